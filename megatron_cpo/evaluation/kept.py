"""What was paid for is kept: rows under the digest of what they answer, in a file of JSON lines.

The file only grows, by a line as soon as an answer is there. A run that was killed goes on with
what is missing, and a rerun finds everything.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class KeptLines:
    """Rows by their key.

    Args:
        path: the file; made if it is not there.
        what: a row in messages, such as `a judge's reply`.
        names: fields that each row has, beside its `key`.

    Raises:
        ValueError: a line that is not the last one cannot be read. Half a last line is what a kill
            leaves; it is cut off, and its answer found again.
    """

    def __init__(self, path: Path, what: str, names: Sequence[str]) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), 1):
                try:
                    row = json.loads(line)
                    self._rows[row["key"]] = {name: row[name] for name in names}
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}:{number}: not {what} ({error}); repair or remove it"
                    ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115
        self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, key: str) -> dict[str, Any] | None:
        """The row of a key, or None."""
        return self._rows.get(key)

    def keep(self, key: str, **row: Any) -> None:
        """Keep a row; it outlives this process."""
        self._file.write(json.dumps({"key": key, **row}).encode() + b"\n")
        self._file.flush()
        self._rows[key] = row

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def digest(content: Any) -> str:
    """What a row is kept under: SHA-256 of all that decides it, JSON-able."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
