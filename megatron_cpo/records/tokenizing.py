"""Records to token ids: once, prefix and continuation each on its own, and never together.

The boundary between prefix and continuation is then a boundary between tokens, and MLE, CPO, the
reference and decoding all see the same ids. A continuation ends in one end of document (EOD) of the
tokenizer, unless it is a piece that was cut from a longer text and the text goes on.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from megatron_cpo.records.reading import BadRecord, Message
from megatron_cpo.tree import Ints

# Two BPE tokenizers may share a vocabulary and differ in merges: only encoding tells them apart.
PROBE = "The naïve café's 1,024 tokens:\n\tdef f(x):  return x != 0  # 漢字 🙂 unbelievably"


@dataclass(frozen=True)
class Pair:
    """A record as token ids (int32): the prefix, y_1, and the rejected continuations."""

    prefix: Ints
    continuation: Ints
    rejected: tuple[Ints, ...] = ()


class Encoder:
    """Encodes prefixes and continuations with a Megatron tokenizer.

    Some tokenizers frame every text (Llama's puts a BOS before it). A prefix keeps what they put
    before, a continuation does not, and neither keeps what they put behind.

    Raises:
        ValueError: the tokenizer has no EOD.
    """

    def __init__(self, tokenizer: Any) -> None:
        eod = getattr(tokenizer, "eod", None)
        if eod is None or eod < 0:
            raise ValueError(
                f"the {_name(tokenizer)} has no end-of-document token (eod is {eod}); sequence "
                "log-probs include it: use a tokenizer that defines an EOS"
            )
        self.eod: int = int(eod)
        self._tokenizer = tokenizer
        try:
            frame, probe = list(tokenizer.tokenize("")), list(tokenizer.tokenize("a"))
        except ValueError:  # NullTokenizer reads numbers only
            frame, probe = [], []
        shared = [f == p for f, p in zip_longest(frame, probe)]
        self._head = frame[: shared.index(False) if False in shared else len(frame)]
        self._tail = frame[len(self._head) :]

    def prefix(self, text: str) -> list[int]:
        """Token ids of a prefix, without EOD."""
        ids = self._untailed(text)
        n = len(self._head)
        # A rendered chat often starts with the text of the BOS which the tokenizer adds as well.
        return ids[n:] if n and ids[n : 2 * n] == self._head else ids

    def unframed(self, ids: list[int]) -> list[int]:
        """A prefix without what the tokenizer puts before every text."""
        n = len(self._head)
        return ids[n:] if n and ids[:n] == self._head else ids

    def continuation(self, text: str) -> list[int]:
        """Token ids of a continuation, without what the tokenizer puts before a text, nor EOD."""
        ids = self._untailed(text)[len(self._head) :]
        while ids and ids[-1] == self.eod:
            ids.pop()
        return ids

    def text(self, text: str) -> Ints:
        """Token ids of a whole text, EOD included, to be split."""
        return _ints([*self.prefix(text), self.eod])

    def pair(self, prefix_text: str, *continuation_texts: str) -> Pair:
        """A prefix, y_1 and its rejected continuations as token ids; continuations end in EOD.

        Raises:
            BadRecord: nothing is left of the prefix or of a continuation.
        """
        continuations = [self.continuation(text) for text in continuation_texts]
        prefix = self.prefix(prefix_text)
        if not prefix or not all(continuations):
            raise BadRecord("no tokens in the prefix or in a continuation")
        first, *rest = (_ints([*ids, self.eod]) for ids in continuations)
        return Pair(_ints(prefix), first, tuple(rest))

    def split(self, tokens: Any, prefix_fraction: float) -> Pair:
        """A whole sample as a pair: x is the first `prefix_fraction` of its n tokens.

        EOD at the end is kept and not counted: x has round(prefix_fraction * n) tokens, but at
        least 1 and at most n - 1.

        Raises:
            BadRecord: n < 2.
        """
        tokens = _ints(tokens)
        n = len(tokens)
        while n and tokens[n - 1] == self.eod:
            n -= 1
        if n < 2:
            raise BadRecord("fewer than 2 tokens to split")
        cut = min(max(round(prefix_fraction * n), 1), n - 1)
        return Pair(tokens[:cut], tokens[cut : n + 1])

    def _untailed(self, text: str) -> list[int]:
        ids = list(self._tokenizer.tokenize(text))
        return ids[: len(ids) - len(self._tail)]


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What decides the ids a tokenizer gives; JSON-able; two are equal when the ids mean the same.

    Independent of the path it was read from, and of the padding of the vocabulary to the
    tensor-parallel size. `sha256` is over the vocabulary, in the order of ids, and over the ids of
    a fixed text, which tells apart two BPE models that differ in their merges only.
    """
    digest = hashlib.sha256()
    for index, token in sorted(vocabulary(tokenizer).items()):
        digest.update(json.dumps([index, str(token)]).encode() + b"\n")
    with contextlib.suppress(
        ValueError
    ):  # NullTokenizer reads numbers only; its size is all it has
        digest.update(json.dumps([int(i) for i in tokenizer.tokenize(PROBE)]).encode())
    return {
        "library": _name(tokenizer),
        "vocab_size": int(tokenizer.vocab_size),
        "eod": int(tokenizer.eod),
        "sha256": digest.hexdigest(),
    }


def chat_renderer(tokenizer: Any) -> Callable[[list[Message]], str] | None:
    """Messages to text with the tokenizer's chat template; None if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(messages: list[Message]) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise BadRecord(f"the chat template refuses the messages ({error})") from error

    return render


def vocabulary(tokenizer: Any) -> dict[int, Any]:
    """Token by id. Empty for a tokenizer that cannot list its vocabulary."""
    for name in ("inv_vocab", "vocab"):
        try:
            listed = getattr(tokenizer, name)
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(listed, dict):
            by_id = all(isinstance(key, int) for key in listed)
            return listed if by_id else {v: k for k, v in listed.items()}
        if isinstance(listed, list | tuple):
            return dict(enumerate(listed))
    return {}


def _name(tokenizer: Any) -> str:
    return type(getattr(tokenizer, "_tokenizer", tokenizer)).__name__


def _ints(tokens: Any) -> Ints:
    return np.asarray(tokens).astype(np.int32)
