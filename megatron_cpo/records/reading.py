"""Records: JSON Lines in the shapes people have, read one line at a time.

A file (plain or `.gz`) holds one JSON object a line. What its keys are decides its shape
(`shapes.py`). Bad records are counted by reason with the place of the first of each, or refused.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_cpo.records.chats import Chat
from megatron_cpo.records.dropped import BadRecord, Dropped
from megatron_cpo.records.lines import LONGEST_LINE, Advance, read_lines
from megatron_cpo.records.record import Record
from megatron_cpo.records.shapes import DEFAULT_TEMPLATE, SETS, SHAPES, detect_shape


def read_records(
    paths: Sequence[str],
    dropped: Dropped,
    shape: str = "auto",
    template: str = DEFAULT_TEMPLATE,
    chat: Chat | None = None,
    advance: Advance = lambda lines, read: None,
    skip: int = 0,
) -> Iterator[Record]:
    """The usable records of JSON Lines files, in order, without ever holding a file in memory.

    Args:
        paths: files; those ending in `.gz` are unpacked on the way. Blank lines are no records.
        dropped: counts bad records; decides whether they are refused.
        shape: a key of `SHAPES`, or `auto` to detect it from the keys of each record.
        template: prefix of instruction records; see `fill_template`.
        chat: renders conversations; default plainly.
        advance: called after each line, once what was made of it is used, with 1 and the bytes
            that were read since, packed ones of `.gz`; with 0 at the end of a file.
        skip: lines to leave out at the beginning; a usable record was among them.

    Raises:
        ValueError: a file is missing or not readable, or holds no usable record, or a bad record
            is refused.
    """
    usable, chat = skip, chat or Chat()
    for source, line in read_lines(paths, advance, skip):
        try:
            if line is None:
                raise BadRecord(f"line longer than {LONGEST_LINE >> 20} MiB")
            record = parse_record(line, shape, template, chat)
        except BadRecord as error:
            dropped.bad(str(error), source)
            continue
        usable += 1
        for remark in record.notes:
            dropped.note(remark, source)
        yield replace(record, source=source)
    if not usable:
        raise ValueError(
            f"--input {' '.join(paths)}: no usable record (dropped: {dropped.describe()}); each "
            f"line must be a JSON object with {SETS}"
        )


def parse_record(line: bytes, shape: str, template: str, chat: Chat) -> Record:
    """The record in one line of JSON.

    Raises:
        BadRecord: it is not one.
    """
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None
    if not isinstance(fields, dict):
        raise BadRecord("not a JSON object")
    record = SHAPES[detect_shape(fields) if shape == "auto" else shape](fields, template, chat)
    if record.prefix is not None and not record.prefix.strip():
        raise BadRecord("empty prefix")
    if not record.continuation.strip():
        raise BadRecord("empty continuation")
    try:  # JSON can spell half a surrogate pair, which no tokenizer can encode
        "".join((record.prefix or "", record.continuation, *record.rejected)).encode()
    except UnicodeEncodeError:
        raise BadRecord("not UTF-8") from None
    return record
