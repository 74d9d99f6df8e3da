"""What a build says of itself: progress while it runs, a table at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_cpo.groups.endings import cut_counts
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import read_manifest
from megatron_cpo.policies.writer import LIMIT_FLAG


@dataclass(frozen=True)
class BuildReport:
    """What a store holds and what was left out."""

    manifest: Mapping[str, Any]
    first_dropped: Mapping[str, str] = field(default_factory=dict)
    """Where the first record of each reason was; known to the run that put the store together."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the whole build counted of a server's answers, by line; known to the same run."""

    @classmethod
    def read(cls, path_prefix: str, **details: Mapping[str, Any]) -> "BuildReport":
        """The report of a store, with what only this run knows.

        Raises:
            ValueError: it has no readable manifest.
        """
        return cls(read_manifest(path_prefix), **details)

    def __str__(self) -> str:
        m, duplicates = self.manifest, self._statistics.get("duplicates")
        lengths = self._statistics.get("candidate_tokens", {})
        rows = [
            ("groups", f"{m['groups']:,} of K = {m['k']}"),
            *self._tokens(),
            *((f"{'y_1' if kind == 'gt' else 'negatives'}: {kind}", self._kind(kind, n))
              for kind in KINDS if (n := m["kinds"].get(kind))),
            *self._endings(),
            *([("negatives: duplicates", f"{duplicates:,}")] if duplicates is not None else []),
            *((f"length: {kind}", _length(lengths[kind])) for kind in KINDS if kind in lengths),
            *((f"end: {kind}", text) for kind in KINDS if (text := self._end(kind))),
            *((f"dropped: {why}", f"{n:,}{self._first(why)}")
              for why, n in m.get("dropped", {}).items()),
            *((f"noted: {what}", f"{n:,}{self._first(what)}")
              for what, n in m.get("notes", {}).items()),
            *((what, f"{n:,}") for what, n in self.counts.items()),
        ]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join([*lines, *self._warnings()])

    @property
    def _statistics(self) -> Mapping[str, Any]:
        """Not all of it is there in stores of other tools and earlier versions."""
        return dict(self.manifest.get("statistics", {}))

    def _tokens(self) -> list[tuple[str, str]]:
        tree = self.manifest["tree_tokens"]
        kinds = ("prefix", "truth", "negative", "padded")
        found = {kind: self._statistics.get(f"{kind}_tokens") for kind in kinds}
        rows = [
            ("tokens: prefix", found["prefix"]),
            ("tokens: y_1", found["truth"]),
            ("tokens: negatives", found["negative"]),
            ("tokens: token trees", tree),
        ]
        lines = [(name, f"{n:,}") for name, n in rows if n is not None]
        if padded := found["padded"]:
            times = f"{padded / max(tree, 1):.1f} times the trees"
            lines.append(("tokens: K padded rows", f"{padded:,}, {times}"))
        return lines

    def _kind(self, kind: str, count: int) -> str:
        parts = [f"{count:,}"]
        similarity = self._statistics.get("mean_similarity", {})
        if kind != "gt" and kind in similarity:
            parts.append(f"mean similarity {similarity[kind]:.3f}")
        if logps := self._statistics.get("mean_reference_logp"):
            parts.append(f"mean reference log-prob {logps[kind]:.1f} nats")
        return ", ".join(parts)

    def _cut(self, kind: str) -> dict[str, float]:
        """Share of a kind that was cut, by the flag whose limit it reached."""
        cut = cut_counts(self.manifest).get(kind, {})
        return {flag: n / self.manifest["kinds"][kind] for flag, n in cut.items()}

    def _end(self, kind: str) -> str:
        """How a kind ends; nothing where all candidates end by themselves."""
        ended = self._statistics.get("ended_share", {}).get(kind, 1.0)
        cut = [f"{share:.1%} cut at {flag}" for flag, share in self._cut(kind).items()]
        return "" if ended == 1 else ", ".join([f"{ended:.1%} by themselves", *cut])

    def _warnings(self) -> list[str]:
        """Of kinds of which more than half were cut."""
        sampling = self.manifest.get("sampling") or {}
        limits = {
            "--max-new-tokens": sampling.get("max_new_tokens"),
            "--max-length": self.manifest.get("max_length"),
            LIMIT_FLAG: (self.manifest.get("writer") or {}).get("max_tokens"),
        }
        found = []
        for kind in self.manifest["kinds"]:
            cut = self._cut(kind)
            if (share := sum(cut.values())) > 0.5:
                flag = max(cut, key=lambda name: cut[name])
                policy = f", or a policy that says EOD ({self.manifest.get('eod')})"
                found.append(
                    f"warning: {share:.0%} of {kind} were cut, with an end put where they have "
                    f"none, so that training mostly teaches when to end; give {flag} more than "
                    f"{limits[flag]}{policy if kind == 'an' else ''}"
                )
        return found

    def _endings(self) -> list[tuple[str, str]]:
        """How y_1 end; of stores that say so."""
        found = [f"{e['text']!r} {e['records']:,}" for e in self.manifest.get("endings", [])]
        return [("y_1 ends in", ", ".join(found))] if found else []

    def _first(self, reason: str) -> str:
        return f", first {self.first_dropped[reason]}" if reason in self.first_dropped else ""


def _length(found: Mapping[str, float]) -> str:
    quantiles = ", ".join(f"{name} {n:,}" for name, n in found.items() if name != "mean")
    return f"mean {found['mean']:,.1f} tokens; {quantiles}"
