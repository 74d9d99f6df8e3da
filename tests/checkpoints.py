"""Small checkpoints for tests of merging and converting: written, read, compared."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.digest import digest_of, whole_file
from megatron_cpo.checkpoints.formats.opening import open_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIG = {"model_type": "llama", "vocab_size": 20, "num_attention_heads": 4, "dtype": "float32"}


def average(mle: torch.Tensor, cpo: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha * mle.double() + (1 - alpha) * cpo.double()


def assert_rounded_once(stored: torch.Tensor, exact: torch.Tensor) -> None:
    """Each stored value within half a unit in its last place of the exact one."""
    kind = torch.finfo(stored.dtype)
    bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[stored.dtype]
    exponent = torch.frexp(stored.double())[1] - bits
    unit = torch.exp2(exponent.double()).clamp(kind.smallest_normal * kind.eps)
    off = (stored.double() - exact).abs()
    # Right at a power of two the unit below is half as large.
    assert (off <= unit / 2).all(), f"{float((off / unit).max())} units in the last place"


def weights(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A model's tensors, one of them too large for one box."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, 7), "model.norm.weight": (7,), "scale": ()}
    shapes["model.layers.0.weight"] = (700, 600)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in shapes.items()
    }
    return tensors | {"model.ids": torch.arange(5), "model.none": torch.empty(0, 3, dtype=dtype)}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = list(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        mine = {name: tensors[name] for name in names if where[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    return folder


def write_pair(folder: Path) -> tuple[Path, Path]:
    """An MLE model in two shards and a CPO model in one file, float32."""
    return (
        write_model(folder / "hf_mle", weights(0, torch.float32), shards=2),
        write_model(folder / "hf_cpo", weights(1, torch.float32)),
    )


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def digest_of_folder(folder: Path) -> str:
    """Of every byte of every file."""
    return digest_of(whole_file(path, folder) for path in folder.rglob("*") if path.is_file())


def change_weight(run: Path) -> None:
    """Change one byte amid a Megatron checkpoint's weights, and neither size nor time of its file.

    In the last digits of a number.
    """
    tensor = open_checkpoint(run).tensors["decoder.layers.mlp.linear_fc1.weight"]
    piece = tensor.pieces[-1]
    at = piece.start + math.prod(piece.sizes) // 2 * tensor.dtype.itemsize
    found, content = piece.path.stat(), bytearray(piece.path.read_bytes())
    content[at] ^= 1
    piece.path.write_bytes(content)
    os.utime(piece.path, ns=(found.st_atime_ns, found.st_mtime_ns))


def read_torch_dist(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, by torch's own reader."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.TensorStorageMetadata) and not name.startswith("optimizer")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class Trap:
    """An object whose pickle, loaded the plain way, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def assert_refused(inputs: Any, message: str, tmp_path: Path, **options: Any) -> None:
    """ValueError, and nothing is left."""
    with pytest.raises(ValueError, match=message):
        merge(*inputs, options.pop("alpha", 0.3), tmp_path / "merged", **options)
    assert not list(tmp_path.glob("merged*"))
