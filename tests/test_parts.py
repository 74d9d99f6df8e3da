"""Long texts in the parts that an embedding model reads."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.negatives.embeddings import SentenceEmbedder, embedding_similarity
from megatron_cpo.negatives.parts import TextParts, windows
from megatron_cpo.records.source import Source
from tests.texts import dolly_tokenizer, write_jsonl

WORDS = "The river carried old stories past every village while nobody counted its stones".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def minilm(tokenizer):
    pytest.importorskip("sentence_transformers")
    return SentenceEmbedder("minilm", tokenizer)


@pytest.mark.parametrize(
    ("ends", "room", "expected"),
    [
        ("a b c d e", 5, [(0, 5)]),
        ("a b c d e", 2, [(0, 2), (2, 4), (4, 5)]),
        ("a bc d ef", 4, [(0, 4), (4, 6)]),
        ("a b cd ef", 3, [(0, 2), (2, 4), (4, 6)]),  # no word is cut
        ("abcdef", 4, [(0, 4), (4, 6)]),  # nothing else to do
        ("a bcdef", 4, [(0, 4), (4, 6)]),  # a word of more than half of it is
    ],
)
def test_windows_end_where_words_do(ends, room, expected):
    """A letter is a token."""
    spans = [(i, i + 1) for i, letter in enumerate(ends) if letter != " "]
    assert list(windows(spans, room)) == expected


def long_text(words):
    return " ".join(WORDS[(i * i) % len(WORDS)] + str(i % 7) for i in range(words))


@pytest.mark.parametrize(
    "text", [long_text(600), "漢字仮名" * 200, "naïve,co-operate! " * 150, "x" * 99 + " y" * 700]
)
def test_parts_are_the_whole_text_and_each_is_read_whole(minilm, text):
    tokens = minilm.model.tokenizer
    parts = minilm._parts.of(text)
    assert len(parts) > 1
    assert "".join("".join(part for part, _ in parts).split()) == "".join(text.split())
    for part, count in parts:
        assert len(tokens(part)["input_ids"]) == count + 2 <= 256
    assert sum(count for _, count in parts) == len(tokens(text, verbose=False)["input_ids"]) - 2


def test_an_embedding_is_the_mean_of_its_parts(minilm, tokenizer):
    """Against the model asked for windows of token ids, one at a time; short texts as they were."""
    import torch

    text = long_text(300)
    [vector] = minilm.embed([np.array(tokenizer.tokenize(text), dtype=np.int32)])
    ids = minilm.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    counts = [count for _, count in minilm._parts.of(text)]
    total, first = np.zeros(384), 0
    for count in counts:
        part = torch.tensor([[101, *ids[first : first + count], 102]])
        with torch.no_grad():
            output = minilm.model({"input_ids": part, "attention_mask": torch.ones_like(part)})
        total += count * output["sentence_embedding"][0].numpy()
        first += count
    np.testing.assert_allclose(vector, total / len(ids), atol=2e-6)
    short = long_text(60)
    [vector] = minilm.embed([np.array(tokenizer.tokenize(short), dtype=np.int32)])
    assert np.array_equal(vector, minilm.model.encode([short])[0])
    assert minilm.embed([]).shape == (0, 384)


def test_cuts_of_a_long_text_are_told_apart(minilm, tokenizer):
    """Each has its own similarity; the model alone finds all of them the same."""
    whole = tokenizer.tokenize(long_text(700))
    cuts = [np.array(whole[: len(whole) - gone], dtype=np.int32) for gone in (0, 9, 200, 500, 900)]
    [similarities] = embedding_similarity(minilm, None)([cuts])
    assert similarities[0] == pytest.approx(1, abs=1e-6)
    assert (np.diff(np.sort(similarities)) > 1e-6).all() and similarities.argmax() == 0
    alone = minilm.model.encode([minilm.text(cut) for cut in cuts])
    assert alone @ alone[0] == pytest.approx(1, abs=1e-6)


def test_parts_are_embedded_once(minilm, tokenizer, monkeypatch):
    """Cuts share their first parts."""
    seen = []
    monkeypatch.setattr(
        minilm, "_encode", lambda texts: seen.extend(texts) or np.ones((len(texts), 384))
    )
    whole = tokenizer.tokenize(long_text(700))
    minilm.embed([np.array(whole[: len(whole) - gone], dtype=np.int32) for gone in range(0, 50, 5)])
    parts = len(minilm._parts.of(long_text(700)))
    assert len(seen) == len(set(seen)) == parts - 1 + 10


def test_models_without_a_limit_and_without_offsets(caplog):
    def parts(**options):
        options = {"max_seq_length": 256, "prompts": {}, "default_prompt_name": None, **options}
        return TextParts(SimpleNamespace(**options))

    for longest in (None, 10**30):
        unlimited = parts(tokenizer=None, max_seq_length=longest)
        assert unlimited.room is None and unlimited.of("a " * 999) == [("a " * 999, 1)]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        slow = parts(tokenizer=SimpleNamespace(is_fast=False))
    assert slow.of("a " * 999) == [("a " * 999, 1)]
    assert "of texts of more than 256 tokens the rest is not embedded" in caplog.text


def test_an_unfinished_build_of_before_is_not_mixed_in(minilm, tokenizer, tmp_path):
    """Its embeddings of long texts are others: its identity is another."""
    path = write_jsonl(
        tmp_path / "r.jsonl", *({"prompt": str(i), "completion": "a b"} for i in range(3))
    )
    config = BuildConfig(Source((path,)), str(tmp_path / "out"), negatives="tn=1", ranker="minilm")
    build_groups(config, tokenizer)
    manifest = (tmp_path / "out.json").read_text()
    assert '"part_tokens": 254' in manifest
    (tmp_path / "out.json").write_text(manifest.replace('"part_tokens": 254,', ""))
    with pytest.raises(ValueError, match=r"store built with embedder .*part_tokens.*; remove"):
        build_groups(config, tokenizer)
