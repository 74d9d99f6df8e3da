"""Changes to files as a bad disk, a bad copy or a bad person makes them; seeded."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUTSIDE = "outside.safetensors"
"""A file beside every case's folder, which nobody has any business with."""
EXTREMES = [0, 1, 255, -1, -(2**31), 2**31 - 1, 2**32 - 1, 2**62, 2**63 - 1]
STRANGE: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", [], {}),
    *(f"../{OUTSIDE}", f"/../{OUTSIDE}", "\ud800", "\0", "x" * 10_000, [[]] * 50, {"a": {"b": []}}),
    *([-1, -2], [0, 2**40], [2**40, 0], ["a"], "../../etc/passwd", "/etc/passwd"),
]


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """One of what disks and copies do."""
    data = bytearray(content)
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(7)
    if kind == 0 and data:
        for _ in range(chance.choice([1, 1, 1, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = chance.randbytes(chance.choice([1, 8, 4096]))
    elif kind == 3:
        end = at + chance.choice([1, 8, 512, 4096])
        data[at:end] = bytes(len(data[at:end]))
    elif kind == 4:
        size = chance.choice([1, 2, 4, 8])
        number = chance.choice(EXTREMES) % (1 << 8 * size)
        data[at : at + size] = number.to_bytes(size, "little")
    elif kind == 5:
        other = chance.randrange(len(data) + 1)
        data[at : at + 64] = data[other : other + 64]
    else:
        data += chance.randbytes(chance.choice([1, 100]))
    return bytes(data)


def change_json(content: Any, chance: random.Random) -> Any:
    """A value somewhere is another one, or gone, or there twice."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            places.append((value, key))
            if isinstance(inner, dict | list):
                walk(inner)

    content = json.loads(json.dumps(content))
    if isinstance(content, dict | list):
        walk(content)
    if not places or chance.random() < 0.05:
        return chance.choice(STRANGE)
    holder, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["", "x", f"../{OUTSIDE}", "__metadata__"])] = holder.pop(key)
    else:
        holder[key] = chance.choice(STRANGE)
    return content


def change_json_file(content: bytes, chance: random.Random) -> bytes:
    """As JSON or as bytes; now and then what no parser likes."""
    if chance.random() < 0.03:
        return chance.choice([b"[" * 200_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b""])
    if chance.random() < 0.4:
        return change_bytes(content, chance)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # changed before
        return change_bytes(content, chance)
    return json.dumps(change_json(found, chance)).encode()


def change_safetensors(content: bytes, chance: random.Random) -> bytes:
    """Mostly the header, whose length is right again."""
    if chance.random() < 0.3:
        return change_bytes(content, chance)
    length = int.from_bytes(content[:8], "little")
    header = change_json_file(content[8 : 8 + length], chance)
    stated = len(header) if chance.random() < 0.9 else chance.choice(EXTREMES) % (1 << 64)
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def change_jsonl(content: bytes, chance: random.Random) -> bytes:
    """Some lines of a file of records."""
    lines = content.splitlines(keepends=True)
    for _ in range(chance.choice([1, 5])):
        at = chance.randrange(len(lines))
        lines[at] = change_json_file(lines[at], chance) + chance.choice([b"\n", b""])
    return b"".join(lines)


class Trap:
    """An object whose pickle, loaded the plain way, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def change_metadata(content: bytes, chance: random.Random, trap: Path) -> bytes:
    """torch's `.metadata`: as a pickle of other values, or as bytes."""
    kind = chance.randrange(10)
    if kind < 4:
        return change_bytes(content, chance)
    if kind == 4:
        return chance.choice(PICKLES)
    metadata = pickle.loads(content)
    index = chance.choice(list(metadata.storage_data))
    info = metadata.storage_data[index]
    entry = metadata.state_dict_metadata.get(index.fqn)
    strange: Any = chance.choice([*STRANGE, Trap(trap)])
    if kind in (5, 6):
        name = chance.choice(["relative_path", "offset", "length"])
        object.__setattr__(info, name, strange)
    elif kind == 7 and hasattr(entry, "chunks"):
        name = chance.choice(["offsets", "sizes"])
        object.__setattr__(chance.choice(entry.chunks), name, strange)
    elif kind == 8 and hasattr(entry, "chunks"):
        object.__setattr__(entry, chance.choice(["size", "properties", "chunks"]), strange)
    else:
        chance.choice([metadata.storage_data, metadata.state_dict_metadata])[index] = strange
    if chance.random() < 0.1:
        name = chance.choice(["state_dict_metadata", "storage_data", "planner_data"])
        setattr(metadata, name, strange)
    return pickle.dumps(metadata)


PICKLES = [
    b"\x80\x02Nr\xff\xff\xff\x1f.",  # a memo of gigabytes for six bytes
    b"\x80\x02Nr\xff\xff\xff\x7f.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes that are not there
    b"\x80\x04\x8e\xff\xff\xff\xff\x02\x00\x00\x00.",
    b"\x80\x04" + b"(" * 100_000 + b".",
    b"\x80\x04" + b"]" * 10_000 + b"a" * 9_999 + b".",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"cos\nsystem\n(S'touch pwned'\ntR.",
    b"",
    b".",
    b"\x80\xff.",
]
Change = Callable[[bytes, random.Random], bytes]
