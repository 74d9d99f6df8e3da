"""A small completions server over a tiny model, as a process of its own: vLLM's fields, real HTTP.

    python -m tests.completions_server FOLDER

prints its port. The model's name says how it behaves: `half` answers every second request with an
error, 500 and 429 in turn, `fourth` every fourth, `down` every one; `none` answers without a
sample; `plain` knows OpenAI's own fields alone. The rest of the time the samples are those of
`HuggingFacePolicy` with the request's seed. `/v1/asked` counts the requests of each model so far.
"""

import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoTokenizer

from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling

FAILING = {"down": 1, "half": 2, "fourth": 4}
"""Of how many requests the first one fails."""
FIELDS = {"model", "prompt", "max_tokens", "n", "seed", "temperature", "top_p"}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    tokenizer = policy = None
    asked: ClassVar[Counter] = Counter()
    lock = threading.Lock()

    def do_GET(self):
        """`/v1/models`, a list of several at `/v2/models`, and `/v1/asked`."""
        if self.path == "/v1/asked":
            return self.answer(200, dict(self.asked))
        models = ["tiny"] if self.path == "/v1/models" else ["tiny", "half"]
        return self.answer(200, {"data": [{"id": name} for name in models]})

    def do_POST(self):
        """`/v1/completions`."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model = body["model"]
        with self.lock:
            self.asked[model] += 1
            number = self.asked[model]
        every = FAILING.get(model)
        if every and (number - 1) % every == 0:
            return self.answer(429 if number // every % 2 else 500, {"error": "busy"})
        ids, text_only = body["prompt"], model == "plain"
        if text_only and (set(body) - FIELDS or not isinstance(ids, str)):
            return self.answer(422, {"error": f"unknown {set(body) - FIELDS}"})
        if isinstance(ids, str):
            ids = self.tokenizer.tokenize(ids)
        sampling = Sampling(top_k=1)
        if body["temperature"] > 0:
            sampling = Sampling(body["temperature"], max(body.get("top_k", 0), 0), body["top_p"])
        with self.lock:
            [drawn] = self.policy.sample(
                [np.array(ids, dtype=np.int32)],
                [body["max_tokens"] + 1],
                body["n"],
                [np.random.default_rng(body["seed"])],
                sampling,
            )
        choices = [{"text": self.tokenizer.detokenize(c[:-1].tolist())} for c in drawn]
        if body.get("return_token_ids"):
            choices = [
                {**choice, "token_ids": c.tolist()}
                for choice, c in zip(choices, drawn, strict=True)
            ]
        if model == "none":
            choices = []
        return self.answer(200, {"choices": choices, "usage": {"prompt_tokens": len(ids)}})

    def answer(self, status, value):
        """Send JSON."""
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if status == 429:
            self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Silence."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    Handler.tokenizer = SimpleNamespace(
        vocab_size=len(tokenizer),
        eod=tokenizer.eos_token_id,
        tokenize=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        detokenize=tokenizer.decode,
    )
    Handler.policy = HuggingFacePolicy(sys.argv[1], Handler.tokenizer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
