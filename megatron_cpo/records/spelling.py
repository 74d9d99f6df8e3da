"""What a tokenizer's tokens spell, in bytes: where in a text each of its tokens ends.

Four libraries write pieces of text in three ways (`▁` for a space, a character for each byte,
bytes), and not all of them give offsets. Spelling a text's tokens and comparing with the text says
where each token ends and, at the same time, whether the tokens are the text at all: a tokenizer
with a normaliser rewrites some texts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.tree import Ints

_UNKNOWN = -(1 << 40)
"""Bytes of a token that was not looked up: any sum with it is below 0."""


class Spelling:
    """The bytes of token ids; looked up once each.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._bytes_of = token_bytes(tokenizer)
        self.keeps_texts = _keeps_texts(tokenizer)
        """Whether its tokens spell every text whose bytes they are as many as."""
        # By id, and grown as ids come; a list is read twice as fast as a dict.
        self._pieces: list[bytes | None] = []
        self._sizes = np.zeros(0, dtype=np.int64)

    @property
    def has_text(self) -> bool:
        """Whether the tokens stand for text; those of a tokenizer that lists none are numbers."""
        return self._bytes_of is not None

    def spell(self, ids: Sequence[int]) -> bytes | None:
        """What tokens stand for; None if one has no bytes, or the tokenizer lists no tokens."""
        if self._bytes_of is None:
            return None
        try:
            return b"".join(map(self._pieces.__getitem__, ids))  # type: ignore[arg-type]
        except (IndexError, TypeError):  # some were not looked up yet, or have no bytes
            if not self._look_up(ids, self._bytes_of):
                return None
        return self.spell(ids)

    def ends(self, ids: Ints) -> NDArray[np.int64] | None:
        """Where each token ends in what they spell, [len(ids)] bytes; None as `spell`."""
        if self._bytes_of is None or not len(ids):
            return None
        try:
            ends: NDArray[np.int64] = self._sizes[ids].cumsum()
            if ends[-1] >= 0:
                return ends
        except IndexError:  # an id that was not met yet, as those of _UNKNOWN bytes
            pass
        known = self._look_up(ids.tolist(), self._bytes_of)
        return self._sizes[ids].cumsum() if known else None

    def _look_up(self, ids: Sequence[int], bytes_of: Callable[[int], bytes | None]) -> bool:
        """Make all of them known; False if one has no bytes."""
        if (more := max(ids) + 1 - len(self._pieces)) > 0:
            self._pieces += [None] * more
            self._sizes = np.append(self._sizes, np.full(more, _UNKNOWN))
        for i in ids:
            if self._pieces[i] is None:
                piece = bytes_of(i)
                if piece is None:
                    return False
                self._pieces[i] = piece
                self._sizes[i] = len(piece)
        return True


def _keeps_texts(tokenizer: Any) -> bool:
    """Does nothing rewrite a text before it is tokenised, as a normaliser does?"""
    library = library_of(tokenizer)
    if hasattr(library, "decode_single_token_bytes"):  # tiktoken
        return True
    if backend := getattr(library, "backend_tokenizer", None):  # transformers
        return backend.normalizer is None and type(backend.model).__name__ == "BPE"
    if hasattr(library, "serialized_model_proto"):  # SentencePiece
        rules = model_proto(library).normalizer_spec
        return not (rules.precompiled_charsmap or rules.remove_extra_whitespaces)
    return False


def library_of(tokenizer: Any) -> Any:
    """What does the work inside a Megatron tokenizer: an object of transformers, SentencePiece or
    tiktoken; None for Megatron's own."""
    inner = getattr(tokenizer, "_tokenizer", None)
    for library in (getattr(inner, "tokenizer", None), getattr(inner, "_tokenizer", None)):
        if library is not None:
            return library
    return None


def model_proto(library: Any) -> Any:
    """A SentencePiece model as it is stored."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto: Any = schema.ModelProto()  # type: ignore[attr-defined]  # made when imported
    proto.ParseFromString(library.serialized_model_proto())
    return proto


def library_name(tokenizer: Any) -> str:
    """The class that does the work of a Megatron tokenizer, such as SentencePieceTokenizer."""
    return type(getattr(tokenizer, "_tokenizer", tokenizer)).__name__


def token_bytes(tokenizer: Any) -> Callable[[int], bytes | None] | None:
    """The bytes of a token by id (None: no such id); None for a tokenizer that has no text."""
    library = library_of(tokenizer)
    if hasattr(library, "decode_single_token_bytes"):  # tiktoken

        def of_tiktoken(i: int) -> bytes | None:
            try:
                return bytes(library.decode_single_token_bytes(i))
            except KeyError:
                return None

        return of_tiktoken
    pieces = vocabulary(tokenizer)
    if not pieces and hasattr(library, "get_vocab"):  # Megatron's SFTTokenizer lists none
        pieces = {index: piece for piece, index in library.get_vocab().items()}
    if not pieces:
        return None
    byte_of = {character: bytes([byte]) for byte, character in enumerate(_byte_characters())}
    byte_level = _is_byte_level(library, pieces.values(), byte_of)

    def of_piece(i: int) -> bytes | None:
        piece = pieces.get(i)
        if piece is None or isinstance(piece, bytes):
            return piece
        if byte_level:
            known = all(character in byte_of for character in piece)  # not so in added tokens
            return b"".join(byte_of[c] for c in piece) if known else piece.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    return of_piece


def _is_byte_level(library: Any, pieces: Iterable[Any], byte_of: Mapping[str, bytes]) -> bool:
    """Does each character of a piece stand for a byte? The decoder says so, if there is one.

    Else all 256 bytes are tokens; of a vocabulary that was cut, rare ones may be missing.
    """
    decoder = getattr(getattr(library, "backend_tokenizer", None), "decoder", None)
    return "ByteLevel" in repr(decoder) if decoder is not None else set(byte_of) <= set(pieces)


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


def _byte_characters() -> list[str]:
    """What byte-level BPE writes for each byte: itself if printable, else characters from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
