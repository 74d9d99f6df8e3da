"""Which fields of the data are meant: the names that we know, or the names that the data has."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_cpo.records.lines import Fields, Unreadable

FAMILIES = (
    ("prompt", "completion", "chosen", "rejected", "tools"),
    ("messages", "chosen", "rejected", "tools"),
    ("instruction", "context", "response", "chosen", "rejected"),
    ("text",),
)
"""Names that one record may have beside each other."""
NAMES = tuple(dict.fromkeys(name for family in FAMILIES for name in family))
"""What `--NAME-field` renames to."""
_OTHER_NAMES = {
    "completion": ("chosen", "chosen_response", "completions"),
    "chosen": ("completion", "chosen_response", "completions"),
    "rejected": ("rejected_response",),
    "messages": ("conversations", "chosen", "chosen_response", "completions"),
    "instruction": ("prompt",),
    "context": ("input",),
    "response": ("output", "chosen"),
}
"""What some data call the same, or have beside it and would be taken instead."""
_SAME = {
    "chosen": "chosen_response",
    "rejected": "rejected_response",
    "messages": "conversations",
    "context": "input",
    "response": "output",
}
"""Those of them that are read as the field itself, also beside fields that are named."""
_OPTIONAL = ("rejected", "context", "tools")
_ANSWERS = ("completion", "chosen", "messages", "response", "text")
"""Names that decide what the shape of a record is."""


@dataclass(frozen=True)
class Columns:
    """The names of the data for the fields that we know.

    Raises:
        ValueError: names of several families, so that no record can be meant.
    """

    names: tuple[tuple[str, str], ...] = ()
    """(ours, the data's); the data's may be dotted: `meta.answers.0`."""

    def __post_init__(self) -> None:
        if self.names and not self._families():
            given = ", ".join(f"--{ours}-field {theirs}" for ours, theirs in self.names)
            sets = "; or ".join(
                " ".join(f"--{name}-field" for name in family) for family in FAMILIES
            )
            raise ValueError(f"{given}: of no one shape of records; give some of {sets}")

    def of(self, fields: Fields) -> Fields | Unreadable:
        """A record with the names that we know; null is no field.

        Names that were given win over those that the record has, and over other shapes.
        """
        if not self.names and None not in fields.values():
            return fields
        present = {name: value for name, value in fields.items() if value is not None}
        renamed = {}
        for ours, theirs in self.names:
            value = _at(fields, theirs)
            if value is not None:
                renamed[ours] = value
            elif ours not in _OPTIONAL:
                return Unreadable(f"no field {theirs!r}, as --{ours}-field says")
        if not self.names:
            return present
        own = {ours for ours, _ in self.names}
        beside = set().union(*self._families())
        taken = _with_other_names(own)
        beside |= {_SAME[name] for name in beside - taken if name in _SAME}
        hidden = _with_other_names(_ANSWERS) - beside | taken
        kept = {name: value for name, value in present.items() if name not in hidden}
        return kept | renamed

    def _families(self) -> list[tuple[str, ...]]:
        """Those that have all names."""
        ours = {name for name, _ in self.names}
        return [family for family in FAMILIES if ours <= set(family)]


def _with_other_names(names: Iterable[str]) -> set[str]:
    return {n for name in names for n in (name, *_OTHER_NAMES.get(name, ()))}


def _at(fields: Any, path: str) -> Any:
    """The value of a field, or of one within objects and lists: `a.b.0`. None: there is none."""
    if isinstance(fields, dict):
        if path in fields:
            return fields[path]
        first, dot, rest = path.partition(".")
        return _at(fields.get(first), rest) if dot else None
    if isinstance(fields, list):
        first, dot, rest = path.partition(".")
        entry = fields[int(first)] if first.isdecimal() and int(first) < len(fields) else None
        return _at(entry, rest) if dot else entry
    return None
