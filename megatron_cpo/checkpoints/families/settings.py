"""Reading a `config.json`: what Megatron cannot run is refused by name."""

from typing import Any


def refuse_others(config: dict[str, Any], plain: dict[str, Any]) -> None:
    """ValueError for a setting that has another value than the one that converts."""
    for name, value in plain.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(
                f"config.json has {name} {found!r}; only {value!r} converts to Megatron here"
            )


def whole(name: str, value: float, flag: str) -> int:
    """A number as the integer that a flag of Megatron wants."""
    if value != int(value) or value < 1:
        raise ValueError(f"config.json has {name} {value}; Megatron's {flag} takes whole numbers")
    return int(value)
