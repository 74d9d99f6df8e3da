"""Files of texts, and models with a tokenizer, for tests of scoring without a judge."""

import json
from pathlib import Path
from typing import Any

from tests.texts import DOLLY, dolly_tokenizer
from tests.tiny_models import save_hugging_face, write_tokenizer

DECODING = "top-k 50, at most 64 tokens"


def records(count: int, longest: int = 30) -> list[tuple[str, str]]:
    """(prompt, answer) of Dolly's, both short."""
    rows = [json.loads(line) for line in Path(DOLLY).read_text(encoding="utf-8").splitlines()]
    short = [
        (row["instruction"], row["response"])
        for row in rows
        if 3 <= len(row["response"].split()) <= longest and len(row["instruction"].split()) < 20
    ]
    assert len(short) >= count
    return short[:count]


def write_texts(path: Path, outputs: list[str], **more: Any) -> Path:
    """A file as `evaluate generate` writes it: an output for each of `records`."""
    pairs = records(len(outputs))
    rows = [
        {
            "id": str(i), "instruction": prompt + "\n", "output": output, "generator": path.stem,
            "sample": 0, "truth": truth, "finish": "length" if i % 4 == 0 else "stop",
            "tokens": len(output.split()) + 1, "checkpoint": path.stem, "decoding": DECODING,
            "data": "sha256 77", "tool": "megatron_cpo 0.1.0", **more,
        }
        for i, ((prompt, truth), output) in enumerate(zip(pairs, outputs, strict=True))
    ]  # fmt: skip
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def save_with_tokenizer(folder: Path, kind: str = "llama") -> str:
    """A tiny causal LM that reads 64 tokens, with 1000 pieces of text; returns the folder."""
    tokenizer = dolly_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    save_hugging_face(folder, kind, rows=1000)
    write_tokenizer(folder, tokenizer)
    return str(folder)
