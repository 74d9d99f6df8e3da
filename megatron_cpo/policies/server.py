"""An OpenAI-compatible completions server as a policy, for AN alone: vLLM, SGLang, transformers.

A server samples by its own random numbers: with one seed a group the same server gives the same
samples if it keeps its promises, but tokens are not those of the other policies, and may change
with the server's load and version. Where the server takes token ids and gives them back, they are
used as they are. Otherwise a prompt is the text of its ids and the answer is encoded again, which
may merge tokens otherwise than they were drawn; training and scoring see the merged ones.

Prefixes are requested side by side, by an `Endpoint`; what they ask for is in `dialects.py`. The
server's context bounds prefix and continuation together: a long prefix gets shorter continuations,
and none if no token fits behind it.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.policies.answers import BAD_REQUEST, Exhausted, Refused
from megatron_cpo.policies.dialects import (
    Questions,
    context_in,
    is_about_length,
    some,
)
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.policies.policy import NotDrawn, Sampling
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.tree import Ints

BROKEN = ("abort", "error", "content_filter")
"""Reasons to finish of what is no sample of the model."""

logger = logging.getLogger(__name__)


class ServerPolicy:
    """The `Policy` of a completions server; it samples, and can do nothing else.

    Args:
        endpoint: where the server is.
        tokenizer: Megatron's, of the build; has to be that of the server's model.
        sampling: how to sample; the server has to understand it.
        model: the server's name of the model; None: the only one it lists.

    Raises:
        ValueError: no answer, no such model, or the tokenizer is another one.
    """

    kinds: tuple[str, ...] = ("an",)
    forks = False  # it asks in parallel by itself
    positions: int | None = None  # what does not fit is seen to here, record by record

    def __init__(
        self, endpoint: Endpoint, tokenizer: Any, sampling: Sampling, model: str | None = None
    ) -> None:
        self._endpoint, self._tokenizer = endpoint, tokenizer
        self._encoder = Encoder(tokenizer)
        self.ends = frozenset({self._encoder.eod})  # those of the model the server knows
        self._ids = vocabulary_size(tokenizer)
        self._context: int | None = None
        self._shortened = 0
        self._one_each = self._warned = False
        asyncio.run(self._open(model, sampling))

    @property
    def identity(self) -> dict[str, Any]:
        """The server's name of the model, without its folder, and how it is asked."""
        name = self._model.rstrip("/").rpartition("/")[2]
        return {"backend": "server", "name": name, **self._questions.identity}

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

        Raises:
            ValueError: the server cannot be reached, or its answer cannot be used.
        """
        seeds = [rng.integers(2**31, size=count).tolist() for rng in rngs]

        async def all_of_them() -> list[list[Ints]]:
            async with self._endpoint, asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._samples(place, *asked, sampling, stops))
                    for place, asked in enumerate(zip(prefixes, limits, seeds, strict=True))
                ]
            return [task.result() for task in tasks]

        try:
            drawn = asyncio.run(all_of_them())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self._shortened += sum(
            bool(found) and self._room(prefix, limit) < limit
            for prefix, limit, found in zip(prefixes, limits, drawn, strict=True)
        )
        return drawn

    def take_counts(self) -> Counter[str]:
        """Lines of the report with their numbers, since the last call."""
        counts = self._endpoint.take_retries()
        if self._shortened:
            counts[f"drawn shorter: server's context of {self._context:,} tokens"] = self._shortened
        self._shortened = 0
        return counts

    def replacements(self, *_: Any) -> list[NDArray[np.int32]]:
        """Not to be had."""
        raise ValueError(_only_samples("mn and pss negatives"))

    def embed(self, *_: Any) -> NDArray[np.float32]:
        """Not to be had."""
        raise ValueError(_only_samples("--rank policy"))

    def logps(self, *_: Any) -> list[NDArray[np.float32]]:
        """Not to be had."""
        raise ValueError(_only_samples("reference log-probs"))

    def _room(self, prefix: Ints, limit: int) -> int:
        """Most tokens of a continuation, EOD included, by what is known of the context."""
        return limit if self._context is None else min(limit, self._context - len(prefix))

    async def _samples(
        self,
        place: int,
        prefix: Ints,
        limit: int,
        seeds: list[int],
        sampling: Sampling,
        stops: Collection[int],
    ) -> list[Ints]:
        """As many continuations as seeds, or none if the server cannot read the prefix.

        Servers that give one a request are asked for each.
        """
        found: list[Ints] = []
        # An answer that does not show its end had the one that is asked for, if that is one.
        end = next(iter(stops)) if len(stops) == 1 else self._encoder.eod
        if limit == 1:
            return [np.array([end], dtype=np.int32)] * len(seeds)
        alone = False
        while len(found) < len(seeds):
            room = self._room(prefix, limit)
            if room < 2:
                return []
            alone = alone or self._one_each
            asked = 1 if alone else len(seeds) - len(found)
            seed = seeds[len(found)]
            body = self._questions.body(prefix, sampling, room - 1, seed, asked, stops)
            try:
                choices = (await self._endpoint.post("completions", body)).get("choices")
            except Refused as error:
                if error.status not in BAD_REQUEST:
                    raise
                if self._learns_context(error.detail, prefix, room):
                    continue
                if asked > 1:  # some take one sample a request
                    alone = True
                    continue
                self._leave_out(error, place, prefix, room)
                return []
            if not isinstance(choices, list) or not choices:
                raise self._endpoint.error(
                    f"answered a request for {asked} samples with none ({_short(choices)}); see "
                    "the server's log and start again: what is finished is kept"
                )
            self._one_each |= alone
            for choice in choices[:asked]:
                ids = self._ids_of(choice, prefix)
                found.append(_ended(ids, choice, room - 1, self.ends.union(stops), end))
        return found

    def _learns_context(self, refusal: str, prefix: Ints, room: int) -> bool:
        """Whether a refusal tells of a smaller context than we know of."""
        context = context_in(refusal)
        if context is None or context >= len(prefix) + room:
            return False
        self._context = context
        return True

    def _leave_out(self, error: Refused, place: int, prefix: Ints, room: int) -> None:
        """Say once that records are left out whose prefixes the server finds too long.

        Raises:
            NotDrawn: the refusal is about something else.
        """
        what = f"a prefix of {len(prefix)} tokens with {room - 1} new ones"
        remedy = "make records fit with --max-length, or continuations with --max-new-tokens"
        if not is_about_length(error.detail):
            raise NotDrawn(f"{error}, asked for {what}; {remedy}", place) from error
        if not self._warned:
            logger.warning(f"{error}, asked for {what}: such records are left out; {remedy}")
        self._warned = True

    def _ids_of(self, choice: Any, prefix: Ints) -> list[int]:
        """The ids of a sample; a text is encoded as it stands behind its prefix.

        Raises:
            ValueError: it has no ids of the build's tokenizer, nor a text.
        """
        fields = choice if isinstance(choice, dict) else {}
        ids, text = fields.get("token_ids"), fields.get("text")
        if fields.get("finish_reason") in BROKEN:
            raise self._endpoint.error(
                f"broke a sample off (finish_reason {fields['finish_reason']}); see the server's "
                "log and start again: what is finished is kept"
            )
        if ids is None and isinstance(text, str):
            ids = self._encoder.after(prefix, text)
            ids = self._encoder.continuation(text) if ids is None else ids
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise self._endpoint.error(
                f"answers with a choice that has neither a text nor a list of token ids "
                f"({_short(choice)}); is it a completions server of the OpenAI API?"
            )
        if wrong := [i for i in ids if not 0 <= i < self._ids]:
            raise self._endpoint.error(
                f"answers with the token id {wrong[0]}, and the build's tokenizer has ids from 0 "
                f"to {self._ids - 1}; build with the tokenizer of the server's model "
                f"({self._model})"
            )
        return ids

    async def _open(self, model: str | None, sampling: Sampling) -> None:
        """Find out which model is served, how much it can read, and how to ask for samples."""
        listed: list[dict[str, Any]] = []
        async with self._endpoint as endpoint:
            try:
                listed = await endpoint.models()
            except (Refused, Exhausted) as error:
                if error.status == 401 or not error.status:
                    raise
                if model is None:
                    raise ValueError(
                        f"{error}; if it cannot list its models, name one with --policy-model"
                    ) from error
            names = [entry["id"] for entry in listed]
            if model is None and len(names) != 1:
                raise endpoint.error(
                    f"serves {some(names) or 'no model it can name'}; choose one with "
                    "--policy-model NAME"
                )
            self._model = model or names[0]
            self._context = _context(listed, self._model)
            self._questions = Questions(self._model, self._tokenizer)
            await self._questions.find_dialect(endpoint, sampling, names)
        self._one_each = "n" in self._questions.left_out


def _ended(
    ids: list[int], choice: dict[str, Any], most: int, ends: Collection[int], end: int
) -> Ints:
    """At most so many tokens of a sample and its end; no end where it was cut.

    It was cut if the server says so, or if it says nothing and all the tokens came that were asked.
    """
    at = next((place for place, token in enumerate(ids) if token in ends), None)
    if at is not None and at <= most:
        return np.array(ids[: at + 1], dtype=np.int32)
    reason = choice.get("finish_reason")
    cut = len(ids) > most or reason == "length" or (reason is None and len(ids) == most)
    return np.array([*ids[:most], *([] if cut else [end])], dtype=np.int32)


def _context(listed: list[dict[str, Any]], model: str) -> int | None:
    """`max_model_len` of a model in a list; an adapter has that of its parent."""
    entries = {entry["id"]: entry for entry in listed}
    entry = entries.get(model, {})
    for found in (entry, entries.get(str(entry.get("parent")), {})):
        size = found.get("max_model_len")
        if isinstance(size, int | float | str) and str(size).partition(".")[0].isdecimal():
            return int(float(size)) or None
    return None


def _short(value: Any) -> str:
    return json.dumps(value)[:200]


def _only_samples(what: str) -> str:
    return (
        f"--policy http://...: a completions server samples (an negatives) and gives no "
        f"distributions, so {what} need another policy: --load CHECKPOINT or --policy hf:PATH"
    )
