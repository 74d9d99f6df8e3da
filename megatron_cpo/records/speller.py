"""Token ids as the texts that they are, as people read them."""

import numpy as np

from megatron_cpo.records.encoder import Encoder
from megatron_cpo.tree import Ints


class Speller:
    """Texts of token ids, as they stand behind one another.

    Args:
        encoder: of the tokenizer.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        alone = encoder.spelled(np.array(encoder.continuation("1"), dtype=np.int32))
        self._first = " " if alone == b" 1" else ""
        """What SentencePiece puts before every text."""

    def prompt(self, prefix: Ints) -> str:
        """A prefix as its record has it: without what the tokenizer puts before a text."""
        ids = np.array(self._encoder.unframed(prefix.tolist()), dtype=np.int32)
        return self.text(ids).removeprefix(self._first)

    def text(self, tokens: Ints) -> str:
        """What tokens spell; numbers where they stand for no text, U+FFFD for broken bytes."""
        spelled = self._encoder.spelled(tokens)
        if spelled is None:
            return " ".join(map(str, tokens.tolist()))
        return spelled.decode(errors="replace")

    def pair(self, prefix: Ints, body: Ints) -> tuple[str, str]:
        """A prefix and what follows it, without control tokens and the white space around them."""
        control = self._encoder.control.ids
        shown = [
            np.array([i for i in ids.tolist() if i not in control], dtype=np.int32)
            for ids in (prefix, body)
        ]
        return self.prompt(shown[0]).strip(), self.text(shown[1]).strip()
