"""What --input may name: files, folders, patterns, datasets; and the records that are in them."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_cpo.records.lines import Advance, Fields, Unreadable, read_json
from megatron_cpo.records.opening import WANTED, kind_of
from megatron_cpo.records.tables import read_arrow, read_parquet

_READERS = {"json": read_json, "parquet": read_parquet, "arrow": read_arrow}
_ENDINGS = (".parquet", ".jsonl", ".jsonl.*", ".json", ".arrow")
_PATTERNS = [f"{inside}*{ending}" for ending in _ENDINGS for inside in ("", "*/")]
"""What is looked for in a folder that is none of datasets'."""


def expand(inputs: Sequence[str]) -> tuple[str, ...]:
    """The inputs, with those that a pattern (`*`, `?`, `[...]`, `**`) matches in its place, sorted.

    Of a dataset whose two files are both named, as where a shell has filled in a pattern, the .idx
    is left out: it is one input.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found = [path for given in inputs for path in _matches(given)]
    second = {path.removesuffix(".bin") + ".idx" for path in found if path.endswith(".bin")}
    return tuple(path for path in found if path not in second or not indexed_prefix(path))


def _matches(given: str) -> list[str]:
    if os.path.lexists(given) or not glob.has_magic(given):
        return [given]
    found = sorted(glob.glob(os.path.expanduser(given), recursive=True))
    if not found:
        raise ValueError(f"--input {given}: the pattern matches nothing; {WANTED}")
    # Of a dataset both files match; it is one input.
    return list(dict.fromkeys(indexed_prefix(path) or path for path in found))


def indexed_prefix(path: str) -> str | None:
    """The prefix of the Megatron indexed dataset that a path names, or None if it names none."""
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    return prefix if Path(prefix + ".idx").is_file() and Path(prefix + ".bin").is_file() else None


def files_of(path: str) -> list[str]:
    """The files that hold the records of an input: itself, or those of a folder, in their order.

    Raises:
        ValueError: it is a folder of something else.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [path]
    if names := _json(folder / "dataset_dict.json").get("splits"):
        raise ValueError(
            f"--input {path}: a DatasetDict with the splits {', '.join(names)}; give one of them, "
            f"such as --input {folder / names[0]}"
        )
    state = _json(folder / "state.json")
    if "_data_files" not in state:
        found = next((pattern for pattern in _PATTERNS if any(folder.glob(pattern))), None)
        hint = f"; give its files: --input '{folder / found}'" if found else ""
        raise ValueError(f"--input {path}: a folder, but none that save_to_disk wrote{hint}")
    if state.get("_indices_data_files"):
        raise ValueError(
            f"--input {path}: an old datasets folder, whose rows are chosen by an index; load it "
            "and save it again: datasets.load_from_disk(...).flatten_indices().save_to_disk(...)"
        )
    return [str(folder / file["filename"]) for file in state["_data_files"]]


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_fields(
    paths: Sequence[str], advance: Advance, skip: int
) -> Iterator[tuple[str, Fields | Unreadable]]:
    """(place, fields) of the records of all inputs, in order, streaming.

    A place is file:line, file[item] of an array, or file:row.

    Args:
        advance: called after each line, item or row, once what was made of it is used, with 1 and
            the bytes that were read since, packed ones of packed files; with 0 at the end of a
            file. Skipped rows may be told of together.
        skip: lines, items and rows to leave out at the beginning.

    Raises:
        ValueError: a file is missing, not whole, or of a kind that is not read.
    """
    for path in paths:
        if indexed_prefix(path):
            raise ValueError(
                f"--input {path}: a Megatron indexed dataset holds token ids and no text; give "
                "the text that it was made from"
            )
        for file in files_of(path):
            skip = yield from _READERS[kind_of(file)](file, advance, skip)
