"""From a Megatron checkpoint to a Hugging Face model that can be used at once."""

import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_cpo.checkpoints.conversion.copying import Copy, unstack
from megatron_cpo.checkpoints.conversion.families import FAMILIES
from megatron_cpo.checkpoints.conversion.families.model import (
    difference,
    model_of_arguments,
)
from megatron_cpo.checkpoints.conversion.families.moves import hugging_face_shapes
from megatron_cpo.checkpoints.conversion.fitting import check_layers, described, nbytes
from megatron_cpo.checkpoints.conversion.generation import write_generation
from megatron_cpo.checkpoints.conversion.provenance import write_provenance
from megatron_cpo.checkpoints.conversion.tokenizers.choosing import (
    chat_template,
    choose_tokenizer,
    name_of_run,
)
from megatron_cpo.checkpoints.conversion.tokenizers.tokenizer import Tokenizer, settle
from megatron_cpo.checkpoints.formats.beside import copy_small_files, origins
from megatron_cpo.checkpoints.formats.hugging_face import read_json
from megatron_cpo.checkpoints.formats.new_safetensors import lay_out_safetensors
from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint
from megatron_cpo.files import flush, whole_folder


def to_hugging_face(
    checkpoint: TorchDistCheckpoint,
    output: Path,
    *,
    like: Path | None,
    tokenizer: Path | None,
    vocab_size: int | None,
    dtype: torch.dtype | None,
    verify: bool,
    shard_bytes: float,
    progress: bool,
) -> None:
    """Write the model of a checkpoint; `convert` has the arguments."""
    origin = _like(checkpoint, like, vocab_size) if like else _origin(checkpoint, vocab_size)
    found, missing = choose_tokenizer(checkpoint, tokenizer, origin, like is not None)
    tokens = _tokens(checkpoint, origin, found, vocab_size, missing)
    model = model_of_arguments(checkpoint.args, tokens)
    moves = [move for move in FAMILIES[model.family].moves(model) if not move.padding]
    if missing:
        warnings.warn(missing, stacklevel=2)
    sources = unstack(checkpoint.tensors)
    check_layers(checkpoint.folder, sources, moves)
    dtypes = {move.hugging_face: dtype or sources[move.key].dtype for move in moves}
    tensors = {name: (dtypes[name], shape) for name, shape in hugging_face_shapes(moves).items()}
    with whole_folder(output, nbytes(tensors)) as writing:
        targets, index = lay_out_safetensors(writing, tensors, shard_bytes)
        copy = Copy(moves, sources, targets, to_megatron=False)
        copy.run(progress)
        flush(writing)  # what makes it a model follows when all values are safe
        if verify:
            copy.verify()
        if index is not None:
            (writing / "model.safetensors.index.json").write_text(index)
        if origin:
            copy_small_files(origin, writing, tokenizer=False if found else None)
            config = read_json(origin / "config.json")
        else:
            config = FAMILIES[model.family].write_config(model)
        if len(set(dtypes.values())) == 1:
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = str(next(iter(dtypes.values()))).removeprefix("torch.")
        if found:
            found.write(writing)
        ends = write_generation(writing, config, origin, found)
        if found:
            settle(writing, found, chat_template(checkpoint))
        write_provenance(
            writing,
            checkpoint,
            model,
            configuration=str(origin) if origin else "made from the run's arguments",
            tokenizer=found.source if found else None,
            tokenizer_of_run=name_of_run(checkpoint.args) or None,
            ends=ends,
        )


def _like(checkpoint: TorchDistCheckpoint, folder: Path, vocab_size: int | None) -> Path:
    """The folder that was named for its configuration, if it is that of the run's model."""
    if not (folder / "config.json").exists():
        raise ValueError(f"--like {folder}: there is no config.json")
    known = described(folder)
    if vocab_size not in (None, known.vocab_size):
        raise ValueError(f"--vocab-size {vocab_size}: {folder} has {known.vocab_size} tokens")
    if found := difference(model_of_arguments(checkpoint.args, known.vocab_size), known):
        name, ours, theirs = found
        raise ValueError(
            f"{checkpoint.folder} is not like {folder}: {name} is {ours!r} and {theirs!r}; name "
            "a model that is, or leave --like out"
        )
    return folder


def _origin(checkpoint: TorchDistCheckpoint, vocab_size: int | None) -> Path | None:
    """The folder that has the configuration of the run's model, if one does."""
    size = vocab_size or _null_vocab_size(checkpoint.args)
    for folder in origins(checkpoint.folder, checkpoint.args):
        try:
            known = described(folder)
        except ValueError:  # a tokenizer that came with a model of another kind
            continue
        model = model_of_arguments(checkpoint.args, known.vocab_size)
        if size in (None, known.vocab_size) and not difference(model, known):
            return folder
    return None


def _tokens(
    checkpoint: TorchDistCheckpoint,
    origin: Path | None,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    missing: str | None,
) -> int:
    """How many of the vocabulary's rows are tokens and not padding."""
    if vocab_size is None and origin:
        vocab_size = described(origin).vocab_size
    if vocab_size is None:
        vocab_size = _null_vocab_size(checkpoint.args)
    if vocab_size is None and tokenizer:
        vocab_size = tokenizer.size
    if vocab_size is None:
        raise ValueError(
            f"{checkpoint.folder} does not say how many of its embedding's rows are tokens and how "
            "many are padding; give --tokenizer, or --vocab-size, or --like with a model of the "
            f"same vocabulary ({missing})"
        )
    if tokenizer and tokenizer.size > vocab_size:
        raise ValueError(
            f"the model has {vocab_size} tokens, {tokenizer.source} has {tokenizer.size}: it is "
            "not the run's; name that with --tokenizer, or the number of tokens with --vocab-size"
        )
    return vocab_size


def _null_vocab_size(args: dict[str, Any]) -> int | None:
    """Tokens of a run without a tokenizer: it says how many."""
    return args.get("vocab_size") if args.get("tokenizer_type") == "NullTokenizer" else None
