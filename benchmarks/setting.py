"""What every benchmark shares: real groups of the shipped Dolly records and a real Megatron GPT."""

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron_cpo.groups.store import Group, GroupReader
from megatron_cpo.negatives.from_records import NEGATIVES, Context, Sampler, batch_negative
from megatron_cpo.tree import Ints

Rows = list[tuple[str, str]]
"""Rows of the table: what was measured, and the result in words."""
DOLLY = Path(__file__).parents[1] / "examples" / "data" / "dolly-400.jsonl"


@dataclass(frozen=True)
class Setting:
    """Sizes of a benchmark run."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocab: int = 50257
    """Rows of the output layer that stand for a token, GPT-2's. Ids come from a small tokenizer."""
    negatives: str = "MixN"
    """Mix of negatives, see `from_records.parse_mix`; the paper's has K = 12. What a policy would
    draw is drawn by `STAND_INS`."""
    max_length: int = 512
    """Longest prefix + candidate."""
    row_tokens: int = 2048
    groups: int = 4
    """Groups of a padded micro-batch; the trees take as many groups."""
    repeats: int = 5
    bf16: bool = False
    """Weights and activations of 16 bits; log-probs and losses stay float32."""
    data: Path = DOLLY
    plot: Path | None = None
    """Where to draw what can be drawn."""
    folder: str = ""
    """For stores and checkpoints; emptied at the end."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def device(self) -> torch.device:
        """The GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usual_setting() -> Setting:
    """What this machine can measure in minutes: on a GPU a GPT of 350M parameters."""
    if torch.cuda.is_available():
        # Megatron's unfused attention keeps 6 bytes of each score: 36 GiB of a row of 4,096 tokens.
        return Setting(hidden=1024, layers=24, heads=16, groups=4, row_tokens=4096, bf16=True)
    return Setting()


def be_quiet() -> None:
    """No warnings of Megatron's between the rows of the table."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


@cache
def start_megatron() -> None:
    """One rank with Megatron's process groups, once; the CPU host where there is no CUDA."""
    from megatron_cpo import install

    install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


@cache
def group_store(setting: Setting) -> GroupReader:
    """Groups of the setting's mix over its records, built once."""
    start_megatron()
    from megatron_cpo.building.build import build_groups
    from megatron_cpo.building.config import BuildConfig
    from megatron_cpo.records.source import Source

    source = Source((str(setting.data),), max_length=setting.max_length)
    store = f"{setting.folder}/{setting.negatives}"
    with patch.dict(NEGATIVES, STAND_INS):
        build_groups(BuildConfig(source, store, setting.negatives), record_tokenizer(setting))
    return GroupReader(store)


@cache
def record_tokenizer(setting: Setting) -> Any:
    """A tokenizer of 4,000 pieces, trained on the setting's records."""
    from megatron_cpo.records.source import Source
    from megatron_cpo.records.tokenizer_training import train_sentencepiece

    model = f"{setting.folder}/tokenizer.model"
    train_sentencepiece(Source((str(setting.data),)), model, 4000)
    return megatron_tokenizer("SentencePieceTokenizer", "--tokenizer-model", model)


def megatron_tokenizer(kind: str, *flags: str) -> Any:
    """What Megatron builds of --tokenizer-type and other flags."""
    import argparse

    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(["--tokenizer-type", kind, *flags])
    args.rank = 1  # Megatron's builder prints on rank 0
    return build_tokenizer(args)


def _another(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """In place of AN: continuations of other records; a policy's own are of such lengths."""
    return batch_negative(context, count, rng)


def _replaced(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """In place of MN: 15% of y_1's tokens drawn uniformly, so trees branch where MN's would."""
    drawn = []
    for _ in range(count):
        tokens = context.truth.copy()
        at = np.flatnonzero(rng.random(len(tokens) - 1) < 0.15)
        tokens[at] = rng.integers(0, 4000, len(at))
        drawn.append(tokens)
    return drawn


STAND_INS: dict[str, Sampler] = {"an": _another, "mn": _replaced}
"""For the negatives that need a policy: what they cost depends on their lengths and branches."""


def build_model(setting: Setting, trees: bool) -> Any:
    """A GPT of Megatron's local modules; with `trees`, our attention in place of Megatron's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cpo.model.attach import attach_tree_attention

    config = TransformerConfig(
        num_layers=setting.layers,
        hidden_size=setting.hidden,
        num_attention_heads=setting.heads,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=setting.bf16,
        params_dtype=setting.dtype,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=-(-setting.vocab // 128) * 128,
        max_sequence_length=setting.max_length,
        share_embeddings_and_output_weights=True,
    ).to(setting.device, setting.dtype)
    return attach_tree_attention([model])[0] if trees else model


def sample_batches(
    setting: Setting, reader: GroupReader, count: int, batches: int
) -> list[list[Group]]:
    """Runs of `count` consecutive groups; on a GPU, whose attention is compiled for a row's length,
    one of them over and over, so that only the warm-up compiles."""
    starts = [0 if setting.device.type == "cuda" else i * count for i in range(batches)]
    return [[reader[(start + i) % len(reader)] for i in range(count)] for start in starts]


def seconds(step: Callable[[], Any]) -> float:
    """Wall time of one call, the device's work included."""
    _wait()
    start = time.perf_counter()
    step()
    _wait()
    return time.perf_counter() - start


class Times(dict[str, list[float]]):
    """Seconds of each step by name, a number for each repetition."""

    def median(self, name: str) -> float:
        return statistics.median(self[name])

    def ratio(self, a: str, b: str) -> float:
        """Median of a / b over the repetitions: what slowed both of one hardly moves it."""
        return statistics.median(x / y for x, y in zip(self[a], self[b], strict=True))


def work(step: Callable[[], Any]) -> float:
    """CPU seconds of one call, all threads': other processes cannot stretch it. On a GPU, time."""
    if torch.cuda.is_available():
        return seconds(step)
    start = time.process_time()
    step()
    return time.process_time() - start


def side_by_side(
    steps: dict[str, Callable[[int], Any]],
    repeats: int,
    clock: Callable[[Callable[[], Any]], float] = seconds,
) -> Times:
    """Seconds of each step, taken in turn so that a busy machine slows all alike.

    Args:
        steps: by name, a function of the repetition; the first is run once more, as a warm-up.
        clock: `seconds` or `work`.
    """
    times = Times({name: [] for name in steps})
    for repeat in range(-1, repeats):
        for name, step in steps.items():
            took = clock(lambda step=step, repeat=repeat: step(max(repeat, 0)))
            if repeat >= 0:
                times[name].append(took)
    return times


def temporary_folder() -> Any:
    """A folder for a benchmark's store, removed at the end."""
    return tempfile.TemporaryDirectory(prefix="megatron-cpo-bench-")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
