"""Records: objects of JSON or rows of tables in the shapes people have, read one at a time.

Files are read by `inputs.py`. What the fields of a record are decides its shape:

    prompt + completion     prefix and true continuation; `rejected` (string or list) is optional
    prompt + chosen         the same, as preference data names them
    instruction + response  Dolly; `context` may be empty. Alpaca's `input` and `output` work too
    messages                a chat: the last assistant turn is the continuation
    text                    split at token level, once it is tokenised

Bad records are counted by reason with the place of the first of each, or refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_cpo.records.columns import Columns
from megatron_cpo.records.inputs import read_fields
from megatron_cpo.records.lines import Advance, Fields, Unreadable
from megatron_cpo.records.remedies import SETS, field_names, remedy

Message = dict[str, str]

DEFAULT_TEMPLATE = "Instruction: {instruction}\nContext: {context}\nResponse: "
_FIELD = re.compile(r"\{(\w+)\}")


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason, in few words, without its place."""


@dataclass(frozen=True)
class Record:
    """A prefix x, its true continuation y_1, and any rejected continuations, as text."""

    prefix: str | None
    """None: `continuation` is a whole sample, to be split into x and y_1 at token level."""
    continuation: str
    rejected: tuple[str, ...] = ()
    source: str = field(default="", compare=False)
    """file:line, for messages."""


@dataclass
class Dropped:
    """Counts what was left out, by reason, with the place of the first of each."""

    refuse: bool = False
    """Raise at the first bad record instead (`--on-bad-record refuse`)."""
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    """The fields of the first record, for advice; see `remedies.field_names`."""

    def bad(self, reason: str, source: str) -> None:
        """Count a bad record.

        Raises:
            ValueError: bad records are refused.
        """
        if self.refuse:
            raise ValueError(
                f"{source}: {reason}; correct this record, or pass --on-bad-record skip to leave "
                "such records out and count them"
            )
        self.skip(reason, source)

    def skip(self, reason: str, source: str) -> None:
        """Count a record that is in order but of no use here, such as one that is too long."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, source)

    def nothing_usable(self, inputs: Sequence[str]) -> ValueError:
        """The error that says so, why, and what to do about it."""
        more = f" and {len(inputs) - 3} more" if len(inputs) > 3 else ""
        return ValueError(
            f"--input {' '.join(inputs[:3])}{more}: no usable record (dropped: {self.describe()}); "
            f"{remedy(self.counts, self.names)}"
        )

    def describe(self) -> str:
        """All reasons in one line, e.g. `2 not JSON (first: a.jsonl:7), 1 empty prefix (...)`."""
        reasons = (f"{n} {why} (first: {self.first[why]})" for why, n in self.counts.items())
        return ", ".join(reasons) or "none"


def read_records(
    paths: Sequence[str],
    dropped: Dropped,
    shape: str = "auto",
    template: str = DEFAULT_TEMPLATE,
    render_chat: Callable[[list[Message]], str] | None = None,
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
        render_chat: messages to text up to where the assistant speaks; default `plain_chat`.
        advance: see `inputs.read_fields`.
        skip: lines or rows to leave out at the beginning; a usable record was among them.
        columns: the data's names for the fields.

    Raises:
        ValueError: a file is missing or not readable, or holds no usable record, or a bad record
            is refused.
    """
    usable = skip
    for source, stored in read_fields(paths, advance, skip):
        try:
            fields = _named(stored, columns, dropped)
            record = parse_record(fields, shape, template, render_chat or plain_chat)
        except BadRecord as error:
            dropped.bad(str(error), source)
            continue
        usable += 1
        yield Record(record.prefix, record.continuation, record.rejected, source)
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


def parse_record(
    fields: Fields, shape: str, template: str, render_chat: Callable[[list[Message]], str]
) -> Record:
    """The record with these fields.

    Raises:
        BadRecord: it is not one.
    """
    record = SHAPES[detect_shape(fields) if shape == "auto" else shape](
        fields, template, render_chat
    )
    if record.prefix is not None and not record.prefix.strip():
        raise BadRecord("empty prefix")
    if not record.continuation.strip():
        raise BadRecord("empty continuation")
    if not all(answer.strip() for answer in record.rejected):
        raise BadRecord("empty rejected continuation")
    try:  # JSON can spell half a surrogate pair, which no tokenizer can encode
        "".join((record.prefix or "", record.continuation, *record.rejected)).encode()
    except UnicodeEncodeError:
        raise BadRecord("not UTF-8") from None
    return record


def detect_shape(fields: dict[str, Any]) -> str:
    """The key of `SHAPES` that the keys of a record ask for, the most specific one first.

    Raises:
        BadRecord: none.
    """
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and ("completion" in fields or "chosen" in fields):
        return "prompt"
    if "instruction" in fields and ("response" in fields or "output" in fields):
        return "instruction"
    if "text" in fields:
        return "text"
    raise BadRecord(f"no {SETS}")


def fill_template(template: str, fields: dict[str, Any]) -> str:
    """The template with every `{name}` replaced by that field of a record.

    One rule beside: a line that names an empty field is left out. No other brace is special.

    Raises:
        BadRecord: a field is missing or not a string.
    """
    lines = []
    for line in template.split("\n"):
        values = {name: _text(fields, name) for name in _FIELD.findall(line)}
        if all(values.values()):
            lines.append(_FIELD.sub(lambda match, v=values: v[match[1]], line))  # type: ignore[misc]
    return "\n".join(lines)


def check_template(template: str) -> None:
    """Refuse a template which gives every record the same prefix.

    Raises:
        ValueError: it names no field.
    """
    if not _FIELD.search(template):
        raise ValueError(
            f"--prompt-template {template!r} names no field; it needs at least one such as "
            "{instruction}, which is replaced by that field of each record"
        )


def plain_chat(messages: list[Message]) -> str:
    """A chat as text: one `role: content` line a message, then `assistant: `.

    For tokenizers without a chat template of their own.
    """
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def _prompt(fields: dict[str, Any], template: str, render_chat: Any) -> Record:
    continuation = _text(fields, "chosen" if "chosen" in fields else "completion")
    rejected = fields.get("rejected") or []
    rejected = [rejected] if isinstance(rejected, str) else rejected
    if not isinstance(rejected, list) or not all(isinstance(r, str) for r in rejected):
        raise BadRecord("field 'rejected' is neither a string nor a list of strings")
    return Record(_text(fields, "prompt"), continuation, tuple(rejected))


def _instruction(fields: dict[str, Any], template: str, render_chat: Any) -> Record:
    if not _text(fields, "instruction").strip():
        raise BadRecord("empty prefix")
    context = fields.get("context", fields.get("input"))
    prefix = fill_template(template, {**fields, "context": "" if context is None else context})
    return Record(prefix, _text(fields, "output" if "output" in fields else "response"))


def _messages(
    fields: dict[str, Any], template: str, render_chat: Callable[[list[Message]], str]
) -> Record:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise BadRecord("field 'messages' is not a list of objects with strings role and content")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRecord("no assistant turn in 'messages'")
    before = messages[: turns[-1]]
    if not any(message["content"].strip() for message in before):
        raise BadRecord("empty prefix")
    return Record(render_chat(before), messages[turns[-1]]["content"])


def _whole_text(fields: dict[str, Any], template: str, render_chat: Any) -> Record:
    return Record(None, _text(fields, "text"))


SHAPES: dict[str, Callable[[dict[str, Any], str, Any], Record]] = {
    "prompt": _prompt,
    "instruction": _instruction,
    "messages": _messages,
    "text": _whole_text,
}
"""`--format`: from the fields of a record, the template and the chat renderer to a `Record`."""


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise BadRecord(f"missing field {name!r}")
    if not isinstance(fields[name], str):
        raise BadRecord(f"field {name!r} is not a string")
    return fields[name]
