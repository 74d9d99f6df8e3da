"""A language model as judge, behind any OpenAI-compatible endpoint; no reply is paid twice.

Every reply is appended to a file as soon as it is there, under a digest of the model and the whole
request. A rerun finds all of them there and asks nothing; a run that was killed asks for what is
missing, and for what was under way when it died.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpo.evaluation.kept import KeptLines, digest
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.progress import progress

MAX_TOKENS = 512
"""Of a reply: room for the sentence that a template asks for."""


class ReplyCache(KeptLines):
    """Replies by the digest of their requests; see `KeptLines`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a judge's reply", ["reply"])

    def find(self, key: str) -> str | None:
        """The reply to a request, or None."""
        row = self.row(key)
        return None if row is None else row["reply"]

    def add(self, key: str, model: str, reply: str) -> None:
        """Keep a reply; it outlives this process."""
        self.keep(key, model=model, reply=reply)


def request(model: str, prompt: str) -> dict[str, Any]:
    """The body of a request; temperature 0, so that asking again gives the same verdict."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }


def replies(endpoint: Endpoint, model: str, prompts: Sequence[str], cache: ReplyCache) -> list[str]:
    """The judge's reply to each prompt; "" where it has none.

    Equal prompts are asked once, and those in the cache not at all.

    Args:
        endpoint: keeps its own number of requests in flight.
        model: its name there.

    Raises:
        ValueError: it cannot be reached, or refuses; replies that are there are kept.
    """
    bodies = {digest(body): body for prompt in prompts if (body := request(model, prompt))}
    missing = {key: body for key, body in bodies.items() if cache.find(key) is None}
    if missing:
        try:
            asyncio.run(_ask_all(endpoint, model, missing, len(bodies), cache))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return [cache.find(digest(request(model, prompt))) or "" for prompt in prompts]


async def _ask_all(
    endpoint: Endpoint,
    model: str,
    missing: dict[str, dict[str, Any]],
    wanted: int,
    cache: ReplyCache,
) -> None:
    with progress(None, "judge", "replies", wanted) as bar:
        bar.update(wanted - len(missing))
        bar.unpause()

        async def ask(key: str, body: dict[str, Any]) -> None:
            answer = await endpoint.post("chat/completions", body)
            cache.add(key, model, _content(endpoint, answer))
            bar.update(1)

        async with endpoint, asyncio.TaskGroup() as tasks:
            for key, body in missing.items():
                tasks.create_task(ask(key, body))


def _content(endpoint: Endpoint, answer: dict[str, Any]) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise endpoint.error(
            f"its answer is no chat completion: {json.dumps(answer)[:200]}; is this the address of "
            "an OpenAI-compatible server?"
        ) from error
    return "" if content is None else str(content)
