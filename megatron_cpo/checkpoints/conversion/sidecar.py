"""What travels with the weights: a Hugging Face model's configuration and tokenizer."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.formats.hugging_face import COPIED
from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint

SIDECAR = "hugging_face"
"""Their folder beside a converted Megatron checkpoint."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_FILES = {
    # Megatron's argument: what transformers calls the file, and the class that reads it.
    "tokenizer_model": ("tokenizer.model", "LlamaTokenizer"),
    "vocab_file": ("vocab.json", "GPT2Tokenizer"),
    "merge_file": ("merges.txt", "GPT2Tokenizer"),
}


def has_tokenizer(folder: Path) -> bool:
    """Whether transformers would find one."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def sidecars(source: Path, checkpoint: TorchDistCheckpoint) -> list[Path]:
    """Folders with a configuration that a Megatron checkpoint may have come from.

    `hugging_face/` beside it; the run's tokenizer, which is that folder where the run followed the
    flags of a converted checkpoint.
    """
    candidates = [source / SIDECAR, checkpoint.folder.parent / SIDECAR]
    if tokenizer := checkpoint.args.get("tokenizer_model"):
        candidates.append(Path(tokenizer))
    return [path for path in candidates if (path / "config.json").exists()]


def copy_small_files(folder: Path, output: Path) -> None:
    """Configuration and tokenizer; what else lies there beside the weights."""
    for path in sorted(folder.iterdir()):
        ours = path.name in ("convert.json", "merge.json") or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in COPIED and not ours:
            shutil.copyfile(path, output / path.name)


def carry_tokenizer(args: dict[str, Any], output: Path) -> None:
    """The tokenizer of a Megatron run, as far as its files are still where they were.

    transformers reads every `tokenizer.model` of a Llama as BPE, and would take a Unigram model for
    other token ids without a word: such a file gets a name at which nobody looks, and a warning.
    """
    model = args.get("tokenizer_model")
    if model and Path(model).is_dir():
        copy_small_files(Path(model), output)
        return
    for name, (file, reader) in _FILES.items():
        if (path := args.get(name)) and Path(path).is_file():
            if file == "tokenizer.model" and not _is_bpe(Path(path)):
                shutil.copyfile(path, output / "sentencepiece.model")
                warnings.warn(
                    f"{path} is no BPE model, so transformers would read other token ids from it: "
                    "it is copied as sentencepiece.model, for SentencePiece itself",
                    stacklevel=2,
                )
                continue
            shutil.copyfile(path, output / file)
            text = json.dumps({"tokenizer_class": reader}, indent=2) + "\n"
            (output / "tokenizer_config.json").write_text(text)


def _is_bpe(model: Path) -> bool:
    """Whether a SentencePiece model is of the one algorithm that Llama's tokenizer has."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto: Any = schema.ModelProto()  # type: ignore[attr-defined]  # made when imported
    proto.ParseFromString(model.read_bytes())
    return bool(proto.trainer_spec.model_type == proto.trainer_spec.BPE)
