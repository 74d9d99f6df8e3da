"""Looking at stores: numbers against slow twins, spans against tokens."""

import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

from harness.stores import VOCAB_SIZE, random_group, write_store
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.inspection import statistics
from megatron_cpo.inspection.facts import describe_store
from megatron_cpo.inspection.plots import kind_table
from megatron_cpo.inspection.statistics import (
    BINS,
    Histogram,
    kind_name,
    measure,
    side_by_side,
)
from megatron_cpo.inspection.view import (
    CHANGED,
    CUT,
    EOD,
    GAP,
    OWN,
    SAME,
    view_group,
)
from megatron_cpo.tree import build_tree
from tests.inspecting import group_of, odd_groups, write_groups

ENDINGS = ((VOCAB_SIZE,),)


@pytest.mark.parametrize("values", ["normal", "wide", "whole", "constant"])
def test_histogram_counts_what_numpy_counts(values):
    rng = np.random.default_rng(0)
    sample = {
        "normal": rng.normal(-100, 40, 5000),
        "wide": np.concatenate([-np.exp(rng.uniform(-5, 12, 3000)), [0.0, 7.5]]),
        "whole": rng.integers(1, 3000, 4000),
        "constant": np.full(10, 1.0),
    }[values].astype(np.float64)
    whole, parts = Histogram(1 / 16), Histogram(1 / 16)
    whole.add(sample)
    for part in np.array_split(rng.permutation(sample), 7):
        parts.add(np.append(part, [np.nan, np.inf, -np.inf]))  # not finite: left out
    assert (parts.first, parts.width) == (whole.first, whole.width)
    assert parts.counts.tolist() == whole.counts.tolist()
    assert len(whole.counts) <= BINS
    edges = (whole.first + np.arange(len(whole.counts) + 1)) * whole.width
    in_bin = [((sample >= a) & (sample < b)).sum() for a, b in pairwise(edges)]
    assert whole.counts.tolist() == in_bin
    assert whole.count == len(sample)
    assert whole.mean == pytest.approx(sample.mean())
    assert (whole.minimum, whole.maximum) == (sample.min(), sample.max())
    for q in (0.0, 0.05, 0.5, 0.95, 1.0):
        exact = np.quantile(sample, q, method="inverted_cdf")
        assert whole.quantile(q) == pytest.approx(exact, abs=whole.width)


def test_what_a_limit_cut_is_shown_as_the_build_counted_it(tmp_path):
    """An end was put there, so the column of missing ends had 0 where two of three were cut."""
    reader = GroupReader(write_store(tmp_path / "groups", 12, 6, kinds=("an", "bn")))
    assert measure(reader, ENDINGS).kinds["an"].cut == 0
    reader.manifest["statistics"] = {"cut": {"an --max-new-tokens": 2, "an --max-length": 1}}
    found = measure(reader, ENDINGS)
    assert {name: kind.cut for name, kind in found.kinds.items() if kind.cut} == {"an": 3}
    of_all = f"{300 / found.kinds['an'].candidates:.1f}%"
    assert f"<td>{of_all}</td></tr>" in kind_table(found)


def test_histograms_side_by_side():
    """0.5 and 3 in one, 900 in another: 1024 / 64 = 16 wide bins; between 0 and 4, bins of 1/16."""
    one, other, none = Histogram(1 / 16), Histogram(1), Histogram(1)
    one.add(np.array([0.5, 3.0]))
    other.add(np.array([900.0]))
    start, width, rows = side_by_side([one, other, none], 64)
    assert (start, width) == (0.0, 16.0)
    assert [np.flatnonzero(row).tolist() for row in rows] == [[0], [56], []]
    assert rows[0].sum() == 2
    start, width, (left, right, _) = side_by_side([one, other, none], 64, low=0, high=4)
    assert (start, width) == (0.5, 1 / 16)
    assert np.flatnonzero(left).tolist() == [0, 40]
    assert right.sum() == 0


def test_statistics_against_a_slow_twin(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 16)
    groups = odd_groups()
    reader = GroupReader(write_groups(tmp_path / "odd", groups))
    seen: list[int] = []
    found = measure(reader, ENDINGS, lambda r: (seen.append(i) or i for i in r))
    assert seen == list(range(len(groups)))

    rows = [
        (
            KINDS[g.kinds[c]], candidate.tolist(), float(g.similarities[c]),
            float(g.reference_logps[c]), g.reference_logps[0], g.candidates[0],
            [e.tolist() for e in g.candidates[:c]],
        )
        for g in groups for c, candidate in enumerate(g.candidates)
    ]  # fmt: skip
    assert list(found.kinds) == [kind for kind in KINDS if kind in {row[0] for row in rows}]
    for name, kind in found.kinds.items():
        mine = [row[1:] for row in rows if row[0] == name]
        assert kind.candidates == len(mine)
        assert kind.unscored == sum(np.isnan(logp) for _, _, logp, *_ in mine)
        assert kind.duplicates == sum(tokens in before for tokens, *_, before in mine)
        assert kind.equal_to_truth == sum(before[:1] == [tokens] for tokens, *_, before in mine)
        assert kind.empty == sum(not tokens for tokens, *_ in mine)
        assert kind.without_eod == sum(tokens[-1:] != [VOCAB_SIZE] for tokens, *_ in mine)
        assert kind.likelier == sum(logp > truth for _, _, logp, truth, *_ in mine)
        per_token = [(lp / len(t), tr / len(y)) for t, _, lp, tr, y, _ in mine if t]
        assert kind.likelier_per_token == sum(np.float32(a) > np.float32(b) for a, b in per_token)
        lengths = [len(tokens) for tokens, *_ in mine]
        assert kind.tokens.mean == pytest.approx(np.mean(lengths))
        assert kind.tokens.counts.sum() == len(mine)
        assert (kind.tokens.minimum, kind.tokens.maximum) == (min(lengths), max(lengths))
        assert kind.similarity.total == pytest.approx(sum(s for _, s, *_ in mine), rel=1e-5)
        scored = [logp for _, _, logp, *_ in mine if np.isfinite(logp)]
        assert kind.logp.count == len(scored)
        assert kind.logp.total == pytest.approx(sum(scored), rel=1e-6)
        finite = [a for a, _ in per_token if np.isfinite(a)]
        assert kind.logp_per_token.total == pytest.approx(sum(finite), rel=1e-5)

    lengths = [(len(g.prefix), [len(c) for c in g.candidates]) for g in groups]
    assert found.groups == len(groups)
    assert found.padded_tokens == sum(len(c) * (p + max(c)) for p, c in lengths)
    assert found.sequence_tokens == sum(p + n for p, c in lengths for n in c)
    trees = [len(build_tree(g.prefix, g.candidates).tokens) for g in groups]
    assert found.tree_tokens.total == sum(trees) == reader.manifest["tree_tokens"]
    ratios = [len(c) * (p + max(c)) / n for (p, c), n in zip(lengths, trees, strict=True)]
    assert found.padded_over_tree.mean == pytest.approx(np.mean(ratios))
    scored = [g.reference_logps for g in groups if np.isfinite(g.reference_logps[0])]
    assert found.truth_place == Counter(sorted(-lp, key=float).index(-lp[0]) for lp in scored)
    assert found.duplicates == Counter(
        len(g.candidates) - len({tuple(c.tolist()) for c in g.candidates}) for g in groups
    )
    assert found.scored


def test_memory_does_not_grow_with_the_store(monkeypatch):
    """Beyond the two int32 a group that the reader hands over."""
    monkeypatch.setattr(statistics, "CHUNK", 64)
    group = random_group(np.random.default_rng(0), 12)

    class Repeating:
        manifest: ClassVar = {}

        def __init__(self, groups):
            self.groups = groups

        def __len__(self):
            return self.groups

        def __getitem__(self, index):
            return group

        def tree_sizes(self):
            return np.full(self.groups, 50, dtype=np.int32), None

    def peak(groups):
        tracemalloc.start()
        measure(Repeating(groups), ENDINGS)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(64)
    assert peak(64 * 16) - peak(64 * 2) < 100_000


def test_spans_rebuild_the_candidate_and_y_1():
    """Whatever the kind: a candidate's tokens, y_1's where they are compared, and the sharing."""
    marks = Counter()
    for index, group in enumerate(odd_groups()):
        view = view_group(index, group, ENDINGS)
        tree = build_tree(group.prefix, group.candidates)
        assert view.tree_tokens == len(tree.tokens)
        truth = group.candidates[0][:-1].tolist()
        paths = [group.candidates[c].tolist() for c in tree.candidate_order]
        cuts = []
        for candidate in view.candidates:
            c = candidate.index
            spans = candidate.spans
            marks.update(span.mark for span in spans)
            tokens = group.candidates[c].tolist()
            assert [t for span in spans for t in span.tokens.tolist()] == tokens
            before = paths[candidate.slot - 1] if candidate.slot else []
            assert paths[candidate.slot] == tokens
            alike = [a == b for a, b in zip(before, tokens, strict=False)]
            assert candidate.branch == [*alike, False].index(False)
            assert sum(len(s.tokens) for s in spans if s.shared) == candidate.branch
            assert [s.mark for s in spans].count(EOD) == (tokens[-1:] == [VOCAB_SIZE])
            if candidate.cut is not None:
                cuts.append((candidate.cut, c))
                assert tokens in (truth[: candidate.cut], [*truth[: candidate.cut], VOCAB_SIZE])
            elif not any(span.mark == OWN for span in spans):
                rebuilt = [
                    t for span in spans if span.mark != EOD
                    for t in (span.tokens if span.truth is None else span.truth).tolist()
                ]  # fmt: skip
                assert rebuilt == truth or not tokens
        marked = [(s.cut_by, s) for s in view.candidates[0].spans if s.mark == CUT]
        assert sorted(c for by, _ in marked for c in by) == sorted(c for _, c in cuts)
    assert {SAME, CHANGED, OWN, EOD, CUT} <= set(marks)


def test_marks_by_hand():
    """y_1 = 1..8; an edit in place, an insertion, a deletion, a cut, another text, a repeat."""
    truth = [1, 2, 3, 4, 5, 6, 7, 8]
    group = group_of(
        [50], [*truth, 0], [1, 2, 3, 30, 5, 60, 70, 8, 0], [1, 2, 3, 4, 40, 5, 6, 7, 8, 0],
        [1, 2, 3, 4, 7, 8, 0], [1, 2, 3, 0], [1, 20, 21, 22, 23, 24, 0], [1, 2, 3, 0],
        kinds="gt mn given given tn bn tn",
    )  # fmt: skip
    view = view_group(0, group, ((0,),))

    def shape(c):
        return [
            (s.mark, s.shared, s.tokens.tolist(), None if s.truth is None else s.truth.tolist())
            for s in view.candidates[c].spans
        ]

    assert [(s.mark, s.tokens.tolist(), s.cut_by) for s in view.candidates[0].spans] == [
        (SAME, [1, 2, 3], ()), (CUT, [], (4, 6)), (SAME, [4, 5, 6, 7, 8], ()), (EOD, [0], ()),
    ]  # fmt: skip
    assert shape(1) == [
        (SAME, True, [1, 2, 3], None), (CHANGED, False, [30], [4]), (SAME, False, [5], None),
        (CHANGED, False, [60, 70], [6, 7]), (SAME, False, [8], None), (EOD, False, [0], None),
    ]  # fmt: skip
    assert shape(2) == [
        (SAME, True, [1, 2, 3, 4], None), (CHANGED, False, [40], []),
        (SAME, False, [5, 6, 7, 8], None), (EOD, False, [0], None),
    ]  # fmt: skip
    assert (GAP, False, [], [5, 6]) in shape(3)
    assert shape(5)[:2] == [(SAME, True, [1], None), (OWN, False, [20, 21, 22, 23, 24], None)]
    assert view.candidates[4].cut == view.candidates[6].cut == 3
    assert view.candidates[6].repeats == 4
    assert all(span.shared for span in view.candidates[6].spans)
    assert view.padded_tokens == 7 * (1 + 10)
    assert view.truth_place is None


def test_kinds_of_later_releases(tmp_path):
    """Codes are looked up in KINDS; one beyond it is shown by its number, everywhere."""
    group = group_of([50], [1, 2, VOCAB_SIZE], [1, 3, VOCAB_SIZE], kinds="gt mn")
    reader = GroupReader(write_groups(tmp_path / "s", [group]))
    later = replace(group, kinds=np.array([0, len(KINDS) + 1]))

    class Later:
        manifest: ClassVar = {}
        tree_sizes = reader.tree_sizes

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return later

    name = f"kind {len(KINDS) + 1}"
    assert list(measure(Later(), ENDINGS).kinds) == ["gt", name]
    assert view_group(0, later, ENDINGS).candidates[1].kind == name
    assert kind_name(1) == "an"


def test_what_the_manifest_says():
    manifest = {
        "groups": 1200, "k": 12, "kinds": {"gt": 1200, "an": 13200}, "source": [{"name": "a\x1bb"}],
        "dropped": {"longer than 9 tokens": 4}, "ranker": "minilm", "seed": 0,
        "tokenizer": {"library": "SentencePieceTokenizer", "vocab_size": 32000},
        "policy": {"backend": "hugging face", "name": "gpt2", "sha256": "0"},
        "reference": {"name": "mle", "iteration": "60", "sha256": "0"},
    }  # fmt: skip
    assert dict(describe_store(manifest)) == {
        "groups": "1,200 of K = 12", "candidates": "1,200 gt, 13,200 an", "records": "a␛b",
        "dropped": "4 longer than 9 tokens", "tokenizer": "SentencePieceTokenizer of 32,000",
        "ranked by": "minilm", "seed": "0", "policy": "gpt2, hugging face",
        "reference": "mle, iteration 60",
    }  # fmt: skip
    least = {"groups": 1, "k": 2}
    expected = {"groups": "1 of K = 2", "reference": "not scored yet"}
    assert dict(describe_store(least)) == expected
