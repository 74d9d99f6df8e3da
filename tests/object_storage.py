"""An S3 server on loopback: moto's, in a process of its own that may be killed and started again.

    python -m tests.object_storage PORT FOLDER      objects of the bucket `data`: FOLDER's files

It holds objects in memory, so it begins with the files of a folder each time.
"""

import functools
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness.ranks import ROOT

BUCKET = "data"
KEYS = {
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


class Server:
    """The server's process, and a client of its own that the code under test has no part in.

    Args:
        folder: its files are the objects that it begins with.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, 0
        self._process: Any = None
        self.start()

    @property
    def variables(self) -> dict[str, str]:
        """Environment in which boto3 finds it."""
        return KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}", "NO_PROXY": "*"}

    def start(self) -> None:
        """Start it, again on the port that it had."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._port), str(self._folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said = [next(self._process.stdout) for _ in range(2)]
        self._port = int(said[-1])

    def kill(self) -> None:
        """As by a loss of power."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process.stdin.close()

    @functools.cached_property
    def client(self) -> Any:
        """boto3's, of this process."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.variables["AWS_ENDPOINT_URL"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )

    def put(self, name: str, content: bytes) -> None:
        """Make an object of the bucket."""
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def get(self, name: str) -> bytes:
        """The content of one."""
        return bytes(self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read())

    def names(self) -> list[str]:
        """Of all objects."""
        found = self.client.list_objects_v2(Bucket=BUCKET)
        return sorted(each["Key"] for each in found.get("Contents", []))


@contextmanager
def answering(answers: list[str], content: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that gives the wrong answers that a test wants, which moto does not.

    Args:
        answers: in turn `whole`, `half` (cut off in its middle), or the status of an error.
        content: of every object.

    Yields:
        Its endpoint, and the ranges of bytes that it was asked for.
    """
    left, requests = iter(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.headers["Range"])
            answer = next(left)
            ranged = answer in ("half", "whole")
            body = content if ranged else b"<Error><Code>Nope</Code><Message>no</Message></Error>"
            self.send_response(206 if ranged else int(answer))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if answer == "half" else body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()


def serve(port: int, folder: Path) -> None:
    """Until killed, or the end of standard input; prints its port when the objects are there."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port)
    server.start()
    host, port = server.get_host_and_port()
    session = boto3.Session("any", "any", region_name=KEYS["AWS_DEFAULT_REGION"])
    client = session.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket=BUCKET)
    for path in folder.iterdir():
        client.put_object(Bucket=BUCKET, Key=path.name, Body=path.read_bytes())
    print(port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
