"""What a judge is asked, and what its reply says: pairs, templates, verdicts."""

import re
from dataclasses import dataclass
from enum import StrEnum

INSTRUCTION = """\
For the following instruction, which response is more helpful?

Instruction:
{prompt}

Response A:
{a}

Response B:
{b}

Judge helpfulness, correctness and clarity; length alone is no merit. First compare the two in one
sentence. Then, on a line of its own, write only "A" or "B" for the more helpful response."""
CONTINUATION = """\
Two texts continue the same beginning. Which continuation is better?

Beginning:
{prompt}

Continuation A:
{a}

Continuation B:
{b}

Judge coherence with the beginning, fluency and information; length alone is no merit. First compare
the two in one sentence. Then, on a line of its own, write only "A" or "B" for the better one."""
TEMPLATES = {"instruction": INSTRUCTION, "continuation": CONTINUATION}
"""By the two tasks of the paper, instruction following and open-ended continuation."""

LIMIT_FLAG = "--judge-max-tokens"
"""Of the tokens of a reply."""


class Verdict(StrEnum):
    """What a judge says of a pair."""

    A = "A"
    B = "B"
    TIE = "tie"

    def swap(self) -> "Verdict":
        """The same verdict of the pair in the other order."""
        return {Verdict.A: Verdict.B, Verdict.B: Verdict.A}.get(self, self)


@dataclass(frozen=True)
class NoReply:
    """What stands for a judge's reply where the request was refused for what is in it."""

    said: str
    """The server's words, with the status."""


@dataclass(frozen=True)
class CutReply:
    """A judge's reply that ends where its tokens were used up."""

    said: str
    """What there is of it."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt."""

    prompt: str
    a: str
    b: str

    def swap(self) -> "Comparison":
        """The same answers in the other order."""
        return Comparison(self.prompt, self.b, self.a)

    def fill(self, template: str) -> str:
        """The template with prompt and answers in their places; braces in them stay as they are."""
        parts = {"{prompt}": self.prompt, "{a}": self.a, "{b}": self.b}
        return re.sub(r"\{(?:prompt|a|b)\}", lambda found: parts[found.group()], template)


def check_template(template: str) -> None:
    """Refuse a template without one of its places.

    Raises:
        ValueError: which one is missing.
    """
    if missing := [place for place in ("{prompt}", "{a}", "{b}") if place not in template]:
        raise ValueError(
            f"the template has no {' and no '.join(missing)}; it needs {{prompt}}, {{a}} and "
            "{b}, where the prompt and both answers go"
        )


# The first <think> may be the end of the prompt, as chat templates have it.
_THOUGHTS = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*$", re.DOTALL)
_PUNCTUATION = re.compile(r"[*_`#>\"'.:!\s]+")
_HEADING = re.compile(r"^\s*#|:[*_\s]*$")
_NAME = r"(?:the\s+)?(?:(?:response|answer|continuation|output|option|assistant|text)\s*)?"
_CHOICE = re.compile(rf"{_NAME}\(?\[{{0,2}}([ab]|tie|both|equal|neither)\]{{0,2}}\)?", re.I)
_ANNOUNCED = re.compile(
    r"^(?:the |my |final )*(?:more helpful|better|best|verdict|answer|choice|winner|preference)"
    r"(?: response| answer| continuation| one)? (?:is )?",
    re.I,
)
_MARKED = re.compile(r"\[\[\s*([ab]|c|tie)\s*\]\]", re.I)
_STATED = re.compile(
    r"(?:verdict|winner|better|best|preferred|prefer|choose|choice|final answer|more helpful)"
    r"(?:\s+(?:response|answer|continuation|output|one|option))?(?:\s+is)?\s*[:=]?\s*"
    rf"{_NAME}\"?\(?([AB]|[Tt]ie)\b(?![-\w]|\s+[a-z])",
)


def read_verdict(reply: str) -> Verdict | None:
    """The verdict of a reply, or None if it has none that is clear.

    A reply that is a choice and nothing else, else its last line if it is one, else the lines that
    are one if all of them agree, else a choice in double brackets, else the one that is stated
    ("better: B") if all that are stated agree. A sentence that merely mentions A and B says
    nothing, and neither does a heading over what is said of an answer ("Response A:") or what a
    model thinks before it answers, between `<think>` and `</think>`; without the latter it was cut.

    >>> [read_verdict(r) for r in ("A.", "Response B", "**A**", "I like A, and B too.")]
    [<Verdict.A: 'A'>, <Verdict.B: 'B'>, <Verdict.A: 'A'>, None]
    """
    reply = _THOUGHTS.sub("", reply)
    lines = [line for line in reply.splitlines() if _PUNCTUATION.sub("", line)]
    if lines and (last := _choice(lines[-1])):
        return last
    named = {_choice(line) for line in lines if not _HEADING.search(line)} - {None}
    if len(named) == 1:
        return named.pop()
    for pattern in (_MARKED, _STATED):
        named = {_verdict(name) for name in pattern.findall(reply)}
        if len(named) == 1:
            return named.pop()
    return None


def _choice(line: str) -> Verdict | None:
    """What a line that is a choice and nothing else says."""
    line = _ANNOUNCED.sub("", _PUNCTUATION.sub(" ", line).strip())
    found = _CHOICE.fullmatch(line)
    return _verdict(found.group(1)) if found else None


def _verdict(name: str) -> Verdict:
    return {"a": Verdict.A, "b": Verdict.B}.get(name.lower(), Verdict.TIE)
