"""A Hugging Face policy against one plain forward per sequence; what it refuses."""

import numpy as np
import pytest
import torch

from harness.ranks import run_ranks
from megatron_cpo.policies.flags import policy_from_args
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from tests.policies import contexts, policy_arguments, rngs, slow_sample
from tests.texts import ToyTokenizer, dolly_tokenizer
from tests.tiny_models import save_hugging_face, write_tokenizer

KINDS = ["llama", "gpt2", "gemma2"]


@pytest.fixture(scope="module", params=KINDS)
def policy(request, tmp_path_factory):
    folder = save_hugging_face(tmp_path_factory.mktemp(request.param), request.param)
    return HuggingFacePolicy(folder, ToyTokenizer(), batch=7)


def plain_logits(policy, tokens):
    with torch.no_grad():
        output = policy._model(
            input_ids=torch.tensor([list(map(int, tokens))]), output_hidden_states=True
        )
    return output.logits[0, :, :100].double(), output.hidden_states[-1][0]


def test_samples_equal_those_without_a_cache(policy):
    block = contexts(6)
    sampling = Sampling(top_k=10)
    drawn = policy.sample([c.prefix for c in block], [12] * 6, 2, rngs(block, "an"), sampling)
    for context, rng, found in zip(block, rngs(block, "an"), drawn, strict=True):
        expected = slow_sample(policy, context.prefix, 12, 2, rng, sampling)
        assert [c.tolist() for c in found] == expected


def test_logps_are_sums_over_the_tokens(policy):
    """Several candidates a record, of several lengths, with a duplicate and an empty text."""
    block = contexts(9)
    candidates = [[c.truth, c.truth[2:], c.truth, c.truth[-1:]] for c in block]
    found = policy.logps([c.prefix for c in block], candidates)
    for context, ys, logps in zip(block, candidates, found, strict=True):
        assert logps.dtype == np.float32
        for y, logp in zip(ys, logps, strict=True):
            logits, _ = plain_logits(policy, [*context.prefix, *y])
            at = torch.arange(len(y)) + len(context.prefix) - 1
            expected = torch.log_softmax(logits, -1)[at, torch.from_numpy(y).long()].sum()
            assert logp == pytest.approx(float(expected), rel=1e-5)


def test_logits_exist_at_the_wanted_positions_alone(policy):
    """A model that caps them as well; nowhere else, and never of a whole batch."""
    block, made = contexts(9), []
    hook = policy._model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: made.append(logits.shape[:-1].numel())
    )
    policy.logps([c.prefix for c in block], [[c.truth] for c in block])
    assert sorted(made) == sorted(len(c.truth) for c in block)
    made.clear()
    places = [np.arange(len(c.truth)) < 2 for c in block]
    policy.replacements(
        [c.prefix for c in block], [c.truth for c in block], [p[None] for p in places], 1,
        rngs(block, "mn"),
    )  # fmt: skip
    assert sorted(made) == sorted(int(p.sum()) for p in places)
    hook.remove()


def test_embeddings_are_means_of_the_last_hidden_state(policy):
    sequences = [c.truth for c in contexts(9)] + [np.zeros(0, dtype=np.int32)]
    found = policy.embed(sequences)
    for tokens, mean in zip(sequences[:-1], found[:-1], strict=True):
        _, hidden = plain_logits(policy, tokens)
        np.testing.assert_allclose(mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert not found[-1].any()


def test_rows_that_pad_the_vocabulary_are_never_drawn(tmp_path):
    """A model of 128 rows and a tokenizer of 100: nothing beyond, and log-probs without them."""
    policy = HuggingFacePolicy(save_hugging_face(tmp_path, rows=128), ToyTokenizer())
    [context] = contexts(1)
    everything = Sampling(top_k=0, max_new_tokens=2)
    [drawn] = policy.sample([context.prefix], [2], 2000, rngs([context], "an"), everything)
    assert max(c[0] for c in drawn) < 100
    ones = [np.array([i], dtype=np.int32) for i in range(100)]
    [logps] = policy.logps([context.prefix], [ones])
    assert np.exp(logps.astype(float)).sum() == pytest.approx(1, abs=1e-6)


def on_the_cpu_host(folder):
    """Log-probs in a process that runs Megatron on the CPU, as the build tool does."""
    import torch

    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"
    block = contexts(5)
    policy = HuggingFacePolicy(folder, ToyTokenizer())
    return policy.logps([c.prefix for c in block], [[c.truth] for c in block])


@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_host_changes_nothing(tmp_path, kind):
    """Its factories once hid from `with torch.device("meta")`: rotary tables were garbage."""
    folder = save_hugging_face(tmp_path, kind)
    block = contexts(5)
    expected = HuggingFacePolicy(folder, ToyTokenizer()).logps(
        [c.prefix for c in block], [[c.truth] for c in block]
    )
    [found] = run_ranks(on_the_cpu_host, 1, folder)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equal_weights_are_one_identity(tmp_path):
    first, again, other = (
        HuggingFacePolicy(save_hugging_face(tmp_path / name, seed=seed), ToyTokenizer()).identity
        for name, seed in (("a", 0), ("b/a", 0), ("c/a", 1))
    )
    assert first == again != other


def test_flags_choose_the_policy(tmp_path):
    assert policy_from_args(policy_arguments(), ToyTokenizer()) is None
    folder = save_hugging_face(tmp_path)
    flags = ["--policy", f"hf:{folder}", "--max-length", 64]
    policy = policy_from_args(policy_arguments(*flags), ToyTokenizer())
    assert policy.positions == 64
    assert policy.identity["name"] == tmp_path.name


def test_what_is_no_policy(tmp_path):
    folder = save_hugging_face(tmp_path / "model")
    for flags, match in [
        (["--policy", "gpt"], r"--policy gpt: unknown; give hf:PATH, http"),
        (["--policy", "megatron"], r"--policy megatron: .* give --load CHECKPOINT"),
        (["--policy-batch", 0], r"--policy-batch 0: needs at least 1"),
        (["--policy", f"hf:{tmp_path}"], r"--policy hf:.*: no config.json there; give the folder"),
        (["--policy", f"hf:{folder}", "--max-length", 65], r"--max-length 65: .* at most 64 tok"),
        (["--policy", f"hf:{folder}"], r"--max-length 1024: .* at most 64 tokens"),
    ]:
        with pytest.raises(ValueError, match=match):
            policy_from_args(policy_arguments(*flags), ToyTokenizer())
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--policy hf:.*: neither .*safetensors"):
        HuggingFacePolicy(folder, ToyTokenizer())


def test_a_policy_with_another_tokenizer_is_refused(tmp_path):
    """Size of the model, size of the tokenizer, one token, the EOS: both values are shown."""
    tokenizer = dolly_tokenizer(tmp_path)
    size = tokenizer.vocab_size
    small = save_hugging_face(tmp_path / "small", rows=90)
    with pytest.raises(ValueError, match=rf"hf:.*: 90 rows in its vocabulary, .* has {size}"):
        HuggingFacePolicy(small, tokenizer)
    folder = save_hugging_face(tmp_path / "model", rows=size)
    write_tokenizer(folder, tokenizer, change=500)
    with pytest.raises(ValueError, match=r"id 500 is 'changed' in its tokenizer and '.*' in --tok"):
        HuggingFacePolicy(folder, tokenizer)
    write_tokenizer(folder, tokenizer)
    HuggingFacePolicy(folder, tokenizer)
    with pytest.raises(ValueError, match=rf"its tokenizer has {size} tokens, .* has 100"):
        HuggingFacePolicy(folder, ToyTokenizer())
    write_tokenizer(folder, tokenizer, eos="<s>")
    with pytest.raises(ValueError, match=r"end of sequence is id 1 \('<s>'\), .* is id 2"):
        HuggingFacePolicy(folder, tokenizer)
