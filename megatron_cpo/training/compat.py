"""All knowledge of Megatron versions: which symbols we bind to, by name, and what to say without
them.
"""

import importlib
import inspect
from typing import Any

TESTED = "0.18 and 0.19"
"""Megatron-Core releases the seam is tested with."""

_SYMBOLS = (
    ("megatron.training.training", "pretrain"),
    ("megatron.training.arguments", "parse_and_validate_args"),
    ("megatron.training.arguments", "validate_args"),
    ("megatron.training.training", "training_log"),
)
PRETRAIN_PARAMETERS = ("train_valid_test_dataset_provider", "forward_step_func", "model_provider")
"""Parameters of `pretrain` that are bound by name: their order moved in 0.18 and in 0.19."""


def megatron_version() -> str:
    """The installed Megatron-Core version."""
    version: str = importlib.import_module("megatron.core.package_info").__version__
    return version


def load(module: str, symbol: str) -> Any:
    """A symbol of Megatron.

    Raises:
        ImportError: it is not there; says which version was found and which are tested.
    """
    try:
        return getattr(importlib.import_module(module), symbol)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"megatron_cpo needs {module}.{symbol}, which Megatron-Core {megatron_version()} "
            f"does not have "
            f"(tested with {TESTED}); install megatron-core[training]>=0.18,<0.20 or use a "
            f"checkout of one "
            "of these"
        ) from error


def check_host() -> None:
    """Raise ImportError unless this Megatron has every name we bind to."""
    for module, symbol in _SYMBOLS:
        load(module, symbol)
    parameters = inspect.signature(load("megatron.training.training", "pretrain")).parameters
    forward = load("megatron.core.models.gpt.gpt_model", "GPTModel").forward
    missing = [name for name in PRETRAIN_PARAMETERS if name not in parameters]
    missing += [n for n in ("output_processor",) if n not in inspect.signature(forward).parameters]
    if missing:
        raise ImportError(
            f"megatron_cpo binds to {', '.join(missing)}, which Megatron-Core "
            f"{megatron_version()} does not "
            f"have (tested with {TESTED})"
        )
