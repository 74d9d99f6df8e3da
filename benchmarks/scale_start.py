"""What ranks do until their first step: file opens, bytes read and collectives, counted.

Every open passes Python's audit hook, every collective torch's dispatcher, and the kernel counts
what `read` hands over. Pages of mapped files are not in there; what is looked at through them at
the start is `damage.LOOKED_AT` bytes of each of two files at most.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.communication import Counted
from harness.ranks import run_pretrain, run_ranks, run_script
from harness.stores import TOKENIZER_FLAGS, write_store

K = 5
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    "--seq-length 256 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 2 --eval-iters 0 --lr 1e-4 --lr-decay-style constant "
    "--ckpt-format torch_dist --save-interval 2"
).split() + TOKENIZER_FLAGS


class _Begins(Exception):
    """The first step is about to be taken."""


def counted_start(argv: list[str], folder: str) -> dict[str, int]:
    """On a rank: what is done before the first step, by kind."""
    from megatron.training import training

    opened: Counter[str] = Counter()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            opened[arguments[0]] += 1

    def stop(*_: Any, **__: Any) -> None:
        raise _Begins

    sys.addaudithook(hook)
    training.train_step = stop
    before = _bytes_read()
    with Counted() as calls, suppress(_Begins):
        run_script(argv)
    read = _bytes_read() - before
    found = {
        f"opens of {what}": sum(n for path, n in opened.items() if path.startswith(place))
        for what, place in (
            ("the store", f"{folder}/groups"),
            ("kept sizes and plans", f"{folder}/cache"),
            ("--load", f"{folder}/model"),
        )
    }
    others = sum(opened.values()) - sum(found.values())
    kinds = {f"collective {name}": n for name, n in calls.calls.items()}
    return {**found, "opens of anything else": others, "bytes by read()": read, **kinds}


def _bytes_read() -> int:
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(re.findall(r"rchar: (\d+)", text)[0])


def starts(folder: Path, worlds: tuple[int, ...] = (2, 4)) -> Iterator[str]:
    """Lines of the report: rank 0, and the busiest of the others, at each number of ranks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    store = write_store(folder / "groups", 200, K, longest=16)
    cpo = ["--cpo-aux-loss", "--cpo-no-warmup", "--cpo-data-path", store]
    run_pretrain([*MODEL, *cpo, "--save", str(folder / "model")], 1)
    argv = [*MODEL, *cpo, "--load", str(folder / "model"), "--finetune"]
    for world in worlds:
        cache = folder / "cache"
        for when in ("first start", "later start"):
            flags = ["--data-cache-path", str(cache)]
            first, *others = run_ranks(counted_start, world, [*argv, *flags], str(folder))
            for name in sorted({*first, *(name for other in others for name in other)}):
                busiest = max(other.get(name, 0) for other in others)
                ours = first.get(name, 0)
                yield f"{world} ranks, {when}: {name}: rank 0 {ours}, others {busiest}"
        cache.rename(folder / f"cache of {world}")
