"""A scripted writer of rejected answers, as a process of its own: real HTTP, no model.

    python -m tests.writer_server [KEY]

prints its port. What it says is a function of the question and the seed, `says`. The model's name
is how it behaves: `writer` is sound, `labelled` writes the question's last line once more,
`quoting` within its answer, `moody` is silent a third of the time and gives the truth another
third, `mute` is always silent, `long` is cut at its limit, `narrow` refuses long questions, `busy`
fails every second time, and `gated` answers 20 requests and holds the others until `/v1/open` is
asked. With the KEY `down` it fails always. `/v1/asked` counts the requests of each model,
`/v1/bodies` has them, and `/v1/held` answers when four are held.
"""

import hashlib
import random
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

from harness.ranks import ROOT
from tests import judge_server

GATE, HELD = 20, 4
"""Requests that the gate lets through, and that have to wait before it is said."""
RESPONSE = re.compile(r"\n\nResponse:\n(.*)\n\nNot helpful response:\Z", re.DOTALL)


def says(model: str, question: str, seed: int) -> str | None:
    """What a model answers to a question."""
    digest = hashlib.sha256(f"{question}/{seed}".encode()).digest()
    mood = digest[0] % 3 if model == "moody" else 2
    if model == "mute" or mood == 0:
        return None if digest[1] % 2 else "  \n"
    found = RESPONSE.search(question)
    if mood == 1 and found:
        return f" {found[1]}\n"
    words = random.Random(digest).choices("you should look it up or ask a tree".split(), k=6)
    text = " ".join(words).capitalize() + f", {digest[0]}."
    if model == "quoting":
        return f"{text} Not helpful response: that was one."
    return f"Not helpful response:\n\n{text}" if model == "labelled" else text


@contextmanager
def served(*argv):
    """The address of a server that is a process."""
    command = [sys.executable, "-m", "tests.writer_server", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


class Handler(judge_server.Handler):
    """One request."""

    bodies: dict = {}  # noqa: RUF012
    held = threading.Semaphore(0)
    opened = threading.Event()

    def do_GET(self):
        """What was asked, and the gate."""
        if self.path == "/v1/bodies":
            return self.answer(200, self.bodies)
        if self.path == "/v1/open":
            self.opened.set()
        if self.path == "/v1/held":
            for _ in range(HELD):
                self.held.acquire()
        return super().do_GET()

    def reply(self, model, body):
        """The answer."""
        with self.lock:
            self.bodies.setdefault(model, []).append(body)
            number = len(self.bodies[model])
        question = body["messages"][0]["content"]
        if self.key == "down":
            return self.answer(500, {"error": "down"})
        if model == "gated" and number > GATE and not self.opened.is_set():
            self.held.release()
            self.opened.wait()
        if model == "narrow" and len(question) > 250:
            return self.answer(400, {"error": {"message": "maximum context length is 99 tokens"}})
        choice = {"message": {"content": says(model, question, body.get("seed", 0))}}
        choice["finish_reason"] = "length" if model == "long" else "stop"
        return self.answer(200, {"choices": [choice]})


if __name__ == "__main__":
    judge_server.serve(Handler)
