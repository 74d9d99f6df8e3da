"""Where faults strike: each a command on tiny inputs, its result, and what a rerun of it is."""

import hashlib
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.ranks import ROOT
from harness.stores import VOCAB_SIZE, write_store
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.conversion.convert import convert
from megatron_cpo.files import end_cleanly
from megatron_cpo.groups.store import FILES
from megatron_cpo.records import pair_files
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
from tests.checkpoints import read_torch_dist
from tests.corpora import write_corpus
from tests.texts import DOLLY, dolly_tokenizer
from tests.tiny_models import GPT_FLAGS, train_megatron

K = 6
STEPS = 6
Outcome = dict[str, str]
"""sha256 of each part of a result, by name."""


@dataclass(frozen=True)
class Place:
    """One command."""

    prepare: Callable[[Path, Path], None]
    """Inputs, in a folder; the first argument is where the shared ones lie."""
    work: Callable[[Path, Path], Any]
    """The command; the same again resumes it."""
    outcome: Callable[[Path], Outcome]
    """Of its result, in a process of its own."""
    shards: int = 1
    """Processes that do it together."""
    ranks: bool = False
    """Whether they are ranks of one job: none ends without the others."""
    done_is_done: bool = False
    """A run that ended well is not started again: Megatron has no sample left to train on."""


class Shared:
    """What all runs share: made once, and never written to again."""

    def __init__(self, folder: Path) -> None:
        from tests.checkpoints import write_pair
        from tests.conversions import CONFIGS, write_model

        dolly_tokenizer(folder)
        write_pair(folder)
        write_model(folder / "llama", CONFIGS["llama"])
        convert(folder / "llama", folder / "megatron", from_format="hf", to_format="megatron")
        (folder / "scored").mkdir()
        write_store(folder / "scored" / "groups", 40, K, seed=1, longest=16)
        (folder / "unscored").mkdir()
        write_store(folder / "unscored" / "groups", 200, K, seed=1, longest=16, scored=False)
        write_corpus(folder, VOCAB_SIZE, documents=60, tokens=100)
        train_megatron(folder / "reference", GPT_FLAGS)


def _nothing(shared: Path, folder: Path) -> None:
    pass


def files_of(folder: Path, pattern: str = "*") -> Outcome:
    """Every file of a result; what a killed process had aside is nobody's."""
    found = {}
    for path in sorted(folder.rglob(pattern)):
        name = str(path.relative_to(folder))
        if path.is_file() and ".writing" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _tokenise(shared: Path, folder: Path) -> None:
    from megatron_cpo.records.pair_files import write_lm_dataset

    write_lm_dataset(Source((DOLLY,)), dolly_tokenizer(shared), str(folder / "text"))


def _build(run: Run) -> Callable[[Path, Path], None]:
    def work(shared: Path, folder: Path) -> None:
        pair_files.NOTE_LINES = 16
        config = BuildConfig(
            Source((DOLLY,), max_length=256),
            str(folder / "groups"),
            negatives="bn=3,tn=8",
            seed=7,
            block_records=8,
        )
        build_groups(config, dolly_tokenizer(shared), run=run)

    return work


def _build_shard(shared: Path, folder: Path) -> None:
    share = int(os.environ["CHAOS_SHARD"])
    _build(Run(workers=1, share=share, shares=2))(shared, folder)


def _unscored(shared: Path, folder: Path) -> None:
    for suffix in (*FILES, ".json"):
        shutil.copyfile(shared / "unscored" / f"groups{suffix}", folder / f"groups{suffix}")


def _score(shared: Path, folder: Path) -> None:
    flags = ["--score-only", "--output-prefix", str(folder / "groups")]
    flags += ["--load", str(shared / "reference" / "model"), "--micro-batch-size", "2"]
    _script("tools/build_negatives.py", [*GPT_FLAGS, *flags])


def training_flags(shared: Path, folder: Path) -> list[str]:
    """Of a run of STEPS steps that goes on from its own checkpoints, beside those of the model."""
    return (
        f"--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters {STEPS} "
        "--eval-iters 0 --eval-interval 99 --split 1,0,0 --ckpt-format torch_dist "
        f"--save-interval 2 --log-interval 1 --save {folder}/run --load {folder}/run "
        f"--cpo-aux-loss --cpo-no-warmup --cpo-k {K} --cpo-data-path {shared}/scored/groups "
        f"--data-cache-path {folder}/cache"
    ).split()


def _train(*more: str) -> Callable[[Path, Path], None]:
    def work(shared: Path, folder: Path) -> None:
        _script("examples/pretrain_gpt.py", [*GPT_FLAGS, *training_flags(shared, folder), *more])

    return work


def _train_beside_plain_rows(shared: Path, folder: Path) -> None:
    plain = ("--cpo-fraction", "0.5", "--data-path", str(shared / "tokens"))
    _train(*plain)(shared, folder)


def _script(name: str, argv: list[str]) -> None:
    sys.argv = [str(ROOT / name), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def weights_of(folder: Path) -> Outcome:
    """Of the last checkpoint, and which one that is."""
    last = folder / "run" / f"iter_{STEPS:07d}"
    tracker = (folder / "run" / "latest_checkpointed_iteration.txt").read_text()
    found = {
        name: hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()
        for name, tensor in read_torch_dist(last).items()
    }
    return {**found, "tracker": tracker}


def losses(output: str) -> dict[str, str]:
    """The numbers of each iteration that a log has: what the last run says of it."""
    return dict(re.findall(r"\[cpo\] iteration (\d+): (.*)", output))


def _merge(shared: Path, folder: Path) -> None:
    end_cleanly()
    if not (folder / "merged").exists():  # a rerun of a command that had been done is refused
        merge(shared / "hf_mle", shared / "hf_cpo", 0.3, folder / "merged")


def _convert(source: str, **formats: str) -> Callable[[Path, Path], None]:
    def work(shared: Path, folder: Path) -> None:
        end_cleanly()
        if not (folder / "model").exists():
            # The output's own place is in Megatron's arguments.
            os.chdir(folder)
            convert(shared / source, folder / "model", **formats)  # type: ignore[arg-type]

    return work


def _model_files(folder: Path) -> Outcome:
    """A place within the result's own files differs from run to run: it is taken out."""
    return {
        name: digest
        for name, digest in files_of(folder).items()
        if not name.endswith((".metadata", ".distcp", "convert.json", "flags.txt"))
    } | _tensors(folder)


def _tensors(folder: Path) -> Outcome:
    from megatron_cpo.checkpoints.formats.opening import open_checkpoint

    tensors = open_checkpoint(folder / "model").tensors
    found = {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256()
        for piece in tensor.pieces:
            with open(piece.path, "rb") as file:
                file.seek(piece.start)
                count = 1
                for size in piece.sizes:
                    count *= size
                digest.update(file.read(count * tensor.dtype.itemsize))
        found[name] = digest.hexdigest()
    return found


PLACES = {
    "tokenise": Place(_nothing, _tokenise, files_of),
    "build, one process": Place(_nothing, _build(Run(workers=1)), files_of),
    "build, two workers": Place(_nothing, _build(Run(workers=2)), files_of),
    "build, two shards": Place(_nothing, _build_shard, files_of, shards=2),
    "score": Place(_unscored, _score, files_of),
    "merge": Place(_nothing, _merge, files_of),
    "convert to Megatron": Place(
        _nothing, _convert("llama", from_format="hf", to_format="megatron"), _model_files
    ),
    "convert to Hugging Face": Place(
        _nothing, _convert("megatron", from_format="megatron", to_format="hf"), _model_files
    ),
    "train": Place(_nothing, _train(), weights_of, done_is_done=True),
    "train, half plain rows": Place(
        _nothing, _train_beside_plain_rows, weights_of, done_is_done=True
    ),
    "train, two ranks": Place(
        _nothing,
        _train("--tensor-model-parallel-size", "2"),
        weights_of,
        shards=2,
        ranks=True,
        done_is_done=True,
    ),
}
