"""Hugging Face models: safetensors, in one file or in shards with an index."""

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_cpo.checkpoints.digest import digest_of, whole_file
from megatron_cpo.checkpoints.folders import check_sizes, damage_named, inside, read_json
from megatron_cpo.checkpoints.formats.names import embedding_and_head, weight_names
from megatron_cpo.checkpoints.formats.stored import Piece, StoredTensor, same_values
from megatron_cpo.checkpoints.formats.usable import refuse_tensors, refuse_unusable
from megatron_cpo.checkpoints.meaning import architecture_of_config
from megatron_cpo.checkpoints.tokens import vocabulary_of_folder

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ONE_FILE = "model.safetensors"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
"""Suffixes of what lies beside the weights and goes into the output."""


class HuggingFaceCheckpoint:
    """A folder with `config.json`, `*.safetensors` and, usually, a tokenizer."""

    format = "Hugging Face"
    padding: tuple[int, int] | None = None

    def __init__(self, folder: Path) -> None:
        refuse_unusable(folder)
        self.folder = folder
        self._index_name, self._index = _read_index(folder)
        self._headers: dict[str, bytes] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for name in _shards(folder, self._index_name, self._index):
            self._headers[name] = _read_header(folder / name)
            with damage_named(folder / name):
                _refuse_codes(folder, self._headers[name])
                in_file = tensors_of(folder / name, self._headers[name])
            for key, found in in_file.items():
                if key in self.tensors:
                    raise ValueError(f"{folder} holds {key} in two files, {name} is the second")
                self.tensors[key] = found
        if missing := sorted(set(self._index.get("weight_map", ())) - set(self.tensors)):
            raise ValueError(f"{folder}: the index lists {missing[0]}, which no shard holds")
        if not self.tensors:
            raise ValueError(f"{folder} holds no weights: its *.safetensors are empty")
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        self.architecture = architecture_of_config(config)
        self.weights = weight_names(config.get("model_type"), self.tensors)
        self.embedding, self.head = embedding_and_head(self.weights)
        self.vocabulary = vocabulary_of_folder(folder)
        self.token_count = config.get("vocab_size")

    def identity(self) -> dict[str, Any]:
        """Its name and a digest of its weights and its configuration."""
        return {"name": self.folder.name, "digest": model_digest(self.folder, self._headers)}

    def prepare(self, output: Path, dtypes: dict[str, torch.dtype]) -> dict[str, StoredTensor]:
        """Shards of the same names and order of tensors, complete but for the values."""
        tensors: dict[str, StoredTensor] = {}
        for name, header in self._headers.items():
            if dtypes != {key: tensor.dtype for key, tensor in self.tensors.items()}:
                header = _with_dtypes(header, dtypes)
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            with open(output / name, "xb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                ends = [entry["data_offsets"][1] for entry in entries.values()]
                file.truncate(8 + len(header) + max(ends, default=0))
            tensors |= tensors_of(output / name, header)
        return tensors

    def complete(self, output: Path, dtypes: dict[str, torch.dtype]) -> None:
        """Index, tokenizer and configuration."""
        if self._index:
            total = sum(
                math.prod(tensor.shape) * dtypes[name].itemsize
                for name, tensor in self.tensors.items()
            )
            metadata = self._index.get("metadata", {}) | {"total_size": total}
            index = self._index | {"metadata": metadata}
            (output / self._index_name).write_text(json.dumps(index, indent=2) + "\n")
        for path in sorted(self.folder.iterdir()):
            skipped = path.name.endswith(".index.json") or path.name == "config.json"
            if path.is_file() and path.suffix in COPIED and not skipped:
                shutil.copyfile(path, output / path.name)
        if not (self.folder / "config.json").exists():
            return
        text = (self.folder / "config.json").read_text()
        changed = {dtypes[n] for n, t in self.tensors.items() if dtypes[n] != t.dtype}
        if changed:
            [dtype] = changed
            config = json.loads(text)
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            config[key] = str(dtype).removeprefix("torch.")
            text = json.dumps(config, indent=2) + "\n"
        (output / "config.json").write_text(text)


def model_digest(folder: Path, files: Iterable[str]) -> str:
    """Of a model's weights, in these files, and of what says how to use them."""
    names = [*files, *(["config.json"] if (folder / "config.json").exists() else [])]
    return digest_of(whole_file(folder / name, folder) for name in names)


def check_tied(
    folder: Path, tensors: dict[str, StoredTensor], head: str, embedding: str | None
) -> None:
    """ValueError if the output layer that is stored is not the embedding, though both are one."""
    if embedding is None or not same_values(tensors[head], tensors[embedding]):
        raise ValueError(
            f"{folder}: its configuration ties the output layer to the embedding, but {head} is "
            f"not {embedding}; set tie_word_embeddings to false there if both are meant, or remove "
            f"{head}"
        )


def _read_index(folder: Path) -> tuple[str, dict[str, Any]]:
    """The index of a sharded model and its name, or nothing; as transformers chooses."""
    indices = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    if not indices or (folder / _ONE_FILE).exists():
        return "", {}
    name = f"{_ONE_FILE}.index.json"
    if name not in indices:
        if len(indices) > 1:
            raise ValueError(f"{folder} holds several models: {', '.join(indices)}")
        [name] = indices
    return name, read_json(folder / name)


def _shards(folder: Path, name: str, index: dict[str, Any]) -> list[str]:
    if index:
        with damage_named(folder / name):
            names = sorted(set(index["weight_map"].values()))
            index.get("metadata", {}).keys()
        check_sizes([(inside(folder, shard), 8) for shard in names])
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    names = [name for name in names if not name.startswith("consolidated")] or names
    if _ONE_FILE in names:
        return [_ONE_FILE]
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if len(names) > 1 and (len(shards) < len(names) or len({m[1] + m[3] for m in shards}) > 1):
        raise ValueError(
            f"{folder} holds several models: {', '.join(names)}; transformers reads {_ONE_FILE}, "
            "or the shards that its index names"
        )
    for stem, count in {(match[1], match[3]) for match in shards}:
        wanted = [f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))]
        check_sizes([(folder / name, 8) for name in wanted])
    return names


def _refuse_codes(folder: Path, header: bytes) -> None:
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    refuse_tensors(folder, {n: (e["dtype"], len(e["shape"])) for n, e in entries.items()})


def _read_header(path: Path) -> bytes:
    """The JSON header of a safetensors file, which follows its length; then come the values."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        if first == b"version ":
            raise ValueError(f"{path} is a pointer of git-lfs and not the file: run git lfs pull")
        length = int.from_bytes(first, "little")
        if size < 8 + length:
            raise ValueError(f"{path} is truncated: {size} bytes, its header alone has {length}")
        header = file.read(length)
    try:
        json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return header


def tensors_of(path: Path, header: bytes) -> dict[str, StoredTensor]:
    tensors, start = {}, 8 + len(header)
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, which merge cannot read")
        low, high = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (low, high, *shape)):
            raise ValueError(f"{path} is damaged: {name} has bytes {low} to {high} for {shape}")
        piece = Piece(path, start + low, (0,) * len(shape), shape)
        tensors[name] = StoredTensor(_DTYPES[entry["dtype"]], shape, (piece,))
        check_sizes([(path, start + high)])
        if high - low != tensors[name].nbytes:
            raise ValueError(f"{path} is damaged: {name} has {high - low} bytes for {shape}")
    return tensors


def _with_dtypes(header: bytes, dtypes: dict[str, torch.dtype]) -> bytes:
    """The header with other dtypes, tensors in the order in which their values lie."""
    entries = json.loads(header)
    changed = {"__metadata__": entries.pop("__metadata__")} if "__metadata__" in entries else {}
    end = 0
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        start, shape = end, entries[name]["shape"]
        end += math.prod(shape) * dtypes[name].itemsize
        kind = NAMES[dtypes[name]]
        changed[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(changed, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
