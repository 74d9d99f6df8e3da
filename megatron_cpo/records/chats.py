"""Chats: what a chat template makes of messages, and which part of that is the answer.

The template is a program of the tokenizer's and the only authority: it trims, writes thoughts and
tool calls, and ends a turn in its own way. So an answer is cut out of the *rendered* conversation:

    prefix        the template over the messages before, where it prompts the model to speak
    continuation  what the template over the messages and the answer has behind that

A template that writes the answer otherwise than behind its own prompt has no such place, and the
record is refused by that name. So is one whose messages spell a control token, or what the template
marks a turn with: such a message would close its own turn.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpo.records.control_tokens import ControlTokens
from megatron_cpo.records.dropped import BadRecord
from megatron_cpo.records.messages import Message, flat, has_text, strings
from megatron_cpo.records.spelling import library_of

_PROBE = "\ue000probe"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text: the prompt, and each answer with the end of its turn."""

    prefix: str
    answers: tuple[str, ...]
    by_template: bool
    """Whether a chat template wrote it, control tokens included."""
    end: str = ""
    """What the template ends an answer with, as far as that can be told."""


class Chat:
    """Renders conversations with a tokenizer's chat template, or plainly if it has none.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`; None is plain.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self._render = _template(tokenizer)
        self._control = ControlTokens(tokenizer) if self._render else None
        self._takes_parts: bool | None = None
        self._marks: list[str] | None = None
        self._end = ""

    def conversation(
        self,
        before: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        tools: Any = None,
        options: dict[str, Any] | None = None,
    ) -> Rendered:
        """The prompt and the answers to it, as text.

        Args:
            before: messages that the answers follow; at least one has a text.
            answers: the messages of each answer, usually one.
            tools: definitions, or JSON of them, which the template gets.
            options: what else the template gets (`chat_template_kwargs`).

        Raises:
            BadRecord: see above.
        """
        if isinstance(tools, str):
            try:
                tools = json.loads(tools) if tools.strip() else None
            except ValueError:
                raise BadRecord("field 'tools' is not JSON") from None
        if not any(map(has_text, before)):
            raise BadRecord("empty prefix")
        if self._render is None:
            return self._plain(before, answers, tools)
        said = [*strings([before, answers]), *strings([tools, options])]
        assert self._control is not None
        for text in said:
            if token := self._control.find(text):
                raise BadRecord(f"control token {token} written in a message")
        if self._marks is None:
            self._marks = self._turn_marks()
        for mark in self._marks:
            if any(mark in text for text in said):
                raise BadRecord(f"the template's mark of a turn, {mark!r}, written in a message")
        rest = {"tools": tools or None, **(options or {})}
        prefix = self._text(before, rest, True)
        found = []
        for answer in answers:
            whole = self._text([*before, *answer], rest, False)
            if not whole.startswith(prefix):
                raise BadRecord(
                    "the chat template writes the answer otherwise than behind its own prompt"
                )
            found.append(whole[len(prefix) :])
        return Rendered(prefix, tuple(found), True, self._end)

    def _text(self, messages: Sequence[Message], rest: dict[str, Any], prompt: bool) -> str:
        assert self._render is not None
        try:
            if self._takes_parts is None:
                self._takes_parts = self._reads_parts()
            return self._render(
                [m if self._takes_parts else flat(m) for m in messages],
                add_generation_prompt=prompt, **rest,
            )  # fmt: skip
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise BadRecord(f"the chat template refuses the messages ({error})") from error

    def _reads_parts(self) -> bool:
        """Does the template read the parts of a content, or would it print the list itself?"""
        assert self._render is not None
        parts = [{"type": "text", "text": _PROBE}]
        try:
            shown = self._render([{"role": "user", "content": parts}], add_generation_prompt=True)
        except Exception:
            return False
        return _PROBE in shown and "'text'" not in shown and '"text"' not in shown

    def _turn_marks(self) -> list[str]:
        """What the template writes between a user's text and the answer, and behind that.

        Control tokens are found by themselves; these are for templates that mark turns with words.
        """
        asked, said = _PROBE, _PROBE[::-1]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        try:
            text = self._text(messages, {}, False)
        except BadRecord:  # one that wants other roles
            return []
        _, _, rest = text.partition(asked)
        between, found, end = rest.partition(said)
        if not found:
            return []
        self._end = end
        # Line breaks are part of what marks a turn, or the word "assistant" would be such a mark.
        return [mark for mark in (between.rstrip(" "), end.strip()) if mark.strip()]

    def _plain(
        self, before: Sequence[Message], answers: Sequence[Sequence[Message]], tools: Any
    ) -> Rendered:
        """One `role: content` line a message, then `assistant: ` and the answer."""
        messages = [*before, *(message for answer in answers for message in answer)]
        if tools or any("tool_calls" in message for message in messages):
            raise BadRecord("tools need a chat template, and the tokenizer has none")
        if not all(len(answer) == 1 for answer in answers):
            raise BadRecord("an answer of several messages needs a chat template")
        roles = "|".join({"user", "assistant", "system", *(re.escape(m["role"]) for m in messages)})
        for message in messages:
            if re.search(rf"(?m)^({roles}): ", flat(message)["content"]):
                raise BadRecord("the turn of another speaker written in a message")
        prefix = "".join(f"{m['role']}: {flat(m)['content']}\n" for m in before)
        texts = tuple(flat(answer[0])["content"] for answer in answers)
        return Rendered(f"{prefix}assistant: ", texts, False)


def template_digest(tokenizer: Any) -> str | None:
    """What tells chat templates apart, which no digest of tokens does; None if there is none."""
    template = _template_of(tokenizer)
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None


def _template_of(tokenizer: Any) -> Any:
    """A tokenizer's chat template, or several by their names; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:  # Megatron's SFTTokenizer keeps it elsewhere
        config = getattr(getattr(tokenizer, "_tokenizer", tokenizer), "_prompt_config", None)
        template = getattr(config, "custom_chat_template", None)
    return template or None


def _template(tokenizer: Any) -> Callable[..., str] | None:
    """(messages, **variables) to text, by the tokenizer's chat template; None if it has none."""
    inner, library = getattr(tokenizer, "_tokenizer", tokenizer), library_of(tokenizer)
    template = _template_of(tokenizer)
    if template is None:
        return None
    if hasattr(library, "get_chat_template"):  # transformers', which knows tools and its tokens
        one = template if isinstance(template, str) else None  # of several it chooses itself

        def render(messages: list[Message], **variables: Any) -> str:
            variables = {"chat_template": one, "tokenize": False, **variables}
            return str(library.apply_chat_template(messages, **variables))

        return render
    from transformers.utils.chat_template_utils import render_jinja_template

    names = {v: k for k, v in ControlTokens(tokenizer).by_text.items()}
    tokens = {
        f"{name}_token": names[i]
        for name in ("bos", "eos", "unk", "pad")
        if (i := getattr(inner, f"{name}_id", None)) in names
    }

    def render_plainly(messages: list[Message], **variables: Any) -> str:
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, **tokens, **variables
        )
        return str(rendered[0][0])

    return render_plainly
