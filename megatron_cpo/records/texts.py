"""Instruction and response of each record as people read them, for models that are told of them.

They lie beside the tokens of a build whose negatives are written by such a model, and only there:
tokens know nothing of the template around an instruction.
"""

import json
from pathlib import Path
from typing import BinaryIO

import numpy as np

Texts = tuple[str, str]
"""Instruction and response, without what a template puts around them."""
_END = np.dtype("<i8")


class TextsWriter:
    """Writes them one after another; goes on behind the first `count`.

    Args:
        path_prefix: of the files `.texts` and `.texts.ends`.
        count: records that are there, see `written`.
    """

    def __init__(self, path_prefix: str, count: int) -> None:
        self._ends = reopened(Path(path_prefix + ".texts.ends"), count * _END.itemsize)
        self._size = 0
        if count:
            self._ends.seek(-_END.itemsize, 1)
            self._size = int(np.frombuffer(self._ends.read(), _END)[0])
        self._texts = reopened(Path(path_prefix + ".texts"), self._size)
        self.files = [self._texts, self._ends]

    def add(self, texts: Texts | None) -> None:
        """Write those of a record; None: it has only its tokens."""
        line = json.dumps(texts).encode() + b"\n"
        self._size += len(line)
        self._texts.write(line)
        self._ends.write(np.array(self._size, _END).tobytes())


def written(path_prefix: str) -> int:
    """Of how many records the texts are there, whole or in part."""
    path = Path(path_prefix + ".texts.ends")
    return path.stat().st_size // _END.itemsize if path.exists() else 0


class TextsReader:
    """Reads what `TextsWriter` wrote; memory mapped."""

    def __init__(self, path_prefix: str) -> None:
        self._ends = np.asarray(np.memmap(path_prefix + ".texts.ends", _END, "r"))
        self._texts = np.asarray(np.memmap(path_prefix + ".texts", np.uint8, "r"))

    def __getitem__(self, index: int) -> Texts | None:
        first = self._ends[index - 1] if index else 0
        found = json.loads(self._texts[first : self._ends[index]].tobytes())
        return None if found is None else (found[0], found[1])


def reopened(path: Path, size: int) -> BinaryIO:
    """A file cut off at a size, open to read and to write on there; empty ones begin anew."""
    file = open(path, "r+b" if size else "w+b")  # noqa: SIM115  # closed by the caller
    file.truncate(size)
    file.seek(size)
    return file
