"""Records and tokenizers for tests of reading, tokenising and building."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_cpo.groups.indexed import IndexedWriter, store_dtype
from megatron_cpo.records.border import BORDERS, Border
from megatron_cpo.records.encoder import Pair
from megatron_cpo.records.pair_files import PairReader, sequences_of
from megatron_cpo.records.source import Source
from megatron_cpo.records.tokenizer_training import train_sentencepiece

DOLLY = str(Path(__file__).parents[1] / "examples" / "data" / "dolly-400.jsonl")


def write_jsonl(path: Path, *records: Any) -> str:
    """Write one record a line: bytes as they are, anything else as JSON. Returns the path."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def write_pairs(pairs: Iterable[Pair], path_prefix: str, vocab_size: int = 100) -> PairReader:
    """Write pairs as a build does, at once and without the notes to go on from."""
    writer = IndexedWriter(path_prefix, store_dtype(vocab_size))
    rows = []
    for pair in pairs:
        sequences = sequences_of(pair)
        writer.add(np.concatenate(sequences), [len(s) for s in sequences])
        rows.append(pair.border.row())
    writer.close()
    Path(f"{path_prefix}.borders").write_bytes(b"".join(rows))
    return PairReader(path_prefix)


def dolly_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """A SentencePiece tokenizer of 1000 pieces, trained on the example data, built by Megatron."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    model = folder / "tokenizer.model"
    if not model.exists():
        train_sentencepiece(Source((DOLLY,)), str(model), 1000)
    args = SimpleNamespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
        chat_template=chat_template,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=False,
    )
    return build_tokenizer(args)


class ToyTokenizer:
    """Words are numbers. Frames each text as asked, like tokenizers that add a BOS or an EOS.

    Args:
        head, tail: ids put before and behind every text.
    """

    vocab_size = 100
    eod = 99

    def __init__(self, head: tuple[int, ...] = (), tail: tuple[int, ...] = ()) -> None:
        self._head, self._tail = head, tail

    def tokenize(self, text: str) -> list[int]:
        """Ids of the words; one that is no number is id 50."""
        ids = [int(word) if word.isdecimal() else 50 for word in text.split()]
        return [*self._head, *ids, *self._tail]


class ListedPairs:
    """Stands in for `PairReader`: pairs from lists, each of a prompt of its own.

    Args:
        continuations: y_1 of each record; one whose last token is ToyTokenizer's EOD ends there.
        rejected: of every record.
        prompts: which prompt each record has, if some share one.
    """

    def __init__(
        self,
        *continuations: list[int],
        rejected: tuple[list[int], ...] = (),
        prompts: str = "",
    ) -> None:
        self._continuations, self._rejected = continuations, rejected
        rows = [
            Border(
                prompts[i] if prompts else str(i),
                str(tokens),
                ending=tuple(tokens[-1:]) if tokens[-1] == ToyTokenizer.eod else (),
            ).row()
            for i, tokens in enumerate(continuations)
        ]
        self.borders = np.frombuffer(b"".join(rows), BORDERS)

    def __len__(self) -> int:
        return len(self._continuations)

    def prefix(self, index: int) -> Any:
        """The same prefix for every record."""
        return np.array([1, 2], dtype=np.int32)

    def continuation(self, index: int) -> Any:
        """y_1 of a record."""
        return np.array(self._continuations[index], dtype=np.int32)

    def rejected(self, index: int) -> list[Any]:
        """The same rejected continuations for every record."""
        return [np.array(r, dtype=np.int32) for r in self._rejected]
