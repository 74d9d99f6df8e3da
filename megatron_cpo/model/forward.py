"""From collated rows to log-probs: the forward path that training and scoring share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_cpo.model.context_parallel import (
    context_group,
    own_indices,
    sum_over_context,
    to_device,
)
from megatron_cpo.model.logprobs import Queries, query_logps
from megatron_cpo.model.output_layer import answering
from megatron_cpo.tree import Ints, build_tree

Batch = dict[str, Tensor]
"""Collated rows: arrays of `groups.rows.Row` with a leading dimension B, and the batch totals."""


def candidate_logps(logps: Tensor, first_slot: Tensor, last_slot: Tensor, slots: int) -> Tensor:
    """Sum of the queries' log-probs over each candidate slot, [slots] float32, nats.

    Under context parallelism a rank has its own queries only, and the sums are over all ranks'.

    Args:
        logps: [Q] log-prob of each query of this rank.
        first_slot, last_slot: [Q] the slots [first, last) whose candidate passes through the query.

    A query opens at its first slot and closes at its last, so a running sum over the slots gives
    all candidates in O(Q + slots). In float64, because what is opened is subtracted again.
    """
    edges = torch.zeros(slots + 1, dtype=torch.float64, device=logps.device)
    wide = logps.double()
    edges = edges.index_add(0, first_slot, wide).index_add(0, last_slot, -wide)
    return sum_over_context(edges.cumsum(0)[:-1].float())


class RowForward:
    """Runs a Megatron model with tree attention on rows.

    Args:
        vocab_size: the tokenizer's, without padding rows.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, batch: Batch, model: Any) -> tuple[Tensor, Batch]:
        """Run the model on collated rows.

        Args:
            batch: collated rows on the CPU, [B, ...] each (`groups.rows.Row`).

        Returns:
            On the last pipeline stage the log-probs of the queries at this context-parallel rank's
            tokens, [Q] float32; elsewhere the hidden states for the next stage. And the batch on
            the device, with these queries flattened: `first_slot`, `last_slot`, `lm`, [Q] each; and
            `padding`, [B, S], see `padding_tokens`.
        """
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        # All on the CPU, where the loader left it: on a GPU it would wait for the device.
        own = own_indices(batch["tokens"].shape[1], context_group())
        positions, targets = _own_queries(batch, own)
        queries = Queries.of(positions, targets, device)
        real = targets >= 0
        slots = batch["candidate_mask"][0].numel()
        offset = slots * torch.arange(len(real))[:, None]
        flat = {
            "first_slot": (batch["query_first_slot"] + offset)[real],
            "last_slot": (batch["query_last_slot"] + offset)[real],
            "lm": batch["query_lm"][real],
            "own_tokens": batch["tokens"][:, own],
            "own_position_ids": batch["position_ids"][:, own],
            "padding": padding_tokens(batch),
        }
        if has_experts(model):
            flat["own_padding"] = flat["padding"][:, own]
        on_device = {n: to_device(t, device) for n, t in (batch | flat).items()}
        extra = {"padding_mask": on_device["own_padding"]} if "own_padding" in flat else {}
        output = model(
            on_device["own_tokens"],
            on_device["own_position_ids"],
            on_device["subtree_end"],
            output_processor=self._head,
            output_processor_context=queries,
            **extra,
        )
        return output, on_device

    def _head(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: Queries,
        in_its_call: bool = False,
        **_: Any,
    ) -> Tensor:
        """Megatron's `output_processor`: log-probs instead of logits.

        Args:
            in_its_call: the layer is being called as a module already (`hybrid`).
        """

        def head(hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
            logps = query_logps(
                hidden,
                output_layer.weight if weight is None else weight,
                context,
                self.vocab_size,
                output_layer.tp_group,
                output_layer.sequence_parallel,
            )
            return logps, None  # as the layer: its product, and a bias that is not added yet

        if in_its_call:
            return head(hidden_states, output_weight)[0]
        with answering(output_layer, head):
            return output_layer(hidden_states, weight=output_weight)[0]


def padding_tokens(batch: Batch) -> Tensor:
    """[B, S] bool: the tokens that only fill a row up: roots that nothing hangs from."""
    index = torch.arange(1, batch["tokens"].shape[1] + 1)
    padding = (batch["position_ids"] == 0) & (batch["subtree_end"] == index)
    rows, at = torch.nonzero(batch["query_targets"] >= 0, as_tuple=True)
    # A prefix of one token whose candidates are all empty is such a root as well, but is asked.
    padding[rows, batch["query_positions"][rows, at]] = False
    return padding


def has_experts(model: Any) -> bool:
    """Whether a model chunk, however wrapped, has mixture-of-experts layers."""
    from megatron.core.utils import get_model_config

    return getattr(get_model_config(model), "num_moe_experts", None) is not None


def _own_queries(batch: Batch, own: Tensor) -> tuple[Tensor, Tensor]:
    """Positions as indices into this rank's tokens, and targets: -1 where another rank has it."""
    place = torch.full((batch["tokens"].shape[1],), -1)
    place[own] = torch.arange(len(own))
    positions = place[batch["query_positions"]]
    targets = torch.where(positions >= 0, batch["query_targets"], -1)
    return positions.clamp(min=0), targets


def by_candidate(
    prefix: Ints, candidates: Sequence[Ints], logps: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A group's log-probs by candidate, from those by slot."""
    order = build_tree(prefix, candidates).candidate_order
    result = np.empty(len(order), dtype=np.float32)
    result[order] = logps[: len(order)]
    return result
