"""A build that is killed, spread, or out of disk ends in the bytes of one that was not."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from harness.ranks import run_pretrain
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.files import asides
from megatron_cpo.groups.store import FILES
from megatron_cpo.negatives.from_records import NEGATIVES
from megatron_cpo.records import pair_files
from megatron_cpo.records.source import Source
from megatron_cpo.records.tokenizer_training import train_sentencepiece
from megatron_cpo.work.job import Run, parse_shard
from tests.faults import stand_still_once
from tests.texts import DOLLY, ToyTokenizer, dolly_tokenizer, write_jsonl

NAMES = sorted(f"groups{suffix}" for suffix in (*FILES, ".json"))
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config_in(folder, **options):
    options = {"negatives": "bn=3,tn=8", "seed": 7, "block_records": 8, **options}
    return BuildConfig(Source((DOLLY,), max_length=256), str(folder / "groups"), **options)


def files_in(folder):
    """Content of all files, by name; nothing else may be there."""
    assert sorted(os.listdir(folder)) == NAMES
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def expected(tokenizer, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("expected")
    build_groups(config_in(folder), tokenizer, run=Run(workers=1))
    return files_in(folder)


BLOCKS = 42
WRITING = 2 + BLOCKS + 1
"""Parts of a build in `config_in` when the store is being put together."""


def finished_parts(folder):
    """Of the records, what blocks share, each block, and the beginning of the store."""
    if asides(folder / "groups"):
        return WRITING
    names = set()
    for part in (folder / "groups.build", folder / "groups.build" / "groups"):
        with suppress(FileNotFoundError):  # a build that ends removes them
            names |= {*os.listdir(part)}
    return len(names & {"pairs", "shared"}) + sum(name.endswith(".npz") for name in names)


def kill_build(folder, tokenizer, workers, parts):
    """Start a build and kill -9 it when that many parts are finished; whether it came so far."""
    reached = FORK.Event()

    def build():
        os.setpgid(0, 0)
        stand_still_once(lambda: finished_parts(folder) >= parts, reached.set)
        build_groups(config_in(folder), tokenizer, run=Run(workers=workers))

    process = FORK.Process(target=build)
    process.start()
    while process.is_alive() and not reached.wait(0.05):
        pass
    process.kill()
    process.join()
    wait_for_group(process.pid)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


def wait_for_group(group):
    """Until no process of a process group is left; workers see within 0.1 s that they are alone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.02)
    pytest.fail("workers outlive their killed parent")


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_random_moments(tokenizer, expected, tmp_path, workers):
    """Five kills, between the first record and the last rename; the workers die as well."""
    chance = random.Random(workers)
    for parts in (0, 1, chance.randint(2, 20), chance.randint(21, WRITING - 3), WRITING):
        folder = tmp_path / str(parts)
        folder.mkdir()
        assert kill_build(folder, tokenizer, workers, parts)
        assert parts <= finished_parts(folder) < parts + 2 * workers
        build_groups(config_in(folder), tokenizer, run=Run(workers=1))
        assert files_in(folder) == expected


def test_killed_while_tokenising(tokenizer, expected, tmp_path, monkeypatch):
    """SIGKILL at a record half way: those before it, but for a few, are not tokenised again."""
    monkeypatch.setattr(pair_files, "NOTE_LINES", 16)
    tokenize, texts, parent = tokenizer.tokenize, [], os.getpid()

    def deadly(text):
        texts.append(text)
        if len(texts) == 300 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenize(text)

    monkeypatch.setattr(tokenizer, "tokenize", deadly)
    process = FORK.Process(target=build_groups, args=(config_in(tmp_path), tokenizer))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "groups.build").glob("pairs*")] == [
        "pairs.unfinished"
    ]
    build_groups(config_in(tmp_path), tokenizer, run=Run(workers=1))
    assert files_in(tmp_path) == expected
    assert 100 < len(texts) < 140  # of 400


def test_killed_again_and_again(tokenizer, expected, tmp_path):
    """One output, whose build is killed whenever it has done a quarter of the work."""
    found = [0]
    while kill_build(tmp_path, tokenizer, 1, found[-1] + WRITING // 4):
        found.append(finished_parts(tmp_path))
    assert found == [0, 11, 22, 33, 44], "what is finished is kept from one run to the next"
    assert files_in(tmp_path) == expected


def test_shards_in_any_order_and_the_last_one_merges(tokenizer, expected, tmp_path):
    reports = [
        build_groups(config_in(tmp_path), tokenizer, run=Run(share=share, shares=3, workers=1))
        for share in (2, 0, 1)
    ]
    assert reports[:2] == [None, None]
    assert reports[2].manifest["groups"] == 336
    assert files_in(tmp_path) == expected
    again = build_groups(config_in(tmp_path), tokenizer, run=Run(share=0, shares=3))
    assert again.manifest == reports[2].manifest
    assert files_in(tmp_path) == expected


def test_shards_at_the_same_time(tokenizer, expected, tmp_path):
    """More shards than cores, all started at once; one of them merges, none leaves anything."""
    shards = [
        FORK.Process(
            target=build_groups,
            args=(config_in(tmp_path), tokenizer),
            kwargs={"run": Run(share=share, shares=5, workers=1)},
        )
        for share in range(5)
    ]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert [shard.exitcode for shard in shards] == [0] * 5
    assert files_in(tmp_path) == expected


def test_merge_says_what_is_missing(tokenizer, expected, tmp_path):
    build_groups(config_in(tmp_path), tokenizer, run=Run(share=0, shares=2, workers=1))
    message = r"--merge: 21 of 42 blocks in .*groups\.build are not finished, the first is 1; run"
    with pytest.raises(ValueError, match=message):
        build_groups(config_in(tmp_path), tokenizer, run=Run(merge_only=True))
    build_groups(config_in(tmp_path), tokenizer, run=Run(share=1, shares=2, workers=1))
    assert files_in(tmp_path) == expected


def test_more_shards_than_blocks(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", *({"prompt": "1 ", "completion": "2 3"},) * 3)
    config = BuildConfig(Source((path,)), str(tmp_path / "out" / "groups"), negatives="tn=1")
    reports = [
        build_groups(config, ToyTokenizer(), run=Run(share=share, shares=4)) for share in (3, 0, 1)
    ]
    assert [report is None for report in reports] == [True, False, False]
    assert sorted(os.listdir(tmp_path / "out")) == NAMES


def build_with_small_files(config, tokenizer, limit, messages):
    """In a process of its own: no file may grow beyond `limit` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        build_groups(config, tokenizer, run=Run(workers=2))
    except OSError as error:
        messages.put((error.errno, str(error)))


@pytest.mark.parametrize(
    ("ranker", "records", "limit", "kept", "blocks"),
    [
        ("none", 8, 4_000, {"pairs.unfinished"}, 0),
        ("lexical", 8, 130_000, {"pairs"}, 0),
        ("none", 300, 130_000, {"pairs", "shared", "groups"}, 1),
        ("none", 8, 200_000, {"pairs", "shared", "groups"}, 42),
    ],
    ids=["tokenising", "weighing features", "finishing blocks", "putting together"],
)
def test_a_full_disk_is_explained_and_resumed(
    tokenizer, tmp_path, ranker, records, limit, kept, blocks
):
    """Tokenised records are 80 kB, weights of features 8 MB, a block of 8 records 15 kB, of 34
    50 kB, of 300 500 kB, the files of the store up to 440 kB."""
    config = config_in(tmp_path, ranker=ranker, block_records=records)
    messages = FORK.Queue()
    process = FORK.Process(target=build_with_small_files, args=(config, tokenizer, limit, messages))
    process.start()
    number, message = messages.get(timeout=60)
    process.join()
    assert os.strerror(number) in message
    assert f"finished work is kept in {tmp_path / 'groups.build'}: make room and run" in message
    assert os.listdir(tmp_path) == ["groups.build"]
    folders = {path.name for path in (tmp_path / "groups.build").iterdir() if path.is_dir()}
    assert folders == kept
    assert len(list((tmp_path / "groups.build" / "groups").glob("*"))) == blocks
    build_groups(config, tokenizer)
    resumed = files_in(tmp_path)
    build_groups(replace(config, output_prefix=str(tmp_path / "whole" / "groups")), tokenizer)
    assert files_in(tmp_path / "whole") == resumed


def test_a_damaged_block_is_built_anew(tokenizer, expected, tmp_path):
    build_groups(config_in(tmp_path), tokenizer, run=Run(share=0, shares=2, workers=1))
    damaged = tmp_path / "groups.build" / "groups" / "00000002.npz"
    damaged.write_bytes(damaged.read_bytes()[:500])
    other = Run(share=1, shares=2, workers=1)
    with pytest.raises(ValueError, match=r"00000002\.npz: damaged .* run the same command again"):
        build_groups(config_in(tmp_path), tokenizer, run=other)
    build_groups(config_in(tmp_path), tokenizer)
    assert files_in(tmp_path) == expected


def test_another_command_over_the_same_output_is_refused(tokenizer, expected, tmp_path):
    build_groups(config_in(tmp_path), tokenizer, run=Run(share=0, shares=2, workers=1))
    other = config_in(tmp_path, seed=8)
    message = r"holds unfinished work with seed 7, this command has 8; run that command again"
    with pytest.raises(ValueError, match=message):
        build_groups(other, tokenizer)
    build_groups(config_in(tmp_path), tokenizer)
    message = r"there is a store built with seed 7, this command has 8; remove .*groups\.json to"
    with pytest.raises(ValueError, match=message):
        build_groups(other, tokenizer)
    with pytest.raises(ValueError, match=r'with negatives \{"bn": 3, "tn": 8\}, .* \{"tn": 2\};'):
        build_groups(config_in(tmp_path, negatives="tn=2"), tokenizer)
    assert files_in(tmp_path) == expected


def test_a_dead_worker_is_reported_and_what_is_finished_kept(tmp_path, monkeypatch):
    def deadly(context, count, rng):
        if context.index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return [context.truth] * count

    path = write_jsonl(tmp_path / "r.jsonl", *({"prompt": "1 ", "completion": "2 3"},) * 6)
    config = BuildConfig(
        Source((path,)), str(tmp_path / "groups"), negatives="tn=1", block_records=1
    )
    with monkeypatch.context() as patch:
        patch.setitem(NEGATIVES, "tn", deadly)
        with pytest.raises(ValueError, match=r"--workers 2: a worker was killed, often for lack"):
            build_groups(config, ToyTokenizer(), run=Run(workers=2))
    assert len(os.listdir(tmp_path / "groups.build" / "groups")) <= 5
    assert build_groups(config, ToyTokenizer()).manifest["groups"] == 6


def test_two_ranks(tokenizer, expected, tmp_path):
    """The tool under torchrun's environment: ranks take blocks, the last to finish merges."""
    model = tmp_path / "tokenizer.model"
    train_sentencepiece(Source((DOLLY,)), str(model), 1000)
    out = tmp_path / "out"
    flags = ["--input", DOLLY, "--max-length", 256, "--output-prefix", out / "groups"]
    flags += ["--seed", 7, "--block-records", 8, "--workers", 1]
    flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    outputs = run_pretrain(flags, 2, script="tools/build_negatives.py")
    assert files_in(out) == expected
    assert sum("of K = 12" in output for output in outputs) == 1


class LethalPolicy:
    """Continues every prefix with one token; the first process to ask it anything is killed."""

    kinds = ("an",)
    forks = True
    positions = None
    ends = frozenset()

    def __init__(self, folder):
        self.identity = {"name": "lethal"}
        self._folder = folder

    def sample(self, prefixes, limits, count, rngs, sampling, stops=()):
        try:
            (self._folder / "killed").touch(exist_ok=False)
        except FileExistsError:
            return [
                [np.array([rng.integers(9), 99], dtype=np.int32) for _ in range(count)]
                for rng in rngs
            ]
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_ray_builds_the_same_and_repeats_what_is_lost(tmp_path):
    """A real cluster of this machine, one of whose actors dies in the middle of a block."""
    ray = pytest.importorskip("ray")
    for module in (__name__, "tests.texts"):  # a worker cannot import them
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    path = write_jsonl(
        tmp_path / "r.jsonl", *({"prompt": f"{i} 1 ", "completion": f"{i} 3"} for i in range(20))
    )
    written = []
    for executor in ("ray", "local"):
        prefix = str(tmp_path / executor / "groups")
        config = BuildConfig(Source((path,)), prefix, negatives="an=2,bn=2", block_records=2)
        run = Run(executor=executor, workers=2 if executor == "ray" else 1)
        build_groups(config, ToyTokenizer(), PolicyUse(partial(LethalPolicy, tmp_path)), run)
        written.append(files_in(tmp_path / executor))
    assert (tmp_path / "killed").exists()
    assert written[0] == written[1]
    ray.shutdown()


def test_without_ray(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--executor ray needs .*ray: pip install .*\[ray\]"):
        build_groups(config_in(tmp_path), tokenizer, run=Run(executor="ray"))


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "1/"])
def test_shards_that_are_none(text):
    with pytest.raises(ValueError, match=rf"--shard {text}: write i/n with i from 0 to n - 1"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"executor": "slurm"}, "--executor slurm: unknown; give one of local, ray"),
        ({"workers": 0}, "--workers 0: needs at least 1"),
    ],
)
def test_runs_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Run(**options)


def test_the_manifest_has_no_trace_of_who_built(expected):
    manifest = json.loads(expected["groups.json"])
    assert "shard" not in json.dumps(manifest)
    assert manifest["block_records"] == 8
