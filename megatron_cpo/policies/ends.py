"""The tokens at which a model stops: not only the tokenizer's end of document.

A chat model ends its turn with `<|im_end|>`, `<|eot_id|>` or `<end_of_turn>`, which its
`generation_config.json` lists and its tokenizer need not name. A sample that goes on behind such a
token is no answer that anybody would be shown.
"""

import json
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.conversion.generation import id_list
from megatron_cpo.checkpoints.formats.beside import SIDECAR


def declared_ends(folder: Path, vocab_size: int) -> frozenset[int]:
    """The `eos_token_id`s in all configurations of a Hugging Face folder, if it has any.

    `generate` stops at those of `generation_config.json` alone; a sample that goes on behind one of
    `config.json` is no answer either.

    Args:
        vocab_size: ids beyond it are no tokens.

    Raises:
        ValueError: a configuration is not JSON.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); copy the model again") from error
        for part in (config, config.get("text_config") or {}):
            found.update(id_list(part.get("eos_token_id")))
    return frozenset(i for i in found if 0 <= i < vocab_size)


def checkpoint_ends(load: str, tokenizer_model: Any, vocab_size: int) -> frozenset[int]:
    """What the folders that belong to a Megatron checkpoint declare.

    Args:
        load: the checkpoint; a converted one has the model's folder beside its weights.
        tokenizer_model: `--tokenizer-model`, which may be a model's folder.
    """
    folders = [Path(load) / SIDECAR, *([Path(tokenizer_model)] if tokenizer_model else [])]
    return frozenset().union(*(declared_ends(folder, vocab_size) for folder in folders))
