"""A Hugging Face causal LM as a policy, read from a local folder.

Sequences are padded on the right where every position is wanted: a causal model never looks there.
Sampling pads on the left, so that all rows grow at the same place: prefixes are read once, the
cache is copied to the samples, and finished rows are dropped from it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_cpo.checkpoints.formats.opening import open_model
from megatron_cpo.groups.kinds import NEEDS_POLICY
from megatron_cpo.host.node import once_a_node
from megatron_cpo.model.workspace import CHUNK_LOGITS
from megatron_cpo.policies.choosing import choose, draw
from megatron_cpo.policies.decoding import Session, sample_in_batches
from megatron_cpo.policies.ends import declared_ends
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.policies.same_tokenizer import check_tokenizer
from megatron_cpo.records.vocabulary import unused_ids, vocabulary_size
from megatron_cpo.tree import Ints

_NO_LM = ("Classification", "QuestionAnswering", "RewardModel", "MaskedLM")
"""How architectures are called whose head predicts no next token."""


def _mean(hidden: Tensor) -> Tensor:
    return hidden.mean(0)


class HuggingFacePolicy:
    """The `Policy` of a folder that `AutoModelForCausalLM` reads; nothing is downloaded.

    Args:
        path: the folder.
        tokenizer: Megatron's, of the build. It has to be the model's own, which is compared where
            the folder has one.
        batch: most sequences at a time.
        dtype: name of a torch dtype, of the weights.
        flag: how the user named the model.

    Raises:
        ValueError: there is no such model, its tokenizer is another one, or no batch.
    """

    kinds: tuple[str, ...] = NEEDS_POLICY
    forks = True

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        batch: int = 256,
        dtype: str = "float32",
        flag: str = "--policy",
    ) -> None:
        from transformers import AutoModelForCausalLM

        named = f"{flag} hf:{path}"
        if batch < 1:
            raise ValueError(f"{named}: {batch} sequences at a time; its batch needs at least 1")
        try:
            self._files = open_model(Path(path))
        except ValueError as error:
            raise ValueError(f"{flag} hf:{error}") from error  # which begins with the path
        try:
            self._model, loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{named}: cannot be loaded ({error})") from error
        _require_whole(named, self._model, loaded)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device).eval()
        self._vocab_size, self._eod = vocabulary_size(tokenizer), int(tokenizer.eod)
        self._unused = torch.from_numpy(unused_ids(tokenizer)).long().to(self._device)
        self.ends = declared_ends(Path(path), self._vocab_size) | {self._eod}
        """Tokens at which the model stops."""
        check_tokenizer(named, path, self._model.config.vocab_size, tokenizer)
        self._batch = batch
        self._head_alone = self._applies_head_alone()
        self._dtype = dtype

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Name of the folder, digest of its weights and configuration, and dtype it computes in.

        One rank of a machine reads every byte for it, and tells the others.
        """
        found = once_a_node(f"model {self._files.folder.resolve()}", self._files.identity)
        return {"backend": "hugging face", **found, "dtype": self._dtype}

    @property
    def positions(self) -> int | None:
        """The config's `max_position_embeddings`, or its name in older models."""
        config = self._model.config
        return getattr(config, "max_position_embeddings", getattr(config, "n_positions", None))

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

        def open_session(batch: list[Ints], copies: int) -> Session:
            return _HuggingFaceSession(
                self._model, self._device, self._drawable, batch, copies, sampling
            )

        return sample_in_batches(
            open_session, prefixes, limits, count, rngs, self._eod, self.ends.union(stops),
            self._batch,
        )  # fmt: skip

    @torch.no_grad()
    def beams(
        self, prefixes: Sequence[Ints], limits: Sequence[int], beams: int, stops: Collection[int]
    ) -> list[Ints]:
        """The best continuation of each prefix by beam search, that of transformers.

        Args:
            limits: as in `sample`.
            beams: sequences that are kept at each step.
            stops: end tokens beside those that the model declares.
        """
        from transformers import GenerationConfig

        unused = self._unused.tolist() + list(
            range(self._vocab_size, self._model.config.vocab_size)
        )
        found = []
        for prefix, limit in zip(prefixes, limits, strict=True):
            config = GenerationConfig(
                num_beams=beams,
                do_sample=False,
                max_new_tokens=limit - 1,
                eos_token_id=sorted(self.ends.union(stops)),
                pad_token_id=self._eod,
                suppress_tokens=unused or None,
            )
            ids = torch.from_numpy(prefix.astype(np.int64))[None].to(self._device)
            # A fresh configuration alone: the folder's own penalties are no part of beam search.
            self._model.generation_config = config
            output = self._model.generate(ids, attention_mask=torch.ones_like(ids))
            tokens = output[0, len(prefix) :].cpu().numpy().astype(np.int32)
            ended = len(tokens) > 0 and int(tokens[-1]) in self.ends.union(stops)
            found.append(tokens if ended else np.append(tokens, np.int32(self._eod)))
        return found

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
        sequences = [np.concatenate(pair) for pair in zip(prefixes, truths, strict=True)]
        uniforms = [rng.random((tries, *p.shape)) for p, rng in zip(places, rngs, strict=True)]
        # A place is predicted from the token before it, and only places that some copy draws are.
        where = [np.flatnonzero(p.any(axis=0)) for p in places]
        before = [len(x) - 1 + at for x, at in zip(prefixes, where, strict=True)]
        result = [
            np.broadcast_to(t, (tries, *p.shape)).copy()
            for t, p in zip(truths, places, strict=True)
        ]
        for i, rows, logits in self._logits(sequences, before):
            at = where[i][rows]
            numbers = torch.from_numpy(uniforms[i][:, :, at]).flatten(0, 1).t()
            drawn = (
                draw(self._drawable(logits), numbers.to(logits.device).contiguous()).cpu().numpy()
            )
            drawn = drawn.T.reshape(tries, -1, len(at))
            result[i][:, :, at] = np.where(places[i][:, at], drawn, result[i][:, :, at])
        return result

    @torch.no_grad()
    def embed(
        self, sequences: Sequence[Ints], pool: Callable[[Tensor], Tensor] = _mean
    ) -> NDArray[np.float32]:
        """See `Policy`.

        Args:
            pool: from the last hidden states of a sequence, [tokens, hidden] float32, to [hidden].
        """
        width = self._model.get_output_embeddings().weight.shape[1]
        result = np.zeros((len(sequences), width), dtype=np.float32)
        for batch, ids in self._right_padded(sequences):
            hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                result[i] = pool(hidden[row, : len(sequences[i])].float()).cpu().numpy()
        return result

    @torch.no_grad()
    def logps(
        self, prefixes: Sequence[Ints], candidates: Sequence[Sequence[Ints]]
    ) -> list[NDArray[np.float32]]:
        """See `Policy`. Equal candidates of a record are scored once."""
        whole: dict[tuple[int, bytes], int] = {}
        sequences: list[Ints] = []
        before, targets = [], []
        for r, (x, ys) in enumerate(zip(prefixes, candidates, strict=True)):
            for y in ys:
                if whole.setdefault((r, y.tobytes()), len(sequences)) == len(sequences):
                    sequences.append(np.concatenate([x, y[:-1]]))
                    before.append(np.arange(len(x) - 1, len(x) - 1 + len(y)))
                    targets.append(torch.from_numpy(y.astype(np.int64)))
        sums = np.zeros(len(sequences))
        for i, rows, logits in self._logits(sequences, before):
            wanted = targets[i][rows].to(logits.device)[:, None]
            chosen = logits.gather(1, wanted)[:, 0] - logits.logsumexp(1)
            sums[i] += float(chosen.double().sum())
        return [
            np.array([sums[whole[r, y.tobytes()]] for y in ys], dtype=np.float32)
            for r, ys in enumerate(candidates)
        ]

    def _logits(
        self, sequences: Sequence[Ints], wanted: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Logits at the wanted positions: (sequence, a run of its wanted ones, [run, V] float32).

        Logits exist for one run of one sequence at a time, whatever the batch; where the model has
        to make them itself, for the wanted positions of one sequence.
        """
        step = max(CHUNK_LOGITS // self._model.config.vocab_size, 1)
        for batch, ids in self._right_padded(sequences):
            if self._head_alone:
                states = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                at = torch.from_numpy(wanted[i]).to(self._device)
                if not self._head_alone:
                    own = ids[row : row + 1, : len(sequences[i])]
                    output = self._model(input_ids=own, use_cache=False, logits_to_keep=at)
                for run in (slice(first, first + step) for first in range(0, len(at), step)):
                    if self._head_alone:
                        logits = self._model.get_output_embeddings()(states[row, at[run]])
                    else:
                        logits = output.logits[0, run]
                    yield i, run, self._mask(logits)

    def _mask(self, logits: Tensor) -> Tensor:
        """Float32 logits without the entries that only pad the vocabulary."""
        return logits[:, : self._vocab_size].float()

    def _drawable(self, logits: Tensor) -> Tensor:
        """The same without those of ids that no token has."""
        masked = self._mask(logits)
        return masked.index_fill(1, self._unused, -torch.inf) if len(self._unused) else masked

    def _right_padded(self, sequences: Sequence[Ints]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of like length: indices of the sequences, and their ids [rows, longest]."""
        order = [i for i in range(len(sequences)) if len(sequences[i])]
        order.sort(key=lambda i: len(sequences[i]))
        for first in range(0, len(order), self._batch):
            batch = order[first : first + self._batch]
            ids = np.full((len(batch), len(sequences[batch[-1]])), self._eod, dtype=np.int64)
            for row, i in enumerate(batch):
                ids[row, : len(sequences[i])] = sequences[i]
            yield batch, torch.from_numpy(ids).to(self._device)

    @torch.no_grad()
    def _applies_head_alone(self) -> bool:
        """Are its logits the output layer on the last hidden state, and nothing more?

        Some models scale or cap them, and are then asked for them: a sequence at a time, because
        `logits_to_keep` has the same positions for a whole batch.
        """
        ids = torch.tensor([[self._eod, 0, 1]], device=self._device)
        head = self._model.get_output_embeddings()
        plain = head(self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return bool(torch.equal(plain, self._model(input_ids=ids, use_cache=False).logits))


def _require_whole(flag: str, model: Any, loaded: dict[str, Any]) -> None:
    """ValueError where transformers made up weights that the folder has not, at random."""
    missing = sorted(loaded["missing_keys"])
    made = [*missing, *sorted(str(found[0]) for found in loaded["mismatched_keys"])]
    kinds = model.config.architectures or []
    other = [kind for kind in kinds if kind.endswith(_NO_LM)]
    if made or other:
        what = f"{len(made)} tensors are missing or misshapen, such as {made[0]}" if made else ""
        raise ValueError(
            f"{flag}: it is no {type(model).__name__}: {what or f'it was saved as {other[0]}'}; "
            "give the folder of a whole causal LM, as save_pretrained writes it"
        )


class _HuggingFaceSession:
    """Rows that grow in a `DynamicCache`; see `decoding.Session`."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        mask: Any,
        prefixes: list[Ints],
        count: int,
        sampling: Sampling,
    ) -> None:
        from transformers import DynamicCache

        self._model, self._device, self._mask_logits = model, device, mask
        self._sampling = sampling
        longest = max(map(len, prefixes))
        ids = np.zeros((len(prefixes), longest), dtype=np.int64)
        seen = np.zeros((len(prefixes), longest), dtype=np.int64)
        for row, prefix in enumerate(prefixes):
            ids[row, longest - len(prefix) :] = prefix
            seen[row, longest - len(prefix) :] = 1
        self._cache = DynamicCache(config=model.config)
        self._seen = torch.from_numpy(seen).to(device)
        lengths = torch.tensor([len(p) for p in prefixes], device=device)
        first = (self._seen.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(torch.from_numpy(ids).to(device), first)
        self._cache.batch_repeat_interleave(count)
        self._seen = self._seen.repeat_interleave(count, dim=0)
        self._depth = lengths.repeat_interleave(count)
        self._logits = logits.repeat_interleave(count, dim=0)

    def choose(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The next token of each row."""
        numbers = torch.from_numpy(uniforms).to(self._device)
        return choose(self._logits, numbers, self._sampling).cpu().numpy()

    def advance(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Keep these rows and append a token to each."""
        if len(rows) < len(self._depth):
            kept = torch.from_numpy(rows).to(self._device)
            self._cache.batch_select_indices(kept)
            self._seen, self._depth = self._seen[kept], self._depth[kept]
        self._seen = torch.nn.functional.pad(self._seen, (0, 1), value=1)
        ids = torch.from_numpy(tokens).to(self._device)[:, None]
        self._logits = self._forward(ids, self._depth[:, None])
        self._depth = self._depth + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[rows, V] logits of the last position; the cache grows by `ids`."""
        output = self._model(
            input_ids=ids,
            attention_mask=self._seen,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        masked: Tensor = self._mask_logits(output.logits[:, -1])
        return masked
