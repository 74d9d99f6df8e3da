"""A converted model is the same function on both sides.

Real models of transformers with random weights large enough to matter go through the converter and
into Megatron's own GPTModel, with no flags but those that the converter wrote.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.ranks import parse_losses, run_pretrain, run_ranks
from harness.stores import write_store
from megatron_cpo.checkpoints.formats.beside import FLAGS
from megatron_cpo.groups.store import GroupReader
from tests.checkpoints import read_model
from tests.conversions import (
    CONFIGS,
    TOKENS,
    VOCAB,
    Models,
    flags_of,
    hf_logits,
    load_megatron,
    to_hugging_face,
)
from tests.corpora import write_corpus


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def megatron_logits(load: str, flags: list[str], tokens: torch.Tensor) -> torch.Tensor:
    """On a rank: logits of the vocabulary and its padding."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model = load_megatron(load, flags)
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    with torch.no_grad():
        logits = model(tokens, torch.arange(length)[None].expand_as(tokens), mask)
        return gather_from_tensor_model_parallel_region(logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree(name: str, models: Models) -> None:
    """Within 1e-5, float32: transformers, and Megatron with the flags that were written."""
    expected = hf_logits(models.hugging_face(name), TOKENS)
    there = models.megatron(name)
    [found] = run_ranks(megatron_logits, 1, str(there), flags_of(there), TOKENS)
    assert expected.std() > 0.5
    assert (found[..., :VOCAB] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("gpt2 untied, erf", ["--no-bias-gelu-fusion"]),
        ("llama tied, llama3", ["--use-rope-scaling"]),
        ("llama linear, wide heads", ["--rotary-seq-len-interpolation-factor", "4"]),
    ],
)
def test_a_flag_left_out_would_show(name: str, flag: list[str], models: Models) -> None:
    """The models above are such that each of these changes what they compute."""
    expected = hf_logits(models.hugging_face(name), TOKENS)
    there, flags = models.megatron(name), flags_of(models.megatron(name))
    at = flags.index(flag[0])
    assert flags[at : at + len(flag)] == flag
    del flags[at : at + len(flag)]
    [found] = run_ranks(megatron_logits, 1, str(there), flags, TOKENS)
    assert (found[..., :VOCAB] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_of_the_vocabulary(name: str, models: Models) -> None:
    """500 rows at TP=1 and 600 at TP=2 for 500 tokens; the other rows repeat rare tokens' rows."""
    expected = hf_logits(models.hugging_face(name), TOKENS)
    there = models.megatron(name)
    flags = [*flags_of(there), "--make-vocab-size-divisible-by", "100"]
    [alone] = run_ranks(megatron_logits, 1, str(there), flags, TOKENS)
    flags += ["--tensor-model-parallel-size", "2"]
    [two, _] = run_ranks(megatron_logits, 2, str(there), flags, TOKENS)
    assert (alone.shape[-1], two.shape[-1]) == (500, 600)
    assert (alone - expected).abs().max() < 1e-5
    assert (two[..., :VOCAB] - expected).abs().max() < 1e-5
    assert torch.equal(two[..., 500:], two[..., 250:350])


def hf_scores(folder: Path, store: str) -> np.ndarray:
    """log pi(candidate | prefix) by transformers, [groups, K]."""
    reader = GroupReader(store)
    scores = []
    for i in range(len(reader)):
        group = reader[i]
        for candidate in group.candidates:
            tokens = torch.from_numpy(np.concatenate([group.prefix, candidate])).long()[None]
            logps = hf_logits(folder, tokens)[0, len(group.prefix) - 1 : -1].log_softmax(-1)
            picked = logps.gather(1, tokens[0, len(group.prefix) :, None])
            scores.append(float(picked.sum()))
    return np.array(scores).reshape(len(reader), -1)


def scores(load: Path, store: str, flags: list[str], world_size: int) -> np.ndarray:
    """The same by our head, in the tool that scores references."""
    run = ["--score-only", "--output-prefix", store, "--load", load, "--seq-length", "256"]
    run_pretrain([*flags, *run], world_size, script="tools/build_negatives.py")
    reader = GroupReader(store)
    return np.stack([reader[i].reference_logps for i in range(len(reader))])


LAYOUTS = {
    "TP=1": (1, ""),
    "TP=2": (2, "--tensor-model-parallel-size 2"),
    "PP=2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_our_head_scores_like_transformers(name: str, models: Models, tmp_path: Path) -> None:
    """Every candidate's log-prob at TP=1 (no padding), TP=2 (100 rows of it) and PP=2."""
    there = models.megatron(name)
    expected = None
    for layout, (world_size, flags) in LAYOUTS.items():
        store = write_store(tmp_path / layout, 6, 4, scored=False)
        if expected is None:
            expected = hf_scores(models.hugging_face(name), store)
        all_flags = [*flags_of(there), *flags.split(), "--make-vocab-size-divisible-by", "100"]
        found = scores(there, store, all_flags, world_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class Training:
    """Runs of Megatron's real loop from a converted checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.data = write_corpus(folder, VOCAB, tokens=80)

    def run(self, load: Path, flags: str, world_size: int) -> str:
        common = (
            "--seq-length 64 --micro-batch-size 1 --global-batch-size 4 --train-iters 2 "
            "--log-interval 1 --eval-interval 100 --eval-iters 1 --split 50,50,0 "
            "--hidden-dropout 0 --attention-dropout 0"
        )
        arguments = [*flags_of(load), *common.split(), *self.data, "--load", load, *flags.split()]
        return run_pretrain(arguments, world_size)[-1]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2", marks=pytest.mark.long), "llama tied, llama3"]
)
def test_real_loop_and_back(name: str, models: Models, training: Training, tmp_path: Path) -> None:
    """Load as a release at TP=2, train, save; on at PP=2; what comes out scores alike in both."""
    there = models.megatron(name)
    save = "--lr 1e-3 --save-interval 1 --save"
    run = f"{save} {tmp_path / 'tp'} --tensor-model-parallel-size 2"
    losses = [parse_losses(training.run(there, run, 2))["lm loss"][0]]
    for world_size, layout in ((1, ""), (2, " --pipeline-model-parallel-size 2")):
        losses.append(
            parse_losses(training.run(there, "--lr 0" + layout, world_size))["lm loss"][0]
        )
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    shutil.copyfile(there / FLAGS, tmp_path / "tp" / FLAGS)
    run = f"{save} {tmp_path / 'pp'} --pipeline-model-parallel-size 2 --finetune"
    training.run(tmp_path / "tp", run, 2)
    first = read_model(to_hugging_face(tmp_path / "tp", tmp_path / "first", iteration=1))
    for trained in ("tp", "pp"):
        back = to_hugging_face(tmp_path / trained, tmp_path / f"{trained}-hf")
        weights, before = read_model(back), read_model(models.hugging_face(name))
        assert weights.keys() == before.keys()
        for earlier in (before, first):
            assert all(not torch.equal(weights[key], earlier[key]) for key in weights)
        store = write_store(tmp_path / f"{trained}-groups", 3, 4, scored=False)
        found = scores(tmp_path / trained, store, flags_of(there), 1)
        np.testing.assert_allclose(found, hf_scores(back, store), rtol=1e-5)
