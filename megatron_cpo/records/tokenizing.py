"""Tokenizers: training one on records, and what tells two apart."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.reading import read_records
from megatron_cpo.records.source import Source
from megatron_cpo.records.spelling import library_name, vocabulary

# Two BPE tokenizers may share a vocabulary and differ in merges: only encoding tells them apart.
PROBE = "The naïve café's 1,024 tokens:\n\tdef f(x):  return x != 0  # 漢字 🙂 unbelievably"


def train_sentencepiece(source: Source, model_path: str, vocab_size: int) -> Dropped:
    """Train a SentencePiece unigram model on the text of records and write it to `model_path`.

    Text is kept as it is (no normalisation, newline is a piece); unknown characters fall back to
    bytes. Ids: 0 unk, 1 BOS, 2 EOS, which is Megatron's EOD, then 256 bytes.

    Raises:
        ValueError: no usable record, the records cannot fill the vocabulary, or sentencepiece is
            not installed.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise ValueError(
            "training a tokenizer needs the package sentencepiece: pip install sentencepiece"
        ) from error

    dropped = Dropped(refuse=source.on_bad_record == "refuse")
    failed: list[ValueError] = []

    def texts() -> Iterator[str]:
        try:
            for record in read_records(source.inputs, dropped, source.shape, source.template):
                # In one piece, as it will be encoded: words behind a border are learned too.
                yield (record.prefix or "") + record.continuation
                yield from record.rejected
        except ValueError as error:  # the C++ trainer would turn it into a RuntimeError of its own
            failed.append(error)

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(),
            model_writer=model,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 20,
            num_threads=1,  # more would change the order of float sums, and so the model
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        raise ValueError(
            f"--vocab-size {vocab_size}: SentencePiece cannot make that many pieces of these "
            f"records ({error}); give another number, at least 300"
        ) from error
    if failed:
        raise failed[0]
    Path(model_path).parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{model_path}.writing-{os.getpid()}")
    aside.write_bytes(model.getvalue())
    os.replace(aside, model_path)
    return dropped


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
        "library": library_name(tokenizer),
        "vocab_size": int(tokenizer.vocab_size),
        "eod": int(tokenizer.eod),
        "sha256": digest.hexdigest(),
    }
