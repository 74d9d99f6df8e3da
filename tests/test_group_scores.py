"""Ranking of held-out groups: against a slow loop, under both sorts of model, and refusals."""

import argparse
import json
import math
import os
import sys

import numpy as np
import pytest

from harness.ranks import run_pretrain, run_ranks
from harness.stores import VOCAB_SIZE, null_tokenizer, write_store
from megatron_cpo.evaluation.group_scores import (
    score_store,
    under_checkpoint,
    under_folder,
    write_group_scores,
)
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.inspection.tokenizer import add_tokenizer_arguments
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.megatron import MegatronPolicy
from megatron_cpo.work.job import BLOCK_RECORDS
from tests.commands import run_command
from tests.tiny_models import GPT_FLAGS, save_hugging_face, train_megatron

GROUPS, K, BETA = 30, 6, 0.5


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_hugging_face(tmp_path_factory.mktemp("hf"), rows=VOCAB_SIZE + 1)
    return HuggingFacePolicy(folder, null_tokenizer(), batch=7)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_nothing_is_refused(batch):
    """Of one below 0 all log-probs were 0, without a word."""
    with pytest.raises(ValueError, match=f"--policy hf:here: {batch} sequences at a time"):
        HuggingFacePolicy("here", None, batch)


def slow_figures(groups, logps, tokens=None):
    """Accuracy and margin by kind, with a loop over everything."""
    found = {}
    for name in (None, *KINDS[1:]):
        margins = []
        for group, scores in zip(groups, logps, strict=True):
            rivals = [
                float(score)
                for score, kind in zip(scores[1:], group.kinds[1:], strict=True)
                if name is None or KINDS[kind] == name
            ]
            if rivals:
                margins.append(float(scores[0]) - max(rivals))
        if margins:
            suffix = f"_{name}" if name else ""
            found[f"accuracy{suffix}"] = sum(m > 0 for m in margins) / len(margins)
            found[f"margin{suffix}"] = sum(margins) / len(margins)
    return found


def test_figures_equal_a_slow_loop(policy, tmp_path):
    """One candidate a forward; log-probs, their means and rewards, of all kinds that are there."""
    store = write_store(tmp_path / "groups", GROUPS, K, seed=3)
    found = score_store(store, policy, null_tokenizer(), BETA)
    reader = GroupReader(store)
    groups = [reader[i] for i in range(GROUPS)]
    logps = [
        np.array([float(policy.logps([g.prefix], [[c]])[0][0]) for c in g.candidates])
        for g in groups
    ]
    rewards = [BETA * (ours - g.reference_logps) for ours, g in zip(logps, groups, strict=True)]
    expected = {f"logp_{k}": v for k, v in slow_figures(groups, logps).items()}
    means = [
        scores / [len(c) for c in g.candidates] for scores, g in zip(logps, groups, strict=True)
    ]
    expected |= {f"token_logp_{k}": v for k, v in slow_figures(groups, means).items()}
    expected |= {f"reward_{k}": v for k, v in slow_figures(groups, rewards).items()}
    nll = -sum(scores[0] for scores in logps) / sum(len(g.candidates[0]) for g in groups)
    expected |= {"nll_truth": nll, "perplexity_truth": math.exp(nll)}
    assert found.figures.keys() == expected.keys() == found.definitions.keys()
    assert len(expected) > 10
    for name, value in expected.items():
        estimate = found.figures[name].estimate()
        assert estimate.value == pytest.approx(value, rel=1e-5, abs=1e-5), name
        assert estimate.low <= estimate.value <= estimate.high
    write_group_scores(tmp_path / "out" / "g.json", found)
    content = json.loads((tmp_path / "out" / "g.json").read_text())
    assert content["groups"]["model"] == policy.identity
    assert content["groups"]["reference"]["name"] == "random"
    assert content["groups"]["figures"].keys() == content["definitions"].keys()


def test_without_a_reference_there_are_no_rewards(policy, tmp_path):
    store = write_store(tmp_path / "groups", 8, 3, scored=False)
    found = score_store(store, policy, null_tokenizer(), 5.0)
    assert found.reference is None
    assert not [name for name in found.figures if name.startswith("reward")]
    assert "logp_accuracy" in found.figures


def test_under_a_checkpoint(tmp_path):
    """The store's own reference, at tensor-parallel size 2: its rewards, which differ by rounding
    alone, are left out, and the log-probs are those that scoring stored."""
    load = train_megatron(tmp_path, GPT_FLAGS)
    store = write_store(tmp_path / "heldout", GROUPS, 4, seed=5, scored=False)
    model = [*GPT_FLAGS, "--load", load]
    build = ["--score-only", "--output-prefix", store]
    run_pretrain([*model, *build], 1, script="tools/build_negatives.py")
    output = tmp_path / "ranked.json"
    flags = ["--groups", store, "--output", str(output), "--tensor-model-parallel-size", "2"]
    run_pretrain(["score", *model, *flags], 2, script="tools/evaluate.py")
    content = json.loads(output.read_text())["groups"]
    reader = GroupReader(store)
    groups = [reader[i] for i in range(GROUPS)]
    expected = slow_figures(groups, [g.reference_logps for g in groups])
    figures = {name: row["value"] for name, row in content["figures"].items()}
    for name, value in expected.items():
        assert figures[f"logp_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert not [name for name in figures if name.startswith("reward")]
    assert content["reference"]["digest"] == content["model"]["digest"]


def ranked(flags, store, fails=None):
    """The figures on a rank, and how many groups its model was asked for."""
    from megatron_cpo import install
    from megatron_cpo.host.loading import score_args

    install()
    sys.argv = ["score", *flags]
    asked, original = [], MegatronPolicy.logps

    def counted(self, prefixes, candidates):
        if int(os.environ["RANK"]) == fails:
            raise ValueError("no such thing")
        asked.append(len(prefixes))
        return original(self, prefixes, candidates)

    MegatronPolicy.logps = counted
    try:
        found = under_checkpoint(store, score_args(), 32, BETA)
    except ValueError as error:
        return str(error)
    return {name: each.value for name, each in found.estimates.items()}, asked


def test_replicas_share_the_groups(tmp_path):
    """Each did all of them, so that more ranks took as long; a rank's error is that of all."""
    store = write_store(tmp_path / "heldout", 2 * BLOCK_RECORDS + 9, 3, seed=7)
    flags = [*GPT_FLAGS, "--load", train_megatron(tmp_path, GPT_FLAGS)]
    flags += ["--micro-batch-size", "1"]
    [(alone, asked)] = run_ranks(ranked, 1, flags, store)
    assert asked == [BLOCK_RECORDS, BLOCK_RECORDS, 9]
    (first, asked), (second, others) = run_ranks(ranked, 2, flags, store)
    assert (asked, others) == ([BLOCK_RECORDS, 9], [BLOCK_RECORDS])
    assert alone == first == second
    assert run_ranks(ranked, 2, flags, store, 1) == ["no such thing"] * 2


def test_bad_input(policy, tmp_path):
    store = write_store(tmp_path / "groups", 4, 3)
    with pytest.raises(ValueError, match=r"nowhere.json: no manifest there"):
        score_store("nowhere", policy, null_tokenizer(), 5.0)
    with pytest.raises(ValueError, match="--beta 0: needs a number above 0"):
        score_store(store, policy, null_tokenizer(), 0)
    one = write_store(tmp_path / "one", 1, 3)
    with pytest.raises(ValueError, match="one: 1 group; an interval needs at least 2"):
        score_store(one, policy, null_tokenizer(), 5.0)
    long = write_store(tmp_path / "long", 4, 3, longest=90)
    with pytest.raises(ValueError, match="tokens to read, the model reads at most 64"):
        score_store(long, policy, null_tokenizer(), 5.0)
    args = add_tokenizer_arguments(argparse.ArgumentParser()).parse_args([])
    with pytest.raises(ValueError, match="its tokenizer cannot be read"):
        under_folder(store, save_hugging_face(tmp_path / "bare"), 8, 5.0, args)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--groups", "x"], "--groups x: needs the model: --policy hf:PATH, or --load"),
        (["--groups", "x", "--policy", "http://h/v1"], "; not --policy http://h/v1"),
        (["--groups", "x", "--policy", "hf:y"], "x.json: no manifest there"),
    ],
)
def test_mistakes_are_one_line(flags, said, monkeypatch, capsys):
    assert run_command(monkeypatch, "evaluate", "score", *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("megatron-cpo evaluate: ")
    assert error.count("\n") == 1
    assert said in error
