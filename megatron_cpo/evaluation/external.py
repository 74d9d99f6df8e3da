"""How likely a model that took no part finds a text, given its prompt.

Nearer to people's text is better, lower is not: greedy text that goes in circles is likelier than
anything that people write. Prompt and text are encoded together by the model's own tokenizer and
cut where the prompt ends, by the rule of `records.border`; an end that a text may or may not have
is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_cpo.checkpoints.digest import digest_of, whole_file
from megatron_cpo.checkpoints.formats.opening import open_model
from megatron_cpo.inspection.tokenizer import folder_tokenizer
from megatron_cpo.kept import KeptLines, digest
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.progress import progress
from megatron_cpo.records.dropped import BadRecord
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.tree import Ints

PART = 64
"""Texts whose figures are kept at a time: what a kill can cost."""


@dataclass(frozen=True)
class Likelihood:
    """What a model says of one text."""

    nats: float
    """-log p(text | prompt), summed over its tokens."""
    tokens: int
    """The model's, of the text as far as it was read; 0: nothing could be read."""
    cut: bool
    """Whether prompt and text are longer than the model reads."""


class ExternalModel:
    """A Hugging Face causal LM in a folder, with its own tokenizer; loaded when first needed.

    Args:
        name: `hf:PATH`.
        flag: how the user named it.
        batch: most texts at a time.
        dtype: name of a torch dtype, of the weights.

    Raises:
        ValueError: there is no such model.
    """

    def __init__(
        self, name: str, flag: str = "--external", batch: int = 16, dtype: str = "float32"
    ) -> None:
        if not name.startswith("hf:"):
            raise ValueError(
                f"{flag} {name}: needs hf:PATH, the folder of a Hugging Face causal LM"
            )
        self._path, self._flag, self._batch = name.removeprefix("hf:"), flag, batch
        try:
            files = open_model(Path(self._path))
        except ValueError as error:
            raise ValueError(f"{flag} hf:{error}") from error  # which begins with the path
        self.identity: dict[str, Any] = {
            **files.identity(),
            "tokenizer": _tokenizer_digest(Path(self._path)),
            "dtype": dtype,
        }
        """Name of the folder, digests of its weights and configuration and of its tokenizer's
        files, and dtype."""

    @cached_property
    def _tokenizer(self) -> Any:
        return folder_tokenizer(f"{self._flag} hf:{self._path}", self._path)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer)

    @cached_property
    def _model(self) -> HuggingFacePolicy:
        _ = self._encoder  # refuses a tokenizer without an end
        dtype = self.identity["dtype"]
        return HuggingFacePolicy(self._path, self._tokenizer, self._batch, dtype, self._flag)

    def likelihoods(self, texts: Sequence[tuple[str, str]], cache: KeptLines) -> list[Likelihood]:
        """What the model says of each (prompt, text); equal ones are asked once.

        Raises:
            ValueError: the model cannot be loaded, or its numbers are not finite.
        """
        keys = [likelihood_key(self.identity, *text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if not cache.row(key)}
        if missing:
            self._ask(missing, cache)
        return [Likelihood(**(cache.row(key) or {})) for key in keys]

    def features(self, texts: Sequence[str], pool: str, longest: int) -> NDArray[np.float32]:
        """[texts, hidden] the last hidden state of the last token of each text, or the mean of all.

        Args:
            pool: `last` or `mean`.
            longest: most tokens of a text that are read, and as many as the model can.
        """
        encoder, model = self._encoder, self._model
        room = min(longest, model.positions or longest)
        tokens = [np.array(encoder.prefix(text)[:room], dtype=np.int32) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(tokens[i]))
        found: list[Any] = [None] * len(texts)
        with progress(None, self.identity["name"], "texts", len(order)) as bar:
            for first in range(0, len(order), PART):
                part = order[first : first + PART]
                sequences = [tokens[i] for i in part]
                hidden = model.embed(sequences, last) if pool == "last" else model.embed(sequences)
                for i, vector in zip(part, hidden, strict=True):
                    found[i] = vector
                bar.update(len(part))
        return np.stack(found)

    def _ask(self, missing: dict[str, tuple[str, str]], cache: KeptLines) -> None:
        pairs = {key: self._pair(*text) for key, text in missing.items()}
        # Of like length together, the longest first: what does not fit into memory fails at once.
        order = sorted(pairs, key=lambda key: -sum(map(len, pairs[key][:2])))
        with progress(None, self.identity["name"], "texts", len(order)) as bar:
            for first in range(0, len(order), PART):
                part = order[first : first + PART]
                read = [key for key in part if len(pairs[key][1])]
                found = self._model.logps(
                    [pairs[key][0] for key in read], [[pairs[key][1]] for key in read]
                )
                nats = dict(zip(read, (-float(logps[0]) for logps in found), strict=True))
                for key in part:
                    if not np.isfinite(nats.get(key, 0.0)):
                        raise ValueError(
                            f"{self._flag} hf:{self._path}: a log-prob of {-nats[key]}; weights "
                            "that are not finite or an overflow in 16 bits do this: try float32"
                        )
                    _, text, cut = pairs[key]
                    cache.keep(key, nats=nats.get(key, 0.0), tokens=len(text), cut=cut)
                bar.update(len(part))

    def _pair(self, prompt: str, text: str) -> tuple[Ints, Ints, bool]:
        """Tokens of the prompt and of what the model can read of the text; whether it was cut."""
        prefix, tokens = encoded(self._encoder, prompt, text)
        if self._model.positions is None:
            return prefix, tokens, False
        room = max(self._model.positions - len(prefix) + 1, 0)  # the last token is not read
        return prefix, tokens[:room], len(tokens) > room


def _tokenizer_digest(folder: Path) -> str:
    """Of all files but the weights' that may say how a text is encoded."""
    names = (*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("merges*"))
    return digest_of(whole_file(path, folder) for path in {*names} if path.is_file())


def last(hidden: Tensor) -> Tensor:
    """[hidden] of the last token, from [tokens, hidden]."""
    return hidden[-1]


def likelihood_key(identity: dict[str, Any], prompt: str, text: str) -> str:
    """What a text's likelihood is kept under: the model, its tokenizer and dtype, prompt, text."""
    model = [identity[name] for name in ("digest", "tokenizer", "dtype")]
    return digest([*model, prompt, text])


def encoded(encoder: Encoder, prompt: str, text: str) -> tuple[Ints, Ints]:
    """Tokens of a prompt and of the text that follows it, without an end; none of a blank text."""
    nothing = np.zeros(0, np.int32)
    if not text.strip():  # or white space at the end of the prompt would be its tokens
        return nothing, nothing
    try:
        pair = encoder.pair(prompt, text)
    except BadRecord:
        return nothing, nothing
    return pair.prefix, pair.continuation[:-1]
