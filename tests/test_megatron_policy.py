"""The Megatron policy with its cache against forwards over everything, and at every layout.

Three real checkpoints, written by Megatron's training loop: a GPT with learned positions and tied
embeddings, a Llama-like model with RoPE, grouped-query attention, RMSNorm and SwiGLU, and a
HybridModel of the same layers.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.ranks import run_ranks
from harness.stores import VOCAB_SIZE, null_tokenizer, random_group
from megatron_cpo.host.installed import core_version
from megatron_cpo.model.stages import StagedModel
from megatron_cpo.negatives.from_records import group_rng
from megatron_cpo.policies.megatron import MegatronPolicy
from megatron_cpo.policies.policy import Sampling
from tests.tiny_models import GPT_FLAGS, LLAMA_FLAGS, train_megatron

LLAMA = [*GPT_FLAGS, *LLAMA_FLAGS]
# The pattern takes the place of --num-layers 4.
HYBRID = ["--hybrid-layer-pattern", "*-*-", *LLAMA[2:]]
MODELS = {"gpt": GPT_FLAGS, "llama": LLAMA, "hybrid": HYBRID}
LAYOUTS = {
    "TP=2": (2, "--tensor-model-parallel-size 2"),
    "PP=2": (2, "--pipeline-model-parallel-size 2"),
    "VPP=2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
}
SAMPLING = Sampling(top_k=20)


@pytest.fixture(scope="module", params=MODELS)
def flags(request, tmp_path_factory):
    """Model flags and --load of a checkpoint after one step from random weights."""
    model = MODELS[request.param]
    return [*model, "--load", train_megatron(tmp_path_factory.mktemp(request.param), model)]


def records():
    """Prefixes of 1 to 20 tokens, truths, and limits from 1 on."""
    rng = np.random.default_rng(3)
    groups = [random_group(rng, 5) for _ in range(14)]
    groups[0].prefix.resize(1, refcheck=False)
    return groups, [1 + (5 * i) % 30 for i in range(len(groups))]


def load(flags, layout="", batch=32):
    from megatron_cpo import install
    from megatron_cpo.host.loading import score_args

    install()
    sys.argv = ["policy", *flags, *layout.split(), "--micro-batch-size", "1"]
    return MegatronPolicy.load(score_args(), null_tokenizer(), batch)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("--context-parallel-size 2", "--context-parallel-size 2: a policy that draws .* use 1"),
        ("--num-experts 4", "--num-experts 4: experts are not tested .* must be dense"),
    ],
)
def test_layouts_at_which_sequences_cannot_grow_are_refused(layout, message):
    plain = {"context_parallel_size": 1, "num_experts": None}
    name, _, value = layout.removeprefix("--").replace("-", "_").partition(" ")
    args = SimpleNamespace(**{**plain, name: int(value or 1)})
    with pytest.raises(ValueError, match=f"^{message}"):
        MegatronPolicy.load(args, null_tokenizer())


def test_rows_on_a_gpu_have_few_lengths():
    """Attention is compiled for a length, and torch gives up after eight."""
    on = {
        name: SimpleNamespace(device=torch.device(name), _row_tokens=64) for name in ("cuda", "cpu")
    }
    assert [StagedModel.width(on["cuda"], n) for n in (1, 64, 65, 200)] == [64, 64, 128, 256]
    assert [StagedModel.width(on["cpu"], n) for n in (1, 65)] == [1, 65]


def sample(policy):
    """Samples, and the ends they stop at: random weights hardly ever give the EOD.

    One is the EOD, the token they have most of, another a stop that is asked for.
    """
    groups, limits = records()

    def draw(*stops):
        rngs = [group_rng(1, i, "an") for i in range(len(groups))]
        drawn = policy.sample([g.prefix for g in groups], limits, 5, rngs, SAMPLING, stops)
        return [[c.tolist() for c in found] for found in drawn]

    counts = np.bincount([t for found in draw() for c in found for t in c[:-1]])
    often, stop = np.argsort(-counts, kind="stable")[:2].tolist()
    policy._eod, policy.ends = often, frozenset({often})
    return draw(stop), (often, stop)


def replace(policy):
    groups, _ = records()
    truths = [g.candidates[0] for g in groups]
    places = [np.random.default_rng(i).random((3, len(y))) < 0.5 for i, y in enumerate(truths)]
    rngs = [group_rng(1, i, "mn") for i in range(len(groups))]
    return policy.replacements([g.prefix for g in groups], truths, places, 2, rngs), places


def score(policy):
    groups, _ = records()
    return policy.logps([g.prefix for g in groups], [g.candidates for g in groups])


def answers(flags, layout=""):
    """Everything that a policy answers, on one rank."""
    policy = load(flags, layout)
    groups, _ = records()
    sequences = [g.candidates[0] for g in groups] + [np.zeros(0, dtype=np.int32)]
    drawn, _ = replace(policy)
    samples, ends = sample(policy)
    policy._batch = 7  # a prefix at a time instead of six
    policy._eod, policy.ends = VOCAB_SIZE, frozenset({VOCAB_SIZE})
    assert sample(policy) == (samples, ends)
    return samples, drawn, score(policy), policy.embed(sequences), policy.identity, ends


@pytest.fixture(scope="module")
def one_process(flags):
    [found] = run_ranks(answers, 1, flags)
    return found


def slow_twin(flags, ends):
    """The same answers by one forward per token, place and candidate, each over everything."""
    import torch

    (eod, _), ends = ends, set(ends)

    policy = load(flags)
    groups, limits = records()

    @torch.no_grad()
    def logits_and_states(tokens):
        states = []

        def head(hidden, shard):
            states.append(hidden)
            return shard.logits(hidden)

        logits = policy._model.run([np.array(tokens, dtype=np.int32)], head)
        return logits[:, : VOCAB_SIZE + 1].double(), states[0]

    def one_sample(prefix, limit, numbers):
        tokens = []
        while len(tokens) < limit - 1 and not ends.intersection(tokens[-1:]):
            p = torch.softmax(logits_and_states([*prefix, *tokens])[0][-1], 0).numpy()
            order = np.sort(np.argsort(-p, kind="stable")[: SAMPLING.top_k])
            total = np.cumsum(p[order])
            number = numbers[len(tokens)] * total[-1]
            tokens.append(int(order[np.searchsorted(total, number, side="right")]))
        return tokens if ends.intersection(tokens[-1:]) else [*tokens, eod]

    samples = []
    for i, (group, limit) in enumerate(zip(groups, limits, strict=True)):
        numbers = group_rng(1, i, "an").random((limit, 5))
        samples.append([one_sample(group.prefix, limit, numbers[:, k]) for k in range(5)])
    logps, embeddings, softmax = [], [], []
    for group in groups:
        p = len(group.prefix)
        sums = []
        for y in group.candidates:
            logits, _ = logits_and_states([*group.prefix, *y])
            at = torch.arange(len(y)) + p - 1
            sums.append(float(torch.log_softmax(logits, -1)[at, torch.from_numpy(y).long()].sum()))
        logps.append(sums)
        truth = group.candidates[0]
        embeddings.append(logits_and_states(truth)[1].mean(0).numpy())
        logits, _ = logits_and_states([*group.prefix, *truth])
        softmax.append(torch.softmax(logits[p - 1 : -1], -1).numpy())
    return samples, logps, embeddings, softmax


@pytest.fixture(scope="module")
def twin(flags, one_process):
    [found] = run_ranks(slow_twin, 1, flags, one_process[5])
    return found


def test_samples_equal_those_without_a_cache(one_process, twin):
    """Token for token in float32; prefixes of 1 to 20 tokens in batches of 6, limits of 1 to 30."""
    assert one_process[0] == twin[0]
    assert {c[-1] for found in one_process[0] for c in found} == set(one_process[5])
    lengths = [len(c) for found in one_process[0] for c in found]
    assert min(lengths) == 1 and max(lengths) > 20 and len(set(lengths)) > 10


def test_replacements_are_the_inverse_of_the_softmax(one_process, twin):
    groups, _ = records()
    for i, (group, probs, drawn) in enumerate(zip(groups, twin[3], one_process[1], strict=True)):
        truth = group.candidates[0]
        places = np.random.default_rng(i).random((3, len(truth))) < 0.5
        numbers = group_rng(1, i, "mn").random((2, 3, len(truth)))
        for t, p in enumerate(probs):
            total = np.cumsum(p)
            expected = np.searchsorted(total, numbers[:, :, t] * total[-1], side="right")
            expected = np.where(places[:, t], expected, truth[t])
            assert drawn[:, :, t].tolist() == expected.tolist()


def test_logps_and_embeddings(one_process, twin):
    for found, expected in zip(one_process[2], twin[1], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(one_process[3][:-1], twin[2], rtol=1e-4, atol=1e-5)
    assert not one_process[3][-1].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_do_not_depend_on_the_layout(flags, one_process, layout):
    """The same tokens and identity, log-probs within 1e-5, on every rank."""
    ranks, extra = LAYOUTS[layout]
    if layout == "VPP=2" and "--hybrid-layer-pattern" in flags:
        if core_version() == (0, 18):
            pytest.skip("0.18 refuses hybrid models in virtual stages")
        extra = "--pipeline-model-parallel-size 2 --hybrid-layer-pattern *|-|*|-"
    for found in run_ranks(answers, ranks, flags, extra):
        assert found[0] == one_process[0]
        for ours, expected in zip(found[1], one_process[1], strict=True):
            assert ours.tolist() == expected.tolist()
        for ours, expected in zip(found[2], one_process[2], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
        np.testing.assert_allclose(found[3], one_process[3], rtol=1e-4, atol=1e-5)
        assert found[4] == one_process[4]


def test_what_is_no_checkpoint(flags, tmp_path):
    with pytest.raises(ValueError, match=r"--load .*: no Megatron checkpoint there"):
        run_ranks(load, 1, [*flags, "--load", str(tmp_path)])
    with pytest.raises(ValueError, match=r"--context-parallel-size 2: .* use 1, and more"):
        run_ranks(load, 2, [*flags, "--context-parallel-size", "2"])
    with pytest.raises(ValueError, match=r"--num-experts 4: .* must be dense"):
        run_ranks(load, 1, [*flags, "--num-experts", "4"])


def test_another_model_than_the_checkpoints_is_refused(flags):
    """On each rank, before the ranks meet."""
    with pytest.raises(ValueError, match=r"layernorm_epsilon is 1e-05 there and 0\.5 here: pass"):
        run_ranks(load, 2, [*flags, *"--norm-epsilon 0.5 --tensor-model-parallel-size 2".split()])


def both_backends(folder):
    """Samples and log-probs of a Megatron GPT and of a GPT-2 with its weights."""
    import torch

    from benchmarks.generation import hugging_face_twin
    from benchmarks.setting import Setting, build_model, start_megatron
    from megatron_cpo.policies.hugging_face import HuggingFacePolicy
    from megatron_cpo.policies.megatron import MegatronPolicy

    start_megatron()
    torch.manual_seed(1)
    vocab = VOCAB_SIZE + 1
    model = build_model(Setting(hidden=32, layers=2, vocab=vocab, max_length=64), trees=True).eval()
    for weight in model.parameters():
        weight.data *= 8  # far from uniform
    hugging_face_twin(model, vocab).save_pretrained(folder)
    policies = (
        MegatronPolicy([model], {}, vocab, VOCAB_SIZE, 64, 128),
        HuggingFacePolicy(folder, null_tokenizer()),
    )
    return [(sample(p), replace(p)[0], score(p)) for p in policies]


def test_hugging_face_and_megatron_agree(tmp_path):
    """The same weights: the same tokens for the same seeds, log-probs within 1e-5."""
    [(ours, theirs)] = run_ranks(both_backends, 1, str(tmp_path))
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.tolist() == b.tolist()
    for a, b in zip(ours[2], theirs[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
