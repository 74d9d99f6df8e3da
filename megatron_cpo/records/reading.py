"""Records: objects of JSON or rows of tables in the shapes people have, read one at a time.

Files are read by `inputs.py`. What the keys of a record are decides its shape (`shapes.py`). Bad
records are counted by reason with the place of the first of each, or refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_cpo.records.chats import Chat
from megatron_cpo.records.columns import Columns
from megatron_cpo.records.dropped import BadRecord, Dropped
from megatron_cpo.records.inputs import read_fields
from megatron_cpo.records.lines import Advance, Fields, Unreadable
from megatron_cpo.records.record import Record
from megatron_cpo.records.remedies import field_names
from megatron_cpo.records.shapes import DEFAULT_TEMPLATE, SHAPES, detect_shape


def read_records(
    paths: Sequence[str],
    dropped: Dropped,
    shape: str = "auto",
    template: str = DEFAULT_TEMPLATE,
    chat: Chat | None = None,
    advance: Advance = lambda lines, read: None,
    skip: int = 0,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
) -> Iterator[Record]:
    """The usable records of files, in order, without ever holding a file in memory.

    Args:
        paths: see `inputs.py`. Blank lines are no records.
        dropped: counts bad records; decides whether they are refused.
        shape: a key of `SHAPES`, or `auto` to detect it from the keys of each record.
        template: prefix of instruction records; see `fill_template`.
        chat: renders conversations; default plainly.
        advance: see `inputs.read_fields`.
        skip: lines or rows to leave out at the beginning; a usable record was among them.
        columns: the data's names for the fields.

    Raises:
        ValueError: a file is missing or not readable, or holds no usable record, or a bad record
            is refused.
    """
    usable, chat = skip, chat or Chat()
    for source, stored in read_fields(paths, advance, skip):
        try:
            fields = _named(stored, columns, dropped)
            record = parse_record(fields, shape, template, chat)
        except BadRecord as error:
            dropped.bad(str(error), source)
            continue
        usable += 1
        for remark in record.notes:
            dropped.note(remark, source)
        yield replace(record, source=source)
    if not usable:
        raise dropped.nothing_usable(paths)


def _named(stored: Fields | Unreadable, columns: Columns, dropped: Dropped) -> Fields:
    """The fields of a record by the names that we know.

    Raises:
        BadRecord: there are none.
    """
    if not isinstance(stored, Unreadable):
        dropped.names = dropped.names or field_names(stored)
        stored = columns.of(stored)
    if isinstance(stored, Unreadable):
        raise BadRecord(stored)
    return stored


def parse_record(fields: Fields, shape: str, template: str, chat: Chat) -> Record:
    """The record with these fields.

    Raises:
        BadRecord: it is not one.
    """
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
