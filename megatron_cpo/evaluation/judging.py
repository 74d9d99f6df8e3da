"""A language model as judge, behind any OpenAI-compatible endpoint; no reply is paid twice.

Every reply is appended to a file as soon as it is there, under a digest of the model and the whole
request. A rerun finds all of them there and asks nothing; a run that was killed asks for what is
missing, and for what was under way when it died.
"""

from collections.abc import Sequence
from typing import Any

from megatron_cpo.evaluation.verdicts import CutReply, NoReply
from megatron_cpo.kept import digest
from megatron_cpo.policies.answers import Refused
from megatron_cpo.policies.chat import Reply, ReplyCache, ask
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.progress import progress

ROW = "a judge's reply"
"""What a row of the file of replies is called."""


def request(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """The body of a request; temperature 0, so that asking again gives the same verdict."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }


def replies(
    endpoint: Endpoint, model: str, prompts: Sequence[str], cache: ReplyCache, max_tokens: int
) -> list[str | CutReply | NoReply]:
    """The judge's reply to each prompt; "" where it says nothing.

    Equal prompts are asked once, and those in the cache not at all.

    Args:
        endpoint: keeps its own number of requests in flight.
        model: its name there.
        max_tokens: of a reply.

    Raises:
        ValueError: as `ask`; replies that are there are kept.
    """

    def asked(prompt: str) -> dict[str, Any]:
        return request(model, prompt, max_tokens)

    refused: dict[str, Refused] = {}
    bodies = {digest(body): body for prompt in prompts if (body := asked(prompt))}
    missing = {key: body for key, body in bodies.items() if cache.find(key) is None}
    if missing:
        with progress(None, "judge", "replies", len(bodies)) as bar:
            bar.update(len(bodies) - len(missing))
            bar.unpause()

            def keep(key: str, reply: Reply) -> None:
                cache.add(key, model, reply)
                bar.update(1)

            refused = ask([endpoint], missing, keep, answered=len(missing) < len(bodies))
    return [
        NoReply(refused[key].said) if (reply := cache.find(key)) is None else _said(reply)
        for key in (digest(asked(prompt)) for prompt in prompts)
    ]


def _said(reply: Reply) -> str | CutReply:
    return CutReply(reply.text) if reply.finish == "length" else reply.text
