"""Runs of the real training loop with CPO: a tiny model's flags, its log and its weights."""

import os
import re
import sys
from typing import Any

import torch

from harness.ranks import run_script
from harness.stores import TOKENIZER_FLAGS

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1 --seed 7"
).split() + TOKENIZER_FLAGS
CPO = "--cpo-aux-loss --cpo-k 5 --cpo-objective ranked --cpo-beta 0.2 --cpo-no-warmup".split()


def cpo_curves(output: str) -> dict[str, list[float]]:
    """The `[cpo]` lines of a training log: {name: [value per iteration]}."""
    curves: dict[str, list[float]] = {}
    for line in re.findall(r"\[cpo\] iteration \d+: (.*)", output):
        for pair in line.split():
            name, value = pair.split("=")
            curves.setdefault(name, []).append(float(value))
    return curves


def plain_tensors(folder: str) -> dict[str, torch.Tensor]:
    """On a rank: the tensors of a torch_dist checkpoint, whole, whatever layout wrote them."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    torch.distributed.init_process_group("gloo")
    return {
        name: tensor
        for name, tensor in load_plain_tensors(folder).items()
        if isinstance(tensor, torch.Tensor) and "extra_state" not in name
    }


def weights(folder: str, iteration: int) -> dict[str, torch.Tensor]:
    """On a rank: the weights that a run saved, without the optimizer's state."""
    tensors = plain_tensors(f"{folder}/iter_{iteration:07d}")
    parts = ("decoder", "embedding", "output")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}


class Deadly:
    """Standard output whose process is sent a signal once a line holds a word."""

    def __init__(self, word: str, number: int) -> None:
        self._out, self._word, self._number = sys.stdout, word, number

    def write(self, text: str) -> int:
        written = self._out.write(text)
        if self._word in text:
            self._out.flush()
            os.kill(os.getpid(), self._number)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def signalled(flags: list[str], word: str, number: int, rank: int = 0) -> None:
    """On a rank: a run, of which one rank gets a signal after it has printed a word."""
    if int(os.environ["RANK"]) == rank:
        sys.stdout = Deadly(word, number)  # type: ignore[assignment]
    run_script(flags)
