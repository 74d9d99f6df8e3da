"""An OpenAI-compatible completions server as a policy, for AN alone: vLLM, SGLang, transformers.

A server samples by its own random numbers: with one seed a group the same server gives the same
samples if it keeps its promises, but tokens are not those of the other policies, and may change
with the server's load and version. Where the server takes token ids and gives them back, they are
used as they are. Otherwise a prompt is the text of its ids and the answer is encoded again, which
may merge tokens otherwise than they were drawn; training and scoring see the merged ones.

Prefixes are requested side by side. An overloaded or failing server is asked again, later each
time; `retries` counts how often, by reason.
"""

import asyncio
import importlib.util
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.tokenizing import PROBE
from megatron_cpo.tree import Ints

ATTEMPTS = 8
"""Requests before the server is given up; with the delays below about two minutes."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before the second request, doubled for each further one, each times 0.5 to 1.5."""
TIMEOUT = 600.0
"""Seconds for one answer."""

Body = dict[str, Any]


def _token_ids(ids: list[int], text: str, sampling: Sampling, eod: int) -> Body:
    """vLLM and SGLang: ids in, and from vLLM out; the number of samples and top-k."""
    return {"prompt": ids, "top_k": sampling.top_k or -1, "return_token_ids": True}


def _transformers(ids: list[int], text: str, sampling: Sampling, eod: int) -> Body:
    """`transformers serve`: text, and what it lacks in a generation config; one sample each."""
    config = {"do_sample": True, "top_k": sampling.top_k, "eos_token_id": eod, "pad_token_id": eod}
    return {"prompt": text, "generation_config": json.dumps(config)}


def _text(ids: list[int], text: str, sampling: Sampling, eod: int) -> Body:
    """OpenAI's own fields, which have no top-k."""
    return {"prompt": text}


DIALECTS: dict[str, Callable[[list[int], str, Sampling, int], Body]] = {
    "token ids": _token_ids,
    "transformers": _transformers,
    "text": _text,
}
"""How servers want to be asked; the first that the server understands is used."""


class ServerPolicy:
    """The `Policy` of a completions server; it samples, and can do nothing else.

    Args:
        url: up to and with the version, such as http://localhost:8000/v1.
        tokenizer: Megatron's, of the build; has to be that of the server's model.
        sampling: how to sample; the server has to understand it.
        model: the server's name of the model; None: the only one it lists.
        concurrency: most requests at a time.

    Raises:
        ValueError: no answer, no such model, or the tokenizer is another one.
    """

    kinds: tuple[str, ...] = ("an",)
    forks = False  # it asks in parallel by itself
    positions: int | None = None
    ends: frozenset[int] = frozenset()  # the server knows

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        sampling: Sampling,
        model: str | None = None,
        concurrency: int = 32,
    ) -> None:
        if importlib.util.find_spec("httpx") is None:
            raise ValueError(
                f"--policy {url}: needs the package httpx: pip install 'megatron-cpo[server]'"
            )
        self._url, self._tokenizer, self._concurrency = url.rstrip("/"), tokenizer, concurrency
        self._encoder = Encoder(tokenizer)
        self.retries: Counter[str] = Counter()
        """Requests that were repeated, by reason; whoever sums them up clears them."""
        self._model = model or self._only_model()
        self._dialect = asyncio.run(self._find_dialect(sampling))

    @property
    def identity(self) -> dict[str, Any]:
        """The server's name of the model, without its folder, and how it is asked."""
        name = self._model.rstrip("/").rpartition("/")[2]
        return {"backend": "server", "name": name, "dialect": self._dialect}

    def sample(
        self,
        prefixes: Sequence[Ints],
        limits: Sequence[int],
        count: int,
        rngs: Sequence[np.random.Generator],
        sampling: Sampling,
        stops: Collection[int] = (),
    ) -> list[list[Ints]]:
        """See `Policy`. The seeds of a group come from its generator.

        What the model declares as its ends the server knows; `stops` it is told where it speaks
        token ids.
        """
        seeds = [rng.integers(2**31, size=count).tolist() for rng in rngs]

        async def all_of_them() -> list[list[Ints]]:
            async with self._client() as client:
                asked = zip(prefixes, limits, seeds, strict=True)
                return await asyncio.gather(
                    *(
                        self._samples(client, x, limit, some, sampling, stops)
                        for x, limit, some in asked
                    )
                )

        return asyncio.run(all_of_them())

    def replacements(self, *_: Any) -> list[NDArray[np.int32]]:
        """Not to be had."""
        raise ValueError(_only_samples("mn and pss negatives"))

    def embed(self, *_: Any) -> NDArray[np.float32]:
        """Not to be had."""
        raise ValueError(_only_samples("--rank policy"))

    def logps(self, *_: Any) -> list[NDArray[np.float32]]:
        """Not to be had."""
        raise ValueError(_only_samples("reference log-probs"))

    async def _samples(
        self,
        client: Any,
        prefix: Ints,
        limit: int,
        seeds: list[int],
        sampling: Sampling,
        stops: Collection[int],
    ) -> list[Ints]:
        """As many continuations as seeds; servers that give one a request are asked for each."""
        found: list[Ints] = []
        ends = {self._encoder.eod, *stops}
        # An answer that does not show its end had the one that is asked for, if that is one.
        end = next(iter(stops)) if len(stops) == 1 else self._encoder.eod
        if limit == 1:
            return [np.array([end], dtype=np.int32)] * len(seeds)
        while len(found) < len(seeds):
            missing = len(seeds) - len(found)
            body = self._body(self._dialect, prefix, sampling)
            body |= {"max_tokens": limit - 1, "seed": seeds[len(found)], "n": missing}
            if self._dialect == "token ids" and stops:
                body["stop_token_ids"] = sorted(stops)
            choices = (await self._post(client, body)).get("choices")
            if not choices:
                raise ValueError(
                    f"--policy {self._url}: answered a request for {missing} samples with none; "
                    "see the server's log and start again: what is finished is kept"
                )
            for choice in choices[:missing]:
                ids = choice.get("token_ids")
                tokens = self._tokens(prefix, choice["text"]) if ids is None else ids
                ended = bool(tokens) and tokens[-1] in ends
                *kept, last = tokens if ended else (*tokens, end)
                found.append(np.array([*kept[: limit - 1], last], dtype=np.int32))
        return found

    def _tokens(self, prefix: Ints, text: str) -> list[int]:
        """An answer in text, as the tokenizer encodes it behind its prefix."""
        ids = self._encoder.after(prefix, text)
        return self._encoder.continuation(text) if ids is None else ids

    def _body(self, dialect: str, prefix: Ints, sampling: Sampling) -> Body:
        ids = prefix.tolist()
        text = self._tokenizer.detokenize(self._encoder.unframed(ids))
        return {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **DIALECTS[dialect](ids, text, sampling, self._encoder.eod),
        }

    async def _find_dialect(self, sampling: Sampling) -> str:
        """The first dialect that the server understands, tried on a fixed text."""
        tokens = np.array(self._encoder.prefix(PROBE), dtype=np.int32)
        refused = []
        async with self._client() as client:
            for dialect in DIALECTS:
                if dialect == "text" and sampling.top_k:
                    continue
                body = self._body(dialect, tokens, sampling) | {"max_tokens": 1, "seed": 0, "n": 1}
                try:
                    await self._post(client, body)
                except ValueError as error:
                    refused.append(f"{dialect}: {error}")
                    continue
                answer = await self._post(client, body | {"prompt": PROBE})
                self._check_length(answer, len(tokens))
                return dialect
        hint = f"; without top-k (--top-k 0, not {sampling.top_k}) more servers can be asked"
        raise ValueError(
            f"--policy {self._url}: understands none of our requests ({'; '.join(refused)})"
            f"{hint if sampling.top_k else ''}"
        )

    def _check_length(self, answer: Any, expected: int) -> None:
        """Refuse a server that counts other tokens in the same text."""
        counted = (answer.get("usage") or {}).get("prompt_tokens")
        frame = len(self._tokenizer.tokenize("")) + 1  # it may add a BOS, or leave ours out
        if counted is not None and abs(counted - expected) > frame:
            raise ValueError(
                f"--policy {self._url}: counts {counted} tokens in a test text, the build's "
                f"tokenizer {expected}; build with the tokenizer of the server's model "
                f"({self._model})"
            )

    def _only_model(self) -> str:
        import httpx

        try:
            answer = httpx.get(f"{self._url}/models", timeout=10)
            answer.raise_for_status()
            names = [model["id"] for model in answer.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--policy {self._url}: no list of models there ({_reason(error)}); start the "
                "server first, give its address up to /v1, such as http://localhost:8000/v1, and "
                "name the model with --policy-model if the server cannot"
            ) from error
        if len(names) != 1:
            raise ValueError(
                f"--policy {self._url}: serves {', '.join(names) or 'no model it can name'}; "
                "choose one with --policy-model NAME"
            )
        return str(names[0])

    def _client(self) -> Any:
        import httpx

        self._slots = asyncio.Semaphore(self._concurrency)
        limits = httpx.Limits(max_connections=self._concurrency)
        return httpx.AsyncClient(timeout=httpx.Timeout(TIMEOUT, connect=10), limits=limits)

    async def _post(self, client: Any, body: Body) -> Any:
        """The server's answer to one request, repeated while it is overloaded or failing.

        Raises:
            ValueError: it refuses the request, or `ATTEMPTS` have failed.
        """
        import httpx

        delay = FIRST_DELAY
        for attempt in range(ATTEMPTS):
            wait = None
            try:
                async with self._slots:
                    answer = await client.post(f"{self._url}/completions", json=body)
                if answer.status_code == 200:
                    return answer.json()
                reason = f"HTTP {answer.status_code}"
                if answer.status_code != 429 and answer.status_code < 500:
                    raise ValueError(f"{reason} {answer.text[:300]}")
                wait = answer.headers.get("retry-after")
            except (httpx.TransportError, json.JSONDecodeError) as error:
                reason = _reason(error)
            if attempt + 1 < ATTEMPTS:
                self.retries[reason] += 1
                jittered = delay * random.uniform(0.5, 1.5)
                await asyncio.sleep(float(wait) if wait and wait.isdecimal() else jittered)
                delay = min(2 * delay, LONGEST_DELAY)
        raise ValueError(
            f"--policy {self._url}: {ATTEMPTS} requests failed in a row, the last one with "
            f"{reason}; see the server's log and start again: what is finished is kept"
        )


def _reason(error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}".rstrip(": ")


def _only_samples(what: str) -> str:
    return (
        f"--policy http://...: a completions server samples (an negatives) and gives no "
        f"distributions, so {what} need another policy: --load CHECKPOINT or --policy hf:PATH"
    )
