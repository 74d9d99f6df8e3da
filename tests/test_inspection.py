"""Looking at stores: numbers against slow twins, spans against tokens, texts that would do harm."""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from stores import VOCAB_SIZE, GroupWriter, null_tokenizer, random_group, write_store
from texts import dolly_tokenizer

from megatron_cpo.groups.store import KINDS, Group, GroupReader
from megatron_cpo.groups.tokenizing import Encoder, tokenizer_identity
from megatron_cpo.negatives.inspection import statistics
from megatron_cpo.negatives.inspection.facts import describe_store
from megatron_cpo.negatives.inspection.page import LONGEST_RUN, render_page
from megatron_cpo.negatives.inspection.show import print_store, write_page
from megatron_cpo.negatives.inspection.statistics import (
    BINS,
    Histogram,
    kind_name,
    measure,
    side_by_side,
)
from megatron_cpo.negatives.inspection.text import TokenText, visible
from megatron_cpo.negatives.inspection.tokenizer import add_tokenizer_arguments, store_tokenizer
from megatron_cpo.negatives.inspection.view import (
    CHANGED,
    CUT,
    EOD,
    GAP,
    OWN,
    SAME,
    view_group,
)
from megatron_cpo.tree import build_tree

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt; \"quoted\" 'single' "
    "<!-- [bold red]markup[/] \x1b[31mred\x1b]0;title\x07 a\u202eb \tc  d\r\n\0 "
    "שלום عربي 🙂👩‍👩‍👧 漢字"
)


def ints(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def group_of(prefix: list[int], *candidates: list[int], kinds: str = "gt bn bn bn bn") -> Group:
    """An unscored group; candidate k has similarity 1 / (k + 1) and rank k."""
    k = len(candidates)
    return Group(
        prefix=ints(*prefix),
        candidates=[ints(*c) for c in candidates],
        kinds=np.array([KINDS.index(kind) for kind in kinds.split()[:k]]),
        similarities=(1 / np.arange(1, k + 1)).astype(np.float32),
        ranks=np.arange(k),
        reference_logps=np.full(k, np.nan, dtype=np.float32),
    )


def write_groups(path: Path, groups: list[Group], tokenizer=None) -> str:
    tokenizer = tokenizer or null_tokenizer()
    manifest = {"tokenizer": tokenizer_identity(tokenizer)}
    writer = GroupWriter(str(path), manifest, tokenizer.vocab_size)
    for group in groups:
        writer.add(group)
    writer.close()
    return str(path)


def flags(*given: object) -> argparse.Namespace:
    parser = add_tokenizer_arguments(argparse.ArgumentParser())
    return parser.parse_args([str(flag) for flag in given])


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


def odd_groups() -> list[Group]:
    """Empty candidates, K = 1, no EOD, repeats, NaN, and random ones of every sort."""
    rng = np.random.default_rng(3)
    eod = VOCAB_SIZE
    groups = [random_group(rng, int(rng.integers(1, 13))) for _ in range(60)]
    groups += [replace(g, reference_logps=g.reference_logps * np.nan) for g in groups[:7]]
    noise = [rng.normal(0, 20, len(g.candidates)).astype(np.float32) for g in groups]
    groups = [
        replace(g, reference_logps=g.reference_logps + n)
        for g, n in zip(groups, noise, strict=True)
    ]
    groups.append(group_of([1], [2, eod]))
    groups.append(group_of([1], [2, eod], [], [2, eod], [2], [], kinds="gt an mn given tn"))
    return groups


def test_statistics_against_a_slow_twin(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 16)
    groups = odd_groups()
    reader = GroupReader(write_groups(tmp_path / "odd", groups))
    seen: list[int] = []
    found = measure(reader, VOCAB_SIZE, lambda r: (seen.append(i) or i for i in r))
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
        measure(Repeating(groups), VOCAB_SIZE)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(64)
    assert peak(64 * 16) - peak(64 * 2) < 100_000


def test_spans_rebuild_the_candidate_and_y_1():
    """Whatever the kind: a candidate's tokens, y_1's where they are compared, and the sharing."""
    marks = Counter()
    for index, group in enumerate(odd_groups()):
        view = view_group(index, group, VOCAB_SIZE)
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
    view = view_group(0, group, 0)

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


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\nb", "a↵\nb"),
        ("a\tb\rc", "a⇥\tb␍c"),
        ("\x1b[31m\x00\x7f", "␛[31m␀␡"),
        ("a\u202eb\u200b\ufeff", "a⟨U+202E⟩b⟨U+200B⟩⟨U+FEFF⟩"),
        ("a\xa0b", "a⍽b"),
        ("👩‍👧 é שלום", "👩‍👧 é שלום"),
        ("\udce2\udc82", "⟨E2⟩⟨82⟩"),
    ],
)
def test_what_is_hidden_shows(raw, shown):
    assert visible(raw) == shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inspection")


@pytest.fixture(scope="module")
def sentencepiece(folder):
    return dolly_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(folder):
    """A byte-level BPE of 400 tokens in a Hugging Face folder, as `--tokenizer-model` names it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    lines = (ROOT / "examples" / "data" / "dolly-400.jsonl").read_text().splitlines()[:50]
    bpe.train_from_iterator(lines, vocab_size=400, special_tokens=["<|end of text|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end of text|>")
    fast.save_pretrained(str(folder / "bpe"))
    args = flags("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder / "bpe")
    return store_tokenizer({}, args)


@pytest.fixture(scope="module")
def tiktoken(folder):
    """The 256 bytes and two words, behind 1000 special tokens, as Megatron wants it."""
    tokens = [*(bytes([i]) for i in range(256)), b" two", b" \xe6\xbc"]
    model = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": ""}
        for i, t in enumerate(tokens)
    ]
    (folder / "tiktoken.json").write_text(json.dumps(model))
    given = ["--tokenizer-type", "TikTokenizer", "--vocab-size", 1000 + len(tokens)]
    return store_tokenizer({}, flags(*given, "--tokenizer-model", folder / "tiktoken.json"))


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "tiktoken"])
def test_cells_spell_the_text(name, request):
    """Characters that several tokens spell are whole; cut in the middle they are bytes."""
    tokenizer = request.getfixturevalue(name)
    text = TokenText(tokenizer)
    words = "A naïve café,\n\n  two spaces 漢字 🙂 <s> ▁ Ġ <0x0A> שלום"
    ids = Encoder(tokenizer).prefix(words)
    shown = text.text(ids)
    if name == "sentencepiece":  # the model itself puts a space before, and ▁ is its space
        assert shown == " " + visible(words.replace("▁", " "))
    else:
        assert shown == visible(words)
    smile = Encoder(tokenizer).continuation("🙂")
    assert len(smile) > 3
    assert text.cells(smile[:-1])[-1].endswith("⟨F0⟩⟨9F⟩⟨99⟩")
    assert text.cells(smile)[-1].endswith("🙂")
    assert text.text(smile[-1:]) == "⟨82⟩"
    assert text.cells([10**6]) == ["⟨#1000000⟩"]
    assert text.cells([*smile[:-1], 10**6]) == [*text.cells(smile[:-1]), "⟨#1000000⟩"]


def test_token_ids_where_there_is_no_text():
    for tokenizer in (None, null_tokenizer()):
        text = TokenText(tokenizer)
        assert not text.has_text
        assert text.text([3, 1, 4]) == "3 1 4"


@pytest.fixture(scope="module")
def hostile(folder, sentencepiece):
    """A store whose every text is hostile: y_1, an edit, a cut, another text; and a long prefix."""
    encoder = Encoder(sentencepiece)
    prefix = encoder.prefix(HOSTILE)
    truth = [*encoder.continuation(HOSTILE * 2), encoder.eod]
    edit = [*truth[:5], *encoder.continuation("<b>")[-2:], *truth[7:]]
    other = [*encoder.continuation("<i>unrelated"), encoder.eod]
    group = group_of(
        prefix, truth, edit, [*truth[:9], encoder.eod], other, [], kinds="gt mn tn bn an"
    )
    scored = replace(group, reference_logps=np.array([-9, -5, -3, -20, np.nan], dtype=np.float32))
    long = replace(group, prefix=np.resize(group.prefix, 10_000))
    store = write_groups(folder / "a<b>&'c", [scored, long, group], sentencepiece)
    return store, flags("--tokenizer-model", folder / "tokenizer.model")


class Page(HTMLParser):
    """The elements of a page, its text outside of scripts, and what its scripts hold."""

    VOID = ("meta", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.pieces, self.scripts, self.styles = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kinds = {"script": self.scripts, "style": self.styles}
        if self.open and self.open[-1] in kinds:
            kinds[self.open[-1]].append(data)
        else:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def test_page_holds_hostile_records_as_text(hostile, tmp_path):
    store, args = hostile
    html = tmp_path / "new" / "report.html"
    said = write_page(store, str(html), 100, [], args)
    assert said.startswith(f"{html}: 3 of 3 groups, ")
    raw = html.read_text(encoding="utf-8")
    page = Page(raw)
    assert page.tags["script"] == 2, "our data and our script, none of a record"
    assert "img" not in page.tags
    assert not set("\x1b\u202e\0") & set(raw)
    assert page.tags["title"] == 1
    assert "a<b>&'c" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    urls = [v for name, v in page.attributes if name in ("href", "src")]
    assert all(url.startswith("#") for url in urls), "nothing is fetched"

    data = json.loads(page.scripts[0])
    first, long, unscored = data["groups"]
    shown = " " + visible(HOSTILE.replace("▁", " "))
    assert "".join(first["prefix"]) == shown
    truth = first["candidates"][0]
    assert [s["mark"] for s in truth["spans"]] == ["same", "cut", "same", "eod"]
    assert truth["spans"][1]["by"] == [2]
    edit = first["candidates"][1]
    assert {"same", "changed", "eod"} == {s["mark"] for s in edit["spans"]}
    assert first["candidates"][4]["tokens"] == 0
    assert first["candidates"][4]["logp"] is None
    assert first["place"] == 2
    assert unscored["place"] is None
    assert unscored["candidates"][0]["logp"] is None
    left_out = [cell for cell in long["prefix"] if isinstance(cell, int)]
    assert left_out == [10_000 - LONGEST_RUN]


MARKUP = ("</script><script>alert(1)</script>", "<!--", "]]>", "<img src=x onerror=alert(1)>",
          "&lt;", "\u2028", "</style>")  # fmt: skip


def test_tokens_that_are_markup(tmp_path):
    """As a vocabulary trained on web pages may have them; and a manifest that somebody wrote."""
    text = TokenText(SimpleNamespace(inv_vocab=dict(enumerate(MARKUP))))
    group = group_of([0, 1, 2, 3, 4, 5, 6], [0, 7], [3, 7])
    found = measure(GroupReader(write_groups(tmp_path / "s", [group])), 7)
    manifest = {"groups": 1, "k": 2, "ranker": "<script>", "dropped": {"<img src=y>": 1}}
    raw = render_page("<img src=z>", manifest, found, [view_group(0, group, 7)], text)
    page = Page(raw)
    assert page.tags["script"] == 2
    assert "img" not in page.tags
    for markup in ("alert(1)</script>", "<!--", "<img", "&lt;", "]]>"):
        assert markup not in raw.split('id="data">')[1].split("</script>")[0]
    (group,) = json.loads(page.scripts[0])["groups"]
    assert group["prefix"] == [*MARKUP[:5], "⟨U+2028⟩", MARKUP[6]]
    assert {"<img src=z>", "<script>", "1 <img src=y>"} <= set(page.pieces)


def test_page_allows_only_its_own_script(hostile, tmp_path):
    store, args = hostile
    write_page(store, str(tmp_path / "x.html"), 1, [], args)
    raw = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(raw)
    (content,) = [v for name, v in page.attributes if name == "content" and "default-src" in v]
    policy = dict(rule.split(" ", 1) for rule in content.split("; "))
    assert policy["default-src"] == "'none'"
    for rule, content in (("script-src", page.scripts[1]), ("style-src", page.styles[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert " style=" not in raw.split("<script")[0], "the policy forbids them"


def test_script_finds_what_it_asks_for(hostile, tmp_path):
    """Every element that the script looks up by id, and every choice of a menu, is there."""
    store, args = hostile
    write_page(store, str(tmp_path / "x.html"), 1, [], args)
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    script = page.scripts[1]
    ids = {value for name, value in page.attributes if name == "id"}
    asked = set(re.findall(r'(?:\$|getElementById)\("(\w+)"\)', script))
    assert len(asked) >= 8
    assert asked <= ids
    for name, used in (("WHICH", 4), ("SORT", 5)):
        table = script.split(f"const {name} = {{")[1].split("};")[0]
        keys = re.findall(r"^  (\w+):", table, re.MULTILINE)
        assert len(keys) == used
        assert set(keys) <= {value for name, value in page.attributes if name == "value"}


def test_page_of_a_large_store_is_a_sample(tmp_path):
    store = write_store(tmp_path / "s", 50, 5, scored=True)
    html = tmp_path / "s.html"
    assert " 5 of 50 groups" in write_page(store, str(html), 5, [7, 3], flags())
    groups = json.loads(Page(html.read_text(encoding="utf-8")).scripts[0])["groups"]
    assert [group["index"] for group in groups] == [7, 3, 0, 12, 24]
    text = Page(html.read_text(encoding="utf-8")).text
    assert "5 of 50 groups are in this page" in text
    assert "Token ids are shown" in text
    assert text.count("Reference log-prob") == 2
    first = html.read_bytes()
    write_page(store, str(html), 5, [7, 3], flags())
    assert html.read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["s.html", *(f"s{s}" for s in (".bin", ".idx", ".values.bin", ".values.idx", ".json"))]
    )


def test_page_of_an_unscored_store_and_of_single_candidates(tmp_path):
    store = write_groups(tmp_path / "one", [group_of([1, 2], [3, VOCAB_SIZE])] * 3)
    write_page(store, str(tmp_path / "one.html"), 100, [], flags())
    page = Page((tmp_path / "one.html").read_text(encoding="utf-8"))
    assert "No reference log-probs yet" in page.text
    assert "Reference log-prob" not in page.text.replace("No reference", "")
    assert "all 3 groups" in page.text


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


def recorded(store, groups, args, **options):
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False, **options)
    print_store(store, groups, args, console)
    return console


def test_terminal_shows_hostile_records_as_text(hostile):
    store, args = hostile
    options = {"force_terminal": True, "color_system": "standard"}
    plain = recorded(store, [], args, **options).export_text()
    assert "groups      3 of K = 5" in plain
    assert "[bold red]markup[/]" in plain.replace("\n", "")
    assert "␛[31mred" in plain.replace("\n", "")
    assert "⟨U+202E⟩" in plain
    assert "\x1b" not in plain
    assert "no, 0" not in plain
    assert "(empty)" in plain
    assert "✂2" in plain
    styled = recorded(store, [1], args, **options).export_text(styles=True)
    escapes = {part.split("m")[0] for part in styled.split("\x1b[")[1:]}
    assert {"2", "1;37;45"} <= escapes, "shared is dim, changed is marked"
    assert "… 9,600 tokens …" in styled.replace("\n", " ")


def test_terminal_without_colours_marks_changes_in_brackets(tmp_path):
    group = group_of([50], [1, 2, 3, 4, VOCAB_SIZE], [1, 2, 30, 4, VOCAB_SIZE], kinds="gt mn")
    store = write_groups(tmp_path / "s", [group])
    plain = recorded(store, [], flags(), color_system=None).export_text()
    assert "1 2 ⟦30⟧ 4 ∎" in plain
    assert "mn   rank 1  similarity 0.500  not scored  5 tokens, 2 of them shared" in plain
    assert "K rows a group, padded      12  1.7 times the trees" in plain
    assert "token trees" in plain
    assert "No reference log-probs yet" in plain
    assert "Token ids are shown" in plain


def test_kinds_of_later_releases(tmp_path):
    """Codes are looked up in KINDS; one beyond it is shown by its number, everywhere."""
    group = group_of([50], [1, 2, VOCAB_SIZE], [1, 3, VOCAB_SIZE], kinds="gt mn")
    reader = GroupReader(write_groups(tmp_path / "s", [group]))
    later = replace(group, kinds=np.array([0, len(KINDS) + 1]))

    class Later:
        tree_sizes = reader.tree_sizes

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return later

    name = f"kind {len(KINDS) + 1}"
    assert list(measure(Later(), VOCAB_SIZE).kinds) == ["gt", name]
    assert view_group(0, later, VOCAB_SIZE).candidates[1].kind == name
    assert kind_name(1) == "an"


def test_flags_are_megatrons():
    """Same names, same destinations, same defaults; and every one that the builder reads."""
    from megatron.training.arguments import add_megatron_arguments

    theirs = {
        option: action
        for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions
        for option in action.option_strings
    }
    ours = [
        a for a in add_tokenizer_arguments(argparse.ArgumentParser())._actions if a.dest != "help"
    ]
    assert len(ours) > 10
    for action in ours:
        (option,) = action.option_strings
        assert (action.dest, action.default) == (theirs[option].dest, theirs[option].default)


def test_tokenizer_type_comes_from_the_store(folder, sentencepiece, byte_level):
    for tokenizer, model in ((sentencepiece, "tokenizer.model"), (byte_level, "bpe")):
        manifest = {"tokenizer": tokenizer_identity(tokenizer)}
        built = store_tokenizer(manifest, flags("--tokenizer-model", folder / model))
        assert tokenizer_identity(built) == manifest["tokenizer"]
    assert store_tokenizer(manifest, flags()) is None


def test_tokenizers_that_do_not_fit(folder, sentencepiece, byte_level, tmp_path):
    manifest = {"tokenizer": tokenizer_identity(sentencepiece)}
    args = flags("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder / "bpe")
    with pytest.raises(ValueError, match=r'bpe: another .* is .*"vocab_size": 1000.* not .* 400'):
        store_tokenizer(manifest, args)
    with pytest.raises(ValueError, match=r"SentencePieceTokenizer .*none: it cannot be read"):
        store_tokenizer(manifest, flags("--tokenizer-model", tmp_path / "none"))
    with pytest.raises(ValueError, match=r"library Strange, whose .* give its --tokenizer-type"):
        store_tokenizer({"tokenizer": {"library": "Strange"}}, flags("--tokenizer-model", "x"))


def run_tool(*given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "tools/inspect_negatives.py"),
         *map(str, given)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_help_and_refusals_do_not_wait_for_megatron(hostile, tmp_path):
    store, _ = hostile
    for given, code, match in [
        (["--help"], 0, "one self-contained page"),
        ([tmp_path / "nowhere"], 1, "nowhere.json: no manifest there"),
        ([store, "--group", 3], 1, "--group 3: "),
        ([store, "--group", 3], 1, "has groups 0 to 2"),
        ([store, "--html", tmp_path / "x.html", "--html-groups", 0], 1, "0: needs at least 1"),
    ]:
        done = run_tool(*given)
        assert done.returncode == code
        assert match in done.stdout + done.stderr
        assert "megatron.core" not in done.stderr
        assert " torch\n" not in done.stderr
        assert "Traceback" not in done.stderr


def test_tool(hostile, folder, tmp_path, monkeypatch, capsys):
    """Prints groups, of Megatron's training imports nothing; and writes the page."""
    store, _ = hostile
    tokenizer = ["--tokenizer-model", str(folder / "tokenizer.model")]
    done = run_tool(store, "--group", 2, 0, *tokenizer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("group 2") < done.stdout.index("group 0")
    assert "megatron.training" not in done.stderr
    assert "not installed" not in done.stderr, "Megatron's remarks on optional packages"

    def here(html):
        tool = str(ROOT / "tools" / "inspect_negatives.py")
        monkeypatch.setattr(sys, "argv", [tool, store, "--html", str(html), *tokenizer])
        runpy.run_path(tool, run_name="__main__")

    html = tmp_path / "report.html"
    here(html)
    assert capsys.readouterr().out.startswith(f"{html}: 3 of 3 groups")
    with pytest.raises(SystemExit, match=r"^inspect_negatives\.py: .*report\.html"):
        here(html / "below a file")
