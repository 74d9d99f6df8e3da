"""Tokenizers of Megatron's runs that transformers reads as they are."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.conversion.generation import generation_ends
from megatron_cpo.checkpoints.conversion.tokenizers.tokenizer import (
    Tokenizer,
    load,
    read_settings,
    write_settings,
)
from megatron_cpo.checkpoints.formats.beside import copy_small_files

_GPT2_END = "<|endoftext|>"


def read_folder(paths: list[Path], args: dict[str, Any]) -> Tokenizer:
    """The tokenizer in a folder, or the one that a file in it belongs to.

    Raises:
        ValueError: transformers cannot read it.
    """
    [path] = paths
    folder = path.parent if path.is_file() else path
    tokenizer = load(folder)
    added = args.get("special_tokens") or []
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": added})
    end = tokenizer.eos_token or tokenizer.sep_token  # as Megatron has it
    if args.get("tokenizer_hf_no_include_special_tokens"):
        warnings.warn(
            "the run encoded texts without what its tokenizer puts around them "
            "(--tokenizer-hf-no-include-special-tokens); so do tokenizer(text, "
            "add_special_tokens=False)",
            stacklevel=2,
        )
    prompts = args.get("sft_tokenizer_prompt_format", "default")
    if args.get("tokenizer_type") == "SFTTokenizer" and prompts != "default":
        warnings.warn(
            f"the run's chats were made by Megatron's --sft-tokenizer-prompt-format {prompts}; the "
            f"output has the chat template of {folder}",
            stacklevel=2,
        )

    def write(output: Path) -> None:
        if added:
            tokenizer.save_pretrained(output)
        else:
            copy_small_files(folder, output, tokenizer=True)
        if tokenizer.eos_token is None and end:
            write_settings(output, read_settings(output) | {"eos_token": end})

    return Tokenizer(
        str(folder),
        max(tokenizer.get_vocab().values()) + 1,
        tokenizer.convert_tokens_to_ids(end) if end else None,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        write,
        lambda text: list(tokenizer(text)["input_ids"]),
        tuple(generation_ends(folder)),
    )


def read_gpt2(paths: list[Path], args: dict[str, Any]) -> Tokenizer:
    """GPT-2's byte-level BPE, from its vocabulary and its merges.

    Raises:
        ValueError: the first file is no such vocabulary.
    """
    vocab, merges = paths
    try:
        ids = json.loads(vocab.read_text(encoding="utf-8"))
        size = max(ids.values()) + 1
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{vocab} is no vocabulary of GPT-2 ({error})") from error
    added = [
        token for token in (_GPT2_END, *(args.get("special_tokens") or [])) if token not in ids
    ]
    ids |= {token: size + place for place, token in enumerate(added)}

    def write(output: Path) -> None:
        shutil.copyfile(vocab, output / "vocab.json")
        shutil.copyfile(merges, output / "merges.txt")
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "padding_side": "left",
            "added_tokens_decoder": {
                str(ids[token]): {"content": token, "special": True} for token in added
            },
            "bos_token": _GPT2_END,
            "eos_token": _GPT2_END,
            "unk_token": _GPT2_END,
        }
        write_settings(output, settings)

    end = ids[_GPT2_END]
    return Tokenizer(str(vocab), size + len(added), end, end, None, write)
