"""What was paid for is kept: rows under the digest of what they answer, in a file of JSON lines.

The file only grows, by a line as soon as an answer is there. A run that was killed goes on with
what is missing, and a rerun finds everything. Processes may share it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpo.files import make_folder


class KeptLines:
    """Rows by their key.

    Args:
        path: the file; made if it is not there.
        what: a row in messages, such as `a judge's reply`.
        names: fields that each row has, beside its `key`.
        defaults: of fields that rows of earlier releases lack.

    Raises:
        ValueError: a line that is not the last one cannot be read. Half a last line is what a kill
            leaves; it is cut off, and its answer found again.
    """

    def __init__(
        self, path: Path, what: str, names: Sequence[str], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        content, whole = b"", 0
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), 1):
                try:
                    row = {**(defaults or {}), **json.loads(line)}
                    self._rows[row["key"]] = {name: row[name] for name in names}
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}:{number}: not {what} ({error}); repair or remove it"
                    ) from error
        make_folder(path.parent)
        # Other processes may have it open as well: each line is one write, and none is cut off.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if whole < len(content):
            self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, key: str) -> dict[str, Any] | None:
        """The row of a key, or None."""
        return self._rows.get(key)

    def keep(self, key: str, **row: Any) -> None:
        """Keep a row; it outlives this process."""
        line = memoryview(json.dumps({"key": key, **row}).encode() + b"\n")
        while line:  # what does not fit on a full disk is an error of the next write
            line = line[self._file.write(line) :]
        self._rows[key] = row

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def digest(content: Any) -> str:
    """What a row is kept under: SHA-256 of all that decides it, JSON-able."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
