"""Records as people store them, for tests of reading: the same ones in every format."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, see\u2028you"},
]
ROWS: Rows = [
    {"prompt": f'{i} "naïve" [漢字', "completion": f"{{{i}}},\n🙂 {'x' * (i % 7)}", "n": i}
    for i in range(23)
]


def lines(rows: Rows, between: str = "\n", **options: Any) -> bytes:
    """An object after the other, as bytes."""
    return between.join(json.dumps(row, **options) for row in rows).encode() + b"\n"


def packed(pack: Callable[[bytes], bytes]) -> Callable[[Path, Rows], Path]:
    """JSON Lines, in a file that does not say how they are packed."""
    return written(lambda rows: pack(lines(rows)))


def written(content: Callable[[Rows], bytes], name: str = "rows.jsonl") -> Callable[..., Path]:
    """A way to store rows in one file."""

    def store(folder: Path, rows: Rows) -> Path:
        (folder / name).write_bytes(content(rows))
        return folder / name

    return store


def zstd(content: bytes) -> bytes:
    """Packed, in two frames."""
    import pyarrow

    half = len(content) // 2
    frames = (content[:half], content[half:])
    return b"".join(pyarrow.compress(frame, "zstd", asbytes=True) for frame in frames)


def parquet(folder: Path, rows: Rows, group: int = 5) -> Path:
    """A Parquet file of several row groups."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(rows), folder / "rows.parquet", row_group_size=group)
    return folder / "rows.parquet"


def table(rows: Rows) -> Any:
    """As pandas and datasets make them: null where a row has no such field."""
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: [row.get(name) for row in rows] for name in names})


def arrow(path: Path, rows: Rows, stream: bool, batch: int = 5) -> Path:
    """An Arrow file or stream of several record batches."""
    import pyarrow

    content = table(rows)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=batch)
    return path


def save_to_disk(folder: Path, rows: Rows, shards: int = 3) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` of 5.2 leaves it."""
    folder = folder / "saved"
    folder.mkdir()
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = -(-len(rows) // shards)
    for i, name in enumerate(names):
        arrow(folder / name, rows[i * size : (i + 1) * size], stream=True)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def pattern(folder: Path, rows: Rows) -> Path:
    """A pattern that matches two files, of which the later one was written first."""
    (folder / "part-1.json").write_bytes(lines(rows[9:]))
    (folder / "part-0.json").write_bytes(json.dumps(rows[:9]).encode())
    return folder / "part-*.json"


FORMATS: dict[str, Callable[[Path, Rows], Path]] = {
    "JSON Lines": written(lines),
    "JSON Lines of Windows": written(lambda rows: b"\xef\xbb\xbf" + lines(rows, "\r\n")),
    "JSON Lines with blank ones": written(lambda rows: b"\n \n" + lines(rows, "\n\n\t\n")),
    "JSON Lines, no last line break": written(lambda rows: lines(rows).rstrip()),
    "gzip": packed(gzip.compress),
    "two gzip members": packed(lambda b: gzip.compress(b[:999]) + gzip.compress(b[999:])),
    "bzip2": packed(bz2.compress),
    "xz": packed(lzma.compress),
    "zstd": packed(zstd),
    "array, compact": written(lambda rows: json.dumps(rows, separators=(",", ":")).encode()),
    "array, indented": written(lambda rows: json.dumps(rows, indent=2).encode()),
    "array, an object a line": written(lambda rows: b"[\n" + lines(rows, ",\n") + b"]\n"),
    "array of Windows": written(
        lambda rows: b"\xef\xbb\xbf\r\n[\r\n  " + lines(rows, " ,\r\n  ") + b"\r\n]\r\n"
    ),
    "array, not only ASCII": written(
        lambda rows: json.dumps(rows, ensure_ascii=False, indent="\t").encode()
    ),
    "array, packed": written(lambda rows: gzip.compress(json.dumps(rows, indent=1).encode())),
    "two arrays": written(
        lambda rows: (json.dumps(rows[:4]) + "\n" + json.dumps(rows[4:], indent=1)).encode()
    ),
    "objects over several lines": written(lambda rows: lines(rows, indent=4)),
    "objects over several lines, not indented": written(lambda rows: lines(rows, indent=0)),
    "objects in one line": written(lambda rows: lines(rows, " ")),
    "objects, nothing between": written(lambda rows: lines(rows, "")),
    "objects, lines of old Macs": written(lambda rows: lines(rows, "\r")),
    "lines of an array without brackets": written(lambda rows: lines(rows, ",\n")),
    "Parquet": parquet,
    "Arrow file": lambda folder, rows: arrow(folder / "rows.feather", rows, stream=False),
    "Arrow stream": lambda folder, rows: arrow(folder / "rows.arrow", rows, stream=True),
    "save_to_disk": save_to_disk,
    "pattern": pattern,
}
"""Ways to store rows: from a folder and the rows to the input."""
