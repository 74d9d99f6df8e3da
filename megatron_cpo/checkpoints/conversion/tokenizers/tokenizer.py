"""A run's tokenizer, and the files in which transformers keeps one."""

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.formats.beside import has_tokenizer
from megatron_cpo.records.tokenizing import PROBE

PROBES = (
    *(PROBE, f"\n {PROBE}\r\n", f"{PROBE}  {PROBE}\n\n", " a", "a ", "  a  b\t", "\n"),
    "e\u0301 ﬁ Ａ\u00a0b",
)
"""Texts that tell apart tokenizers which differ at all."""
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Tokenizer:
    """A Megatron run's tokenizer."""

    source: str
    """What messages call it."""
    size: int
    """Largest id + 1."""
    eod: int | None
    """Megatron's end of document."""
    bos: int | None
    pad: int | None
    write: Callable[[Path], None]
    """Puts the files that transformers reads into a folder."""
    encode: Callable[[str], list[int]] | None = None
    """The run's ids of a text; None where it reads no text."""
    ends: tuple[int, ...] = ()
    """Other tokens at which its folder says that texts end."""


def id_or_none(index: int | None) -> int | None:
    """A token's id; some libraries say -1 for none."""
    return None if index is None or index < 0 else int(index)


def load(folder: Path) -> Any:
    """What transformers makes of the tokenizer in a folder.

    Raises:
        ValueError: it cannot read it, or would have to run code that lies there.
    """
    from transformers import AutoTokenizer

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever its many readers raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"transformers cannot read the tokenizer in {folder}: {reason}") from error
    finally:
        logger.setLevel(level)


def read_settings(folder: Path) -> dict[str, Any]:
    """A folder's `tokenizer_config.json`; empty without one."""
    path = folder / _CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write a folder's `tokenizer_config.json`."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / _CONFIG).write_text(text, encoding="utf-8")


def save(fast: Any, folder: Path, special: dict[str, str]) -> None:
    """Write a `tokenizers.Tokenizer` so that transformers reads it as it is.

    Args:
        special: tokens by transformers' names: `eos_token` and so on.
    """
    fast.save(str(folder / "tokenizer.json"))
    # Batches of a decoder are padded on the left.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    write_settings(folder, settings | special)


def settle(folder: Path, tokenizer: Tokenizer, template: str | None) -> None:
    """Make the tokenizer in a model's folder one that can be used at once, and check it.

    It gets a token to pad with, if it has none, and the run's chat template, if that had its own.
    What transformers makes of it is compared with the run's: the end of a text, and ids.

    Args:
        folder: with `config.json` and, usually, a tokenizer.
        template: Megatron's `--chat-template`.
    """
    if not has_tokenizer(folder):
        return
    try:
        found, settings = load(folder), read_settings(folder)
        wrong = _difference(tokenizer, found)
        if wrong and (folder / "tokenizer.json").exists():
            # Without a class, or with another kind of model's, transformers builds its own.
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_settings(folder, settings)
            found = load(folder)
            wrong = _difference(tokenizer, found)
        changed = dict(settings)
        if found.pad_token is None and found.eos_token is not None:
            changed["pad_token"] = found.eos_token
        if template is not None and template != found.chat_template:
            changed["chat_template"] = template
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        if changed != settings:
            write_settings(folder, changed)
        if wrong:
            raise ValueError(f"it is not {tokenizer.source}: {wrong}")
    except ValueError as error:
        warnings.warn(f"the tokenizer in the output: {error}", stacklevel=2)


def _difference(tokenizer: Tokenizer, found: Any) -> str | None:
    """What differs between a run's tokenizer and what transformers makes of it."""
    if found.eos_token_id != tokenizer.eod:
        return f"its end of a text is id {found.eos_token_id}, the run's {tokenizer.eod}"
    for text in PROBES:
        theirs = list(found(text)["input_ids"])
        ours = tokenizer.encode(text) if tokenizer.encode else theirs
        if ours != theirs:
            return f"{text[:40]!r} is {theirs[:8]}, in the run {ours[:8]}"
    return None
