"""Hugging Face models: safetensors, in one file or in shards with an index."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_cpo.checkpoints.formats.stored import Piece, StoredTensor
from megatron_cpo.checkpoints.identity import check_sizes, folder_digest

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
COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
"""Suffixes of what lies beside the weights and goes into the output."""
_ARCHITECTURE = (
    "model_type hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head "
    "num_key_value_heads head_dim intermediate_size n_inner hidden_act activation_function "
    "rope_theta rope_scaling tie_word_embeddings num_local_experts"
).split()


class HuggingFaceCheckpoint:
    """A folder with `config.json`, `*.safetensors` and, usually, a tokenizer."""

    format = "Hugging Face"
    padding: tuple[int, int] | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = _read_index(folder)
        self._headers: dict[str, bytes] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for name in _shards(folder, self._index):
            self._headers[name] = _read_header(folder / name)
            for key, found in tensors_of(folder / name, self._headers[name]).items():
                if key in self.tensors:
                    raise ValueError(f"{folder} holds {key} in two files, {name} is the second")
                self.tensors[key] = found
        if missing := sorted(set(self._index.get("weight_map", ())) - set(self.tensors)):
            raise ValueError(f"{folder}: the index lists {missing[0]}, which no shard holds")
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        self.architecture = {name: config[name] for name in _ARCHITECTURE if name in config}
        self.vocabulary = _vocabulary(folder, config)

    def identity(self) -> dict[str, Any]:
        """Its name and a digest of its files."""
        return {"name": self.folder.name, "sha256": folder_digest(self.folder)}

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
            name = next(self.folder.glob("*.safetensors.index.json")).name
            (output / name).write_text(json.dumps(index, indent=2) + "\n")
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a sharded model, or nothing."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} holds several models: {indices[0].name}, {indices[1].name}")
    return read_json(indices[0]) if indices else {}


def _shards(folder: Path, index: dict[str, Any]) -> list[str]:
    if not index:
        return sorted(path.name for path in folder.glob("*.safetensors"))
    names = sorted(set(index["weight_map"].values()))
    check_sizes([(folder / name, 8) for name in names])
    return names


def _read_header(path: Path) -> bytes:
    """The JSON header of a safetensors file, which follows its length; then come the values."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"{path} is truncated: {size} bytes, its header alone has {length}")
        header = file.read(length)
    try:
        json.loads(header)
    except ValueError as error:
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


def _vocabulary(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Size and tokens, but no settings of a tokenizer: each version of the library has its own."""
    found: dict[str, Any] = {}
    if "vocab_size" in config:
        found["vocab_size"] = config["vocab_size"]
    for name in ("tokenizer.model", "merges.txt"):
        if (path := folder / name).exists():
            found[name] = path
    for name in ("tokenizer.json", "vocab.json"):
        if (path := folder / name).exists():
            tokens: Any = read_json(path)
            if name == "tokenizer.json":
                model = tokens.get("model", {})
                merges = model.get("merges", [])  # "a b" or ["a", "b"], as the version likes
                joined = [m if isinstance(m, str) else " ".join(m) for m in merges]
                tokens = [model.get("vocab", {}), joined]
            text = json.dumps(tokens, sort_keys=True)
            found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found
