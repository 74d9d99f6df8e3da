"""Sampling continuations: the policies beside Hugging Face `generate` with the same weights.

The same prompts in one batch, the same number of tokens a continuation (nothing ends early), top-k
50, one sample a prefix and eleven. And greedily over 200 prompts, as `evaluate generate` does.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.setting import Rows, Setting, build_model, group_store, side_by_side
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.megatron import MegatronPolicy
from megatron_cpo.policies.policy import Policy, Sampling
from megatron_cpo.tree import Ints

PROMPTS = 8
GREEDY_PROMPTS = 200
GREEDY = Sampling(top_k=1)
NEW_TOKENS = 32
SAMPLES = (1, 11)


def bench_generation(setting: Setting) -> Rows:
    """Rows of the table."""
    reader = group_store(setting)
    model = build_model(setting, trees=True).eval()
    twin = hugging_face_twin(model, setting.vocab)
    folder = f"{setting.folder}/twin"
    twin.save_pretrained(folder)
    tokenizer = SimpleNamespace(vocab_size=setting.vocab, eod=setting.vocab - 1)
    ours = MegatronPolicy(
        [model],
        {},
        setting.vocab,
        tokenizer.eod,
        setting.max_length,
        setting.row_tokens,
        batch=PROMPTS * max(SAMPLES),
    )
    dtype = str(setting.dtype).removeprefix("torch.")
    theirs = HuggingFacePolicy(folder, tokenizer, batch=PROMPTS * max(SAMPLES), dtype=dtype)
    ours._eod = theirs._eod = -1  # never drawn: as many tokens from each
    ours.ends = theirs.ends = frozenset({-1})
    longest = setting.max_length - NEW_TOKENS
    many = [reader[i % len(reader)].prefix[-longest:] for i in range(GREEDY_PROMPTS)]
    prompts = many[:PROMPTS]
    rows = []
    for count in SAMPLES:
        steps: dict[str, Any] = {
            "Megatron policy": lambda _, n=count: _sample(ours, prompts, n),
            "Hugging Face policy": lambda _, n=count: _sample(theirs, prompts, n),
            "generate": lambda _, n=count: _generate(twin, prompts, n),
        }
        times = side_by_side(steps, setting.repeats)
        tokens = PROMPTS * count * NEW_TOKENS
        rows += [
            (
                f"an: {name}, {PROMPTS} prefixes x {count}",
                f"{tokens / times.median(name):,.0f} tokens/s, "
                f"{times.ratio('generate', name):.2f} x generate",
            )
            for name in times
        ]
    steps = {
        "Megatron policy": lambda _: _sample(ours, many, 1, GREEDY),
        "Hugging Face policy": lambda _: _sample(theirs, many, 1, GREEDY),
        "generate": lambda _: _generate(twin, many, 1, do_sample=False),
    }
    ours._batch = theirs._batch = GREEDY_PROMPTS
    times = side_by_side(steps, setting.repeats)
    return rows + [
        (
            f"greedy: {name}, {GREEDY_PROMPTS} prompts",
            f"{GREEDY_PROMPTS * NEW_TOKENS / times.median(name):,.0f} tokens/s, "
            f"{times.ratio('generate', name):.2f} x generate",
        )
        for name in times
    ]


def hugging_face_twin(model: Any, vocab: int) -> Any:
    """A GPT-2 with the weights of a Megatron GPT of local modules, tied, with erf-GELU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=model.max_sequence_length,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_attention_heads,
            activation_function="gelu",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    weights = model.state_dict()
    found: dict[str, torch.Tensor] = {
        "wte.weight": weights["embedding.word_embeddings.weight"][:vocab],
        "wpe.weight": weights["embedding.position_embeddings.weight"],
        "ln_f.weight": weights["decoder.final_layernorm.weight"],
        "ln_f.bias": weights["decoder.final_layernorm.bias"],
    }
    for layer in range(config.num_layers):
        for name, source in (
            ("ln_1", "input_layernorm"),
            ("attn.c_attn", "self_attention.linear_qkv"),
            ("attn.c_proj", "self_attention.linear_proj"),
            ("ln_2", "pre_mlp_layernorm"),
            ("mlp.c_fc", "mlp.linear_fc1"),
            ("mlp.c_proj", "mlp.linear_fc2"),
        ):
            for part in ("weight", "bias"):
                tensor = weights[f"decoder.layers.{layer}.{source}.{part}"]
                if name == "attn.c_attn":  # Megatron: q, k, v of each head; GPT-2: of all heads
                    heads = tensor.unflatten(0, (config.num_attention_heads, 3, -1))
                    tensor = heads.transpose(0, 1).flatten(0, 2)
                found[f"h.{layer}.{name}.{part}"] = tensor.t() if tensor.dim() == 2 else tensor
    twin.transformer.load_state_dict(found)
    return twin.to(next(model.parameters()))


def _sample(
    policy: Policy, prompts: list[Ints], count: int, sampling: Sampling | None = None
) -> None:
    limits = [NEW_TOKENS + 1] * len(prompts)  # EOD is put behind
    rngs = [np.random.default_rng(i) for i in range(len(prompts))]
    drawn = policy.sample(prompts, limits, count, rngs, sampling or Sampling())
    assert all(len(tokens) == NEW_TOKENS + 1 for found in drawn for tokens in found)


@torch.no_grad()
def _generate(model: Any, prompts: list[Ints], count: int, do_sample: bool = True) -> None:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=model.device)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        seen[row, longest - len(prompt) :] = 1
    found = model.generate(
        ids,
        attention_mask=seen,
        do_sample=do_sample,
        top_k=50 if do_sample else None,
        max_new_tokens=NEW_TOKENS,
        num_return_sequences=count,
        pad_token_id=0,
    )
    assert found.shape == (len(prompts) * count, longest + NEW_TOKENS)
