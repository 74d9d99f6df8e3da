"""Convert a checkpoint: Hugging Face's GPT-2 and Llama models to Megatron's torch_dist, and back.

Values are copied bit for bit; `families` says which goes where, and one list of moves serves both
directions. No model is ever built: transformers is imported for tokenizers alone, Megatron for one
kind of them. Memory is what importing takes plus 100 MB (Llama) or 300 MB (GPT-2, whose matrices
are transposed).
"""

from pathlib import Path
from typing import Any

import torch

from megatron_cpo.checkpoints.conversion.copying import Copy, unstack
from megatron_cpo.checkpoints.conversion.exporting import to_hugging_face
from megatron_cpo.checkpoints.conversion.families import FAMILIES
from megatron_cpo.checkpoints.conversion.families.model import MULTIPLE, Model, arguments, flags
from megatron_cpo.checkpoints.conversion.families.moves import megatron_shapes
from megatron_cpo.checkpoints.conversion.fitting import described, nbytes, weights_of
from megatron_cpo.checkpoints.conversion.generation import generation_ends
from megatron_cpo.checkpoints.conversion.provenance import write_provenance
from megatron_cpo.checkpoints.formats.beside import FLAGS, SIDECAR, copy_small_files, has_tokenizer
from megatron_cpo.checkpoints.formats.hugging_face import HuggingFaceCheckpoint
from megatron_cpo.checkpoints.formats.new_torch_dist import NewTorchDist
from megatron_cpo.checkpoints.formats.opening import open_checkpoint
from megatron_cpo.checkpoints.formats.pickled import PickledModel, is_pickled
from megatron_cpo.checkpoints.formats.stored import Shape
from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint
from megatron_cpo.checkpoints.merging.assembling import DTYPES
from megatron_cpo.files import flush, whole_folder

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
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    verify: bool = False,
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
        tokenizer: to Hugging Face: a folder or file with the run's tokenizer, where it is not found
            by the name that the run had for it.
        vocab_size: to Hugging Face: the number of tokens, where nothing else says it.
        dtype: "fp32", "bf16" or "fp16" to store weights in; by default what they are stored in.
        verify: before the output appears, read a sample of every tensor back and compare it.
        shard_bytes: bytes of weights after which another file begins.
        progress: show a bar with bytes and the time left, if standard error is a terminal.

    Raises:
        ValueError: the source cannot be read, is of no family that converts or has a setting that
            the other side has not; or the arguments are wrong.
        OSError: the disk is full.
    """
    if {from_format, to_format} != set(_FORMATS):
        raise ValueError(f"--from {from_format} --to {to_format}: one is hf and one is megatron")
    if to_format == "megatron" and (like, tokenizer, vocab_size) != (None, None, None):
        raise ValueError(
            "--like, --tokenizer and --vocab-size are for --to hf: a Hugging Face model has them"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
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
    stored_in = None if dtype is None else DTYPES[dtype]
    if isinstance(checkpoint, _HuggingFace):
        _to_megatron(checkpoint, output, stored_in, verify, shard_bytes, progress)
    elif isinstance(checkpoint, TorchDistCheckpoint):
        to_hugging_face(
            checkpoint,
            output,
            like=None if like is None else Path(like),
            tokenizer=None if tokenizer is None else Path(tokenizer),
            vocab_size=vocab_size,
            dtype=stored_in,
            verify=verify,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    return output


def _to_megatron(
    checkpoint: _HuggingFace,
    output: Path,
    dtype: torch.dtype | None,
    verify: bool,
    shard_bytes: float,
    progress: bool,
) -> None:
    folder = checkpoint.folder
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json, which says what the model is")
    model = described(folder)
    moves = list(FAMILIES[model.family].moves(model))
    sources = weights_of(folder, checkpoint.tensors, model, moves, dtype is not None)
    dtypes = {move.megatron: dtype or sources[move.hugging_face].dtype for move in moves}
    shapes: dict[str, Shape] = {}
    for (name, layer), shape in megatron_shapes(moves).items():
        shapes[name] = shape if layer is None else (model.num_layers, *shape)
    tensors = {name: (dtypes[name], shape) for name, shape in shapes.items()}
    args = arguments(model) | _tokenizer_arguments(folder, output, model)
    stored_in = dtypes["embedding.word_embeddings.weight"]
    args |= {"bf16": stored_in == torch.bfloat16, "fp16": stored_in == torch.float16}
    known_to_megatron = {
        "padded_vocab_size": model.padded_vocab_size,
        "make_vocab_size_divisible_by": MULTIPLE,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "add_position_embedding": True,
    }
    with whole_folder(output, nbytes(tensors)) as writing:
        new = NewTorchDist(writing, shard_bytes)
        targets = unstack(new.add_tensors(tensors))
        new.add_states(args | known_to_megatron, model.num_layers)
        copy = Copy(moves, targets, sources, to_megatron=True)
        copy.run(progress)
        flush(writing)  # what makes it a checkpoint follows when all values are safe
        if verify:
            copy.verify()
        (writing / SIDECAR).mkdir()
        copy_small_files(folder, writing / SIDECAR)
        (writing / FLAGS).write_text("\n".join(flags(args)) + "\n")
        write_provenance(writing, checkpoint, model)
        new.complete()


def _tokenizer_arguments(folder: Path, output: Path, model: Model) -> dict[str, Any]:
    if has_tokenizer(folder):
        model_folder = str(output.absolute() / SIDECAR)
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model_folder}
    found = {"tokenizer_type": "NullTokenizer", "vocab_size": model.vocab_size}
    ends = [end for end in generation_ends(folder) if end < model.vocab_size]
    return found | ({"null_tokenizer_eod_id": ends[0]} if ends else {})
