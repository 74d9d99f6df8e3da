"""Convert a checkpoint: Hugging Face's GPT-2 and Llama models to Megatron's torch_dist, and back.

Values are copied bit for bit; `families` says which goes where, and one list of moves serves both
directions. No model is ever built, so neither Megatron nor transformers is imported, and memory is
what importing torch takes plus 100 MB (Llama) or 300 MB (GPT-2, whose matrices are transposed).
"""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_cpo import __version__
from megatron_cpo.checkpoints.conversion.copying import Copy, unstack
from megatron_cpo.checkpoints.conversion.families import FAMILIES, model_of_config
from megatron_cpo.checkpoints.conversion.families.model import (
    MULTIPLE,
    Model,
    arguments,
    difference,
    flags,
    model_of_arguments,
)
from megatron_cpo.checkpoints.conversion.families.moves import hugging_face_shapes, megatron_shapes
from megatron_cpo.checkpoints.conversion.fitting import check_layers, weights_of
from megatron_cpo.checkpoints.conversion.sidecar import (
    SIDECAR,
    carry_tokenizer,
    copy_small_files,
    has_tokenizer,
    sidecars,
)
from megatron_cpo.checkpoints.formats.hugging_face import HuggingFaceCheckpoint, read_json
from megatron_cpo.checkpoints.formats.new_safetensors import lay_out_safetensors
from megatron_cpo.checkpoints.formats.new_torch_dist import NewTorchDist
from megatron_cpo.checkpoints.formats.opening import open_checkpoint
from megatron_cpo.checkpoints.formats.pickled import PickledModel, is_pickled
from megatron_cpo.checkpoints.formats.stored import Shape
from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint
from megatron_cpo.files import flush, whole_folder

FLAGS = "megatron_flags.txt"
PROVENANCE = "convert.json"
_HuggingFace = HuggingFaceCheckpoint | PickledModel
_FORMATS = {"hf": HuggingFaceCheckpoint.format, "megatron": TorchDistCheckpoint.format}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    from_format: str,
    to_format: str,
    iteration: int | None = None,
    like: str | Path | None = None,
    vocab_size: int | None = None,
    shard_bytes: float = 5e9,
    progress: bool = False,
) -> Path:
    """Write the checkpoint `source` in the other format; returns its folder.

    To Megatron: a release checkpoint, which loads with or without `--finetune` at any layout;
    beside it `megatron_flags.txt`, and in `hugging_face/` the configuration and tokenizer of the
    source. To Hugging Face: safetensors with `config.json` and the tokenizer. `convert.json` says
    what the output was made from.

    Args:
        source: a Hugging Face model's folder, or Megatron's `--save` folder or one iteration in it.
        output: a folder that does not exist. It appears when it is complete.
        from_format, to_format: "hf" and "megatron", or the other way round.
        iteration: Megatron's iteration to read; the latest by default.
        like: to Hugging Face: a folder whose configuration and tokenizer the output gets. By
            default those that the checkpoint came from, if they are still there; without any, the
            configuration is made from Megatron's arguments.
        vocab_size: to Hugging Face: the number of tokens, where nothing else says it.
        shard_bytes: bytes of weights after which another file begins.
        progress: show a bar with bytes and the time left, if standard error is a terminal.

    Raises:
        ValueError: the source cannot be read, is of no family that converts or has a setting that
            the other side has not; or the arguments are wrong.
        OSError: the disk is full.
    """
    if {from_format, to_format} != set(_FORMATS):
        raise ValueError(f"--from {from_format} --to {to_format}: one is hf and one is megatron")
    if to_format == "megatron" and not (like is None and vocab_size is None):
        raise ValueError("--like and --vocab-size are for --to hf: a Hugging Face model has both")
    if shard_bytes <= 0:
        raise ValueError(f"--shard-gb {shard_bytes / 1e9:g}: must be above 0")
    source, output = Path(source), Path(output)
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output {output} lies within the input {source}")
    if from_format == "hf" and iteration is not None:
        raise ValueError(f"--iteration {iteration} is for --from megatron")
    checkpoint = PickledModel(source) if is_pickled(source) else open_checkpoint(source, iteration)
    if checkpoint.format != _FORMATS[from_format]:
        raise ValueError(f"--from {from_format}: {source} is a {checkpoint.format} checkpoint")
    if isinstance(checkpoint, _HuggingFace):
        _to_megatron(checkpoint, output, shard_bytes, progress)
    elif isinstance(checkpoint, TorchDistCheckpoint):
        if like is not None:
            found = _model_like(checkpoint, Path(like), vocab_size)
        else:
            found = _model_of_run(checkpoint, sidecars(source, checkpoint), vocab_size)
        _to_hugging_face(checkpoint, output, *found, shard_bytes, progress)
    return output


def _to_megatron(
    checkpoint: _HuggingFace, output: Path, shard_bytes: float, progress: bool
) -> None:
    folder = checkpoint.folder
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json, which says what the model is")
    model = _described(folder)
    moves = list(FAMILIES[model.family].moves(model))
    sources = weights_of(folder, checkpoint.tensors, model, moves)
    dtypes = {move.megatron: sources[move.hugging_face].dtype for move in moves}
    shapes: dict[str, Shape] = {}
    for (name, layer), shape in megatron_shapes(moves).items():
        shapes[name] = shape if layer is None else (model.num_layers, *shape)
    tensors = {name: (dtypes[name], shape) for name, shape in shapes.items()}
    args = arguments(model) | _tokenizer_arguments(folder, output, model)
    dtype = dtypes["embedding.word_embeddings.weight"]
    args |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    known_to_megatron = {
        "padded_vocab_size": model.padded_vocab_size,
        "make_vocab_size_divisible_by": MULTIPLE,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "add_position_embedding": True,
    }
    with whole_folder(output, _nbytes(tensors)) as writing:
        new = NewTorchDist(writing, shard_bytes)
        targets = unstack(new.add_tensors(tensors))
        new.add_states(args | known_to_megatron, model.num_layers)
        Copy(moves, targets, sources, to_megatron=True).run(progress)
        flush(writing)  # what makes it a checkpoint follows when all values are safe
        (writing / SIDECAR).mkdir()
        copy_small_files(folder, writing / SIDECAR)
        (writing / FLAGS).write_text("\n".join(flags(args)) + "\n")
        _write_provenance(writing, checkpoint, model)
        new.complete()


def _model_like(
    checkpoint: TorchDistCheckpoint, folder: Path, vocab_size: int | None
) -> tuple[Model, Path | None]:
    """The run's model, and the folder that was named for its configuration."""
    if not (folder / "config.json").exists():
        raise ValueError(f"--like {folder}: there is no config.json")
    known = _described(folder)
    if vocab_size not in (None, known.vocab_size):
        raise ValueError(f"--vocab-size {vocab_size}: {folder} has {known.vocab_size} tokens")
    model = model_of_arguments(checkpoint.args, known.vocab_size)
    if found := difference(model, known):
        name, ours, theirs = found
        raise ValueError(
            f"{checkpoint.folder} is not like {folder}: {name} is {ours!r} and {theirs!r}; name "
            "a model that is, or leave --like out"
        )
    return model, folder


def _model_of_run(
    checkpoint: TorchDistCheckpoint, candidates: list[Path], vocab_size: int | None
) -> tuple[Model, Path | None]:
    """The run's model, and the folder that has its configuration, if one does."""
    size = vocab_size or _null_vocab_size(checkpoint.args)
    for folder in candidates:
        try:
            known = _described(folder)
        except ValueError:  # a tokenizer that came with a model of another kind
            continue
        size = size or known.vocab_size
        model = model_of_arguments(checkpoint.args, size)
        if size == known.vocab_size and not difference(model, known):
            return model, folder
    if size is None:
        raise ValueError(
            f"{checkpoint.folder} does not say how many of its embedding's rows are tokens and how "
            "many are padding; give --vocab-size, or --like with a model of the same vocabulary"
        )
    return model_of_arguments(checkpoint.args, size), None


def _to_hugging_face(
    checkpoint: TorchDistCheckpoint,
    output: Path,
    model: Model,
    sidecar: Path | None,
    shard_bytes: float,
    progress: bool,
) -> None:
    moves = [move for move in FAMILIES[model.family].moves(model) if not move.padding]
    sources = unstack(checkpoint.tensors)
    check_layers(checkpoint.folder, sources, moves)
    dtypes = {move.hugging_face: sources[move.key].dtype for move in moves}
    tensors = {name: (dtypes[name], shape) for name, shape in hugging_face_shapes(moves).items()}
    with whole_folder(output, _nbytes(tensors)) as writing:
        targets, index = lay_out_safetensors(writing, tensors, shard_bytes)
        Copy(moves, sources, targets, to_megatron=False).run(progress)
        flush(writing)  # what makes it a model follows when all values are safe
        if index is not None:
            (writing / "model.safetensors.index.json").write_text(index)
        if sidecar:
            copy_small_files(sidecar, writing)
            config = read_json(sidecar / "config.json")
        else:
            carry_tokenizer(checkpoint.args, writing)
            config = FAMILIES[model.family].write_config(model)
        if len(set(dtypes.values())) == 1:
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = str(next(iter(dtypes.values()))).removeprefix("torch.")
        origin = str(sidecar) if sidecar else "made from the run's arguments"
        _write_provenance(writing, checkpoint, model, configuration=origin)
        (writing / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _described(folder: Path) -> Model:
    try:
        return model_of_config(read_json(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _nbytes(tensors: dict[str, tuple[torch.dtype, Shape]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())


def _tokenizer_arguments(folder: Path, output: Path, model: Model) -> dict[str, Any]:
    if has_tokenizer(folder):
        model_folder = str(output / SIDECAR)
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model_folder}
    return {"tokenizer_type": "NullTokenizer", "vocab_size": model.vocab_size}


def _null_vocab_size(args: dict[str, Any]) -> int | None:
    """Tokens of a run without a tokenizer: it says how many."""
    return args.get("vocab_size") if args.get("tokenizer_type") == "NullTokenizer" else None


def _write_provenance(
    folder: Path, source: _HuggingFace | TorchDistCheckpoint, model: Model, **more: str
) -> None:
    record = {
        "made_by": f"megatron_cpo {__version__}, torch {torch.__version__}",
        "family": model.family,
        "source": source.identity() | {"folder": str(source.folder.resolve())},
        **more,
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
