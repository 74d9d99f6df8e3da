"""Changes of a Hugging Face model's folder, as somebody's tool makes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]


def config(**settings: Any) -> Change:
    """Settings; None takes one out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        found = json.loads(path.read_text()) | settings
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def file(name: str, content: str | dict[str, Any] = "") -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return change


def tensors(edit: Callable[[Tensors], Tensors | None]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        found = edit(found) or found
        found = {name: tensor.clone().contiguous() for name, tensor in found.items()}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def no_change(folder: Path) -> None:
    pass


def base_names(prefix: str) -> Change:
    return tensors(lambda found: {n.removeprefix(prefix): t for n, t in found.items()})


def more(name: str, value: torch.Tensor) -> Change:
    return tensors(lambda found: {**found, name: value})


def cast(dtype: torch.dtype, pattern: str = "") -> Change:
    return tensors(lambda found: {n: t.to(dtype) if pattern in n else t for n, t in found.items()})


def only(*kept: str) -> Change:
    """Remove all other files."""

    def change(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()

    return change
