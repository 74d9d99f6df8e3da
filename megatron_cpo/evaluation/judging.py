"""A language model as judge, behind any OpenAI-compatible endpoint; no reply is paid twice.

Every reply is appended to a file as soon as it is there, under a digest of the model and the whole
request. A rerun finds all of them there and asks nothing; a run that was killed asks for what is
missing, and for what was under way when it died.
"""

from collections.abc import Sequence
from typing import Any

from megatron_cpo.evaluation.verdicts import NoReply
from megatron_cpo.kept import digest
from megatron_cpo.policies.answers import Refused
from megatron_cpo.policies.chat import Reply, ReplyCache, ask
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.progress import progress

MAX_TOKENS = 512
"""Of a reply: room for the sentence that a template asks for."""
ROW = "a judge's reply"
"""What a row of the file of replies is called."""


def request(model: str, prompt: str) -> dict[str, Any]:
    """The body of a request; temperature 0, so that asking again gives the same verdict."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }


def replies(
    endpoint: Endpoint, model: str, prompts: Sequence[str], cache: ReplyCache
) -> list[str | NoReply]:
    """The judge's reply to each prompt; "" where it says nothing.

    Equal prompts are asked once, and those in the cache not at all.

    Args:
        endpoint: keeps its own number of requests in flight.
        model: its name there.

    Raises:
        ValueError: as `ask`; replies that are there are kept.
    """
    refused: dict[str, Refused] = {}
    bodies = {digest(body): body for prompt in prompts if (body := request(model, prompt))}
    missing = {key: body for key, body in bodies.items() if cache.find(key) is None}
    if missing:
        with progress(None, "judge", "replies", len(bodies)) as bar:
            bar.update(len(bodies) - len(missing))
            bar.unpause()

            def keep(key: str, reply: Reply) -> None:
                cache.add(key, model, reply)
                bar.update(1)

            refused = ask([endpoint], missing, keep, answered=len(missing) < len(bodies))
    keys = [digest(request(model, prompt)) for prompt in prompts]
    return [
        NoReply(refused[key].said) if (reply := cache.find(key)) is None else reply.text
        for key in keys
    ]
