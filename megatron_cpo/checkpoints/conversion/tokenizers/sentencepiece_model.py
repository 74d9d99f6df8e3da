"""A SentencePiece model as a `tokenizers.Tokenizer`, id for id.

transformers has classes of its own for a `tokenizer.model`. They take every one for the BPE model
of Llama, with its normalisation and a BOS before each text, and give other ids without a word where
it is a Unigram model, has a normalisation or no dummy prefix. What is built here follows the
model's own specification instead: each setting of it is one step of the tokenizer.
"""

import re
from pathlib import Path
from typing import Any

PENALTY = 0.1
"""Below the best score times its bytes: what SentencePiece gives a user-defined symbol."""


def read_model(path: Path) -> tuple[Any, Any]:
    """The model's specification, a protobuf message, and SentencePiece's own processor.

    Raises:
        ValueError: the file is no SentencePiece model.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece import sentencepiece_model_pb2 as schema

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no SentencePiece model ({error})") from error
    model: Any = schema.ModelProto()  # type: ignore[attr-defined]  # made when imported
    model.ParseFromString(path.read_bytes())
    return model, processor


def is_bpe(model: Any) -> bool:
    """Whether it is of the one algorithm that readers of a `tokenizer.model` expect."""
    return bool(model.trainer_spec.model_type == model.trainer_spec.BPE)


def fast_tokenizer(model: Any) -> Any:
    """The same as a `tokenizers.Tokenizer`, which transformers keeps as `tokenizer.json`.

    With `encode_special_tokens` it gives the model's ids for every text. Without it, which is the
    way of transformers, a control piece that is spelled out in a text becomes that piece.

    Raises:
        ValueError: it is a model of whole words, or puts its white space behind words, for which
            `tokenizers` has no steps.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    spec, kinds = model.trainer_spec, type(model.pieces[0])
    if spec.model_type == spec.WORD:
        raise ValueError("its pieces are whole words")
    if spec.treat_whitespace_as_suffix:
        raise ValueError("its words end in their white space")
    merges = spec.model_type in (spec.BPE, spec.CHAR)
    tokenizer = Tokenizer(_bpe(model) if merges else _unigram(model))
    tokenizer.normalizer = normalizers.Sequence(_normalisation(model.normalizer_spec))
    splits = [pre_tokenizers.Split(Regex(_never_in_a_text(model)), "merged_with_previous")]
    if merges and (symbols := _pieces(model, kinds.USER_DEFINED)):
        longest_first = sorted(symbols, key=len, reverse=True)
        splits.append(
            pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    control = _pieces(model, kinds.CONTROL) + _pieces(model, kinds.UNKNOWN)
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control]
    )
    return tokenizer


def _normalisation(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        # `Precompiled` looks up clusters of characters, and of long ones each character alone.
        if "nfkc" in spec.name:
            steps.append(normalizers.NFC())
        if "nmt" in spec.name:
            steps.append(normalizers.Replace("\r\n", "  "))
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    return steps


def _unigram(model: Any) -> Any:
    from tokenizers import models

    kinds = type(model.pieces[0])
    best = max(piece.score for piece in model.pieces if piece.type == kinds.NORMAL)
    vocabulary = [
        (
            piece.piece,
            len(piece.piece.encode()) * best - PENALTY
            if piece.type == kinds.USER_DEFINED
            else piece.score,
        )
        for piece in model.pieces
    ]
    spec = model.trainer_spec
    return models.Unigram(vocabulary, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _bpe(model: Any) -> Any:
    """Merges in the order of the scores of what they make: SentencePiece stores none."""
    from tokenizers import models

    kinds, spec = type(model.pieces[0]), model.trainer_spec
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    parts = {piece.piece for piece in model.pieces if piece.type == kinds.NORMAL}
    merges = [
        (-piece.score, ids[piece.piece[:cut]], ids[piece.piece[cut:]])
        for piece in model.pieces
        if piece.type == kinds.NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in parts and piece.piece[cut:] in parts
    ]
    text = [piece.piece for piece in model.pieces]
    return models.BPE(
        vocab=ids,
        merges=[(text[left], text[right]) for _, left, right in sorted(merges)],
        unk_token=spec.unk_piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        # A user-defined symbol is a word of its own then, which no merges lead to.
        ignore_merges=bool(_pieces(model, kinds.USER_DEFINED)),
    )


def _never_in_a_text(model: Any) -> str:
    """A pattern for the first character of what spells a control piece, or a byte's.

    SentencePiece never finds those in a text. `tokenizers` would, if it were not cut there.
    """
    kinds = type(model.pieces[0])
    spelled = _pieces(model, kinds.CONTROL) + _pieces(model, kinds.UNKNOWN)
    patterns = [f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in spelled]
    if _pieces(model, kinds.BYTE):
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    return "|".join(patterns)


def _pieces(model: Any, kind: int) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type == kind]
