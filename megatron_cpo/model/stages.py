"""Forwards over rows of any length, through the pipeline stages of a Megatron model.

Training goes through Megatron's own schedules, which pass tensors of one fixed shape. What a policy
is asked has rows of any length, one token of each sample among them, so they are passed on here.
All ranks of a replica call the same methods in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_cpo.model.attention import TreeAttention
from megatron_cpo.model.memory import PrefixMemory
from megatron_cpo.model.rope import DepthRotaryEmbedding
from megatron_cpo.model.vocabulary import NO_IDS, VocabShard
from megatron_cpo.tree import Ints

Head = Callable[[Tensor, VocabShard], Tensor]
"""What the last stage makes of the hidden states of a row, [S, H], and its output layer."""


class StagedModel:
    """A model with tree attention on this rank, and its place in the pipeline.

    Args:
        chunks: of this rank, with tree attention in place, in evaluation mode.
        vocab_size: the tokenizer's, without padding rows.
        positions: most tokens of a sequence.
        row_tokens: tokens of a row; a longer sequence has a row of its own.
        unused: see `VocabShard`.
    """

    def __init__(
        self,
        chunks: list[Any],
        vocab_size: int,
        positions: int,
        row_tokens: int,
        unused: Ints = NO_IDS,
    ) -> None:
        from megatron.core import parallel_state

        self.chunks, self._vocab_size, self._row_tokens = chunks, vocab_size, row_tokens
        self._unused = unused
        self.device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = torch.distributed.get_process_group_ranks(self._stages)
        self._stage = self._stages.rank()
        vocab_group = parallel_state.get_tensor_model_parallel_group()
        self.vocab_group = vocab_group if vocab_group.size() > 1 else None
        """Ranks that have the vocabulary together, equal parts in order; None: this one has all."""
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._attention = [m for m in modules if isinstance(m, TreeAttention)]
        for module in modules:
            if isinstance(module, DepthRotaryEmbedding):
                module.depths = positions

    def run(self, sequences: Sequence[Ints], head: Head) -> Tensor | None:
        """One forward over a row of sequences, each a chain; `head`'s result on the last stage."""
        lengths = [len(s) for s in sequences]
        size = sum(lengths)
        width = self.width(size)
        tokens = np.zeros(width, dtype=np.int64)
        tokens[:size] = np.concatenate(sequences)
        depths = np.zeros(width, dtype=np.int64)
        depths[:size] = np.concatenate([np.arange(n) for n in lengths])
        ends = np.arange(1, width + 1)
        ends[:size] = np.repeat(np.cumsum(lengths), lengths)
        return self.run_row(tokens, depths, ends, head)

    def run_row(
        self,
        tokens: NDArray[np.int64],
        depths: NDArray[np.int64],
        subtree_end: NDArray[np.int64],
        head: Head,
    ) -> Tensor | None:
        """One forward over a row [S]; `head`'s result on the last stage, None on the others."""
        row = [torch.from_numpy(a)[None].to(self.device) for a in (tokens, depths, subtree_end)]

        def processor(
            *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any
        ) -> Tensor:
            weight = output_layer.weight if output_weight is None else output_weight
            shard = VocabShard(weight, self._vocab_size, output_layer.tp_group, self._unused)
            return head(hidden_states.flatten(0, 1), shard)

        return self.through_stages(
            len(tokens), lambda chunk: chunk(*row, output_processor=processor)
        )

    def remember(self, memory: PrefixMemory | None) -> None:
        """Let attention read into a memory and grow from it; None: rows stand alone again."""
        for attention in self._attention:
            attention.memory = memory

    def through_stages(self, tokens: int, call: Callable[[Any], Any]) -> Any:
        """`call` each chunk in the order of the layers, hidden states passed on between stages.

        One row at a time: a stage waits for those before it.
        """
        from megatron.core.utils import get_attr_wrapped_model

        last = len(self._ranks) - 1
        for at, chunk in enumerate(self.chunks):
            config = chunk.config
            if at or self._stage:
                hidden = torch.empty(
                    (tokens, 1, config.hidden_size),
                    dtype=config.pipeline_dtype or config.params_dtype,
                    device=self.device,
                )
                torch.distributed.recv(hidden, self._ranks[self._stage - 1], self._stages)
                get_attr_wrapped_model(chunk, "set_input_tensor")(hidden)
            output = call(chunk)
            if at == len(self.chunks) - 1 and self._stage == last:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            following = self._ranks[(self._stage + 1) % len(self._ranks)]
            torch.distributed.send(hidden.contiguous(), following, self._stages)
        return None

    def share(self, found: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the last stage found, on every stage."""
        if len(self._ranks) == 1:
            assert found is not None
            return found
        if found is None:
            found = torch.empty(shape, dtype=dtype, device=self.device)
        torch.distributed.broadcast(found.contiguous(), self._ranks[-1], self._stages)
        return found

    def rows(self, lengths: list[int]) -> Iterator[list[int]]:
        """Runs of consecutive sequences that fit in a row together."""
        row: list[int] = []
        size = 0
        for i, length in enumerate(lengths):
            if row and size + length > self._row_tokens:
                yield row
                row, size = [], 0
            row.append(i)
            size += length
        if row:
            yield row

    def width(self, tokens: int) -> int:
        """Tokens of a row's tensors: on a GPU, which compiles attention for a shape, whole rows."""
        if self.device.type != "cuda":
            return tokens
        return -(-tokens // self._row_tokens) * self._row_tokens
