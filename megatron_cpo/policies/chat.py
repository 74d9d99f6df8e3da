"""Chat completions of OpenAI-compatible servers: a judge's verdicts, a writer's answers.

Several servers share the work: each has as many requests in flight as it may, and takes the next
one when it has answered. One that fails for good leaves what it had to the others.

A request that is refused for what is in it, a text that is too long or that a filter stops, costs
what was asked by it and no more; where all are refused it is not the texts, and asking ends.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpo.files import encodable
from megatron_cpo.kept import KeptLines
from megatron_cpo.policies.answers import BAD_REQUEST, Exhausted, Refused
from megatron_cpo.policies.endpoint import Endpoint

Body = dict[str, Any]

FIRST_REFUSALS = 32
"""Refusals before any answer after which no further request is sent."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What a model says to a request."""

    text: str
    """Empty where it says nothing."""
    finish: str | None = None
    """Why it ends there, in the server's words: `stop`, or `length` if it was cut."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encodable(self.text))


class ReplyCache(KeptLines):
    """Replies by the digest of their requests; see `KeptLines`.

    Args:
        what: a row in messages, such as `a judge's reply`.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(path, what, ["reply", "finish"], {"finish": None})

    def find(self, key: str) -> Reply | None:
        """The reply to a request, or None."""
        row = self.row(key)
        return None if row is None else Reply(row["reply"], row["finish"])

    def add(self, key: str, model: str, reply: Reply) -> None:
        """Keep a reply; it outlives this process."""
        self.keep(key, model=model, reply=reply.text, finish=reply.finish)


def ask(
    endpoints: Sequence[Endpoint],
    bodies: Mapping[str, Body],
    keep: Callable[[str, Reply], object],
    answered: bool = False,
) -> dict[str, Refused]:
    """Ask for every reply, of any of the servers; requests that were refused, by their keys.

    Args:
        endpoints: each keeps its own number of requests in flight.
        bodies: requests by their keys.
        keep: called with key and reply as soon as that is there.
        answered: requests like these were answered before.

    Raises:
        ValueError: no server can be reached any more, one refuses whatever it is asked (a key, a
            model or a path that it does not know), or the first `FIRST_REFUSALS` requests, or all,
            were refused.
    """
    try:
        return asyncio.run(_ask_all(endpoints, dict(bodies), keep, answered))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def check_reachable(endpoints: Sequence[Endpoint]) -> None:
    """Ask each server for the list of its models, which costs nothing; it need not have one.

    Raises:
        ValueError: nothing answers there, or the key is not taken.
    """

    async def all_of_them() -> None:
        for endpoint in endpoints:
            async with endpoint:
                try:
                    await endpoint.models()
                except (Exhausted, Refused) as error:
                    if error.status in (0, 401):
                        raise

    asyncio.run(all_of_them())


async def _ask_all(
    endpoints: Sequence[Endpoint],
    missing: dict[str, Body],
    keep: Callable[[str, Reply], object],
    answered: bool,
) -> dict[str, Refused]:
    alive = list(endpoints)
    refused: dict[str, Refused] = {}

    async def work(endpoint: Endpoint, waiting: list[str]) -> None:
        nonlocal answered
        while waiting and endpoint in alive:
            key = waiting.pop()
            try:
                answer = await endpoint.post("chat/completions", missing[key])
            except (Exhausted, Refused) as error:
                if isinstance(error, Refused) and error.status:
                    refused[key] = error
                    del missing[key]
                    if error.status not in BAD_REQUEST or (
                        len(refused) == FIRST_REFUSALS and not answered
                    ):
                        raise
                    continue
                if endpoint in alive:
                    if len(alive) == 1:
                        raise
                    alive.remove(endpoint)
                    logger.warning(f"{error}; the other servers go on without it")
            else:
                keep(key, _reply(endpoint, answer))
                answered = True
                del missing[key]

    async with AsyncExitStack() as opened:
        for endpoint in endpoints:
            await opened.enter_async_context(endpoint)
        while missing:  # again with what a server left that failed when the others had finished
            waiting = [*missing][::-1]
            async with asyncio.TaskGroup() as tasks:
                for endpoint in alive:
                    for _ in range(min(endpoint.in_flight, len(missing))):
                        tasks.create_task(work(endpoint, waiting))
    if refused and not answered:
        raise next(iter(refused.values()))
    return refused


def _reply(endpoint: Endpoint, answer: dict[str, Any]) -> Reply:
    try:
        choice = answer["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise endpoint.error(
            f"its answer is no chat completion: {json.dumps(answer)[:200]}; is this the address of "
            "an OpenAI-compatible server?"
        ) from error
    return Reply("" if content is None else str(content), finish)
