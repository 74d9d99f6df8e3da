"""The shapes of records: which keys a JSON object has, and what is prompt and answer in it.

    prompt + completion     prefix and true continuation
    chosen + rejected       preference data, with or without a prompt; see `preferences.py`
    instruction + response  Dolly; `context` may be empty. Alpaca's `input` and `output` work too
    messages                a chat: the last assistant turn is the continuation
    text                    split at token level, once it is tokenised

All but `text` may have `rejected` answers beside theirs. Where several fit, the most specific one
counts.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_cpo.records.chats import Chat
from megatron_cpo.records.dropped import BadRecord
from megatron_cpo.records.messages import messages_of
from megatron_cpo.records.preferences import answered_chat, is_preference, preference
from megatron_cpo.records.record import Record, string, without_empty
from megatron_cpo.records.remedies import SETS

DEFAULT_TEMPLATE = "Instruction: {instruction}\nContext: {context}\nResponse:\n"
"""Ends in a line break: a space would be the answer's, and a model asked without it."""
_FIELD = re.compile(r"\{(\w+)\}")


def detect_shape(fields: dict[str, Any]) -> str:
    """The key of `SHAPES` that the keys of a record ask for, the most specific one first.

    Raises:
        BadRecord: none.
    """
    if is_preference(fields):
        return "preference"
    if "messages" in fields or "conversations" in fields:
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
        values = {name: string(fields, name) for name in _FIELD.findall(line)}
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


def _prompt(fields: dict[str, Any], template: str, chat: Chat) -> Record:
    if "chosen" in fields:
        return preference(fields, chat)
    _check_label(fields)
    if isinstance(fields.get("prompt"), list):
        before, answer = messages_of(fields["prompt"], "prompt"), fields.get("completion")
        messages = (
            messages_of(answer, "completion")
            if isinstance(answer, list)
            else [{"role": "assistant", "content": string(fields, "completion")}]
        )
        return answered_chat(before, messages, fields, chat)
    rejected = fields.get("rejected") or []
    rejected = [rejected] if isinstance(rejected, str) else rejected
    if not isinstance(rejected, list) or not all(isinstance(r, str) for r in rejected):
        raise BadRecord("field 'rejected' is neither a string nor a list of strings")
    return without_empty(
        Record(string(fields, "prompt"), string(fields, "completion"), tuple(rejected))
    )


def _check_label(fields: dict[str, Any]) -> None:
    """BadRecord for an unpaired answer that is a wrong one, as TRL and LLaMA-Factory label it."""
    if any(fields.get(name) is False for name in ("label", "kto_tag")):
        raise BadRecord("a completion labelled false is no right answer")


def instruction_prompt(fields: dict[str, Any], template: str) -> str:
    """The prefix of an instruction record."""
    if not string(fields, "instruction").strip():
        raise BadRecord("empty prefix")
    if fields.get("history") and isinstance(fields["history"], list):
        raise BadRecord("earlier turns in 'history', of which the prompt would have nothing")
    return fill_template(template, {**fields, "context": _context(fields)})


def _context(fields: dict[str, Any]) -> Any:
    context = fields.get("context", fields.get("input"))
    return "" if context is None else context


def _asked(fields: dict[str, Any]) -> str:
    """What an instruction record asks, without a template."""
    context = _context(fields)  # it may be anything where the template does not name it
    parts = string(fields, "instruction"), context if isinstance(context, str) else ""
    return "\n\n".join(filter(None, parts))


def _instruction(fields: dict[str, Any], template: str, chat: Chat) -> Record:
    _check_label(fields)
    answer = string(fields, "output" if "output" in fields else "response")
    return _answered_instruction({**fields, "chosen": answer}, template, chat)


def _messages(fields: dict[str, Any], template: str, chat: Chat) -> Record:
    _check_label(fields)
    field = "messages" if "messages" in fields else "conversations"
    messages = messages_of(fields.get(field), field)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRecord(f"no assistant turn in {field!r}")
    return answered_chat(messages[: turns[-1]], [messages[turns[-1]]], fields, chat)


def _preference(fields: dict[str, Any], template: str, chat: Chat) -> Record:
    if "instruction" not in fields or "prompt" in fields:
        return preference(fields, chat)
    return _answered_instruction(fields, template, chat)  # LLaMA-Factory's pairs


def _answered_instruction(fields: dict[str, Any], template: str, chat: Chat) -> Record:
    """The record of an instruction with `chosen`, and perhaps `rejected`."""
    record = preference({**fields, "prompt": instruction_prompt(fields, template)}, chat)
    return replace(record, texts=record.texts or (_asked(fields), record.continuation))


def _whole_text(fields: dict[str, Any], template: str, chat: Chat) -> Record:
    return Record(None, string(fields, "text"))


SHAPES: dict[str, Callable[[dict[str, Any], str, Chat], Record]] = {
    "prompt": _prompt,
    "instruction": _instruction,
    "messages": _messages,
    "preference": _preference,
    "text": _whole_text,
}
"""`--format`: from the fields of a record, the template and the chat renderer to a `Record`."""
