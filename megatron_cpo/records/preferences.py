"""Preference data: a right answer and worse ones to one prompt, as TRL, NeMo and UltraFeedback
write them.

    prompt, chosen, rejected             strings, or lists of messages (TRL's explicit prompt)
    chosen, rejected                     whole conversations or texts (TRL's implicit prompt): the
                                         prompt is what both begin with
    prompt, messages, chosen, rejected   UltraFeedback: a string beside whole conversations
    prompt, chosen_response, rejected_response   NeMo-Aligner
    context, completions                 NeMo RL: answers with a rank, 0 the best
    conversations, chosen, rejected      LLaMA-Factory: one message each

Other shapes may have `rejected` beside their answer, chats among them (`answered_chat`). It may
hold several answers. An empty one costs that answer and not the record.
"""

import re
from collections.abc import Sequence
from typing import Any

from megatron_cpo.records.border import common_start
from megatron_cpo.records.chats import Chat
from megatron_cpo.records.dropped import BadRecord
from megatron_cpo.records.messages import Message, messages_of
from megatron_cpo.records.record import Record, without_empty

_PROMPTS = ("question", "query", "input", "context", "system", "user", "conversations", "messages")
"""Fields that may well be the prompt of two strings that are not said to have one."""


def is_preference(fields: dict[str, Any]) -> bool:
    """Is there a right answer, and what it is better than?"""
    return (
        ("chosen" in fields and "rejected" in fields)
        or ("chosen_response" in fields and "rejected_response" in fields)
        or ("completions" in fields and "context" in fields)
    )


def preference(fields: dict[str, Any], chat: Chat) -> Record:
    """The record of a right answer and worse ones.

    Raises:
        BadRecord: it is none of the forms above.
    """
    prompt, chosen, rejected = _parts(fields)
    worse = _answers(rejected)
    if isinstance(chosen, str) and not isinstance(prompt, list):
        if not all(isinstance(answer, str) for answer in worse):
            raise BadRecord("field 'rejected' is neither a string nor a list of strings")
        if prompt is None:
            return without_empty(_implicit(fields, chosen, worse))
        if not isinstance(prompt, str):
            raise BadRecord("field 'prompt' is not a string")
        return without_empty(Record(prompt, chosen, tuple(worse)))
    answers = [_turns(chosen, "chosen"), *(_turns(answer, "rejected") for answer in worse)]
    before, answers = _split(prompt, answers)
    _check_answers(answers)
    return Record.of_chat(chat, before, answers, fields)


def answered_chat(
    before: list[Message], truth: list[Message], fields: dict[str, Any], chat: Chat
) -> Record:
    """The record of messages with their right answer, and of what `rejected` has beside it.

    Raises:
        BadRecord: a rejected answer is none to these messages.
    """
    worse = [_turns(answer, "rejected") for answer in _answers(fields.get("rejected"))]
    worse = _behind(before, worse)
    _check_answers(worse)
    return Record.of_chat(chat, before, [truth, *worse], fields)


def _parts(fields: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt (None: implicit), chosen and rejected, whatever their fields are called.

    Raises:
        BadRecord: an answer is missing, as where `--format` says what the record is not.
    """
    if "chosen" in fields:
        prompt = fields.get("prompt")
        if isinstance(fields["chosen"], dict):  # one message: the conversation is elsewhere
            others = (fields.get(name) for name in ("conversations", "messages"))
            prompt = next((value for value in others if value is not None), prompt)
        return prompt, fields["chosen"], fields.get("rejected")
    if "chosen_response" in fields and "rejected_response" in fields:
        return fields.get("prompt"), fields["chosen_response"], fields["rejected_response"]
    if not is_preference(fields):
        raise BadRecord("no chosen and rejected answers")
    ranked = fields["completions"]
    if not isinstance(ranked, list) or not all(
        isinstance(c, dict) and isinstance(c.get("rank"), int) and "completion" in c for c in ranked
    ):
        raise BadRecord("field 'completions' is not a list of objects with rank and completion")
    if len(ranked) < 2:
        raise BadRecord("field 'completions' has fewer than 2 answers")
    best, *rest = sorted(ranked, key=lambda completion: int(completion["rank"]))
    worse = [c["completion"] for c in rest if c["rank"] > best["rank"]]
    return fields["context"], best["completion"], worse


def _answers(rejected: Any) -> list[Any]:
    """Rejected answers: none, one (a string, a message or a list of messages), or several."""
    if not rejected:
        return []
    if isinstance(rejected, list) and not isinstance(rejected[0], dict):
        return rejected
    return [rejected]


def _turns(answer: Any, name: str) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return messages_of([answer] if isinstance(answer, dict) else answer, name)


def _split(
    prompt: Any, conversations: Sequence[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """The messages before the answers, and those of each answer."""
    if isinstance(prompt, list):
        before = messages_of(prompt, "prompt")
    else:
        before = []
        for turns in zip(*(c[:-1] for c in conversations), strict=False):
            if any(turn != turns[0] for turn in turns):
                break
            before.append(turns[0])
        if not before and isinstance(prompt, str):
            before = [{"role": "user", "content": prompt}]
    if not before:
        raise BadRecord("conversations of chosen and rejected have no message in common: no prompt")
    return before, _behind(before, conversations)


def _behind(before: list[Message], conversations: Sequence[list[Message]]) -> list[list[Message]]:
    """The messages of each answer, which may be a whole conversation."""
    n = len(before)
    answers = [c[n:] if c[:n] == before else c for c in conversations]
    if not all(answers):
        raise BadRecord("no answer behind the messages of the prompt")
    return answers


def _check_answers(answers: Sequence[list[Message]]) -> None:
    for answer in answers:
        if answer[0]["role"] != "assistant" or any(m["role"] in ("user", "system") for m in answer):
            raise BadRecord("chosen and rejected differ in more than the last answer")


def _implicit(fields: dict[str, Any], chosen: str, rejected: Sequence[str]) -> Record:
    """Two whole texts: what they begin with alike, word for word, is the prompt."""
    if other := next((name for name in _PROMPTS if name in fields), None):
        raise BadRecord(
            f"chosen and rejected are strings without a prompt, beside {other!r}: name it prompt"
        )
    texts = [chosen, *(answer for answer in rejected if answer.strip())]
    if len(texts) < 2:
        raise BadRecord("chosen and rejected without a prompt, and one of them is empty")
    common = chosen[: min(common_start(chosen, text) for text in texts[1:])]
    if not all(text[len(common) :][:1].isspace() for text in texts):
        common = re.sub(r"\S+\Z", "", common)  # the beginning of a word is no common word
    if not common.strip():
        raise BadRecord("chosen and rejected without a prompt have no common start")
    empty = [""] * (1 + len(rejected) - len(texts))
    first, *rest = (text[len(common) :] for text in texts)
    return Record(common, first, (*rest, *empty))
