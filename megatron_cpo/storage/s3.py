"""Objects of S3, or of a server that speaks as it does: AWS_ENDPOINT_URL, as boto3 reads it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cpo.extras import needs

SECONDS = 60
"""Without a byte after which a connection is lost."""


class SimpleStorage:
    """`Objects` by boto3; keys, region, endpoint and proxies are those of boto3's own settings.

    Raises:
        ValueError: boto3 is not installed.
        OSError: its settings are of no use; says which.
    """

    def __init__(self) -> None:
        try:
            import boto3
        except ModuleNotFoundError as error:
            raise ValueError(f"s3:// {needs(error.name, 's3')}") from error
        self._session = boto3.Session()
        # We try again ourselves, and say so.
        self._client = self._connected({"total_max_attempts": 1})
        self.where = str(self._client.meta.endpoint_url)

    @functools.cached_property
    def _uploader(self) -> Any:
        """Of a large file it sends one part again, where we would begin with the first."""
        return self._connected({"mode": "standard", "total_max_attempts": 5})

    def _connected(self, retries: dict[str, Any]) -> Any:
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(retries=retries, connect_timeout=10, read_timeout=SECONDS)
        try:
            return self._session.client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise OSError(f"s3://: {error}: see AWS_ENDPOINT_URL and boto3's settings") from error

    def lost(self, error: Exception) -> bool:
        """No answer, half an answer, or one of a server that is overloaded or broken."""
        from botocore import exceptions

        if isinstance(error, exceptions.ClientError):
            return _status(error) >= 500 or _status(error) == 429
        return isinstance(
            error,
            exceptions.ConnectionError
            | exceptions.HTTPClientError
            | exceptions.IncompleteReadError,
        )

    def size(self, url: str) -> int | None:
        """Bytes of an object; None: there is none."""
        try:
            with self._named(url):
                return int(self._client.head_object(**_place(url))["ContentLength"])
        except FileNotFoundError:
            return None

    def read(self, url: str, span: range | None) -> bytes:
        """An object, or the bytes of it in `span`."""
        asked = {} if span is None else {"Range": f"bytes={span.start}-{span.stop - 1}"}
        with self._named(url):
            return bytes(self._client.get_object(**_place(url), **asked)["Body"].read())

    def upload(self, file: Path, url: str) -> None:
        """Make a file an object, in parts where it is large."""
        with self._named(url), file.open("rb") as content:
            self._uploader.upload_fileobj(content, **_place(url))

    def write(self, content: bytes, url: str) -> None:
        """Make a few bytes an object."""
        with self._named(url):
            self._client.put_object(**_place(url), Body=content)

    def remove(self, url: str) -> None:
        """Remove an object, if there is one."""
        with self._named(url):
            self._client.delete_object(**_place(url))

    @contextmanager
    def _named(self, url: str) -> Iterator[None]:
        """A refusal in words that name the object; what is lost stays what it is."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            if self.lost(error):
                raise
            if not isinstance(error, ClientError):
                raise OSError(f"{url}: {error}") from error
            said = error.response["Error"]
            if said.get("Code") in ("404", "NoSuchKey"):
                raise FileNotFoundError(f"{url}: there is no such object") from error
            raise OSError(
                f"{url}: {self.where} refuses it: {said.get('Code')}, {said.get('Message')}"
            ) from error


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _place(url: str) -> dict[str, str]:
    """Bucket and key of an address.

    Raises:
        ValueError: it lacks one of them.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise ValueError(f"{url}: needs a bucket and a name in it, such as s3://BUCKET/runs/groups")
    return {"Bucket": bucket, "Key": key}
