"""Tiny models of transformers, converted: what all tests of conversion share."""

import copy
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.stores import VOCAB_SIZE
from megatron_cpo.checkpoints.conversion.convert import convert
from megatron_cpo.checkpoints.formats.beside import FLAGS
from tests.checkpoints import read_model

VOCAB = VOCAB_SIZE + 1
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "eos_token_id": VOCAB_SIZE,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2 untied, erf": _GPT2
    | {"activation_function": "gelu", "n_inner": 80, "tie_word_embeddings": False},
    "llama": _LLAMA,
    "llama tied, llama3": _LLAMA
    | {"tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": LLAMA3}
    # Waves longer than 8192 / 4 positions are what the scaling changes.
    | {"head_dim": 32},
    "llama linear, wide heads": _LLAMA
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 16}
    | {"num_key_value_heads": 4},
}
TOKENS = torch.randint(VOCAB, (2, 200), generator=torch.Generator().manual_seed(3))


def write_model(folder: Path, config: dict[str, Any], seed: int = 0, **saving: Any) -> Path:
    """A model of transformers with random weights and logits of several units.

    Larger weights would amplify the rounding of float32 beyond 1e-5, on either side.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(settings)))
    for name, parameter in model.named_parameters():
        parameter.data.normal_("ln" in name or "norm" in name, 0.15)
    model.to(saving.pop("dtype", torch.float32)).save_pretrained(folder, **saving)
    return folder


def to_megatron(source: Path, output: Path, **options: Any) -> Path:
    return convert(source, output, from_format="hf", to_format="megatron", **options)


def to_hugging_face(source: Path, output: Path, **options: Any) -> Path:
    return convert(source, output, from_format="megatron", to_format="hf", **options)


def flags_of(folder: Path) -> list[str]:
    """As a shell would split them."""
    return shlex.split((folder / FLAGS).read_text())


class Models:
    """Models by name, converted when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hugging_face(self, name: str) -> Path:
        folder = self.folder / f"{name} hf".replace(" ", "_")
        return folder if folder.exists() else write_model(folder, CONFIGS[name])

    def megatron(self, name: str) -> Path:
        folder = self.folder / f"{name} megatron".replace(" ", "_")
        return folder if folder.exists() else to_megatron(self.hugging_face(name), folder)


def assert_same_model(one: Path, other: Path) -> None:
    """The same tensors, bit for bit."""
    ours, theirs = read_model(one), read_model(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def assert_refused(source: Path, message: str, tmp_path: Path, **options: Any) -> None:
    """ValueError, and nothing is left."""
    formats = {"from_format": "hf", "to_format": "megatron"} | options
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "refused", **formats)
    assert not list(tmp_path.glob("refused*"))


@functools.cache
def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded(folder)(tokens).logits


def load_megatron(load: str, flags: list[str]) -> Any:
    """On a rank: Megatron's GPT with the weights of a checkpoint."""
    from megatron_cpo import install

    install()  # the flags that only a CPU needs
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_cpo.host.compat import build_gpt

    run = "--micro-batch-size 1 --train-iters 1 --lr 0 --eval-interval 1 --seq-length 256"
    sys.argv = ["convert", *run.split(), *flags, "--load", load]
    args = parse_and_validate_args()
    args.finetune = args.exit_on_missing_checkpoint = True
    initialize_megatron()
    [model] = build_gpt(args, lambda chunks: chunks)
    load_checkpoint([model], None, None)
    return model.eval()
