"""SentencePiece models of Megatron's runs, for transformers."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.conversion.tokenizers.sentencepiece_model import (
    fast_tokenizer,
    is_bpe,
    read_model,
)
from megatron_cpo.checkpoints.conversion.tokenizers.tokenizer import (
    PROBES,
    Tokenizer,
    id_or_none,
    save,
)

_TIE = 1e-3
"""Nats between two cuts of a text that are one number in sums of float32."""


def read(paths: list[Path], args: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a run with these arguments.

    Raises:
        ValueError: the file is no SentencePiece model.
    """
    [path] = paths
    model, processor = read_model(path)
    added = args.get("special_tokens") or []

    def write(folder: Path) -> None:
        try:
            if added or not args.get("tokenizer_sentencepiece_ignore_extra_whitespaces", True):
                raise ValueError("the run adds special tokens or keeps spaces on its own")
            fast = _checked(model, processor)
        except ValueError as reason:
            shutil.copyfile(path, folder / "sentencepiece.model")
            warnings.warn(
                f"{path}: transformers has no tokenizer with the same ids ({reason}); it is copied "
                "as sentencepiece.model, encode and decode with the package sentencepiece",
                stacklevel=2,
            )
            return
        special = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
            "pad_token": processor.pad_id(),
        }
        pieces = {name: processor.id_to_piece(i) for name, i in special.items() if i >= 0}
        save(fast, folder, pieces)
        # Readers of a tokenizer.model take it for BPE. At the other name nobody looks.
        name = "tokenizer" if is_bpe(model) else "sentencepiece"
        shutil.copyfile(path, folder / f"{name}.model")

    return Tokenizer(
        str(path),
        processor.get_piece_size() + len(added),
        id_or_none(processor.eos_id()),
        id_or_none(processor.bos_id()),
        id_or_none(processor.pad_id()),
        write,
        processor.encode,
    )


def _checked(model: Any, processor: Any) -> Any:
    """The counterpart for `tokenizers`; ValueError if it has not the same ids."""
    fast = fast_tokenizer(model)
    fast.encode_special_tokens = True  # SentencePiece reads no control pieces from a text
    for text in (*PROBES, *_all_pieces(model)):
        ours, theirs = processor.encode(text), fast.encode(text).ids
        if ours != theirs and not _tied(processor, ours, theirs):
            raise ValueError(f"others would come of {text[:40]!r}")
    fast.encode_special_tokens = False
    return fast


def _all_pieces(model: Any) -> Iterator[str]:
    """In texts of a thousand pieces."""
    pieces = [piece.piece for piece in model.pieces]
    for first in range(0, len(pieces), 1000):
        yield "".join(pieces[first : first + 1000]).replace("▁", " ")


def _tied(processor: Any, one: list[int], other: list[int]) -> bool:
    """Whether two cuts of a text are equally probable to a Unigram model.

    SentencePiece adds float32, `tokenizers` float64: between these they may choose differently.
    """
    scores = [sum(map(processor.get_score, ids)) for ids in (one, other)]
    return abs(scores[0] - scores[1]) < _TIE and processor.decode(one) == processor.decode(other)
