"""An OpenAI-compatible endpoint: requests side by side, asked again when it is busy or failing.

It knows nothing of what is asked: completions of a policy, or chats of a judge.

    endpoint = Endpoint("http://localhost:8000/v1", in_flight=32)
    async with endpoint:
        answers = await asyncio.gather(*(endpoint.post("chat/completions", b) for b in bodies))

Why not the `openai` client (3.57 read): it counts no retries, and gives up a request after a fixed
number of them, though a rate limit that serves others is only a queue; takes a wait above two
minutes for a refusal; does not ask again after JSON that is cut off, and hands out a web page or
JSON of another shape as an answer (`model_construct` checks nothing); follows redirects; reads
organisation, project and further headers from the environment and sends them to any server; says
nothing of what to do on 401; and from 3 on needs httpx2 beside the httpx that Hugging Face needs.
With its retries turned off, a header and the path would be left of it. Taken over from it are the
time limits, Retry-After in seconds, milliseconds and as a date, and which statuses are asked again.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from typing import Any, Self

import httpx

from megatron_cpo.policies.address import Address
from megatron_cpo.policies.answers import Exhausted, Failed, Refused, no_answer, read_answer, said

ATTEMPTS, LIST_ATTEMPTS = 8, 3
"""Failures of one request before it is given up, with the delays below after about two minutes; and
of the list of models, which some servers fail to make."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before the second request, doubled for each further one, each times 0.5 to 1.5."""
LONGEST_WAIT = 60.0
"""Seconds, at most, that `Retry-After` makes us wait for once."""
TIMEOUT, CONNECT_TIMEOUT, LIST_TIMEOUT = 600.0, 10.0, 30.0
"""Seconds for one answer, to connect, and for the list of models."""
TELL_SECONDS = 60.0
"""From one line in the log to the next."""

logger = logging.getLogger(__name__)


class Endpoint:
    """A base URL with its key, its retries and its errors; an asynchronous context manager.

    It may be opened again and again, also in forked processes; each opening has connections of
    its own.

    Args:
        url: up to the version, such as http://localhost:8000/v1, or without it.
        flag: that gave the address, for messages.
        key_flag: that names the environment variable of the key, for messages.
        key_variable: that variable; None: OPENAI_API_KEY if it is set.
        in_flight: most requests at a time; those that wait to be repeated are among them.

    Raises:
        ValueError: as `Address.read`.
    """

    def __init__(
        self,
        url: str,
        flag: str = "--policy",
        key_flag: str = "--policy-key-env",
        key_variable: str | None = None,
        in_flight: int = 32,
    ) -> None:
        self.address = Address.read(url, flag, key_flag, key_variable)
        self.name = f"{flag} {self.address.shown}"
        """For the beginning of messages."""
        self.retries: Counter[str] = Counter()
        """Requests that were repeated, by reason, since `take_retries`."""
        self.in_flight = in_flight
        """Most requests at a time."""
        self._bases = self.address.bases
        self._reached = False
        self._answers = 0
        self._news: Counter[str] = Counter()
        self._told = time.monotonic()
        for library in ("httpx", "httpcore"):  # a line a request
            if logging.getLogger(library).level == logging.NOTSET:
                logging.getLogger(library).setLevel(logging.WARNING)

    async def __aenter__(self) -> Self:
        authorization = self.address.authorization
        self._slots = asyncio.Semaphore(self.in_flight)
        try:
            self._client = httpx.AsyncClient(
                headers={"Authorization": authorization} if authorization else {},
                timeout=httpx.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
                limits=httpx.Limits(
                    max_connections=self.in_flight, max_keepalive_connections=self.in_flight
                ),
            )
        # Of the environment: proxies of another kind, files of certificates that are not there.
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            raise self.error(
                f"cannot be asked with the proxy and certificate variables of this environment "
                f"({said(error)})"
            ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    def take_retries(self) -> Counter[str]:
        """Lines of a report of requests that were repeated since the last call."""
        found = Counter({f"asked again: {why}": n for why, n in self.retries.items()})
        self.retries.clear()
        return found

    def error(self, what: str) -> ValueError:
        """What went wrong, with whom it did."""
        return ValueError(f"{self.name}: {self.address.hide(what)}")

    async def models(self) -> list[dict[str, Any]]:
        """What it lists, each with its `id`; finds out whether the address lacks its /v1.

        Raises:
            Refused: it has no such list, or nothing answers.
            Exhausted: it fails to make one.
        """
        answer = await self._ask("GET", "models", LIST_ATTEMPTS, timeout=LIST_TIMEOUT)
        listed = answer.get("data")
        if not isinstance(listed, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed
        ):
            raise Refused(f"{self.name}: its list of models has another shape", 200)
        return listed

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that it answers, with the request repeated while it is busy or failing.

        Args:
            path: behind the version, such as `completions`.
            body: a JSON object.

        Raises:
            Refused: it will not answer this request, however often it is asked.
            Exhausted: `ATTEMPTS` have failed.
        """
        return await self._ask("POST", path, ATTEMPTS, json=body)

    async def _ask(self, method: str, path: str, attempts: int, **request: Any) -> dict[str, Any]:
        """Ask at the base that is known to be right, or at each until one is not absent."""
        absent: Refused | None = None
        for base in self._bases:
            url = f"{base}/{path}{self.address.query}"
            try:
                async with self._slots:
                    answer = await self._repeated(method, url, attempts, **request)
            except Refused as error:
                if error.absent:
                    absent = error
                    continue
                self._bases = (base,)
                raise
            self._bases = (base,)
            return answer
        assert absent is not None
        raise absent

    async def _repeated(
        self, method: str, url: str, attempts: int, **request: Any
    ) -> dict[str, Any]:
        failures = repeats = 0
        served = self._answers
        while True:
            try:
                answer = await self._once(method, url, **request)
                self._answers += 1
                self._tell("")
                return answer
            except Failed as failed:
                # Others are served: a rate limit is a queue, and this request stands in it.
                failures = 1 if failed.busy and self._answers > served else failures + 1
                served = self._answers
                if failures == attempts:
                    what = f"{attempts} requests failed in a row, the last one with {failed}"
                    raise Exhausted(
                        f"{self.name}: {what}; see the server's log and start again: what is "
                        "finished is kept",
                        failed.status,
                        what,
                    ) from failed
                self.retries[failed.reason] += 1
                self._tell(failed.reason)
                delay = min(FIRST_DELAY * 2 ** min(repeats, 10), LONGEST_DELAY)
                delay *= random.uniform(0.5, 1.5)
                repeats += 1
                await asyncio.sleep(max(delay, min(failed.wait or 0.0, LONGEST_WAIT)))

    async def _once(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        """One request.

        Raises:
            Failed: it may be answered the next time.
            Refused: it will not be answered.
        """
        try:
            response = await self._client.request(method, url, **request)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise no_answer(error, self.name, self.address, url, self._reached) from error
        self._reached = True
        return read_answer(response, self.name, self.address)

    def _tell(self, again: str) -> None:
        """Note an answer, or why a request is repeated; a line in the log once a minute."""
        self._news[again] += 1
        now = time.monotonic()
        if now - self._told < TELL_SECONDS:
            return
        answers = self._news.pop("", 0)
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in self._news.most_common())
        logger.log(
            logging.WARNING if reasons else logging.INFO,
            f"{self.name}: {answers:,} requests answered in {now - self._told:.0f} s"
            f"{f', asked again: {reasons}' if reasons else ''}",
        )
        self._news.clear()
        self._told = now
