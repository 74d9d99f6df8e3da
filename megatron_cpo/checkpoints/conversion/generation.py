"""Where generation starts, ends and pads, as transformers and servers read it of a folder."""

import json
import warnings
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.conversion.tokenizers.tokenizer import Tokenizer, id_or_none
from megatron_cpo.checkpoints.formats.hugging_face import read_json

FILE = "generation_config.json"
_DEFAULTS: dict[str, dict[str, int]] = {
    "gpt2": {"bos_token_id": 50256, "eos_token_id": 50256},
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
}
"""Of transformers, for a `config.json` that leaves them out."""


def generation_ends(folder: Path) -> list[int]:
    """The tokens at which the files of a Hugging Face model say that a text ends.

    As `generate` has it: those of `generation_config.json`, else those of `config.json`. The
    tokenizer's is another matter.
    """
    if (folder / FILE).exists():
        return id_list(read_json(folder / FILE).get("eos_token_id"))
    if (folder / "config.json").exists():
        return id_list(_completed(read_json(folder / "config.json"))["eos_token_id"])
    return []


def write_generation(
    folder: Path, config: dict[str, Any], origin: Path | None, tokenizer: Tokenizer | None
) -> list[int]:
    """Write `generation_config.json` and complete `config.json`'s ids; returns all ends.

    A text ends where the model that the checkpoint came from ends it, and at the run's EOD, which
    is what training taught. What the origin says of the rest is kept. A token that pads is needed
    for batches; any will do, because it is masked.

    Args:
        folder: has the origin's files, if there is one.
        config: of `config.json`, which is written as well.
        origin: the model's folder whose configuration this is.
        tokenizer: the run's.
    """
    ends = _all_ends(origin, tokenizer, config["vocab_size"])
    if config.get("eos_token_id") is None and "eos_token_id" in config:
        config["eos_token_id"] = _shown(ends)
    if origin is None and tokenizer:
        config["bos_token_id"] = tokenizer.bos
        if tokenizer.pad not in (None, *ends):  # what pads gets no gradient in transformers
            config["pad_token_id"] = tokenizer.pad
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    settings = _generation(folder, config) if origin else {}
    before = dict(settings)
    if id_list(settings.get("eos_token_id")) != ends:
        settings["eos_token_id"] = _shown(ends)
    pads = [
        config.get("pad_token_id"),
        *([tokenizer.pad, tokenizer.eod] if tokenizer else []),
        *ends,
    ]
    known = {
        "bos_token_id": _completed(config)["bos_token_id"],
        "pad_token_id": next((pad for pad in pads if id_or_none(pad) is not None), None),
    }
    for name, value in known.items():
        if id_or_none(settings.get(name)) is None and value is not None:
            settings[name] = value
    if settings != before or not (folder / FILE).exists():
        (folder / FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return ends


def _all_ends(origin: Path | None, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    declared = generation_ends(origin) if origin else []
    found = list(declared)
    if tokenizer:
        found += [end for end in (tokenizer.eod, *tokenizer.ends) if end is not None]
        if declared and tokenizer.eod is not None and tokenizer.eod not in declared:
            warnings.warn(
                f"the run ends texts with id {tokenizer.eod}, the EOD of {tokenizer.source}; "
                f"{origin} declares {_shown(declared)}: generation ends at any of them",
                stacklevel=3,
            )
    found = [end for end in dict.fromkeys(found) if end < vocab_size]
    if tokenizer and not found:
        warnings.warn(
            f"{tokenizer.source} has no end of text (EOS), and nothing else says one: generation "
            "will go on to its limit. Give a tokenizer that has with --tokenizer FOLDER_OR_FILE",
            stacklevel=3,
        )
    return found


def _generation(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The folder's settings; of an old model they are in its `config.json`."""
    if (folder / FILE).exists():
        return read_json(folder / FILE)
    from transformers import GenerationConfig

    found = GenerationConfig.from_model_config(dict(config)).to_diff_dict()
    others = ("_from_model_config", "transformers_version")  # from now on this file has more
    return {name: value for name, value in found.items() if name not in others}


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    plain = {"bos_token_id": None, "eos_token_id": None}
    return plain | _DEFAULTS.get(config.get("model_type", ""), {}) | config


def id_list(value: int | list[int] | None) -> list[int]:
    """The ids of an entry such as `eos_token_id`, which may be one, several or none."""
    if value is None:
        return []
    return [int(i) for i in (value if isinstance(value, list) else [value])]


def _shown(ends: list[int]) -> int | list[int] | None:
    return ends[0] if len(ends) == 1 else ends or None
