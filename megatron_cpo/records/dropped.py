"""What was left out of the records, and what is to be said of those that were used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_cpo.records.remedies import remedy


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason, in few words, without its place."""


@dataclass
class Dropped:
    """Counts what was left out, by reason, with the place of the first of each."""

    refuse: bool = False
    """Raise at the first bad record instead (`--on-bad-record refuse`)."""
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    """Records that were used, by what is to be said of them; their places are in `first`."""
    names: tuple[str, ...] = ()
    """The fields of the first record, for advice; see `remedies.field_names`."""

    def bad(self, reason: str, source: str) -> None:
        """Count a bad record.

        Raises:
            ValueError: bad records are refused.
        """
        if self.refuse:
            raise ValueError(
                f"{source}: {reason}; correct this record, or pass --on-bad-record skip to leave "
                "such records out and count them"
            )
        self.skip(reason, source)

    def skip(self, reason: str, source: str) -> None:
        """Count a record that is in order but of no use here, such as one that is too long."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, source)

    def note(self, remark: str, source: str) -> None:
        """Count a record that is used, and of which something is to be said."""
        self.notes[remark] = self.notes.get(remark, 0) + 1
        self.first.setdefault(remark, source)

    def content(self) -> dict[str, dict[str, Any]]:
        """All counts, JSON-able; `take` reads them."""
        return {"counts": self.counts, "notes": self.notes, "first": self.first}

    def take(self, content: Mapping[str, Any]) -> None:
        """Go on from the counts of a run that was interrupted."""
        self.counts, self.notes, self.first = (
            content[name] for name in ("counts", "notes", "first")
        )

    def nothing_usable(self, inputs: Sequence[str]) -> ValueError:
        """The error that says so, why, and what to do about it."""
        more = f" and {len(inputs) - 3} more" if len(inputs) > 3 else ""
        return ValueError(
            f"--input {' '.join(inputs[:3])}{more}: no usable record (dropped: {self.describe()}); "
            f"{remedy(self.counts, self.names)}"
        )

    def describe(self) -> str:
        """All reasons in one line, e.g. `2 not JSON (first: a.jsonl:7), 1 empty prefix (...)`."""
        reasons = (f"{n} {why} (first: {self.first[why]})" for why, n in self.counts.items())
        return ", ".join(reasons) or "none"
