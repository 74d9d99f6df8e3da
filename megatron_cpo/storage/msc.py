"""Objects behind NVIDIA's multi-storage-client: `msc://PROFILE/NAME`, profiles as MSC_CONFIG says.

Megatron's --enable-msc is for what Megatron reads by itself; stores of groups do without.
"""

from pathlib import Path

from megatron_cpo.extras import needs


class MultiStorage:
    """`Objects` by multistorageclient; it asks again by itself where a profile says so.

    Raises:
        ValueError: it is not installed.
    """

    where = "the storage of its profile"

    def __init__(self) -> None:
        try:
            import multistorageclient
        except ModuleNotFoundError as error:
            raise ValueError(f"msc:// {needs(error.name, 'msc')}") from error
        self._msc = multistorageclient

    def lost(self, error: Exception) -> bool:
        """Its `RetryableError`; and its RuntimeError, which no answer is, among other things."""
        known = self._msc.types.RetryableError | RuntimeError | ConnectionError | TimeoutError
        return isinstance(error, known)

    def size(self, url: str) -> int | None:
        """Bytes of an object; None: there is none."""
        try:
            return int(self._msc.info(url).content_length)
        except FileNotFoundError:
            return None

    def read(self, url: str, span: range | None) -> bytes:
        """An object, or the bytes of it in `span`."""
        client, path = self._msc.resolve_storage_client(url)
        asked = None if span is None else self._msc.types.Range(span.start, len(span))
        return bytes(client.read(path, byte_range=asked))

    def upload(self, file: Path, url: str) -> None:
        """Make a file an object."""
        self._msc.upload_file(url, str(file))

    def write(self, content: bytes, url: str) -> None:
        """Make a few bytes an object."""
        self._msc.write(url, content)

    def remove(self, url: str) -> None:
        """Remove an object, if there is one."""
        if self.size(url) is not None:
            self._msc.delete(url)
