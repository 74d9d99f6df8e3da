"""What a build says of itself: progress while it runs, a table at the end."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from megatron_cpo.groups.store import KINDS, read_manifest


@dataclass(frozen=True)
class BuildReport:
    """What a store holds and what was left out."""

    manifest: Mapping[str, Any]
    first_dropped: Mapping[str, str] = field(default_factory=dict)
    """Where the first record of each reason was; known to the run that put the store together."""
    retries: Mapping[str, int] = field(default_factory=dict)
    """Requests to a server that this run repeated, by reason."""

    @classmethod
    def read(cls, path_prefix: str, **details: Mapping[str, Any]) -> "BuildReport":
        """The report of a store, with what only this run knows.

        Raises:
            ValueError: it has no readable manifest.
        """
        return cls(read_manifest(path_prefix), **details)

    def __str__(self) -> str:
        m, s = self.manifest, self.manifest["statistics"]
        padded, tree = s["padded_tokens"], m["tree_tokens"]
        rows = [
            ("groups", f"{m['groups']:,} of K = {m['k']}"),
            ("tokens: prefix", f"{s['prefix_tokens']:,}"),
            ("tokens: y_1", f"{s['truth_tokens']:,}"),
            ("tokens: negatives", f"{s['negative_tokens']:,}"),
            ("tokens: token trees", f"{tree:,}"),
            ("tokens: K padded rows", f"{padded:,}, {padded / max(tree, 1):.1f} times the trees"),
            *((f"{'y_1' if kind == 'gt' else 'negatives'}: {kind}", self._kind(kind, n))
              for kind in KINDS if (n := m["kinds"].get(kind))),
            ("negatives: duplicates", f"{s['duplicates']:,}"),
            *((f"dropped: {why}", f"{n:,}{self._first(why)}") for why, n in m["dropped"].items()),
            *((f"asked again: {why}", f"{n:,}") for why, n in self.retries.items()),
        ]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _kind(self, kind: str, count: int) -> str:
        statistics = self.manifest["statistics"]
        parts = [f"{count:,}"]
        if kind != "gt":
            parts.append(f"mean similarity {statistics['mean_similarity'][kind]:.3f}")
        if logps := statistics.get("mean_reference_logp"):
            parts.append(f"mean reference log-prob {logps[kind]:.1f} nats")
        return ", ".join(parts)

    def _first(self, reason: str) -> str:
        return f", first {self.first_dropped[reason]}" if reason in self.first_dropped else ""


def progress(items: Any, what: str, unit: str, total: int | None = None) -> Any:
    """A progress bar on the first rank's terminal, with rate and time left; none in a log file."""
    hidden = None if os.environ.get("RANK", "0") == "0" else True
    return tqdm(items, desc=what, unit=f" {unit}", total=total, disable=hidden, dynamic_ncols=True)
