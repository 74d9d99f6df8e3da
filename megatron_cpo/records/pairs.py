"""Records to pairs of prefix and continuation, as token ids, streaming."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_cpo.records.chats import Chat
from megatron_cpo.records.documents import read_documents
from megatron_cpo.records.dropped import BadRecord, Dropped
from megatron_cpo.records.encoder import Encoder, Pair
from megatron_cpo.records.inputs import indexed_prefix
from megatron_cpo.records.lines import Advance
from megatron_cpo.records.reading import read_records
from megatron_cpo.records.source import Source
from megatron_cpo.tree import Ints

UNUSED = "rejected answers that no kind of negative uses; given=1 does"
GLUED = (
    "no white space between prompt and answer; put it there, or read them as instructions: "
    "--instruction-field, --response-field"
)
_ONE_WORD = re.compile(r"[A-Za-z0-9.?!:;][A-Za-z0-9]")
"""The last character of a prompt and the first of an answer that read as one word."""


def read_pairs(
    source: Source,
    tokenizer: Any,
    dropped: Dropped,
    rejected: int = 0,
    advance: Advance = lambda lines, read: None,
    skip: int = 0,
) -> Iterator[Pair]:
    """The pairs of all inputs, in order, streaming.

    Args:
        dropped: counts what is left out, and why.
        rejected: how many rejected continuations a record must have; more are left off.
        advance: called after each line or document, once its pairs are used; see `read_records`.
            Its bytes add up to `source.stored_bytes()`.
        skip: lines or documents to leave out at the beginning; a usable one was among them.

    Raises:
        ValueError: an input is missing or from another tokenizer, a bad record is refused, or no
            record is usable.
    """
    encoder, usable = Encoder(tokenizer), skip
    records = [path for path in source.inputs if not indexed_prefix(path)]
    indexed = [path for path in map(indexed_prefix, source.inputs) if path]
    if records and indexed:
        raise ValueError(
            f"--input mixes JSON Lines ({records[0]}) and a Megatron indexed dataset "
            f"({indexed[0]}); build a store of each"
        )
    for pair, where in (
        _pairs_of_datasets(indexed, source, tokenizer, encoder, dropped, advance, skip)
        if indexed
        else _pairs_of_records(source, tokenizer, encoder, dropped, rejected, advance, skip)
    ):
        if len(pair.rejected) < rejected:
            dropped.skip(f"fewer than {rejected} rejected continuations", where)
            continue
        longest = max(map(len, (pair.continuation, *pair.rejected)))
        if source.max_length and len(pair.prefix) + longest > source.max_length:
            dropped.skip(f"longer than {source.max_length} tokens", where)
            continue
        usable += 1
        for remark in pair.notes:
            dropped.note(remark, where)
        yield pair
    if not usable:
        raise dropped.nothing_usable(source.inputs)


def _pairs_of_records(
    source: Source,
    tokenizer: Any,
    encoder: Encoder,
    dropped: Dropped,
    rejected: int,
    advance: Advance,
    skip: int,
) -> Iterator[tuple[Pair, str]]:
    rendered = source.control_tokens == "parse"
    for record in read_records(
        source.inputs,
        dropped,
        source.shape,
        source.template,
        Chat(tokenizer),
        advance,
        skip,
        source.columns,
    ):
        if record.prefix is None:
            text = encoder.text(record.continuation, rendered)
            for remark in () if rendered else encoder.notes(record.continuation):
                dropped.note(remark, record.source)
            yield from _pieces(text, record.source, source, encoder, dropped)
            continue
        try:
            texts = (record.prefix, record.continuation, *record.rejected[:rejected])
            as_rendered = record.rendered or rendered
            pair = encoder.pair(*texts, rendered=as_rendered, end=record.end)
        except BadRecord as error:
            dropped.bad(str(error), record.source)
        else:
            own = (record.prefix, record.continuation)
            said = None if rendered else record.texts or own
            notes = [*pair.notes, *([UNUSED] if record.rejected and not rejected else [])]
            border = record.prefix[-1:] + record.continuation[:1]
            if not as_rendered and _ONE_WORD.fullmatch(border):
                notes.append(GLUED)
            yield replace(pair, texts=said, notes=tuple(notes)), record.source


def _pairs_of_datasets(
    prefixes: list[str],
    source: Source,
    tokenizer: Any,
    encoder: Encoder,
    dropped: Dropped,
    advance: Advance,
    skip: int,
) -> Iterator[tuple[Pair, str]]:
    for tokens, where in read_documents(prefixes, tokenizer, encoder.eod, advance, skip):
        yield from _pieces(tokens, where, source, encoder, dropped)


def _pieces(
    tokens: Ints, where: str, source: Source, encoder: Encoder, dropped: Dropped
) -> Iterator[tuple[Pair, str]]:
    """A text in pieces of at most `max_length` tokens, each split into x and y_1.

    Only the last piece of a text ends in EOD: where a piece was cut, the text goes on.
    """
    size = source.max_length or len(tokens)
    for start in range(0, len(tokens), size):
        try:
            yield encoder.split(tokens[start : start + size], source.prefix_fraction), where
        except BadRecord as error:
            dropped.skip(str(error), where)  # not bad: the end of a text that was cut is short
