"""Training a tokenizer: all of the text is seen, and what cannot be is said."""

import json
import os
from pathlib import Path

import pytest

from megatron_cpo.records import tokenizer_training
from megatron_cpo.records.pair_files import write_lm_dataset
from megatron_cpo.records.source import Source
from megatron_cpo.records.tokenizer_training import train_sentencepiece
from tests.texts import DOLLY, ToyTokenizer, dolly_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_trained_tokenizer_keeps_text_and_is_reproducible(tmp_path, tokenizer):
    for text in ("def f(x):\n\treturn  x", "naïve 漢字", "a\n\nb"):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    train_sentencepiece(Source((DOLLY,)), str(tmp_path / "again.model"), 1000)
    assert (tmp_path / "again.model").read_bytes() == Path(tokenizer.path).read_bytes()
    with pytest.raises(
        ValueError, match=r"--vocab-size 100000: these records can fill at most \d+ pieces"
    ):
        train_sentencepiece(Source((DOLLY,)), str(tmp_path / "x.model"), 100_000)
    with pytest.raises(ValueError, match=r"no such file"):
        train_sentencepiece(Source(("missing.jsonl",)), str(tmp_path / "x.model"), 1000)
    lines = Path(DOLLY).read_bytes().splitlines()
    path = write_jsonl(tmp_path / "bad.jsonl", *lines, b"oops")
    refusing = Source((path,), on_bad_record="refuse")
    with pytest.raises(ValueError, match=r"bad\.jsonl:401: not JSON; correct"):
        train_sentencepiece(refusing, str(tmp_path / "x.model"), 1000)
    assert sorted(os.listdir(tmp_path)) == ["again.model", "bad.jsonl"]


def test_what_is_read_is_not_written_over(tmp_path):
    """By whatever path it is named."""
    path = Path(write_jsonl(tmp_path / "r.jsonl", {"text": "one two three"}))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"--output .*r\.jsonl: it is read, and would be"):
        train_sentencepiece(Source((str(path),)), f"{tmp_path}/../{tmp_path.name}/r.jsonl", 300)
    path.rename(tmp_path / "text.bin")
    source = Source((str(tmp_path / "text.bin"),))
    with pytest.raises(ValueError, match=r"--output-prefix .*text\.bin: it is read, and"):
        write_lm_dataset(source, ToyTokenizer(), str(tmp_path / "text"))
    assert (tmp_path / "text.bin").read_bytes() == before


def pieces_of(path):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(path))
    return {model.id_to_piece(i) for i in range(len(model))}


def train(tmp_path, *texts, vocab_size=400):
    """On the responses of the first records of Dolly and these texts."""
    lines = [json.loads(line)["response"] for line in Path(DOLLY).read_text().splitlines()[:20]]
    path = write_jsonl(tmp_path / "r.jsonl", *({"text": text} for text in (*lines, *texts)))
    return train_sentencepiece(Source((path,)), str(tmp_path / "t.model"), vocab_size)


@pytest.mark.parametrize(
    ("text", "in_parts"),
    [
        ("Жук " * 20, 0),
        ("Жук " * 800, 0),
        ("Жук " * 801, 1),  # of 7 bytes each, 5,600 a sentence
        ("Жук" * 1000, 1),  # without a space to cut at
        ("a\u2585Жук Жук", 1),  # what SentencePiece keeps for itself
        ("\u2585", 1),
        ("\0Жук\tЖук\u2028", 0),
        ("</s><unk>Жук Жук", 0),
    ],
)
def test_no_text_is_skipped(tmp_path, monkeypatch, text, in_parts):
    """The one text in another script gives its letters, however long it is, or it is counted."""
    monkeypatch.setattr(tokenizer_training, "LONGEST_SENTENCE", 5600)
    training = train(tmp_path, text)
    assert training.in_parts == in_parts
    assert training.describe() == "records dropped: none" + (
        "; texts used in parts: 1" if in_parts else ""
    )
    assert ("Ж" in pieces_of(tmp_path / "t.model")) == ("Ж" in text)


def test_parts_are_the_text_at_most_so_long_and_cut_at_spaces(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "LONGEST_SENTENCE", 7)
    assert list(tokenizer_training._parts("ab cd efgh ijklmnopq")) == [
        "ab cd", " efgh", " ijklmn", "opq"
    ]  # fmt: skip
    assert list(tokenizer_training._parts("漢字漢字")) == ["漢字", "漢字"]  # 3 bytes each
    assert list(tokenizer_training._parts("a\u2585\u2585b")) == ["a", "b"]


def test_a_vocabulary_that_does_not_fit_is_told_its_limits(tmp_path):
    with pytest.raises(ValueError, match=r"--vocab-size 1000: .* at most (\d+) pieces") as error:
        train(tmp_path, vocab_size=1000)
    most = int(str(error.value).partition("at most ")[2].split()[0])
    train(tmp_path, vocab_size=most)
    assert len(pieces_of(tmp_path / "t.model")) == most
    with pytest.raises(ValueError, match=r"at most"):
        train(tmp_path, vocab_size=most + 1)
    with pytest.raises(ValueError, match=r"--vocab-size 258: .* alone are (\d+) pieces") as error:
        train(tmp_path, vocab_size=258)
    fewest = int(str(error.value).partition("alone are ")[2].split()[0])
    train(tmp_path, vocab_size=fewest + 1)
    for size in (0, -3):
        with pytest.raises(ValueError, match=rf"--vocab-size {size}: needs a number of pieces"):
            train(tmp_path, vocab_size=size)


@pytest.mark.parametrize("records", [[], [b"", b"  "], [b'{"text": " "}'], [b"[]"]])
def test_nothing_to_train_on(tmp_path, records):
    path = write_jsonl(tmp_path / "r.jsonl", *records)
    with pytest.raises(ValueError, match=r"r\.jsonl: no usable record"):
        train_sentencepiece(Source((path,)), str(tmp_path / "t.model"), 300)
    assert os.listdir(tmp_path) == ["r.jsonl"]
