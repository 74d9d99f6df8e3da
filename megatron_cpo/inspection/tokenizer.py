"""The tokenizer that turns a store's ids into text: its flags, and the check that it is the one.

The flags are Megatron's own, with its defaults, but for the few that only encoding or training
needs. They are declared here because Megatron's parser takes seconds to import.
"""

import argparse
import json
from typing import Any

from megatron_cpo.policies.same_tokenizer import has_tokenizer
from megatron_cpo.records.tokenizing import tokenizer_identity

TYPES = {
    "SentencePieceTokenizer": "SentencePieceTokenizer",
    "HuggingFaceTokenizer": "HuggingFaceTokenizer",
    "MegatronHFTokenizer": "GPT2BPETokenizer",
    "TikTokenTokenizer": "TikTokenizer",
}
"""`--tokenizer-type` by the library that a manifest names; a NullTokenizer has no text."""
_REST = {
    "metadata_path": None,
    "chat_template": None,
    "pad_vocab_size": False,
    "padded_vocab_size": 1,  # before 0.19 Megatron computes it unless there is one
}


def add_tokenizer_arguments(
    parser: argparse.ArgumentParser, without: str = "token ids are shown"
) -> argparse.ArgumentParser:
    """Add the flags of `megatron-cpo build` that say which tokenizer it was.

    Args:
        without: what is done if none of them is given.
    """
    add = parser.add_argument_group(f"tokenizer, as given to build (none: {without})").add_argument
    add("--tokenizer-model", metavar="PATH", help="its model file, folder or name")
    add("--tokenizer-type", metavar="TYPE", help="Megatron's name of it (default: the store's)")
    add("--vocab-file", metavar="FILE", help="vocabulary of a BPE tokenizer")
    add("--merge-file", metavar="FILE", help="merges of a BPE tokenizer")
    add("--vocab-size", type=int, metavar="N")
    add("--tokenizer-special-tokens", nargs="+", dest="special_tokens", metavar="TOKEN")
    add("--tiktoken-pattern", choices=["v1", "v2"])
    add("--tiktoken-num-special-tokens", type=int, default=1000, metavar="N")
    add("--tokenizer-sentencepiece-legacy", action="store_true")
    add("--no-tokenizer-sentencepiece-ignore-extra-whitespaces", action="store_false",
        dest="tokenizer_sentencepiece_ignore_extra_whitespaces")  # fmt: skip
    add("--tokenizer-hf-no-use-fast", action="store_true")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true")
    add("--trust-remote-code", action="store_true")
    return parser


def store_tokenizer(manifest: dict[str, Any], args: argparse.Namespace) -> Any | None:
    """The tokenizer that the flags name, checked against the store's; None if they name none.

    Args:
        manifest: the store's; gives the type where `--tokenizer-type` does not.
        args: parsed flags of `add_tokenizer_arguments`.

    Raises:
        ValueError: the type is not known, the tokenizer cannot be built, or it is another one than
            the store was built with.
    """
    if not any((args.tokenizer_model, args.tokenizer_type, args.vocab_file)):
        return None
    stored = manifest.get("tokenizer") or {}
    kind = args.tokenizer_type or TYPES.get(stored.get("library", ""))
    if kind is None:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: the store was built with a tokenizer of "
            f"the library {stored.get('library')}, whose type is not known here; give its "
            "--tokenizer-type, or no tokenizer flag to see token ids"
        )
    try:
        tokenizer = _build(args, kind)
    except Exception as error:  # four libraries, each of which raises what it likes
        raise ValueError(
            f"--tokenizer-type {kind} --tokenizer-model {args.tokenizer_model}: it cannot be "
            f"read ({error}); give the flags that the store was built with"
        ) from error
    found = tokenizer_identity(tokenizer)
    if stored and found != stored:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: another tokenizer than the store's, which "
            f"is {json.dumps(stored)}, not {json.dumps(found)}; give the flags that the store was "
            "built with, or none to see token ids"
        )
    return tokenizer


def folder_tokenizer(name: str, folder: str) -> Any:
    """The tokenizer in a Hugging Face model's folder, as Megatron wraps it.

    Args:
        name: how the user named the model.

    Raises:
        ValueError: the folder has none.
    """
    words = ["--tokenizer-model", folder]
    args = add_tokenizer_arguments(argparse.ArgumentParser()).parse_args(words)
    try:
        if not has_tokenizer(folder):
            raise ValueError("there are no such files")
        return _build(args, "HuggingFaceTokenizer")
    except Exception as error:  # whatever transformers raises
        raise ValueError(
            f"{name}: its tokenizer cannot be read ({error}); give the folder of a model with its "
            "tokenizer, as save_pretrained of both writes it"
        ) from error


def _build(args: argparse.Namespace, kind: str) -> Any:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    return build_tokenizer(argparse.Namespace(**{**_REST, **vars(args), "tokenizer_type": kind}))
