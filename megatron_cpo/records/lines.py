"""JSON text as people store it, one object at a time and never a file in memory.

    JSON Lines              an object a line; a line that is none is a bad record
    one array of objects    compact, indented or an object a line
    objects one after the other, over several lines each, or several in a line

The first line that is not blank decides: a whole object, or what is no JSON, is JSON Lines.
"""

import codecs
import json
import re
from collections.abc import Callable, Generator, Iterator
from io import BufferedReader
from typing import Any

from megatron_cpo.records.opening import open_text

Advance = Callable[[int, int], object]
"""Told of lines (or documents, or rows) that are done with, and of bytes that were read."""
Fields = dict[str, Any]
"""A record as it was stored: values by the names of its fields."""
LONGEST_LINE = 32 << 20
"""Bytes. A longer line or object is a bad record and never held."""
CHUNK = 1 << 20
"""Characters of an array that are read at a time."""
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


class Unreadable(str):
    """In place of the fields of a record: why there are none."""


def read_json(
    path: str, advance: Advance, skip: int
) -> Generator[tuple[str, Fields | Unreadable], None, int]:
    """(place, fields) of the objects of a file, plain or packed.

    Args:
        advance: called after each line (of an array: each item), once what was made of it is used,
            with 1 and the bytes that were read since, packed ones of packed files; with 0 at the
            end of the file.
        skip: lines or items to leave out at the beginning.

    Returns:
        How many are still to be left out, in the files that follow.

    Raises:
        ValueError: the file cannot be read, or holds an array that is no JSON.
    """
    with open_text(path) as (file, stored_bytes):
        read = 0
        for place, unit in _units(file, path):
            if skip:
                skip -= 1
            elif unit != b"":
                yield place, _object(unit)
            advance(1, stored_bytes() - read)
            read = stored_bytes()
        advance(0, stored_bytes() - read)
    return skip


def _units(file: BufferedReader, path: str) -> Iterator[tuple[str, Any]]:
    """(place, unit): the bytes of a line, a decoded value, or why there is neither."""
    if file.peek(3)[:3] == codecs.BOM_UTF8:  # the mark some editors put first
        file.read(3)
    number, line = 1, b""
    while not line.strip():
        if file.peek(1).lstrip().startswith(b"["):  # it may be one line of any length
            yield from _values(file, b"", path, number)
            return
        if not (line := file.readline(LONGEST_LINE + 1)):
            return
        if _spans_lines(line):
            yield from _values(file, line, path, number)
            return
        yield f"{path}:{number}", _line(file, line)
        number += 1
    while line := file.readline(LONGEST_LINE + 1):
        yield f"{path}:{number}", _line(file, line)
        number += 1


def _line(file: BufferedReader, line: bytes) -> bytes | Unreadable:
    """A line; of one that is too long the end is read as well, and nothing kept."""
    if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
        return line.strip()
    while line and not line.endswith(b"\n"):
        line = file.readline(1 << 20)
    return Unreadable(f"line longer than {LONGEST_LINE >> 20} MiB")


def _object(unit: Any) -> Fields | Unreadable:
    if isinstance(unit, bytes):
        try:
            unit = json.loads(unit.decode("utf-8"))
        except UnicodeDecodeError:
            return Unreadable("not UTF-8")
        except (ValueError, RecursionError):
            return Unreadable("not JSON")
    return unit if isinstance(unit, dict | Unreadable) else Unreadable("not a JSON object")


def _spans_lines(line: bytes) -> bool:
    """Whether a file whose first line this is holds an array, or objects without a line each."""
    text = line.decode("utf-8", "surrogateescape").strip()
    if not text.startswith("{"):
        return text.startswith("[")
    try:
        end = _DECODER.raw_decode(text)[1]
    except json.JSONDecodeError as error:
        return _ends_too_early(error, text)
    except (RecursionError, ValueError):  # nested too deeply, a number of too many digits
        return False
    return text[end:].lstrip().startswith(("{", ","))


def _ends_too_early(error: json.JSONDecodeError, text: str) -> bool:
    """Whether text that is no JSON may be the beginning of some."""
    # A literal, a number or an escape that is cut is complained of where it begins.
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16


class _Window:
    """What was read of a file and not used yet, as text. It grows until it holds a whole value."""

    def __init__(self, file: BufferedReader, start: bytes, line: int) -> None:
        self._file = file
        # Bytes that are no UTF-8 become half surrogates, which no record may have.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at = self._decoder.decode(start), 0
        self.line = line
        """Where it begins in the file."""

    def next_sign(self) -> str:
        """The next character that is no space or comma; "" at the end of the file."""
        while True:
            match = _BETWEEN.match(self._text, self._at)
            assert match
            self.move(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def move(self, to: int | None = None) -> None:
        """Go on to there, or over one character."""
        to = self._at + 1 if to is None else to
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            ValueError: there is none; nothing is used up.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not _ends_too_early(error, self._text):
                    raise ValueError("not JSON") from error
                if len(self._text) - self._at > LONGEST_LINE:
                    message = f"object longer than {LONGEST_LINE >> 20} MiB"
                    raise ValueError(message) from error
                if not self._more():
                    raise ValueError("not JSON") from error
            except (RecursionError, ValueError):
                raise ValueError("not JSON") from None
            else:
                self.move(end)
                return value

    def to_next_object(self) -> None:
        """Go on to the next line that begins an object, from somewhere within one that is bad."""
        while (found := self._text.find("\n{", self._at)) < 0:
            self.move(max(len(self._text) - 1, self._at))
            if not self._more():
                self.move(len(self._text))
                return
        self.move(found + 1)

    def _more(self) -> bool:
        """Read as much again as there is, so that a long value is not tried too often."""
        self._text, self._at = self._text[self._at :], 0
        chunk = self._file.read(max(CHUNK, len(self._text)))
        self._text += self._decoder.decode(chunk, final=not chunk)
        return bool(chunk)


def _values(file: BufferedReader, start: bytes, path: str, line: int) -> Iterator[tuple[str, Any]]:
    """The values of a file, and those in its arrays; `start` was read from it already."""
    window, in_array, number = _Window(file, start, line), False, 0
    while sign := window.next_sign():
        if sign == ("]" if in_array else "["):
            in_array = not in_array
            window.move()
            continue
        line = window.line
        place = f"{path}[{number}]" if in_array else f"{path}:{line}"
        try:
            unit = window.value()
        except ValueError as error:
            if in_array:
                raise ValueError(
                    f"--input {path}: item {number} of its array, line {line}: {error}; correct "
                    "it there, or copy the file again if it is cut off"
                ) from error
            unit = Unreadable(error)
            window.to_next_object()
        yield place, unit
        number += 1
    if in_array:
        raise ValueError(f"--input {path}: its array does not end: the file is cut off; copy it")
