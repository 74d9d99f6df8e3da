"""What lies beside a Megatron checkpoint's weights: the model it came from, the run's tokenizer.

A run's arguments name its tokenizer as it was called where the run was started, which nobody wrote
down; since then files may have moved. So they are looked for.
"""

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.formats.hugging_face import COPIED
from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint
from megatron_cpo.checkpoints.tokens import KEPT, kept_files

SIDECAR = "hugging_face"
"""Beside a converted checkpoint: configuration and tokenizer of the model that it came from."""
FLAGS = "megatron_flags.txt"
"""Beside a converted checkpoint: the flags that belong to it, quoted as a shell reads them."""
TEMPLATES = "additional_chat_templates"
"""A folder of a tokenizer of transformers."""
FILES = {
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "SFTTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
}
"""Megatron's tokenizers that have files, and the arguments that name them."""
FOLDERS = ("HuggingFaceTokenizer", "SFTTokenizer")
"""Of these, the ones that transformers reads from a folder."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenization_|chat_template|tekken|spiece|sentencepiece).*"
    r"|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|.*\.(model|tiktoken)"
)


def has_tokenizer(folder: Path) -> bool:
    """Whether transformers would find one."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer."""
    return bool(_TOKENIZER_FILE.fullmatch(name))


def small_files(folder: Path) -> Iterator[Path]:
    """Configuration, tokenizer and what else lies beside a model's weights, as relative paths."""
    for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]):
        ours = path.name in ("convert.json", "merge.json") or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in COPIED and not ours:
            yield path.relative_to(folder)


def copy_small_files(folder: Path, output: Path, tokenizer: bool | None = None) -> None:
    """Copy them: all, those of the tokenizer alone, or (False) all but those."""
    for name in small_files(folder):
        ours = name.parent.name == TEMPLATES or is_tokenizer_file(name.name)
        if tokenizer is None or tokenizer == ours:
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, output / name)


def origins(checkpoint: Path, args: dict[str, Any]) -> Iterator[Path]:
    """Folders with a configuration that a Megatron checkpoint may have come from.

    `hugging_face/` in it or beside it; the run's tokenizer, which is such a folder where the run
    followed the flags of a converted checkpoint.

    Args:
        checkpoint: the folder of the iteration.
        args: the run's arguments.
    """
    named = found(str(args.get("tokenizer_model") or ""), checkpoint)
    for path in chain([checkpoint / SIDECAR, checkpoint.parent / SIDECAR], named):
        if os.path.exists(path / "config.json"):
            yield path


def run_tokenizers(checkpoint: Path, args: dict[str, Any]) -> Iterator[list[Path]]:
    """Where the files of the run's tokenizer may be now, the likeliest first; all of them exist.

    One path for each argument that `FILES` lists for the run's tokenizer.
    """
    kind = args.get("tokenizer_type", "")
    named = [str(args.get(name)) for name in FILES.get(kind, ()) if args.get(name)]
    if not named or len(named) < len(FILES[kind]):
        return
    right = has_tokenizer if kind in FOLDERS else Path.is_file
    kept = [[checkpoint / KEPT]] if kind in FOLDERS else kept_files(checkpoint, kind, named)
    others = zip(*(found(path, checkpoint) for path in named), strict=False)
    for paths in chain(kept, others):
        if all(map(right, paths)):
            yield list(paths)


def found(named: str, checkpoint: Path) -> Iterator[Path]:
    """Files or folders that may be the one that a run named, the likeliest first.

    As it was named; then its last parts, the more of them the better, below the checkpoint's folder
    or one that it lies in, the nearest first, or below the working folder; then what was downloaded
    from the Hugging Face hub by this name.
    """
    path = Path(named)
    parts = path.parts[1:] if path.is_absolute() else path.parts
    as_given = Path(os.path.abspath(checkpoint))  # without the `..` of Path.absolute
    linked = checkpoint.resolve()
    below = [as_given, *as_given.parents, linked, *linked.parents, Path.cwd()]
    candidates = [path] if path.is_absolute() else []
    for first in range(len(parts)):
        candidates += [folder.joinpath(*parts[first:]) for folder in below]
    seen = set()
    for candidate in candidates:
        # Path.exists raises where a folder may not be read.
        if os.path.exists(candidate) and candidate.resolve() not in seen:
            seen.add(candidate.resolve())
            yield candidate
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", named):
        yield from _downloaded(named)


def _downloaded(named: str) -> list[Path]:
    try:
        from huggingface_hub import snapshot_download

        return [Path(snapshot_download(named, local_files_only=True))]
    except Exception:  # no hub here, no such model, or what else it may have to say
        return []


def carry(inputs: Sequence[Any], writing: Path, output: Path) -> None:
    """Put beside a merged checkpoint of Megatron's what lies beside its inputs.

    Of each, the first input that has it: the model that it came from, the run's tokenizer, flags.

    Args:
        inputs: the opened checkpoints.
        writing: the new checkpoint's folder; it has `release/`.
        output: what that will be called.
    """
    runs = [run for run in inputs if isinstance(run, TorchDistCheckpoint)]
    models = (folder for run in runs for folder in origins(run.folder, run.args))
    if model := next(models, None):
        (writing / SIDECAR).mkdir()
        copy_small_files(model, writing / SIDECAR)
    tokenizers = (files for run in runs for files in run_tokenizers(run.folder, run.args))
    if files := next(tokenizers, None):
        _keep(files, writing / "release" / KEPT)
    flags = (run.folder.parent / FLAGS for run in runs)
    if path := next((path for path in flags if path.exists()), None):
        (writing / FLAGS).write_text(_moved(path.read_text(), output / SIDECAR if model else None))


def _keep(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    for path in files:
        if path.is_dir():
            copy_small_files(path, folder, tokenizer=True)
        else:
            shutil.copyfile(path, folder / path.name)


def _moved(flags: str, sidecar: Path | None) -> str:
    """Flags with the tokenizer in another folder."""
    lines = []
    for line in flags.splitlines():
        if sidecar and line.startswith("--tokenizer-model "):
            line = shlex.join(["--tokenizer-model", str(sidecar.absolute())])
        lines.append(line)
    return "\n".join(lines) + "\n"
