"""Messages of a chat in the form that chat templates take, whoever wrote them."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_cpo.records.dropped import BadRecord

Message = dict[str, Any]
_SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Roles as ShareGPT calls them."""


def messages_of(value: Any, field: str) -> list[Message]:
    """The messages in a field, in the form that chat templates take.

    Null content is empty; other null fields and lists of no tool calls are left out, and so is
    nothing else: tool calls, tool ids and reasoning are for the template to read. Arguments of a
    tool call that are JSON in a string become what they say, as vLLM hands them to a template.

    Raises:
        BadRecord: it is not a list of messages.
    """
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadRecord(f"field {field!r} is not a list of messages")
    return [_message(message, field) for message in value]


def _message(message: Message, field: str) -> Message:
    if "from" in message and "role" not in message:  # ShareGPT
        role = message["from"]
        role = _SPEAKERS.get(role, role) if isinstance(role, str) else role
        message = {"role": role, "content": message.get("value")}
    known = {name: value for name, value in message.items() if value is not None}
    content = known.get("content", "")
    if not isinstance(known.get("role"), str) or not isinstance(content, str | list):
        raise BadRecord(f"field {field!r} has a message without a role or a text")
    if "content" not in message and len(known) < 2:
        raise BadRecord(f"field {field!r} has a message without a role or a text")
    if isinstance(content, list):
        content = [_part(part, field) for part in content]
    known["content"] = content
    calls = known.get("tool_calls")
    if isinstance(calls, list):
        known["tool_calls"] = [_call(call) for call in calls]
    if not calls:  # tables have a list for every message, and some templates count what is in it
        known.pop("tool_calls", None)
    return known


def _part(part: Any, field: str) -> Message:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRecord(f"field {field!r} has a message with a part that is no text ({kind})")
    return {"type": "text", "text": text}


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def flat(message: Message) -> Message:
    """A message whose content is one text; its parts stand on lines of their own, as in vLLM."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def has_text(message: Message) -> bool:
    """Does a message say or do anything?"""
    return bool(flat(message)["content"].strip() or message.get("tool_calls"))


def strings(value: Any) -> Iterator[str]:
    """Every text in a value made of lists and objects, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)
