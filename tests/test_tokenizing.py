"""Tokenising: frames, end of document, the 15% split, indexed datasets, tokenizer identity.

The border between prefix and continuation has a module of its own, `test_border.py`.
"""

import gzip
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpo.records import pair_files
from megatron_cpo.records.dropped import BadRecord, Dropped
from megatron_cpo.records.encoder import Encoder, Pair
from megatron_cpo.records.pair_files import write_lm_dataset, write_pairs_resumed
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.source import Source
from megatron_cpo.records.tokenizer_training import train_sentencepiece
from megatron_cpo.records.tokenizing import tokenizer_identity
from tests.stored_records import parquet, save_to_disk
from tests.texts import DOLLY, ToyTokenizer, dolly_tokenizer, write_jsonl, write_pairs

EOD = ToyTokenizer.eod


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def listed(pair):
    return [pair.prefix.tolist(), pair.continuation.tolist(), *(r.tolist() for r in pair.rejected)]


def indexed(path, *documents):
    """Write documents, each a list of sequences, as a Megatron indexed dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for document in documents:
        tokens = np.concatenate([*document, []]).astype(np.int32)
        builder.add_document(torch.from_numpy(tokens), [len(s) for s in document])
    builder.finalize(f"{path}.idx")
    return str(path)


@pytest.mark.parametrize(
    ("head", "tail", "prefix"),
    [
        ((), (), [1, 2]),
        ((7,), (), [7, 1, 2]),  # a BOS before every text, as Llama's
        ((), (EOD,), [1, 2]),  # an EOS behind every text, as T5's
        ((7,), (EOD,), [7, 1, 2]),
        ((EOD,), (), [EOD, 1, 2]),  # BOS and EOS are one token, before every text
    ],
)
def test_continuation_has_no_bos_and_one_eod(head, tail, prefix):
    encoder = Encoder(ToyTokenizer(head, tail))
    pair = encoder.pair("1 2 ", "3 4", "5", "6 99")
    assert listed(pair) == [prefix, [3, 4, EOD], [5, EOD], [6, EOD]]
    assert pair.prefix.dtype == pair.continuation.dtype == np.int32


def test_bos_that_a_chat_template_wrote_is_not_doubled():
    pair = Encoder(ToyTokenizer((7,))).pair("7 1 ", "2", rendered=True)
    assert listed(pair) == [[7, 1], [2, EOD]]


def test_an_end_of_document_within_a_text_is_refused():
    with pytest.raises(BadRecord, match=r"an end of document within the text"):
        Encoder(ToyTokenizer()).pair("1 ", f"2 {EOD} 3")


@pytest.mark.parametrize("texts", [("", "1"), ("1", " "), ("1", "2", "")])
def test_nothing_left_after_tokenising(texts):
    with pytest.raises(BadRecord, match=r"no tokens in the prefix or in a continuation"):
        Encoder(ToyTokenizer()).pair(*texts)


@pytest.mark.parametrize("eod", [None, -1])
def test_tokenizer_without_eod(eod):
    tokenizer = ToyTokenizer()
    tokenizer.eod = eod
    with pytest.raises(ValueError, match=r"ToyTokenizer has no end-of-document token .eod is"):
        Encoder(tokenizer)


@pytest.mark.parametrize(
    ("n", "fraction", "cut"), [(20, 0.15, 3), (100, 0.29, 29), (2, 0.15, 1), (3, 0.99, 2)]
)
def test_split(n, fraction, cut):
    """x has round(fraction * n) tokens, at least 1, at most n - 1; EOD is not counted."""
    encoder = Encoder(ToyTokenizer())
    text = list(range(n)) if n < EOD else [5] * n
    for end in ([EOD], [EOD, EOD]):
        pair = encoder.split([*text, *end], fraction)
        assert listed(pair) == [text[:cut], [*text[cut:], EOD]]
    assert listed(encoder.split(text, fraction)) == [text[:cut], text[cut:]]
    with pytest.raises(BadRecord, match=r"fewer than 2 tokens"):
        encoder.split([4, EOD], fraction)


def test_too_long_records_are_counted(tmp_path):
    """--max-length counts the prefix, the candidate and its EOD."""
    records = [
        {"prompt": "1 2 ", "completion": "3 4"},  # 5 tokens
        {"prompt": "1 2 ", "completion": "3 4 5"},
        {"prompt": "1 2 ", "completion": "3", "rejected": "3 4 5"},
        {"text": "1 2 3 4"},
    ]
    source = Source((write_jsonl(tmp_path / "r.jsonl", *records),), max_length=5)
    dropped = Dropped()
    pairs = list(read_pairs(source, ToyTokenizer(), dropped))
    assert [listed(p) for p in pairs] == [
        [[1, 2], [3, 4, EOD]],
        [[1, 2], [3, EOD]],  # its rejected answer is not asked for
        [[1], [2, 3, 4, EOD]],
    ]
    assert dropped.counts == {"longer than 5 tokens": 1}
    dropped = Dropped()
    match = r"no usable record .dropped: 3 fewer than 1 rejected.*; give each record its rejected"
    with pytest.raises(ValueError, match=match):
        list(read_pairs(source, ToyTokenizer(), dropped, rejected=1))
    assert dropped.counts == {
        "fewer than 1 rejected continuations": 3,
        "longer than 5 tokens": 1,
    }
    short = Source((write_jsonl(tmp_path / "s.jsonl", *records[:2]),), max_length=3)
    with pytest.raises(ValueError, match=r"2 longer than 3 tokens.*; raise --max-length, or give"):
        list(read_pairs(short, ToyTokenizer(), Dropped()))


def test_documents_are_cut_and_only_their_end_has_eod(tmp_path):
    """13 tokens in pieces of 5: the text goes on at a cut, so no EOD stands there."""
    text = list(range(1, 14))
    path = indexed(
        tmp_path / "d", [text[:6], text[6:]], [[*text[:4], EOD]], [[8, 9, EOD, EOD]], [[EOD]]
    )
    source, dropped = Source((path,), prefix_fraction=0.2, max_length=5), Dropped()
    pairs = list(read_pairs(source, ToyTokenizer(), dropped))
    assert [listed(p) for p in pairs] == [
        [[1], [2, 3, 4, 5]],
        [[6], [7, 8, 9, 10]],
        [[11], [12, 13, EOD]],
        [[1], [2, 3, 4, EOD]],
        [[8], [9, EOD]],
    ]
    assert dropped.counts == {"fewer than 2 tokens to split": 1}
    assert dropped.first == {"fewer than 2 tokens to split": f"{path}:document 3"}
    whole = Source((path + ".bin",), prefix_fraction=0.2)  # a suffix is fine; no limit, no cut
    assert len(next(read_pairs(whole, ToyTokenizer(), Dropped())).continuation) == 11


@pytest.mark.parametrize(
    ("documents", "places"),
    [
        ([[], [[1, 2, 3]], [[4, 5]]], [0]),
        ([[[1, 2, 3]], [], [[4, 5]]], [1]),
        ([[[1, 2, 3]], [[4, 5]], []], [2]),
        ([[], [], [[1, 2, 3]], [], [[4, 5]], [], []], [0, 1, 3, 5, 6]),
        ([[[]], [[1, 2, 3]], [[], []], [[4, 5]], [[]]], [0, 2, 4]),  # of empty sequences
        ([[[], [1, 2, 3]], [[4], [], [5], []]], []),
        ([[[EOD]], [[1, 2, 3]], [[4, 5, EOD]], [[EOD, EOD]], [[7]]], [0, 3, 4]),
    ],
)
def test_empty_documents_are_counted_wherever_they_lie(tmp_path, documents, places):
    path, dropped = indexed(tmp_path / "d", *documents), Dropped()
    source, told = Source((path,), prefix_fraction=0.2), []

    def advance(units, read):
        told.append((units, read))

    pairs = list(read_pairs(source, ToyTokenizer(), dropped, advance=advance))
    assert [listed(pair) for pair in pairs] == [[[1], [2, 3, EOD]], [[4], [5, EOD]]]
    assert dropped.counts == ({"fewer than 2 tokens to split": len(places)} if places else {})
    assert [int(place.rpartition(" ")[2]) for place in dropped.first.values()] == places[:1]
    assert [units for units, _ in told] == [1] * len(documents)
    assert sum(read for _, read in told) == source.stored_bytes()


@pytest.mark.parametrize("documents", [[[]], [[], []], [[[]], [[EOD]]], [[[], []]]])
def test_a_dataset_of_nothing(tmp_path, documents):
    path = indexed(tmp_path / "d", *documents)
    match = rf"dropped: {len(documents)} fewer than 2 tokens to split .*; give texts of at least"
    with pytest.raises(ValueError, match=match):
        list(read_pairs(Source((path,)), ToyTokenizer(), Dropped()))


def test_a_dataset_that_is_damaged(tmp_path):
    path = indexed(tmp_path / "d", [[1, 2, 3]], [[4, 5]])
    index, data = (Path(path + suffix).read_bytes() for suffix in (".idx", ".bin"))
    for suffix, content, match in (
        (".bin", data[:-2], r"d\.bin has 8 bytes, its index says 10: it is cut off; copy"),
        (".idx", index[:-9], r"d\.idx is not the whole index of a Megatron indexed dataset"),
        (".idx", b"TNTIDX" + index[6:], r"not the whole index .*bad header"),
    ):
        Path(path + ".bin").write_bytes(data)
        Path(path + ".idx").write_bytes(index)
        Path(path + suffix).write_bytes(content)
        with pytest.raises(ValueError, match=match):
            list(read_pairs(Source((path,)), ToyTokenizer(), Dropped()))


def test_a_progress_bar_is_told_of_every_byte(tmp_path):
    """Of plain and packed files as they lie on disk, with bad and blank lines, and of datasets."""
    first = write_jsonl(tmp_path / "r.jsonl", *[{"text": "1 2 3"}] * 5000)
    last = tmp_path / "last.jsonl"
    last.write_bytes(b'\n{"text": "1 2 3"}\nbad')
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(first).read_bytes()) + b"\0" * 1000)
    dataset = indexed(tmp_path / "d", [[1, 2, 3], [4, EOD]], [[8, 9, EOD]])
    for inputs in [(first, str(last), str(packed)), (dataset,)]:
        source, told = Source(inputs), []

        def advance(lines, read, told=told):
            told.append(read)

        for _ in read_pairs(source, ToyTokenizer(), Dropped(), advance=advance):
            assert sum(told) <= source.stored_bytes()
        assert sum(told) == source.stored_bytes() == sum(map(size_of, inputs))
        assert min(told) >= 0


@pytest.mark.parametrize("kind", ["texts", "packed", "array", "tables", "datasets"])
def test_interrupted_anywhere_and_resumed(tmp_path, monkeypatch, kind):
    """Texts of several pieces, bad records, two inputs: the bytes and counts of one go."""
    monkeypatch.setattr(pair_files, "NOTE_LINES", 3)
    lines = [{"text": " ".join(["1"] * (i % 7))} for i in range(1, 20)] + [{"prompt": "1"}] * 3
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", *lines) for name in "ab"]
    if kind == "packed":
        for path in paths:
            Path(path + ".gz").write_bytes(gzip.compress(Path(path).read_bytes()))
        paths = [path + ".gz" for path in paths]
    if kind == "array":
        for path in paths:
            Path(path).write_text(json.dumps(lines, indent=1))
    if kind == "tables":
        for name in "ab":
            (tmp_path / name).mkdir()
        paths = [parquet(tmp_path / "a", lines), save_to_disk(tmp_path / "b", lines)]
        paths = [str(path) for path in paths]
    if kind == "datasets":
        documents = [[[*[1] * (i % 7), EOD]] for i in range(20)]
        paths = [indexed(tmp_path / name, *documents) for name in "ab"]
    source, whole = Source(tuple(paths), max_length=3), tmp_path / "whole"
    whole.mkdir()
    write_pairs_resumed(source, ToyTokenizer(), 0, whole, lambda read: None, texts=True)
    counted = Dropped()
    write_pairs(read_pairs(source, ToyTokenizer(), counted), str(tmp_path / "p"))
    assert json.loads((whole / "dropped.json").read_text())["counts"] == counted.counts != {}
    for suffix in (".bin", ".idx"):
        assert (whole / f"pairs{suffix}").read_bytes() == (tmp_path / f"p{suffix}").read_bytes()
    for first in range(1, 45, 4):
        folder, shown, texts = tmp_path / str(first), [], []
        folder.mkdir()
        tokenizer = ToyTokenizer()
        tokenize = tokenizer.tokenize
        tokenizer.tokenize = lambda text, f=tokenize, texts=texts: texts.append(text) or f(text)
        for calls in (first, first + 7):
            show = interrupting(calls)
            with suppress(KeyboardInterrupt):
                write_pairs_resumed(source, tokenizer, 0, folder, show, texts=True)
                break
        else:
            before = len(texts)
            write_pairs_resumed(source, tokenizer, 0, folder, shown.append, texts=True)
            assert sum(shown) == source.stored_bytes()
            if kind == "texts" and first > 9:
                assert len(texts) - before < 41 - first, "lines that are done with are skipped"
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
            p.name: p.read_bytes() for p in whole.iterdir()
        }


def interrupting(calls):
    """A callback that the user interrupts at this call."""
    left = iter(range(calls))

    def show(read):
        if next(left, None) is None:
            raise KeyboardInterrupt

    return show


def test_a_note_of_files_that_are_cut_is_not_believed(tmp_path, monkeypatch):
    """As after a loss of power: everything is tokenised anew."""
    monkeypatch.setattr(pair_files, "NOTE_LINES", 2)
    source = Source((write_jsonl(tmp_path / "r.jsonl", *[{"text": "1 2 3"}] * 9),))
    with pytest.raises(KeyboardInterrupt):
        write_pairs_resumed(source, ToyTokenizer(), 0, tmp_path, interrupting(7))
    assert json.loads((tmp_path / "note.json").read_text())["lines"] == 6
    (tmp_path / "pairs.bin").write_bytes(b"")
    assert len(write_pairs_resumed(source, ToyTokenizer(), 0, tmp_path, lambda read: None)) == 9


def size_of(path):
    path = Path(path)
    return (path if path.exists() else path.with_suffix(".bin")).stat().st_size


def test_texts_are_cut_like_documents(tmp_path):
    """A BOS stands before the text, so before its first piece only."""
    path = write_jsonl(tmp_path / "r.jsonl", {"text": "1 2 3 4 5 6"}, {"text": "8 9"})
    pairs = read_pairs(Source((path,), max_length=5), ToyTokenizer((7,)), Dropped())
    assert [listed(p) for p in pairs] == [
        [[7], [1, 2, 3, 4]],
        [[5], [6, EOD]],
        [[7], [8, 9, EOD]],
    ]


def test_dataset_of_another_tokenizer_is_refused(tmp_path):
    path = indexed(tmp_path / "d", [[1, 2, 3]], [[1, 700, 3]])
    with pytest.raises(ValueError, match=r"document 1: token ids 1 to 700, .* has 100 tokens"):
        list(read_pairs(Source((path,)), ToyTokenizer(), Dropped()))
    mixed = Source((path, write_jsonl(tmp_path / "r.jsonl", {"text": "1 2"})))
    with pytest.raises(ValueError, match=r"--input mixes JSON Lines .*r\.jsonl.* build a store of"):
        list(read_pairs(mixed, ToyTokenizer(), Dropped()))


def test_pairs_and_mle_documents_hold_the_same_tokens(tmp_path, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = Source((DOLLY,), max_length=256)
    dropped = Dropped()
    reader = write_pairs(
        read_pairs(source, tokenizer, dropped), str(tmp_path / "pairs"), tokenizer.vocab_size
    )
    written, lm_dropped = write_lm_dataset(source, tokenizer, str(tmp_path / "new" / "mle"))
    documents = IndexedDataset(str(tmp_path / "new" / "mle"))
    assert (
        written == len(documents) == len(reader) == 400 - dropped.counts["longer than 256 tokens"]
    )
    assert lm_dropped.counts == dropped.counts
    for index in range(0, len(reader), 37):
        prefix, continuation = reader.prefix(index), reader.continuation(index)
        assert documents[index].tolist() == [*prefix, *continuation]
        assert continuation[-1] == tokenizer.eod
        assert tokenizer.eod not in continuation[:-1]
    assert tokenizer.detokenize(reader.prefix(0).tolist()).startswith("Instruction: Write a review")
    assert sorted(os.listdir(tmp_path / "new")) == ["mle.bin", "mle.idx"]


def test_rejected_continuations_are_read_back(tmp_path):
    ints = [np.array(x, dtype=np.int32) for x in ([1, 2], [3, 99], [4, 99], [5, 6, 99])]
    pairs = [Pair(ints[0], ints[1], (ints[2], ints[3])), Pair(ints[0], ints[1])]
    reader = write_pairs(pairs, str(tmp_path / "pairs"))
    assert [r.tolist() for r in reader.rejected(0)] == [[4, 99], [5, 6, 99]]
    assert reader.rejected(1) == []
    assert reader.prefix(1).dtype == np.int32


def test_mle_dataset_leaves_nothing_behind_on_failure(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "r.jsonl", *[{"text": "a b c"}] * 3, b"oops")
    output = tmp_path / "out" / "mle"
    with pytest.raises(ValueError, match=r"r.jsonl:4: not JSON"):
        write_lm_dataset(Source((path,), on_bad_record="refuse"), tokenizer, str(output))
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"inputs": ()}, r"--input is missing: give JSON Lines"),
        ({"shape": "csv"}, "--format csv: unknown; give one of auto, prompt"),
        ({"on_bad_record": "fix"}, "--on-bad-record fix: give skip or refuse"),
        ({"prefix_fraction": 1.0}, "--prefix-fraction 1.0: needs a number between 0 and 1"),
        ({"max_length": 2}, "--max-length 2: needs at least 3 tokens"),
        ({"template": "x"}, "--prompt-template 'x' names no field"),
    ],
)
def test_flags_out_of_range(flags, match):
    with pytest.raises(ValueError, match=match):
        Source(**{"inputs": ("x",), **flags})


def test_identity_depends_on_content_not_on_the_path(tmp_path, tokenizer):
    ours = tokenizer_identity(tokenizer)
    assert ours["library"] == "SentencePieceTokenizer"
    assert (ours["vocab_size"], ours["eod"], len(ours["sha256"])) == (1000, 2, 64)
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer.path).read_bytes())
    assert tokenizer_identity(dolly_tokenizer(tmp_path)) == ours
    train_sentencepiece(Source((DOLLY,)), str(tmp_path / "other" / "tokenizer.model"), 900)
    assert tokenizer_identity(dolly_tokenizer(tmp_path / "other"))["sha256"] != ours["sha256"]


def test_identity_sees_merges_that_the_vocabulary_does_not_show():
    """Same tokens, other segmentation: only the ids of a text differ."""
    tokenizers = [ToyTokenizer(), ToyTokenizer(), ToyTokenizer()]
    tokenizers[1].tokenize = lambda text: [1] * len(text)
    digests = [tokenizer_identity(t)["sha256"] for t in tokenizers]
    assert digests[0] == digests[2] != digests[1]


def test_identity_of_null_tokenizers():
    from megatron.core.tokenizers import MegatronTokenizer

    made = [
        MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=n)
        for n in (64, 65, 64)
    ]
    first, second, third = map(tokenizer_identity, made)
    assert first == third != second
    assert Encoder(made[0]).continuation("1 2 63") == [1, 2]
