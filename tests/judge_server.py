"""A scripted judge, as a process of its own: real HTTP, no model.

    python -m tests.judge_server [KEY]

prints its port. The model's name says how it judges: `longer` prefers the longer answer, `first`
always says A, `rude` answers without a verdict, `empty` without a word, `partly` gives no verdict
on the third question, `narrow` refuses it and `strict` all, `busy` is overloaded every second time
(429 with Retry-After, and 500), `thinks` says 600 words first, `slow` takes 50 ms, `latent` 200,
`web` answers with a page. With a KEY, requests without it get 401. `/v1/asked` counts the requests
of each model.
"""

import json
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

ANSWERS = re.compile(r"Response A:\n(.*?)\n\nResponse B:\n(.*?)\n\nJudge", re.DOTALL)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer of two packets waits 40 ms for the client's word
    key = None
    asked: ClassVar[Counter] = Counter()
    lock = threading.Lock()

    def do_GET(self):
        """`/v1/asked`."""
        self.answer(200, dict(self.asked))

    def do_POST(self):
        """`/v1/chat/completions`."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.lock:
            self.asked[body["model"]] += 1
            number = self.asked[body["model"]]
        if self.key and self.headers.get("authorization") != f"Bearer {self.key}":
            return self.answer(401, {"error": {"message": f"wrong key {self.key}"}})
        model = body["model"]
        if model == "busy" and number % 2:
            return self.answer(429 if number % 4 == 1 else 500, {"error": "busy"})
        if model == "web":
            return self.answer(200, None)
        time.sleep({"slow": 0.05, "latent": 0.2}.get(model, 0))
        return self.reply(model, body)

    def reply(self, model, body):
        """The verdict."""
        a, b = ANSWERS.search(body["messages"][0]["content"]).groups()
        third = "ask 3\n" in body["messages"][0]["content"]
        if model == "strict" or (model == "narrow" and third):
            return self.answer(400, {"error": {"message": "stopped by the content filter"}})
        if model == "partly" and third:
            model = "rude"
        reply = {
            "first": "Both are fine.\n\n**A**",
            "rude": "I would rather not.",
            "empty": None,
        }.get(model, f"One is longer.\n\n{'A' if len(a) > len(b) else 'B'}.")
        finish = "stop"
        if model == "thinks":
            reply = f"<think>{'Hmm. ' * 600}</think>{reply}"
            if len(reply.split()) > body["max_tokens"]:
                reply, finish = " ".join(reply.split()[: body["max_tokens"]]), "length"
        choice = {"message": {"content": reply}, "finish_reason": finish}
        self.answer(200, {"choices": [choice]})

    def answer(self, status, value):
        """Send JSON, or a page."""
        data = b"<html>hello</html>" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if status == 429:
            self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Silence."""


def serve(handler):
    """Answer for ever, after a line with the port."""
    handler.key = sys.argv[1] if len(sys.argv) > 1 else None
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(Handler)
