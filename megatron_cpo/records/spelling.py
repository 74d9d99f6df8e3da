"""What a tokenizer's tokens spell, in bytes: where in a text each of its tokens ends.

Four libraries write pieces of text in three ways (`▁` for a space, a character for each byte,
bytes), and not all of them give offsets. Spelling a text's tokens and comparing with the text says
where each token ends and, at the same time, whether the tokens are the text at all: a tokenizer
with a normaliser rewrites some texts.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any


class Spelling:
    """The bytes of token ids; looked up once each.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._bytes_of = token_bytes(tokenizer)
        self._known: dict[int, bytes] = {}

    @property
    def has_text(self) -> bool:
        """Whether the tokens stand for text; those of a tokenizer that lists none are numbers."""
        return self._bytes_of is not None

    def pieces(self, ids: Iterable[int]) -> list[bytes] | None:
        """The bytes of each token; None if one has none, or the tokenizer cannot list its own."""
        if self._bytes_of is None:
            return None
        known, ids = self._known, list(ids)
        for i in {i for i in ids if i not in known}:
            piece = self._bytes_of(i)
            if piece is None:
                return None
            known[i] = piece
        return [known[i] for i in ids]


def token_bytes(tokenizer: Any) -> Callable[[int], bytes | None] | None:
    """The bytes of a token by id (None: no such id); None for a tokenizer that has no text."""
    encoding: Any = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    if hasattr(encoding, "decode_single_token_bytes"):  # tiktoken

        def of_tiktoken(i: int) -> bytes | None:
            try:
                return bytes(encoding.decode_single_token_bytes(i))
            except KeyError:
                return None

        return of_tiktoken
    pieces = vocabulary(tokenizer)
    if not pieces:
        return None
    byte_of = {character: bytes([byte]) for byte, character in enumerate(_byte_characters())}
    # A byte-level BPE starts from all 256 bytes, so it has each as a token.
    byte_level = set(byte_of) <= set(pieces.values())

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
