"""How completions servers are asked for samples of pi, and nothing but pi.

A server has defaults of its own for all that a request leaves open: vLLM and SGLang take them from
the model's generation_config.json, transformers as well, llama.cpp from its command line. So a
request says everything that changes what is drawn. Servers that refuse a field they do not know are
asked without it, and the user is told once.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from megatron_cpo.policies.answers import BAD_REQUEST, Exhausted, Refused
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.tokenizing import PROBE
from megatron_cpo.tree import Ints

Body = dict[str, Any]

OPTIONAL: Body = {
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,  # llama.cpp's name of it
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "ignore_eos": False,
    "stop": [],
}
"""Fields at which the logits and the end of a sample are the model's own."""
NEUTRAL = {
    "do_sample": True,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "renormalize_logits": False,
}
"""The same in a generation config of transformers, where what is None is the model's default."""


def _token_ids(ids: list[int], text: str, sampling: Sampling, eod: int) -> Body:
    """vLLM and SGLang: ids in, and from vLLM out; the number of samples and top-k."""
    own = {"top_k": sampling.top_k or -1, "stop_token_ids": [eod], "return_token_ids": True}
    return {"prompt": ids, **own, **OPTIONAL}


def _transformers(ids: list[int], text: str, sampling: Sampling, eod: int) -> Body:
    """`transformers serve`: text, and what it lacks in a generation config; one sample each."""
    config = {**NEUTRAL, "top_k": sampling.top_k, "eos_token_id": eod, "pad_token_id": eod}
    return {"prompt": text, "generation_config": json.dumps(config)}


def _text(ids: list[int], text: str, sampling: Sampling, eod: int) -> Body:
    """OpenAI's own fields, which have no top-k."""
    return {"prompt": text, "top_k": -1, **OPTIONAL}


DIALECTS: dict[str, Callable[[list[int], str, Sampling, int], Body]] = {
    "token ids": _token_ids,
    "transformers": _transformers,
    "text": _text,
}
"""How servers want to be asked; the first that the server understands is used."""

logger = logging.getLogger(__name__)


class Questions:
    """Requests for samples, in the dialect that a server understands.

    Args:
        model: the server's name of it.
        tokenizer: Megatron's, of the build.
    """

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._model, self._tokenizer, self._encoder = model, tokenizer, Encoder(tokenizer)
        self._dialect = ""
        self.left_out: set[str] = set()
        """Fields that the server does not take."""

    @property
    def identity(self) -> dict[str, Any]:
        """What of a request decides the answer, beside the sampling."""
        without = {"without": sorted(self.left_out)} if self.left_out else {}
        return {"dialect": self._dialect, **without}

    def body(
        self,
        prefix: Ints,
        sampling: Sampling,
        tokens: int,
        seed: int,
        samples: int,
        stops: Collection[int] = (),
    ) -> Body:
        """A request for so many samples of at most so many tokens, EOD not counted.

        Args:
            stops: end tokens beside EOD, of which a server is told that speaks ids.
        """
        ids = prefix.tolist()
        text = self._tokenizer.detokenize(self._encoder.unframed(ids))
        body = {
            "model": self._model,
            # Servers that know no top-k, or pass over it in silence, take the likeliest token at 0.
            "temperature": 0.0 if sampling.top_k == 1 else sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": tokens,
            "seed": seed,
            "n": samples,
            **DIALECTS[self._dialect](ids, text, sampling, self._encoder.eod),
        }
        if stops and self._dialect == "token ids":
            body["stop_token_ids"] = sorted({self._encoder.eod, *stops})
        return {name: value for name, value in body.items() if name not in self.left_out}

    async def find_dialect(
        self, endpoint: Endpoint, sampling: Sampling, served: Sequence[str]
    ) -> None:
        """Take the first dialect that the server understands, tried on a fixed text.

        Args:
            served: names of its models, if it lists any; for messages.

        Raises:
            ValueError: it understands none, or counts other tokens than the build's tokenizer.
        """
        tokens = np.array(self._encoder.prefix(PROBE), dtype=np.int32)
        hint = ""
        if served and self._model not in served:
            hint = f"; it serves {some(served)}: choose one with --policy-model"
        refused = []
        for self._dialect in DIALECTS:
            self.left_out = set()
            while self._dialect != "text" or sampling.top_k < 2:
                body = self.body(tokens, sampling, 1, 0, 1)
                try:
                    await endpoint.post("completions", body)
                except (Refused, Exhausted) as error:
                    if error.status == 404 and "model" in error.detail.lower():
                        raise endpoint.error(
                            f"does not know the model {self._model} ({error.detail[:300]}){hint}"
                        ) from error
                    if error.status not in (*BAD_REQUEST, 500):
                        raise
                    more = _without(error.detail, body, sampling)
                    self.left_out |= more
                    if not more:
                        refused.append(f"{self._dialect}: {error.said}")
                        break
                else:
                    await self._check_length(endpoint, body, len(tokens))
                    self._warn(endpoint)
                    return
        if sampling.top_k > 1:
            hint += f"; without top-k (--top-k 0, not {sampling.top_k}) more servers can be asked"
        raise endpoint.error(f"understands none of our requests ({'; '.join(refused)}){hint}")

    async def _check_length(self, endpoint: Endpoint, body: Body, expected: int) -> None:
        """Refuse a server that counts other tokens in the same text."""
        try:
            answer = await endpoint.post("completions", body | {"prompt": PROBE})
        except Refused:  # it takes ids alone
            return
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        frame = len(self._tokenizer.tokenize("")) + 1  # it may add a BOS, or leave ours out
        if isinstance(counted, int) and abs(counted - expected) > frame:
            raise endpoint.error(
                f"counts {counted} tokens in a test text, the build's tokenizer {expected}; build "
                f"with the tokenizer of the server's model ({self._model})"
            )

    def _warn(self, endpoint: Endpoint) -> None:
        """Say once which of the server's own settings remain."""
        theirs = self.left_out - {"seed", "n", "return_token_ids"}
        if "repetition_penalty" not in self.left_out:
            theirs -= {"repeat_penalty"}
        if theirs:
            logger.warning(
                f"{endpoint.name}: does not take {', '.join(sorted(theirs))}, so its own values "
                "hold, such as those of a generation_config.json; if it has any, its samples are "
                "not the model's alone"
            )


def some(names: Sequence[str], most: int = 20) -> str:
    """Names on a line; hosts list hundreds of models."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _without(refusal: str, body: Body, sampling: Sampling) -> set[str]:
    """Fields to leave out when a server refused a request that has them; empty: it needs another.

    Those that the refusal names, if we can do without; if it names none, all that keep a server
    from going its own way, and then what makes draws repeatable and many at a time.
    """
    pins = {*OPTIONAL, "stop_token_ids", "return_token_ids"} | ({"top_k"} - {*_needs(sampling)})
    named = {name for name in body if _names(refusal, name)}
    if named & {"prompt", "generation_config", *_needs(sampling)}:
        return set()
    stages = (named & {*pins, "seed", "n"}, pins & set(body), {"seed", "n"} & set(body))
    return next(filter(None, stages), set())


def _needs(sampling: Sampling) -> tuple[str, ...]:
    return ("top_k",) if sampling.top_k > 1 else ()


def _names(text: str, field: str) -> bool:
    quote = "['\"`]" if len(field) < 3 else ""  # `n` is a word of its own in any text
    return bool(re.search(rf"(?<!\w){quote}{field}{quote}(?!\w)", text))


_LENGTH = re.compile(
    r"context|too (long|large|many)|longer than|exceed|max_model_len|max(imum\b.*|_\w*)tokens",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"(?:context (?:length|size|window)|max_model_len|max_new_tokens` must be <=)"
    r"\D{0,40}?(\d[\d,]*)",
    re.IGNORECASE,
)


def is_about_length(refusal: str) -> bool:
    """Whether a refusal is about the number of tokens, as servers word it."""
    return bool(_LENGTH.search(refusal))


def context_in(refusal: str) -> int | None:
    """The server's context in tokens, out of the text of a refusal; None if it does not say."""
    found = _CONTEXT.search(refusal)
    return int(found.group(1).replace(",", "")) if found else None
