"""Hooks of the output layer: each runs once a forward, whatever its kind and the model's."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from harness.ranks import run_ranks
from harness.stores import VOCAB_SIZE, random_group
from megatron_cpo.groups.rows import RowShape, group_row
from tests.runs import MODEL

HYBRID = ["--hybrid-layer-pattern", "*-*-", *MODEL[2:]]
ORDER = ["before", "before, with weight", "after", "after, with weight"]


def with_its_own_processor(chunk: Any) -> None:
    """Make a HybridModel of 0.19 one that has GPTModel's output parameters itself."""
    from megatron.core.models.hybrid import hybrid_model

    class HybridModel(hybrid_model.HybridModel):
        def forward(
            self,
            *args: Any,
            output_processor: Any = None,
            output_processor_context: Any = None,
            **kwargs: Any,
        ) -> Any:
            self.post_process = False
            hidden = super().forward(*args, **kwargs)
            self.post_process = True
            return output_processor(
                hidden_states=hidden,
                output_layer=self.output_layer,
                output_weight=self.shared_embedding_or_output_weight(),
                context=output_processor_context,
            )

    chunk.__class__ = HybridModel


def hooked(argv: list[str], own: bool = False) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """On a rank: what hooks saw of a forward, its log-probs, and those with a weight of zeros."""
    from megatron_cpo import install
    from megatron_cpo.host.compat import build_gpt
    from megatron_cpo.host.loading import score_args, start_megatron
    from megatron_cpo.model.attach import attach_tree_attention
    from megatron_cpo.model.forward import RowForward

    def attach(chunks: list[Any]) -> list[Any]:
        if own:
            with_its_own_processor(chunks[0])
        return attach_tree_attention(chunks)

    install()
    sys.argv = ["script", *argv, "--seq-length", "128"]
    args = score_args()
    start_megatron()
    [model] = build_gpt(args, attach)
    layer, seen = model.output_layer, []

    def say(what: str, module: Any, given: tuple[Any, ...], *more: Any) -> None:
        known = [len(given) == 1, module is layer]
        if "with weight" in what:
            known.append("weight" in more[0])
        if "after" in what:
            known.append(more[-1][1] is None)
        seen.append(what if all(known) else f"{what}: {known}")

    for what in ORDER:
        kind = "forward_pre" if "before" in what else "forward"
        register = getattr(layer, f"register_{kind}_hook")
        register(lambda *a, what=what: say(what, *a), with_kwargs="with weight" in what)
    shape = RowShape(tokens=128, queries=128, groups=1, candidates=4)
    group = random_group(np.random.default_rng(0), 4)
    batch = default_collate([group_row([group], shape, False)])
    logps, _ = RowForward(VOCAB_SIZE + 1)(batch, model)
    assert "forward" not in vars(layer), "it is put back"
    found = list(seen)
    weight = torch.zeros_like(model.shared_embedding_or_output_weight())
    layer.register_forward_pre_hook(
        lambda _, given, named: (given, named | {"weight": weight}), with_kwargs=True
    )
    uniform, _ = RowForward(VOCAB_SIZE + 1)(batch, model)
    return found, logps.detach(), uniform.detach()


@pytest.mark.parametrize("flags", [MODEL, [*MODEL, "--untie-embeddings-and-output-weights"]])
def test_hooks_of_a_gpt(flags: list[str]) -> None:
    """And what one of them changes is what the head computes with: log 1 / V with weights of 0."""
    [(seen, logps, uniform)] = run_ranks(hooked, 1, flags)
    assert seen == ORDER
    assert logps.std() > 0.1
    torch.testing.assert_close(uniform, torch.full_like(uniform, -math.log(VOCAB_SIZE + 1)))


def test_hooks_of_a_hybrid_and_of_one_that_needs_no_help() -> None:
    """A later HybridModel that hands over its hidden states gives the same log-probs."""
    [(seen, logps, uniform)] = run_ranks(hooked, 1, HYBRID)
    [(theirs, same, again)] = run_ranks(hooked, 1, HYBRID, own=True)
    assert seen == theirs == ORDER
    assert torch.equal(logps, same) and torch.equal(uniform, again)
    torch.testing.assert_close(uniform, torch.full_like(uniform, -math.log(VOCAB_SIZE + 1)))
