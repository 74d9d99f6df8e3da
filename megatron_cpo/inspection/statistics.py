"""Numbers of a whole store in one pass over its groups, in memory that does not grow with them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import batched, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.endings import Endings, cut_counts, ending_length
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import Group, GroupReader

BINS = 1024
"""Most bins of a histogram: its quantiles are exact to within range / 512."""
CHUNK = 1024
"""Groups whose values are in memory at a time."""


class Histogram:
    """Counts of finite values in bins of one width, which doubles whenever `BINS` bins are too few.

    Bin i holds [i * width, (i + 1) * width), and every width is `width` times a power of two, so
    the result depends on the values alone and not on their order.

    Args:
        width: of the narrowest bins, a power of two.
    """

    def __init__(self, width: float) -> None:
        self.width = width
        self.first = 0
        """The i of `counts[0]`."""
        self.counts = np.zeros(0, dtype=np.int64)
        self.count = 0
        self.total = 0.0
        self.minimum, self.maximum = np.inf, -np.inf

    def add(self, values: NDArray[Any]) -> None:
        """Count values; those that are not finite are left out."""
        values = np.asarray(values, dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self.count += len(values)
        self.total += float(values.sum())
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        while self._bin(self.maximum) - self._bin(self.minimum) >= BINS:
            self._double()
        first, last = self._bin(self.minimum), self._bin(self.maximum)
        counts = np.zeros(last - first + 1, dtype=np.int64)
        at = self.first - first
        counts[at : at + len(self.counts)] = self.counts
        bins = np.floor(values / self.width).astype(np.int64)
        self.first, self.counts = first, counts + np.bincount(bins - first, minlength=len(counts))

    @property
    def mean(self) -> float:
        """Mean of the values; NaN if there are none."""
        return self.total / self.count if self.count else np.nan

    def quantile(self, q: float) -> float:
        """The value that a share q of the values does not exceed, to within a bin; NaN if none."""
        if not self.count:
            return np.nan
        below = np.cumsum(self.counts)
        at = int(np.searchsorted(below, q * self.count))
        inside = (q * self.count - (below[at] - self.counts[at])) / self.counts[at]
        value = (self.first + at + inside) * self.width
        return float(min(max(value, self.minimum), self.maximum))

    def _bin(self, value: float) -> int:
        return int(np.floor(value / self.width))

    def _double(self) -> None:
        bins = (self.first + np.arange(len(self.counts))) // 2
        self.width *= 2
        self.first = self.first // 2
        merged = np.bincount(bins - self.first, weights=self.counts)
        self.counts = merged.astype(np.int64)


def side_by_side(
    histograms: Iterable[Histogram], bars: int, low: float = -np.inf, high: float = np.inf
) -> tuple[float, float, list[NDArray[np.int64]]]:
    """Several histograms over the same bins, at most `bars` of them.

    Args:
        low, high: bins that lie outside are left out.

    Returns:
        The left edge of the first bin, the width of a bin, and the counts of each, [bins].
    """
    copies = [_between(histogram, low, high) for histogram in histograms]
    filled = [c for c in copies if len(c.counts)]
    if not filled:
        return 0.0, 1.0, [np.zeros(1, dtype=np.int64) for _ in copies]
    width = max(c.width for c in filled)
    while True:
        for copy in filled:
            while copy.width < width:
                copy._double()
        first = min(c.first for c in filled)
        bins = max(c.first + len(c.counts) for c in filled) - first
        if bins <= bars:
            break
        width *= 2
    rows = [np.zeros(bins, dtype=np.int64) for _ in copies]
    for row, copy in zip(rows, copies, strict=True):
        row[copy.first - first : copy.first - first + len(copy.counts)] = copy.counts
    return first * width, width, rows


def _between(histogram: Histogram, low: float, high: float) -> Histogram:
    """A copy of the bins of a histogram that overlap [low, high]."""
    copy = Histogram(histogram.width)
    edges = (histogram.first + np.arange(len(histogram.counts))) * histogram.width
    inside = np.flatnonzero((edges + histogram.width > low) & (edges <= high))
    if len(inside):
        copy.first = histogram.first + int(inside[0])
        copy.counts = histogram.counts[inside[0] : inside[-1] + 1]
    return copy


@dataclass
class KindStatistics:
    """Candidates of one kind. Log-probs are in nats under the reference."""

    candidates: int = 0
    unscored: int = 0
    """Candidates whose reference log-prob is not finite: not scored yet."""
    duplicates: int = 0
    """Candidates equal to an earlier one of their group."""
    equal_to_truth: int = 0
    empty: int = 0
    without_eod: int = 0
    cut: int = 0
    """Candidates that a limit ended, and got an end for that: what the build counted."""
    likelier: int = 0
    """Candidates with a higher summed log-prob than y_1."""
    likelier_per_token: int = 0
    """Candidates with a higher log-prob per token than y_1."""
    tokens: Histogram = field(default_factory=lambda: Histogram(1))
    similarity: Histogram = field(default_factory=lambda: Histogram(1 / 64))
    logp: Histogram = field(default_factory=lambda: Histogram(1 / 16))
    logp_per_token: Histogram = field(default_factory=lambda: Histogram(1 / 64))
    """Empty candidates have none."""


@dataclass
class StoreStatistics:
    """What `measure` found."""

    groups: int = 0
    kinds: dict[str, KindStatistics] = field(default_factory=dict)
    """By name, in the order of `KINDS`."""
    prefix_tokens: Histogram = field(default_factory=lambda: Histogram(1))
    tree_tokens: Histogram = field(default_factory=lambda: Histogram(1))
    padded_tokens: int = 0
    """Tokens of K rows a group, each padded to the longest of the group."""
    sequence_tokens: int = 0
    """Tokens of K rows a group without padding."""
    padded_over_tree: Histogram = field(default_factory=lambda: Histogram(1 / 16))
    """Padded tokens of a group over those of its tree."""
    truth_place: Counter[int] = field(default_factory=Counter)
    """Groups by the place of y_1 under the reference, 0 = no candidate is likelier."""
    truth_place_per_token: Counter[int] = field(default_factory=Counter)
    """The same by log-prob per token."""
    duplicates: Counter[int] = field(default_factory=Counter)
    """Groups by how many of their candidates equal an earlier one."""

    @property
    def scored(self) -> bool:
        """Is there a reference log-prob at all?"""
        return any(kind.unscored < kind.candidates for kind in self.kinds.values())


def measure(
    reader: GroupReader,
    endings: Endings,
    progress: Callable[[range], Iterable[int]] = iter,
) -> StoreStatistics:
    """Statistics of every group of a store, read once, in order.

    Args:
        endings: what may end a candidate; none at all counts no candidate as without one.
        progress: wraps the iterable of group numbers, for a progress bar.
    """
    found = StoreStatistics()
    codes: dict[int, KindStatistics] = {}
    sizes, _ = reader.tree_sizes()
    for indices in batched(progress(range(len(reader))), CHUNK):
        groups = [reader[index] for index in indices]
        earlier = [repeats(group) for group in groups]
        found.duplicates.update(sum(e is not None for e in of_group) for of_group in earlier)
        _add_groups(found, groups, sizes[indices[0] : indices[-1] + 1])
        _add_candidates(codes, groups, list(chain.from_iterable(earlier)), endings)
    found.kinds = {kind_name(code): codes[code] for code in sorted(codes)}
    for kind, cut in cut_counts(reader.manifest).items():
        if kind in found.kinds:
            found.kinds[kind].cut = sum(cut.values())
    return found


def kind_name(code: int) -> str:
    """Name of a stored kind; a code that this release does not know is called by its number."""
    return KINDS[code] if 0 <= code < len(KINDS) else f"kind {code}"


def padded_tokens(group: Group) -> int:
    """Tokens of K rows, each padded to the longest of the group."""
    return len(group.candidates) * (len(group.prefix) + max(map(len, group.candidates)))


def repeats(group: Group) -> list[int | None]:
    """[K] the first candidate that each candidate repeats, or None."""
    first: dict[bytes, int] = {}
    return [
        earlier if (earlier := first.setdefault(c.tobytes(), index)) < index else None
        for index, c in enumerate(group.candidates)
    ]


def logps_per_token(group: Group) -> NDArray[np.float32]:
    """[K] reference log-prob per token; NaN for an empty candidate or one without a score."""
    lengths = np.array([len(c) or np.nan for c in group.candidates], dtype=np.float32)
    return group.reference_logps / lengths


def place_of_truth(logps: NDArray[np.float32]) -> int | None:
    """How many candidates have a strictly higher value than y_1; None if y_1 has none.

    Args:
        logps: [K], y_1 first; NaN where there is none.
    """
    return int((logps > logps[0]).sum()) if np.isfinite(logps[0]) else None


def _add_groups(found: StoreStatistics, groups: list[Group], tree_tokens: NDArray[Any]) -> None:
    padded = np.array([padded_tokens(group) for group in groups])
    found.groups += len(groups)
    found.padded_tokens += int(padded.sum())
    found.sequence_tokens += sum(
        len(g.candidates) * len(g.prefix) + sum(map(len, g.candidates)) for g in groups
    )
    found.prefix_tokens.add(np.array([len(group.prefix) for group in groups]))
    found.tree_tokens.add(tree_tokens)
    found.padded_over_tree.add(padded / tree_tokens)
    for group in groups:
        for places, logps in (
            (found.truth_place, group.reference_logps),
            (found.truth_place_per_token, logps_per_token(group)),
        ):
            if (place := place_of_truth(logps)) is not None:
                places[place] += 1


def _add_candidates(
    codes: dict[int, KindStatistics],
    groups: list[Group],
    repeated: list[int | None],
    endings: Endings,
) -> None:
    """Add the candidates of a chunk of groups, kind by kind; `repeated` as `repeats` gives it."""
    kinds = np.concatenate([group.kinds for group in groups])
    lengths = np.array([len(c) for group in groups for c in group.candidates])
    similarity = np.concatenate([group.similarities for group in groups])
    logps = np.concatenate([group.reference_logps for group in groups]).astype(np.float64)
    per_token = np.concatenate([logps_per_token(group) for group in groups])
    earlier = np.array([-1 if r is None else r for r in repeated])
    counts = [len(group.candidates) for group in groups]
    truth = np.repeat(np.cumsum([0, *counts[:-1]]), counts)  # where the group's y_1 is
    candidates = (c for group in groups for c in group.candidates)
    ended = np.array([not endings or ending_length(c, endings) > 0 for c in candidates])
    for code in np.unique(kinds).tolist():
        of = kinds == code
        kind = codes.setdefault(code, KindStatistics())
        kind.candidates += int(of.sum())
        kind.unscored += int((~np.isfinite(logps[of])).sum())
        kind.duplicates += int((earlier[of] >= 0).sum())
        kind.equal_to_truth += int((earlier[of] == 0).sum())
        kind.empty += int((lengths[of] == 0).sum())
        kind.without_eod += int((~ended[of]).sum())
        kind.likelier += int((logps[of] > logps[truth[of]]).sum())
        kind.likelier_per_token += int((per_token[of] > per_token[truth[of]]).sum())
        kind.tokens.add(lengths[of])
        kind.similarity.add(similarity[of])
        kind.logp.add(logps[of])
        kind.logp_per_token.add(per_token[of])
