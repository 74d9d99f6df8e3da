"""How fast a store is built, and how much of the ranking's time is the embedding model's.

`python -m benchmarks.build 1000000` builds that many synthetic records and says its peak memory.
"""

import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.setting import (
    Rows,
    Setting,
    megatron_tokenizer,
    record_tokenizer,
    temporary_folder,
)
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run

RECORDS = 6000
"""Records of the bn/tn build; the data is repeated up to that."""
RANKED = 128
"""Records whose candidates are ranked by sentence embeddings."""
NEGATIVES = "bn=3,tn=8"
"""What needs no policy."""


def bench_build(setting: Setting) -> Rows:
    """Rows of the table."""
    tokenizer, folder = record_tokenizer(setting), Path(setting.folder)
    return [
        *_bench_negatives(setting, tokenizer, folder),
        *_bench_ranking(setting, tokenizer, folder),
    ]


def _bench_negatives(setting: Setting, tokenizer: Any, folder: Path) -> Rows:
    """Candidates a second from text to store, with one process and with all cores."""
    lines = setting.data.read_bytes().splitlines(keepends=True)
    data = folder / "records.jsonl"
    data.write_bytes(b"".join(lines * -(-RECORDS // len(lines))))
    source = Source((str(data),), max_length=setting.max_length)
    cores = len(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(3):
        for workers in rates:
            config = BuildConfig(source, str(folder / "built" / "groups"), NEGATIVES)
            start = time.perf_counter()
            report = build_groups(config, tokenizer, run=Run(workers=workers))
            took = time.perf_counter() - start
            assert report is not None
            rates[workers].append(sum(report.manifest["kinds"].values()) / took)
            shutil.rmtree(folder / "built")
    return [
        (
            f"build: {NEGATIVES}, lexical rank, tokenise to store, {workers} process(es)",
            f"{statistics.median(rate):,.0f} candidates/s",
        )
        for workers, rate in rates.items()
    ]


def _bench_ranking(setting: Setting, tokenizer: Any, folder: Path) -> Rows:
    """Builds with and without `--rank minilm`: their difference against the model alone."""
    try:
        from megatron_cpo.negatives.embeddings import SentenceEmbedder

        embedder = SentenceEmbedder("minilm", tokenizer)
    except ValueError as error:
        return [("ranking", f"not measured: {error}")]
    data = folder / "ranked.jsonl"
    data.write_bytes(b"".join(setting.data.read_bytes().splitlines(keepends=True)[:RANKED]))
    source = Source((str(data),), max_length=setting.max_length)

    def build(ranker: str) -> float:
        prefix = str(folder / ranker / "groups")
        config = BuildConfig(source, prefix, NEGATIVES, ranker=ranker)
        start = time.perf_counter()
        build_groups(config, tokenizer)
        return time.perf_counter() - start

    build("none")
    reader = GroupReader(str(folder / "none" / "groups"))
    groups = [reader[i] for i in range(len(reader))]
    texts = list(dict.fromkeys(embedder.text(c) for g in groups for c in g.candidates))
    texts = [text for text in texts if text.strip()]
    times: dict[str, list[float]] = {"none": [], "minilm": [], "encode": [], "open": []}
    for _ in range(3):
        for name in ("none", "minilm"):
            shutil.rmtree(folder / name, ignore_errors=True)
            times[name].append(build(name))
        start = time.perf_counter()
        SentenceEmbedder("minilm", tokenizer)
        times["open"].append(time.perf_counter() - start)
        start = time.perf_counter()
        embedder.model.encode(texts, show_progress_bar=False)
        times["encode"].append(time.perf_counter() - start)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    ranking = median["minilm"] - median["none"] - median["open"]
    return [
        (
            f"rank minilm: {len(texts)} distinct texts of {len(groups)} groups",
            f"{len(texts) / ranking:.0f} texts/s in the build, {len(texts) / median['encode']:.0f} "
            f"texts/s by SentenceTransformer.encode alone ({median['encode'] / ranking:.0%})",
        )
    ]


def build_synthetic(records: int) -> None:
    """Build `records` records of 12 to 40 words, bn=3,tn=8, lexical rank; print what it took."""
    rng = np.random.default_rng(0)
    tokenizer = megatron_tokenizer("NullTokenizer", "--vocab-size", "30001")
    with temporary_folder() as folder:
        data = Path(folder) / "records.jsonl"
        with data.open("w") as file:
            for _ in range(records):
                words = rng.integers(0, 30_000, rng.integers(12, 40)).tolist()
                x, y = (" ".join(map(str, part)) for part in (words[:6], words[6:]))
                file.write(f'{{"prompt": "{x}", "completion": "{y}"}}\n')
        before = _peak()
        start = time.perf_counter()
        config = BuildConfig(Source((str(data),)), f"{folder}/groups")
        report = build_groups(config, tokenizer)
        took = time.perf_counter() - start
        assert report is not None
        rate = sum(report.manifest["kinds"].values()) / took
        print(report)
        print(
            f"{took:.0f} s, {rate:,.0f} candidates/s; peak memory {_peak():.0f} MiB ({before:.0f} "
            f"MiB before the build), of a worker {_peak(resource.RUSAGE_CHILDREN):.0f} MiB"
        )


def _peak(who: int = resource.RUSAGE_SELF) -> float:
    """MiB of resident memory at the peak."""
    return resource.getrusage(who).ru_maxrss / 1024


if __name__ == "__main__":
    build_synthetic(int(sys.argv[1]))
