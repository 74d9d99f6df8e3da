"""A record as text: a prefix, its true continuation, and rejected ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_cpo.records.chats import Chat
from megatron_cpo.records.dropped import BadRecord
from megatron_cpo.records.messages import Message, flat, has_text, messages_of
from megatron_cpo.records.texts import Texts

EMPTY_ANSWER = "an empty rejected answer, left out"


@dataclass(frozen=True)
class Record:
    """A prefix x, its true continuation y_1, and any rejected continuations, as text."""

    prefix: str | None
    """None: `continuation` is a whole sample, to be split into x and y_1 at token level."""
    continuation: str
    rejected: tuple[str, ...] = ()
    source: str = field(default="", compare=False)
    """file:line, for messages."""
    rendered: bool = False
    """A chat template wrote it: control tokens in it are such, and end the answers."""
    end: str = field(default="", compare=False)
    """What the template ends an answer with, as far as that is known."""
    notes: tuple[str, ...] = ()
    """What is to be said of it, although it is used."""
    texts: Texts | None = field(default=None, compare=False)
    """None: prefix and continuation as they are."""

    @classmethod
    def of_chat(
        cls,
        chat: Chat,
        before: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        fields: dict[str, Any],
    ) -> "Record":
        """A conversation with its answers, y_1 first.

        Args:
            fields: of the record: `tools` and `chat_template_kwargs` are the template's, and
                `system` is what is said before messages that do not begin with it.

        Raises:
            BadRecord: as `Chat.conversation`, or y_1 is empty.
        """
        before = [*_system(before, fields.get("system")), *before]
        first, *rest = answers
        if not any(map(has_text, first)):
            raise BadRecord("empty continuation")
        kept = [answer for answer in rest if any(map(has_text, answer))]
        options = fields.get("chat_template_kwargs")
        if options is not None and not isinstance(options, dict):
            raise BadRecord("field 'chat_template_kwargs' is not an object")
        found = chat.conversation(before, [first, *kept], fields.get("tools"), options)
        truth, *rejected = found.answers
        notes = (EMPTY_ANSWER,) * (len(rest) - len(kept))
        return cls(
            found.prefix, truth, tuple(rejected), rendered=found.by_template, end=found.end,
            notes=notes, texts=(_shown(before), _shown(first)),
        )  # fmt: skip


def _system(before: Sequence[Message], said: Any) -> list[Message]:
    """The message of a field `system`, as Anthropic and LLaMA-Factory have one beside a chat."""
    there = any(message["role"] == "system" for message in before[:1])
    if there or not said or not isinstance(said, str | list):
        return []
    return [*filter(has_text, messages_of([{"role": "system", "content": said}], "system"))]


def _shown(messages: Sequence[Message]) -> str:
    """What messages say; who says it where it is not one of the user or of the model alone."""
    if len(messages) == 1 and messages[0]["role"] in ("user", "assistant"):
        return str(flat(messages[0])["content"])
    return "\n\n".join(f"{m['role']}: {flat(m)['content']}" for m in messages)


def without_empty(record: Record) -> Record:
    """A record without its empty rejected answers, each of which is noted."""
    kept = tuple(answer for answer in record.rejected if answer.strip())
    empty = len(record.rejected) - len(kept)
    return replace(record, rejected=kept, notes=record.notes + (EMPTY_ANSWER,) * empty)


def string(fields: dict[str, Any], name: str) -> str:
    """A field of a record that has to be a string.

    Raises:
        BadRecord: it is missing, or something else.
    """
    if name not in fields:
        raise BadRecord(f"missing field {name!r}")
    value = fields[name]
    if not isinstance(value, str):
        raise BadRecord(f"field {name!r} is not a string")
    return value
