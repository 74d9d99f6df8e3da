"""Training a SentencePiece tokenizer on the text of records.

SentencePiece leaves out, without a word, what it cannot take as one sentence: longer texts than it
is told, and texts with the sign that it writes for an unknown piece itself. Such texts are given
to it in parts, so that all of them is seen, and counted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from megatron_cpo.files import make_folder, write_whole
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.reading import read_records
from megatron_cpo.records.source import Source

LONGEST_SENTENCE = 1 << 20
"""Bytes of UTF-8 in a sentence; longer texts are cut, at a space where there is one."""
RESERVED = "\u2585"
"""A sentence with it would be skipped (`kUNKByte` of SentencePiece); bytes stand for it instead."""
_NUMBERS = re.compile(r"value <= (\d+)|required_chars\. \d+ vs (\d+)")


@dataclass
class Training:
    """What a tokenizer was trained on."""

    dropped: Dropped
    """Records that were left out."""
    in_parts: int = 0
    """Texts that SentencePiece would have skipped as a whole."""

    def describe(self) -> str:
        """In one line."""
        parts = f"; texts used in parts: {self.in_parts}" if self.in_parts else ""
        return f"records dropped: {self.dropped.describe()}{parts}"


def train_sentencepiece(source: Source, model_path: str | Path, vocab_size: int) -> Training:
    """Train a SentencePiece unigram model on the text of records and write it to `model_path`.

    Text is kept as it is (no normalisation, newline is a piece); unknown characters fall back to
    bytes. Ids: 0 unk, 1 BOS, 2 EOS, which is Megatron's EOD, then 256 bytes.

    Raises:
        ValueError: no usable record, `model_path` is an input, the vocabulary is larger than the
            records can fill or smaller than their characters, or sentencepiece is not installed.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise ValueError(
            "training a tokenizer needs the package sentencepiece: pip install sentencepiece"
        ) from error

    source.refuse_output("--output", str(model_path))
    training = Training(Dropped(refuse=source.on_bad_record == "refuse"))
    failed: list[ValueError] = []

    def sentences() -> Iterator[str]:
        try:
            for text in _texts(source, training.dropped):
                parts = list(_parts(text))
                training.in_parts += parts != [text]
                yield from parts
        except ValueError as error:  # the C++ trainer would turn it into a RuntimeError of its own
            failed.append(error)

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            max_sentence_length=LONGEST_SENTENCE,
            num_threads=1,  # more would change the order of float sums, and so the model
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        raise ValueError(_explained(vocab_size, str(error))) from error
    if failed:
        raise failed[0]
    make_folder(Path(model_path).parent)
    write_whole(Path(model_path), model.getvalue())
    return training


def _texts(source: Source, dropped: Dropped) -> Iterator[str]:
    records = read_records(
        source.inputs, dropped, source.shape, source.template, columns=source.columns
    )
    for record in records:
        # In one piece, as it will be encoded: words behind a border are learned too.
        yield from filter(None, ((record.prefix or "") + record.continuation, *record.rejected))


def _parts(text: str) -> Iterator[str]:
    """A text in parts that SentencePiece takes; itself, if it does."""
    for part in text.split(RESERVED):
        encoded = part.encode()
        while len(encoded) > LONGEST_SENTENCE:
            end = encoded.rfind(b" ", 1, LONGEST_SENTENCE + 1)
            if end < 0:  # no space there: the part must not end within a character
                end = LONGEST_SENTENCE
                while encoded[end] & 0xC0 == 0x80:
                    end -= 1
            yield encoded[:end].decode()
            encoded = encoded[end:]
        if encoded:
            yield encoded.decode()


def _explained(vocab_size: int, message: str) -> str:
    """The trainer's message in our words, with the limit that it found."""
    numbers = _NUMBERS.search(message)
    if numbers and numbers[1]:
        return (
            f"--vocab-size {vocab_size}: these records can fill at most {numbers[1]} pieces; give "
            "at most that, or more text"
        )
    if numbers:
        return (
            f"--vocab-size {vocab_size}: bytes and the characters of these records alone are "
            f"{numbers[2]} pieces; give more than that"
        )
    if vocab_size < 1:
        return f"--vocab-size {vocab_size}: needs a number of pieces, at least 300"
    return f"--vocab-size {vocab_size}: SentencePiece cannot train on these records ({message})"
