"""A Megatron checkpoint as a policy, at the tensor- and pipeline-parallel sizes of its flags.

Everything is a forward over rows of tokens, by the path that training and scoring use: chains for
distributions and hidden states, token trees for log-probs, and one token of each sample while
continuations grow (`model.memory`). Nothing is padded but, on a GPU, the end of a row.

All ranks of a replica call the same methods with the same arguments; what the last pipeline stage
finds goes to the others. Data-parallel replicas know nothing of each other.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from megatron_cpo.checkpoints.arguments import check_model
from megatron_cpo.checkpoints.identity import require_checkpoint, require_folder
from megatron_cpo.groups.kinds import NEEDS_POLICY
from megatron_cpo.groups.rows import RowShape, group_row
from megatron_cpo.groups.store import Group, no_scores
from megatron_cpo.host.loading import load_model, start_megatron
from megatron_cpo.host.waiting import on_first_rank
from megatron_cpo.model.attach import attach_tree_attention
from megatron_cpo.model.forward import RowForward, by_candidate, candidate_logps
from megatron_cpo.model.memory import PrefixMemory
from megatron_cpo.model.stages import Head, StagedModel
from megatron_cpo.model.vocabulary import NO_IDS, VocabShard
from megatron_cpo.model.workspace import CHUNK_LOGITS
from megatron_cpo.policies.choosing import choose, draw
from megatron_cpo.policies.decoding import sample_in_batches
from megatron_cpo.policies.ends import checkpoint_ends
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.vocabulary import unused_ids, vocabulary_size
from megatron_cpo.tree import Ints, build_tree


class MegatronPolicy:
    """The `Policy` of a loaded Megatron model.

    Args:
        chunks: a model with tree attention in place, in evaluation mode (`host.loading`).
        identity: of its checkpoint.
        vocab_size: the tokenizer's `vocabulary_size`, without padding rows.
        eod: the tokenizer's.
        positions: most tokens of a sequence.
        row_tokens: tokens of a row of chains or trees; a longer one has a row of its own.
        batch: most samples that grow at a time.
        unused: ids below `vocab_size` that no token has, and that are not drawn.
        ends: tokens at which the model stops, beside `eod`.
    """

    kinds: tuple[str, ...] = NEEDS_POLICY
    forks = False  # its process groups stay behind

    def __init__(
        self,
        chunks: list[Any],
        identity: dict[str, Any],
        vocab_size: int,
        eod: int,
        positions: int,
        row_tokens: int,
        batch: int = 256,
        unused: Ints = NO_IDS,
        ends: Collection[int] = (),
    ) -> None:
        self.chunks, self.identity = chunks, identity
        self.ends = frozenset({eod, *ends})
        self.positions: int | None = positions
        self._eod, self._batch = eod, batch
        self._model = StagedModel(chunks, vocab_size, positions, row_tokens, unused)
        self._forward = RowForward(vocab_size)

    @staticmethod
    def load(args: Any, tokenizer: Any, batch: int = 256) -> "MegatronPolicy":
        """The policy of Megatron's parsed and validated arguments; see `host.loading.score_args`.

        Raises:
            ValueError: no checkpoint at `--load`, one of another model or vocabulary, or a layout
                that cannot grow sequences.
        """
        _check_layout(args)
        require_folder(args)
        check_model(args, vocabulary_size(tokenizer))
        # The same weights, and rows of any length: nothing is gained by splitting so few tokens.
        args.sequence_parallel = False
        start_megatron()
        identity = on_first_rank(lambda: require_checkpoint(args))
        return MegatronPolicy(
            load_model(args, attach_tree_attention),
            {"backend": "megatron", **identity, "dtype": str(args.params_dtype).split(".")[-1]},
            vocabulary_size(tokenizer),
            int(tokenizer.eod),
            args.max_position_embeddings,
            args.seq_length,
            batch,
            unused_ids(tokenizer),
            checkpoint_ends(args.load, args.tokenizer_model, vocabulary_size(tokenizer)),
        )

    @torch.no_grad()
    def sample(
        self,
        prefixes: Sequence[Ints],
        limits: Sequence[int],
        count: int,
        rngs: Sequence[np.random.Generator],
        sampling: Sampling,
        stops: Collection[int] = (),
    ) -> list[list[Ints]]:
        """See `Policy`."""

        def open_session(batch: list[Ints], copies: int) -> _MegatronSession:
            return _MegatronSession(self._model, batch, copies, sampling)

        try:
            return sample_in_batches(
                open_session, prefixes, limits, count, rngs, self._eod, self.ends.union(stops),
                self._batch,
            )  # fmt: skip
        finally:
            self._model.remember(None)

    @torch.no_grad()
    def replacements(
        self,
        prefixes: Sequence[Ints],
        truths: Sequence[Ints],
        places: Sequence[NDArray[np.bool_]],
        tries: int,
        rngs: Sequence[np.random.Generator],
    ) -> list[NDArray[np.int32]]:
        """See `Policy`."""
        count = len(places[0]) if len(places) else 0
        sequences = [np.concatenate([x, y[:-1]]) for x, y in zip(prefixes, truths, strict=True)]
        uniforms = [rng.random((tries, *p.shape)) for p, rng in zip(places, rngs, strict=True)]
        where = [np.flatnonzero(p.any(axis=0)) for p in places]
        result = [
            np.broadcast_to(t, (tries, *p.shape)).copy()
            for t, p in zip(truths, places, strict=True)
        ]
        for row in self._model.rows([len(s) for s in sequences]):
            starts = np.cumsum([0, *(len(sequences[i]) for i in row)])
            # A place is predicted from the token before it.
            before = np.concatenate(
                [s + len(prefixes[i]) - 1 + where[i] for s, i in zip(starts, row, strict=False)]
            )
            numbers = np.concatenate(
                [uniforms[i][:, :, where[i]].reshape(tries * count, -1).T for i in row]
            )
            head = _draws(torch.from_numpy(before), torch.from_numpy(numbers))
            drawn = self._model.share(
                self._model.run([sequences[i] for i in row], head), numbers.shape, torch.int64
            )
            ends = np.cumsum([len(where[i]) for i in row])[:-1]
            for i, tokens in zip(row, np.split(drawn.cpu().numpy(), ends), strict=True):
                tokens = tokens.T.reshape(tries, count, -1)
                kept = result[i][:, :, where[i]]
                result[i][:, :, where[i]] = np.where(places[i][:, where[i]], tokens, kept)
        return result

    @torch.no_grad()
    def embed(self, sequences: Sequence[Ints]) -> NDArray[np.float32]:
        """See `Policy`."""
        width = self.chunks[0].config.hidden_size
        result = np.zeros((len(sequences), width), dtype=np.float32)
        filled = [i for i in range(len(sequences)) if len(sequences[i])]
        for part in self._model.rows([len(sequences[i]) for i in filled]):
            row = [filled[j] for j in part]
            lengths = [len(sequences[i]) for i in row]
            means = self._model.run([sequences[i] for i in row], _means(lengths))
            shared = self._model.share(means, (len(row), width), torch.float32)
            result[row] = shared.cpu().numpy()
        return result

    @torch.no_grad()
    def logps(
        self, prefixes: Sequence[Ints], candidates: Sequence[Sequence[Ints]]
    ) -> list[NDArray[np.float32]]:
        """See `Policy`. By token trees, as training and scoring."""
        trees = [build_tree(x, ys) for x, ys in zip(prefixes, candidates, strict=True)]
        result: list[NDArray[np.float32]] = []
        for row in self._model.rows([len(tree.tokens) for tree in trees]):
            groups = [_group(prefixes[i], candidates[i]) for i in row]
            shape = RowShape(
                tokens=self._model.width(sum(len(trees[i].tokens) for i in row)),
                queries=sum(len(trees[i].query_targets) for i in row),
                groups=len(row),
                candidates=max(len(candidates[i]) for i in row),
            )
            batch = default_collate([group_row(groups, shape, lm_prefix=False)])
            slots = shape.groups * shape.candidates
            sums = None
            output = self._model.through_stages(shape.tokens, partial(self._forward, batch))
            if output is not None:
                logps, on_device = output
                sums = candidate_logps(
                    logps, on_device["first_slot"], on_device["last_slot"], slots
                )
            by_slot = self._model.share(sums, (slots,), torch.float32).cpu().numpy()
            by_slot = by_slot.reshape(shape.groups, shape.candidates)
            result += [
                by_candidate(prefixes[i], candidates[i], logps)
                for i, logps in zip(row, by_slot, strict=True)
            ]
        return result


class _MegatronSession:
    """Samples that grow in a `PrefixMemory`; see `decoding.Session`."""

    def __init__(
        self, model: StagedModel, prefixes: list[Ints], count: int, sampling: Sampling
    ) -> None:
        self._model, self._sampling = model, sampling
        lengths = [len(prefix) for prefix in prefixes]
        self._memory = PrefixMemory(lengths, count)
        model.remember(self._memory)
        found = []
        for row in model.rows(lengths):
            self._memory.row_tokens = sum(lengths[i] for i in row)
            last = torch.from_numpy(np.cumsum([lengths[i] for i in row]) - 1)
            found.append(model.run([prefixes[i] for i in row], self._reader(last)))
        self._memory.row_tokens = None
        self._depths = np.repeat(lengths, count)
        # Logits, of this rank's vocabulary, exist on the last stage alone.
        self._logits: Tensor | None = None
        if parts := [part for part in found if part is not None]:
            self._logits = torch.cat(parts).repeat_interleave(count, dim=0)

    def choose(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The next token of each row."""
        tokens = None
        if self._logits is not None:
            numbers = torch.from_numpy(uniforms).to(self._logits.device)
            group = self._model.vocab_group
            first = self._logits.shape[1] * group.rank() if group else 0
            tokens = choose(self._logits, numbers, self._sampling, first, group)
        return self._model.share(tokens, uniforms.shape, torch.int64).cpu().numpy()

    def advance(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Keep these rows and append a token to each."""
        self._memory.grow(rows, self._model.device)
        self._depths = self._depths[rows]
        ends = np.arange(1, len(rows) + 1)  # the mask is not looked at
        self._logits = self._model.run_row(tokens, self._depths, ends, self._reader())
        self._depths = self._depths + 1

    def _reader(self, positions: Tensor | None = None) -> Head:
        """Logits at these positions of a row, or at all."""

        def head(hidden: Tensor, shard: VocabShard) -> Tensor:
            return shard.drawable(hidden if positions is None else hidden[positions])

        return head


def _check_layout(args: Any) -> None:
    """Raise ValueError for a layout at which sequences cannot grow by a token."""
    if args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size}: a policy that draws negatives "
            "reads rows of a few tokens, which are not split; use 1, and more data-parallel ranks"
        )
    if args.num_experts:
        raise ValueError(
            f"--num-experts {args.num_experts}: experts are not tested with rows of any length, so "
            "a policy that draws negatives must be dense; draw them with a back-end of its own"
        )


def _draws(positions: Tensor, uniforms: Tensor) -> Head:
    """Tokens [P, M] drawn at these positions by numbers [P, M]; logits of a chunk at a time."""

    def head(hidden: Tensor, shard: VocabShard) -> Tensor:
        step = max(CHUNK_LOGITS // len(shard.weight), 1)
        numbers = uniforms.to(hidden.device)
        drawn = [
            draw(shard.drawable(hidden[some]), some_numbers, shard.first, shard.group)
            for some, some_numbers in zip(positions.split(step), numbers.split(step), strict=True)
        ]
        return torch.cat(drawn)

    return head


def _means(lengths: list[int]) -> Head:
    """Mean hidden state of each sequence of a row, [sequences, H] float32."""

    def head(hidden: Tensor, shard: VocabShard) -> Tensor:
        parts = hidden[: sum(lengths)].float().split(lengths)
        return torch.stack([part.mean(dim=0) for part in parts])

    return head


def _group(prefix: Ints, candidates: Sequence[Ints]) -> Group:
    """A group of which only the tokens matter."""
    k = len(candidates)
    zeros = np.zeros(k, dtype=np.int32)
    return Group(
        prefix, list(candidates), zeros, np.zeros(k, dtype=np.float32), zeros, no_scores(k)
    )
