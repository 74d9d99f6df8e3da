"""Control tokens: what stands for a document's end or a speaker's turn, and is nobody's text.

A record's text that happens to spell one (`<|endoftext|>`, `<|im_end|>`, `</s>`) is text, and is
encoded as text: otherwise a document could end in its middle, or a user's message close its own
turn. What a chat template wrote around the messages is encoded as the tokens that it names.
"""

import re
from collections.abc import Callable, Collection
from functools import cached_property, partial
from typing import Any

from megatron_cpo.records.spelling import library_of, model_proto

_BLANK = "▁ \t\r\n"


class ControlTokens:
    """Which they are, and a text as token ids with and without them.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`.
    """

    by_text: dict[str, int]
    """Their ids, by how a text would spell them."""
    plain: Callable[[str], list[int]]
    """A text to ids, and nothing in it is a control token; with what frames every text (BOS)."""
    marked: Callable[[str], list[int]]
    """A text that a chat template wrote to ids, control tokens as such; without a frame, because
    a template writes its own BOS."""

    def __init__(self, tokenizer: Any) -> None:
        inner, library = getattr(tokenizer, "_tokenizer", None), library_of(tokenizer)
        self.by_text = {}
        self._added: Callable[[], frozenset[int]] = frozenset
        self.plain = self.marked = tokenizer.tokenize
        if hasattr(library, "added_tokens_decoder"):  # transformers
            known = library.added_tokens_decoder
            self.by_text = {token.content: i for i, token in known.items() if token.special}
            words = (i for i, token in known.items() if token.content.strip(_BLANK))
            self._added = partial(frozenset, [*words])
            framed = getattr(inner, "include_special_tokens", True)
            self.plain = partial(_hugging_face, library, framed, True)
            self.marked = partial(_hugging_face, library, False, False)
        elif hasattr(library, "special_tokens_set"):  # tiktoken
            self.by_text = {t: library.encode_single_token(t) for t in library.special_tokens_set}
            self.plain = library.encode_ordinary
        elif hasattr(library, "is_control"):  # SentencePiece
            ids = range(library.get_piece_size())
            self.by_text = {library.id_to_piece(i): i for i in ids if library.is_control(i)}
            self.by_text |= getattr(inner, "special_token_to_id", {})
            self._added = partial(_user_defined, library)
            if getattr(inner, "legacy", False):  # it looks for its own special tokens in every text
                self.plain = library.encode_as_ids
            self.marked = self._marked_sentencepiece
        self.ids = frozenset(self.by_text.values())
        self._beginnings = tuple({text[:2] for text in self.by_text})
        self._pattern = _any_of(self.by_text)

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids of what somebody added to the vocabulary, but for white space: control tokens or not,
        such as a template's `<|im_end|>` that nobody declared as special."""
        return self._added()

    def find(self, text: str) -> str | None:
        """The first control token that a text spells."""
        if not any(beginning in text for beginning in self._beginnings):
            return None
        found = self._pattern.search(text)
        return found[0] if found else None

    def _marked_sentencepiece(self, text: str) -> list[int]:
        """SentencePiece finds no control token in a text, so they are cut out of it beforehand."""
        ids: list[int] = []
        for part in re.split(f"({self._pattern.pattern})", text):
            if part in self.by_text:
                ids.append(self.by_text[part])
            elif part:
                ids += self._within(part) if ids else self.plain(part)
        return ids

    def _within(self, text: str) -> list[int]:
        """A text that does not begin a document: without the space that is put before one."""
        before = self.plain("\n")
        ids = self.plain("\n" + text)
        return ids[len(before) :] if ids[: len(before)] == before else self.plain(text)


def _hugging_face(tokenizer: Any, framed: bool, as_text: bool, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=framed, split_special_tokens=as_text)
    return list(encoded["input_ids"])


def _user_defined(library: Any) -> frozenset[int]:
    """Ids of SentencePiece's user-defined pieces, but for those that are white space."""
    return frozenset(
        i
        for i, piece in enumerate(model_proto(library).pieces)
        if piece.type == piece.USER_DEFINED and piece.piece.strip(_BLANK)
    )


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern of all of them, the longer ones first; of none, one that is never found."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
