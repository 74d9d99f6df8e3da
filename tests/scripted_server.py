"""A completions server without a model, as a process of its own: real HTTP, any misbehaviour.

    python tests/scripted_server.py [PORT [CERTIFICATE]]

prints its port. The first part of a path is the case, that of `CASES` which says how it behaves:
`http://127.0.0.1:PORT/CASE/v1`; `/v1` alone, and a case that is not there, is a sound server. Its
samples are a function of prompt, seed and place. `/notes/CASE` has what was asked of a case: how
many requests there were, how many at a time, the last body, and the `Authorization` of each.
"""

import base64
import contextlib
import email.utils
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

EOD, VOCAB, CONTEXT = 99, 100, 40
KEY, USER, PASSWORD = "sk-scripted-51f0", "ann", "p@ss:w/rd"
OWN = {"model", "prompt", "max_tokens", "n", "seed", "temperature", "top_p"}
"""Of OpenAI's fields those that every client sends."""
SAMPLERS = {
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
    "stop_token_ids", "ignore_eos", "return_token_ids",
}  # fmt: skip
"""Those that vLLM and SGLang know besides."""
VLLM_LONG = (
    "This model's maximum context length is {context} tokens. However, you requested {asked} "
    "output tokens and your prompt contains {prompt} input tokens, for a total of {total} tokens. "
    "Please reduce the length of the input prompt or the number of requested output tokens."
)
VLLM_OLD = (
    "This model's maximum context length is {context} tokens. However, you requested {total} "
    "tokens ({prompt} in the messages, {asked} in the completion)."
)
SGLANG_LONG = (
    "Requested token count exceeds the model's maximum context length of {context} tokens. You "
    "requested a total of {total} tokens: {prompt} tokens from the input and {asked} tokens."
)
LLAMA_LONG = "request ({total} tokens) exceeds the available context size ({context} tokens)"


def samples(prompt: Any, seed: int, count: int, most: int) -> list[list[int]]:
    """Token ids of the samples of a prompt; some end by themselves, with EOD."""
    drawn = []
    for place in range(count):
        rng = random.Random(f"{prompt}/{seed}/{place}")
        ids = [rng.randrange(EOD) for _ in range(rng.randrange(2 * most + 1))]
        drawn.append([*ids, EOD] if len(ids) < most else ids[:most])
    return drawn


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    notes: ClassVar[Any] = defaultdict(
        lambda: {"asked": 0, "now": 0, "most": 0, "body": None, "keys": []}
    )
    began: ClassVar[Any] = {}
    """When a case was first asked for more than an opening."""
    running: Any = None
    """The notes that this request is counted in."""

    def do_GET(self) -> None:
        """The list of models, or notes."""
        case, _, path = self.path.lstrip("/").partition("/")
        if case == "notes":
            return self.answer(200, self.notes[path])
        if case.startswith("v1"):
            case, path = "", self.path.lstrip("/")
        lists = LISTS.get(case, [{"id": "tiny"}])
        if path.partition("?")[0] != "v1/models" or lists is None:
            return self.answer(404, {"detail": "Not Found"})
        return lists(self) if callable(lists) else self.answer(200, {"data": lists})

    def do_POST(self) -> None:
        """Completions."""
        case, _, path = self.path.lstrip("/").partition("/")
        if case == "v1":
            case, path = "", self.path.lstrip("/")
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        notes = self.notes[case]
        with self.lock:
            notes["asked"] += 1
            notes["now"] += 1
            self.number, self.now, self.running = notes["asked"], notes["now"], notes
            notes["most"] = max(notes["most"], notes["now"])
            notes["body"] = self.body
            notes["keys"].append(self.headers.get("authorization"))
        try:
            if path.partition("?")[0] == "v1/completions":
                CASES.get(case, Handler.sound)(self)
            else:
                self.answer(404, {"detail": "Not Found"})
        finally:
            self.leave()

    def leave(self) -> None:
        """Count this request as over: before its client can know, who may send another at once."""
        with self.lock:
            if self.running is not None:
                self.running["now"] -= 1
            self.running = None

    @property
    def opening(self) -> bool:
        """Whether it is one of the short questions of a client that opens."""
        return self.body["max_tokens"] == 1 and self.body["seed"] == 0

    def sound(self) -> None:
        """As it should be."""
        self.choose({"token_ids": ids, "text": "4 5"} for ids in self.drawn())

    def drawn(self) -> list[list[int]]:
        """Ids of all that the request asks for."""
        body = self.body
        return samples(body["prompt"], body.get("seed", 0), body.get("n", 1), body["max_tokens"])

    def choose(self, choices: Any, **more: Any) -> None:
        """Answer with choices."""
        self.answer(200, {"choices": list(choices), **more})

    def answer(self, status: int, value: Any, **headers: str) -> None:
        """Send JSON, or a text as it is."""
        self.leave()
        page = isinstance(value, str)
        data = (value if page else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("content-type", "text/html" if page else "application/json")
        self.send_header("content-length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silence."""


def refuses(status: int, value: Any = None, **headers: str) -> Callable[[Handler], None]:
    """A case that never answers otherwise."""
    said = {"error": {"message": "no", "code": status}} if value is None else value
    return lambda handler: handler.answer(status, said, **headers)


def once(first: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """A case whose third request, the first after opening, comes to grief."""
    return lambda handler: first(handler) if handler.number == 3 else handler.sound()


def later(value: Any) -> Callable[[Handler], None]:
    """A case that opens well and then gives such choices, or such an answer."""

    def case(handler: Handler) -> None:
        if handler.opening:
            return handler.sound()
        return handler.choose(value) if isinstance(value, list) else handler.answer(200, value)

    return case


def wants(authorization: str, **headers: str) -> Callable[[Handler], None]:
    """A case that wants a key, and repeats what it was given instead."""

    def case(handler: Handler) -> None:
        given = handler.headers.get("authorization")
        if given == authorization:
            return handler.sound()
        return handler.answer(401, {"error": {"message": f"Incorrect API key: {given}"}}, **headers)

    return case


def short(words: str, status: int = 400) -> Callable[[Handler], None]:
    """A case that cannot read more than CONTEXT tokens, and says so in such words."""

    def case(handler: Handler) -> None:
        prompt, asked = len(handler.body["prompt"]), handler.body["max_tokens"]
        if prompt + asked <= CONTEXT or handler.opening:
            return handler.sound()
        said = words.format(context=CONTEXT, prompt=prompt, asked=asked, total=prompt + asked)
        return handler.answer(status, {"object": "error", "message": said, "code": status})

    return case


def picky(said: str, known: set[str] = OWN) -> Callable[[Handler], None]:
    """A case that refuses fields that it does not know, and says so in such words."""

    def case(handler: Handler) -> None:
        unknown = sorted(set(handler.body) - known)
        if unknown:
            return handler.answer(400, {"detail": said.format(", ".join(unknown))})
        return handler.sound()

    return case


def hang_up(handler: Handler) -> None:
    """No answer at all."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_off(handler: Handler, length: bool = True) -> None:
    """Half an answer, with the length of the whole or without any."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length" if length else "connection", "900" if length else "close")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"text": "4')
    handler.wfile.flush()
    hang_up(handler)


def one_at_a_time(handler: Handler) -> None:
    """429 while it works on another request."""
    if handler.now > 1:
        return handler.answer(429, {"error": "queue is full"})
    time.sleep(0.01)
    return handler.sound()


def patient(handler: Handler) -> None:
    """Tells a client to wait a third of a second, and refuses who does not."""
    now = time.monotonic()
    if handler.opening or now - Handler.began.setdefault("patient", now) > 0.3:
        return handler.sound()
    return handler.answer(429, {}, retry_after="0.35")


def slow(handler: Handler) -> None:
    """Takes its time."""
    time.sleep(0.02)
    handler.sound()


def die(handler: Handler) -> None:
    """The process ends at the tenth request; not the one that takes its port."""
    if handler.number == 10 and len(sys.argv) == 1:
        os._exit(1)
    handler.sound()


def one_each(handler: Handler) -> None:
    """One sample a request."""
    if handler.body.get("n", 1) > 1:
        return handler.answer(400, {"error": {"message": "only one choice is supported"}})
    return handler.sound()


def wrong_model(handler: Handler) -> None:
    """vLLM's words."""
    said = f"The model `{handler.body['model']}` does not exist."
    handler.answer(404, {"error": {"message": said, "type": "NotFoundError", "code": 404}})


def sloppy(handler: Handler) -> None:
    """Goes on behind EOD, for longer than asked, in more samples than asked; some without ids."""
    choices: list[Any] = [{"token_ids": [*ids, EOD, 5, 6], "text": ""} for ids in handler.drawn()]
    handler.choose([*choices, {"text": "7"}])


BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
PAGE = "<html><head><title>502 Bad\n Gateway</title></head><body>nginx</body></html>"
CASES: dict[str, Callable[[Handler], None]] = {
    # keys
    "key": wants(f"Bearer {KEY}"),
    "open-list": wants(f"Bearer {KEY}"),
    "basic": wants(f"Basic {BASIC}"),
    "forbidden": refuses(403, {"error": {"message": "Country not supported"}}),
    # other servers
    "chat-only": refuses(404, {"detail": "Not Found"}),
    "get-only": refuses(405, {"detail": "Method Not Allowed"}),
    "gone": refuses(501, {"error": "not implemented"}),
    "page": refuses(200, "<!DOCTYPE html><title>Chat UI</title>"),
    "moved": refuses(308, {}, location=f"https://u:{KEY}@else.where/v1/completions?{KEY}"),
    "no-model": wrong_model,
    # odd answers
    "list": later({"no": "choices"}),
    "dict": later({"choices": {"text": "4"}}),
    "null": later({"choices": None}),
    "none": later([]),
    "null-choice": later([None]),
    "null-text": later([{"text": None, "token_ids": None}]),
    "no-text": later([{"index": 0}]),
    "strings": later([{"token_ids": ["token_id:4"]}]),
    "floats": later([{"token_ids": [4.0]}]),
    "beyond": later([{"token_ids": [5, VOCAB], "text": "5"}]),
    "negative": later([{"token_ids": [-1]}]),
    "aborted": later([{"token_ids": [4], "finish_reason": "abort"}]),
    "error-inside": later({"error": {"message": "upstream is down", "code": 400}}),
    "array": lambda h: h.sound() if h.opening else h.answer(200, [1, 2]),
    "late-page": lambda h: h.sound() if h.opening else h.answer(200, PAGE),
    # texts
    "text": lambda h: h.choose({"text": " 4 5 77"} for _ in h.drawn()),
    "null-ids": lambda h: h.choose({"text": "7", "token_ids": None} for _ in h.drawn()),
    "sloppy": sloppy,
    # failures
    "busy": refuses(429, {"error": "slow down"}, retry_after="7200"),
    "quota": refuses(429, {"error": {"message": "You exceeded your current quota"}}),
    "broken": refuses(502, PAGE),
    "hour": once(refuses(429, {}, retry_after="3600")),
    "century": once(refuses(503, {}, retry_after=email.utils.formatdate(4e9, usegmt=True))),
    "page-502": once(refuses(502, PAGE)),
    "inside-429": once(refuses(200, {"error": {"code": 429, "message": "x"}})),
    "hang-up": once(hang_up),
    "cut-off": once(cut_off),
    "half": once(lambda h: cut_off(h, False)),
    "timeout": once(lambda h: None),
    "queue": one_at_a_time,
    "patient": patient,
    "slow": slow,
    "die": die,
    # what a request may have
    "vllm": short(VLLM_LONG),
    "vllm-old": short(VLLM_OLD),
    "sglang": short(SGLANG_LONG),
    "llama": short(LLAMA_LONG),
    "wordless": short("Input is too long for this model.", 422),
    "riddle": lambda h: h.sound() if h.opening else h.answer(400, {"error": "computer says no"}),
    "one-each": one_each,
    "picky": picky("Unknown fields: {}"),
    "mute": picky("invalid request"),
    "strict": picky("Extra inputs are not permitted: {}", OWN - {"n", "seed"}),
    "rare": picky("Unrecognized request argument supplied: {}", OWN | SAMPLERS),
}

LISTS: dict[str, Any] = {
    "key": lambda handler: (
        handler.answer(200, {"data": [{"id": "tiny", "max_model_len": CONTEXT}]})
        if handler.headers.get("authorization") == f"Bearer {KEY}"
        else handler.answer(401, {"error": "Unauthorized"})
    ),
    "two": [{"id": "tiny"}, {"id": "large", "max_model_len": 80}],
    "adapter": [{"id": "base", "max_model_len": CONTEXT}, {"id": "lora", "parent": "base"}],
    "limited": [{"id": "tiny", "max_model_len": CONTEXT}],
    "limited-text": [{"id": "tiny", "max_model_len": str(CONTEXT)}],
    "unlimited": [{"id": "tiny", "max_model_len": None}],
    "zero": [{"id": "tiny", "max_model_len": 0}],
    "unlisted": None,
    "odd-list": ["tiny"],
    "odd-object": lambda handler: handler.answer(200, {"models": ["tiny"]}),
    "forbidden-list": refuses(403),
    "page": refuses(200, "<!DOCTYPE html><title>Chat UI</title>"),
    "empty": [],
    "hub": [{"id": f"m{i}"} for i in range(100)],
}
"""What the list of models has, in cases where it is not `tiny` alone."""


@contextlib.contextmanager
def scripted(*flags: Any) -> Iterator[tuple[int, "subprocess.Popen[str]"]]:
    """A server's port and its process, which is killed at the end."""
    command = [sys.executable, __file__, *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process
        finally:
            process.kill()


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", int([*sys.argv, 0][1])), Handler)
    if len(sys.argv) > 2:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(sys.argv[2]))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_port, flush=True)
    server.serve_forever()
