"""Texts that are longer than a sentence-embedding model reads, in parts that it does read.

MiniLM reads 256 word pieces and leaves the rest out without a word: cuts of a long answer would all
be alike. Parts begin where the one before ended, so cuts of a text share their first parts.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any


class TextParts:
    """Cuts texts for a model of sentence-transformers.

    Args:
        model: a `SentenceTransformer`.
    """

    def __init__(self, model: Any) -> None:
        self._tokenizer = model.tokenizer
        self.room: int | None = None
        """Tokens of text that the model reads at once; None: no limit, or none that we can find."""
        longest = model.max_seq_length
        if longest is None or longest > 1 << 20:  # tokenizers without a limit say 10 ** 30
            return
        if not getattr(self._tokenizer, "is_fast", False):
            logging.getLogger(__name__).warning(
                "--rank: this model's tokenizer does not say where its tokens lie in the text, so "
                "of texts of more than %d tokens the rest is not embedded",
                longest,
            )
            return
        prompt = (model.prompts or {}).get(model.default_prompt_name, "")
        self.room = max(longest - len(self._tokenizer(prompt)["input_ids"]), 1)

    def of(self, text: str) -> list[tuple[str, int]]:
        """(part, its tokens), from the beginning on; the text itself if the model reads it all."""
        # A token has at least one byte, and a tokenizer may put one before the text.
        if self.room is None or len(text.encode()) < self.room:
            return [(text, 1)]
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans = encoded["offset_mapping"]
        if len(spans) <= self.room:
            return [(text, 1)]
        return [
            (text[spans[first][0] : spans[end - 1][1]], end - first)
            for first, end in windows(spans, self.room)
        ]


def windows(spans: Sequence[tuple[int, int]], room: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of at most `room` tokens, which together are all.

    A run ends where a word does, unless that were in its first half.

    Args:
        spans: where each token begins and ends in the text.
    """
    first = 0
    while len(spans) - first > room:
        end = first + room
        while end > first + room // 2 and spans[end][0] == spans[end - 1][1]:
            end -= 1
        if spans[end][0] == spans[end - 1][1]:  # no space in all of the second half
            end = first + room
        yield first, end
        first = end
    yield first, len(spans)
