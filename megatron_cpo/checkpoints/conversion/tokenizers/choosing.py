"""Which tokenizer did a run have, and where is it now?"""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.conversion.generation import generation_ends
from megatron_cpo.checkpoints.conversion.tokenizers import (
    from_sentencepiece,
    from_tiktoken,
    from_transformers,
)
from megatron_cpo.checkpoints.conversion.tokenizers.tokenizer import Tokenizer, id_or_none
from megatron_cpo.checkpoints.formats.beside import (
    FILES,
    FOLDERS,
    found,
    has_tokenizer,
    run_tokenizers,
)
from megatron_cpo.checkpoints.formats.hugging_face import read_json
from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint

READERS: dict[str, Callable[[list[Path], dict[str, Any]], Tokenizer]] = {
    "SentencePieceTokenizer": from_sentencepiece.read,
    "GPTSentencePieceTokenizer": from_sentencepiece.read,
    "Llama2Tokenizer": from_sentencepiece.read,
    "HuggingFaceTokenizer": from_transformers.read_folder,
    "SFTTokenizer": from_transformers.read_folder,
    "GPT2BPETokenizer": from_transformers.read_gpt2,
    "TikTokenizer": from_tiktoken.read,
}
"""By Megatron's `--tokenizer-type`; `beside.FILES` says which arguments name the files."""


def choose_tokenizer(
    checkpoint: TorchDistCheckpoint, given: Path | None, origin: Path | None, like: bool
) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer of the run that wrote a checkpoint, if there is one, and what to warn of.

    Args:
        given: a folder or file to take it from.
        origin: the model that the checkpoint came from, whose tokenizer is the run's where the
            run's own is not found.
        like: the origin was named to take its tokenizer.

    Raises:
        ValueError: `given` holds no tokenizer, or one that the model has no rows for.
    """
    args = checkpoint.args
    rows = checkpoint.padding[1] if checkpoint.padding else None
    if given is not None:
        kind, paths = _files_in(given, args)
        return _read(kind, paths, args, rows), None
    last = [("HuggingFaceTokenizer", [origin])] if origin and has_tokenizer(origin) else []
    first = () if like and last else run_tokenizers(checkpoint.folder, args)
    rejected = []
    for kind, paths in chain(((args["tokenizer_type"], paths) for paths in first), last):
        try:
            return _read(kind, paths, args, rows), None
        except ValueError as error:
            rejected.append(str(error))
    return _without_files(checkpoint, origin, rejected)


def _without_files(
    checkpoint: TorchDistCheckpoint, origin: Path | None, rejected: list[str]
) -> tuple[Tokenizer | None, str | None]:
    """What is known of the run's tokenizer without its files, and what is not."""
    args = checkpoint.args
    kind = args.get("tokenizer_type")
    null = kind == "NullTokenizer" and bool(args.get("vocab_size"))
    if rejected:
        said = rejected[0]
    elif null:
        said = "the run had none (NullTokenizer)"
    elif kind in FILES:
        said = (
            f"the run's {name_of_run(args)} ({kind}) is neither there, nor below "
            f"{checkpoint.folder} or a folder that it lies in, nor below {Path.cwd()}"
        )
    elif kind:
        said = f"the run's is a {kind}, of which transformers has no counterpart"
    else:
        said = "the checkpoint does not say which the run had"
    if origin and not rejected and null:
        return None, None  # the model came without one; its configuration says where texts end
    if origin and has_tokenizer(origin):
        said += f"; the files in {origin} are copied as they are"
    else:
        said += ", so the output has none"
    if not null and not (origin and generation_ends(origin)):
        said += " and says nowhere where a text ends: generation will go on to its limit"
    said = f"tokenizer: {said}. Give one with --tokenizer FOLDER_OR_FILE"
    return (_null(args) if null and origin is None else None), said


def name_of_run(args: dict[str, Any]) -> str:
    """What the run called its tokenizer's files."""
    names = FILES.get(args.get("tokenizer_type", ""), ())
    return " and ".join(str(args.get(name)) for name in names)


def chat_template(checkpoint: TorchDistCheckpoint) -> str | None:
    """The template that the run had beside its tokenizer's: of its metadata, else of its flags."""
    args = checkpoint.args
    for path in found(str(args.get("metadata_path") or ""), checkpoint.folder):
        if path.is_file() and (template := read_json(path).get("chat_template")):
            return str(template)
    return args.get("chat_template")


def _read(kind: str, paths: list[Path], args: dict[str, Any], rows: int | None) -> Tokenizer:
    tokenizer = READERS[kind](paths, args)
    if rows is not None and tokenizer.size > rows:
        raise ValueError(
            f"{tokenizer.source} has {tokenizer.size} tokens, the model's vocabulary {rows} rows "
            "with its padding: it is not the run's"
        )
    return tokenizer


def _null(args: dict[str, Any]) -> Tokenizer:
    """Of a run with Megatron's NullTokenizer, which reads numbers."""
    size = int(args["vocab_size"])
    eod = args.get("null_tokenizer_eod_id")
    return Tokenizer(
        "NullTokenizer",
        size,
        size - 1 if eod is None else int(eod),
        None,
        id_or_none(args.get("null_tokenizer_pad_id")),
        lambda folder: None,
    )


def _files_in(given: Path, args: dict[str, Any]) -> tuple[str, list[Path]]:
    """The kind of tokenizer that a folder or file is, and its files."""
    if not given.exists():
        raise ValueError(f"--tokenizer {given}: there is no such folder or file")
    if given.is_file():
        return _kind_of_file(given)
    kind = args.get("tokenizer_type", "")
    if kind in FILES and kind not in FOLDERS:
        files = [given / Path(str(args.get(name))).name for name in FILES[kind]]
        if all(path.is_file() for path in files):
            return kind, files
    ready = [given / name for name in ("tokenizer.json", "tokenizer_config.json")]
    for file in (given / "vocab.json", *sorted(given.glob("*.model"))):
        if file.is_file() and not any(path.exists() for path in ready):
            return _kind_of_file(file)
    if not has_tokenizer(given):
        raise ValueError(f"--tokenizer {given}: there is no tokenizer in it")
    return "HuggingFaceTokenizer", [given]


def _kind_of_file(path: Path) -> tuple[str, list[Path]]:
    if path.suffix != ".json":
        return "SentencePieceTokenizer", [path]
    merges = path.with_name("merges.txt")
    if path.name != "tokenizer.json" and merges.is_file():
        return "GPT2BPETokenizer", [path, merges]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--tokenizer {path} is no tokenizer ({error})") from error
    return ("TikTokenizer" if isinstance(content, list) else "HuggingFaceTokenizer"), [path]
