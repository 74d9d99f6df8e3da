"""Rows of token trees against what every peer runs: K padded sequences through plain Megatron.

The slow twin is Megatron's own GPTModel with its own attention on [K, longest] padded rows, a
log-softmax over the whole vocabulary and an explicit loop over eq. 1 and eq. 2. The fast path must
give the same candidate log-probs, the same loss and the same gradient of every parameter.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from harness.ranks import run_ranks
from harness.stores import VOCAB_SIZE, random_group
from megatron_cpo.groups.rows import RowShape, group_row
from megatron_cpo.groups.store import Group

BETA = 0.5
ARCHITECTURES = {
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "rope and GQA": {"position_embedding_type": "rope", "num_query_groups": 2},
    "tied embeddings": {"tied": True},
}


def build_model(position_embedding_type="learned_absolute", num_query_groups=4, tied=False) -> Any:
    """A 2-layer GPTModel of Megatron's local modules on one process."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=num_query_groups,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=512,
        max_sequence_length=64,
        position_embedding_type=position_embedding_type,
        share_embeddings_and_output_weights=tied,
    )


def awkward_groups() -> list[Group]:
    """Groups of several sizes; one with an empty negative and duplicates, one with K=1."""
    rng = np.random.default_rng(0)
    groups = [random_group(rng, 6, longest=25), random_group(rng, 4), random_group(rng, 6)]
    eod = np.array([VOCAB_SIZE], dtype=np.int32)
    awkward = random_group(rng, 5)
    awkward.candidates[2] = eod  # an empty answer: end of sequence at once
    awkward.candidates[3] = awkward.candidates[0].copy()
    return [*groups, awkward, random_group(rng, 1)]


def padded_twin(model: Any, group: Group) -> torch.Tensor:
    """[K] summed log-probs by K right-padded rows and logits of every position."""
    rows = [np.concatenate([group.prefix, c]) for c in group.candidates]
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    for k, row in enumerate(rows):
        tokens[k, : len(row)] = torch.from_numpy(row)
    masked = torch.ones(longest, longest, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(longest).expand_as(tokens)
    logits = model(tokens, positions, masked)[..., : VOCAB_SIZE + 1]
    logps = torch.log_softmax(logits.float(), dim=-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    p = len(group.prefix)
    return torch.stack([logps[k, p - 1 : len(row) - 1].sum() for k, row in enumerate(rows)])


def explicit_loss(objective: str, logps: torch.Tensor, group: Group) -> torch.Tensor:
    """Eq. 1 or eq. 2 of the paper, written out."""
    scores = BETA * (logps - torch.from_numpy(group.reference_logps))
    order = [0] if objective == "best" else np.argsort(group.ranks, kind="stable").tolist()
    remaining, loss = list(range(len(scores))), torch.zeros(())
    for k in order:
        loss = loss - (scores[k].exp() / scores[remaining].exp().sum()).log()
        remaining.remove(k)
    return loss


def compare(architecture: dict[str, Any], objective: str) -> dict[str, float]:
    """Worst relative differences between the two paths, by what is compared."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_cpo.model.attach import attach_tree_attention
    from megatron_cpo.model.forward import RowForward, candidate_logps
    from megatron_cpo.objective import OBJECTIVES

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model, tree_model = build_model(**architecture), build_model(**architecture)
    tree_model.load_state_dict(model.state_dict())
    attach_tree_attention([tree_model])
    groups = awkward_groups()

    slow_logps = [padded_twin(model, group) for group in groups]
    for group, logps in zip(groups, slow_logps, strict=True):
        group.reference_logps[:] = logps.detach().numpy() + np.linspace(-2, 2, len(logps))
    pairs = zip(slow_logps, groups, strict=True)
    slow_loss = sum(explicit_loss(objective, logps, group) for logps, group in pairs)
    slow_loss.backward()

    shape = RowShape(tokens=320, queries=320, groups=3, candidates=6)
    rows = [group_row(groups[:3], shape, False), group_row(groups[3:], shape, False)]
    output, batch = RowForward(VOCAB_SIZE + 1)(default_collate(rows), tree_model)
    mask = batch["candidate_mask"].flatten(0, 1)
    logps = candidate_logps(output, batch["first_slot"], batch["last_slot"], mask.numel())
    logps = logps.view_as(mask)
    reference, ranks = (batch[n].flatten(0, 1) for n in ("reference_logps", "ranks"))
    fast_loss = OBJECTIVES[objective](logps, reference, ranks, BETA, mask).sum()
    fast_loss.backward()

    from megatron_cpo.tree import build_tree

    worst = {"loss": abs(float(fast_loss / slow_loss) - 1), "logps": 0.0}
    slots = [g for g in range(len(mask)) if mask[g, 0]]
    assert len(slots) == len(groups)
    for g, group, slow in zip(slots, groups, slow_logps, strict=True):
        order = torch.from_numpy(build_tree(group.prefix, group.candidates).candidate_order).long()
        off = (logps[g, : len(slow)] - slow[order]).abs() / slow[order].abs()
        worst["logps"] = max(worst["logps"], float(off.max()))
    twins = dict(model.named_parameters())
    for name, parameter in tree_model.named_parameters():
        slow, fast = twins[name].grad, parameter.grad
        worst[name] = float((fast - slow).norm() / slow.norm())
    assert math.isfinite(float(fast_loss)) and len(worst) > 10
    return worst


@pytest.mark.parametrize("objective", ["best", "ranked"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trees_equal_padded_rows(architecture: str, objective: str) -> None:
    """Loss, candidate log-probs and every parameter's gradient within 1e-5 relative, float32."""
    [worst] = run_ranks(compare, 1, ARCHITECTURES[architecture], objective)
    assert max(worst.values()) < 1e-5, worst
