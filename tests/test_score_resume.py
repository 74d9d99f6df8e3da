"""Scoring under a Megatron checkpoint that is killed ends in the bytes of one that was not."""

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from harness.ranks import ROOT, run_pretrain, run_ranks
from harness.stores import null_tokenizer, write_store
from megatron_cpo.groups.store import FILES, GroupReader
from megatron_cpo.scoring.folder import ScoreFolder
from megatron_cpo.storage.remote import sha256
from tests.checkpoints import change_weight
from tests.faults import stand_still_once
from tests.tiny_models import GPT_FLAGS, LLAMA_FLAGS, train_megatron

K, GROUPS = 6, 200
TOOL = "tools/build_negatives.py"
NAMES = sorted(f"groups{suffix}" for suffix in (*FILES, ".json"))
LAYOUTS = {  # ranks of the run that is killed, of the two that are not, and their flags
    "one rank": (1, 1, ""),
    "DP=2, then one rank": (2, 1, ""),
    "TP=2": (2, 2, "--tensor-model-parallel-size 2"),
    "PP=2": (2, 2, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return train_megatron(tmp_path_factory.mktemp("reference"), GPT_FLAGS)


@pytest.fixture(scope="module")
def unscored(tmp_path_factory):
    return write_store(
        tmp_path_factory.mktemp("unscored") / "groups", GROUPS, K, seed=1, longest=16, scored=False
    )


def copy_of(store, folder):
    folder.mkdir(exist_ok=True)
    for suffix in (*FILES, ".json"):
        shutil.copyfile(store + suffix, folder / f"groups{suffix}")
    return str(folder / "groups")


def flags_of(store, reference, *more):
    flags = ["--score-only", "--output-prefix", store, "--load", reference]
    return [*GPT_FLAGS, *flags, "--micro-batch-size", "2", *map(str, more)]


def sums_in(folder):
    """sha256 of every file; nothing else may be there."""
    assert sorted(os.listdir(folder)) == NAMES
    return {name: sha256(str(folder / name)) for name in NAMES}


def run_and_die(argv, victim, folder, finished):
    """The tool; SIGKILL takes this rank, if it is the victim, once so many blocks are finished.

    Who writes a block after that stands still, and so does whoever waits for it.
    """
    reached = Path(f"{folder}.reached")
    stand_still_once(lambda: len(list(Path(folder).glob("*.npz"))) >= finished, reached.touch)

    def die():
        while not reached.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == str(victim):
        threading.Thread(target=die, daemon=True).start()
    sys.argv = [TOOL, *argv]
    runpy.run_path(str(ROOT / TOOL), run_name="__main__")


def kill_while_scoring(argv, world, victim, finished):
    """The finished blocks of a run that is killed; the other ranks are killed with it."""
    folder = Path(argv[argv.index("--output-prefix") + 1] + ".score") / "logps"
    with pytest.raises(RuntimeError, match=f"rank{victim} of {world} died with exit code -9"):
        run_ranks(run_and_die, world, argv, victim, folder, finished)
    return sorted(folder.glob("*.npz"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_and_resumed_in_the_same_bytes(reference, unscored, tmp_path, layout):
    killed_world, world, flags = LAYOUTS[layout]
    whole, killed = (copy_of(unscored, tmp_path / name) for name in ("whole", "killed"))
    run_pretrain(flags_of(whole, reference, *flags.split()), world, script=TOOL)
    argv = flags_of(killed, reference, *flags.split())
    done = kill_while_scoring(argv, killed_world, killed_world - 1, 2)
    assert len(done) in ((2, 3) if layout.startswith("DP=2") else (2,))
    outputs = run_pretrain(argv, world, script=TOOL)
    assert sums_in(tmp_path / "killed") == sums_in(tmp_path / "whole")
    assert f"scored {GROUPS} groups under model iteration 1" in outputs[0]
    assert "mean reference log-prob" in outputs[0]


def test_experts_that_replicas_share(unscored, tmp_path):
    """All replicas have to come to the experts, though one of them has finished its block."""
    experts = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
    model = [*LLAMA_FLAGS, *experts.split()]
    load = train_megatron(tmp_path / "experts", [*GPT_FLAGS, *model])
    flags = [*model, "--expert-model-parallel-size", 2]
    whole, killed = (copy_of(unscored, tmp_path / name) for name in ("whole", "killed"))
    run_pretrain(flags_of(whole, load, *flags), 2, script=TOOL)
    argv = flags_of(killed, load, *flags)
    done = kill_while_scoring(argv, 2, 0, 4)
    done[1].unlink()  # of rank 1; block 0, of the same round, is there
    run_pretrain(argv, 2, script=TOOL)
    assert sums_in(tmp_path / "killed") == sums_in(tmp_path / "whole")


def test_finished_blocks_are_not_scored_again(reference, unscored, tmp_path):
    """Blocks that are marked stay as they are; a store that is scored stays as it is, too."""
    store = copy_of(unscored, tmp_path / "store")
    argv = flags_of(store, reference)
    marked = {}
    for path in kill_while_scoring(argv, 1, 0, 3):
        with np.load(path) as block:
            marked[int(path.stem)] = len(block["logps"])
        np.savez(path, logps=np.full(marked[int(path.stem)], -7, dtype=np.float32))
    run_pretrain(argv, 1, script=TOOL)
    reader = GroupReader(store)
    found = np.concatenate([reader[i].reference_logps for i in range(len(reader))])
    assert marked.keys() >= {0, 1, 2}
    assert (found == -7).sum() == sum(marked.values())
    assert np.isfinite(found).all()
    before = sums_in(tmp_path / "store")
    [output] = run_pretrain([*argv, "--tensor-model-parallel-size", 1], 1, script=TOOL)
    assert "is scored under model iteration 1 already: it is left as it is" in output
    assert sums_in(tmp_path / "store") == before


def test_what_would_be_mixed_is_refused(reference, unscored, tmp_path):
    """Both values are shown, and the finished blocks are still there to go on with."""
    store = copy_of(unscored, tmp_path / "store")
    argv = flags_of(store, reference)
    done = kill_while_scoring(argv, 1, 0, 2)
    other = shutil.copytree(reference, tmp_path / "other" / "model")
    change_weight(Path(other))
    digest = '"[0-9a-f]{64}"'
    for flags, message in [
        (["--rotary-percent", "0.5"], r"rotary_percent 1\.0, this command has 0\.5"),
        (["--seq-length", "256"], "row_tokens 128, this command has 256"),
        (["--load", other], f"reference digest {digest}, this command has {digest}"),
    ]:
        with pytest.raises(
            Exception, match=r"groups\.score holds unfinished work with .*" + message
        ):
            run_pretrain([*argv, *flags], 1, script=TOOL)
    assert sorted((tmp_path / "store" / "groups.score" / "logps").glob("*.npz")) == done
    with pytest.raises(Exception, match=r"has 500 tokens, this run's tokenizer 490; use the model"):
        run_pretrain([*argv, "--vocab-size", "490"], 1, script=TOOL)
    write_store(tmp_path / "new" / "groups", GROUPS, K, seed=2, longest=16, scored=False)
    copy_of(str(tmp_path / "new" / "groups"), tmp_path / "store")
    with pytest.raises(Exception, match=r'files \.bin \{"bytes": \d+, "sha256": "[0-9a-f]{64}"\},'):
        run_pretrain(argv, 1, script=TOOL)
    copy_of(unscored, tmp_path / "store")
    run_pretrain(argv, 1, script=TOOL)
    sums_in(tmp_path / "store")


REFERENCE = {"name": "any", "iteration": "1", "sha256": "0" * 64}
BLOCKS = [range(first, min(first + 64, GROUPS)) for first in range(0, GROUPS, 64)]


def all_blocks_of(store):
    """A folder of which every block is there: log-probs 0, 1, 2 ... of the store."""
    work = ScoreFolder(store)
    work.check(null_tokenizer())
    assert work.begin(REFERENCE)
    for block, groups in enumerate(BLOCKS):
        logps = np.arange(groups.start * K, groups.stop * K, dtype=np.float32)
        work.write_block(block, groups, np.split(logps, len(groups)), "any")
    return work


def finish_and_die(work, calls):
    """SIGKILL before that many renames and removals are done."""
    count = iter(range(calls))

    def counted(call):
        def count_down(*args, **options):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return count_down

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    work.finish(BLOCKS)


def test_killed_at_every_step_of_putting_it_into_the_store(unscored, tmp_path):
    expected = copy_of(unscored, tmp_path / "expected")
    assert all_blocks_of(expected).finish(BLOCKS) == []
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        work = all_blocks_of(copy_of(unscored, folder))
        process = multiprocessing.get_context("fork").Process(
            target=finish_and_die, args=(work, kills)
        )
        process.start()
        process.join()
        again = ScoreFolder(str(folder / "groups"))
        again.check(null_tokenizer())
        if again.begin(REFERENCE):
            assert again.finish(BLOCKS) == []
        assert sums_in(folder) == sums_in(tmp_path / "expected")
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills > 10


def test_a_folder_that_could_not_be_removed(unscored, tmp_path, monkeypatch):
    """An I/O error once the store has its log-probs: the same command removes it, another's not."""
    store = copy_of(unscored, tmp_path / "store")
    work = all_blocks_of(store)
    with monkeypatch.context() as patch:
        patch.setattr(ScoreFolder, "remove", lambda _: (_ for _ in ()).throw(OSError(5, "EIO")))
        with pytest.raises(OSError, match="EIO"):
            work.finish(BLOCKS)
    again = ScoreFolder(store)
    assert not again.is_done({**REFERENCE, "iteration": "2"})
    assert again.path.exists()
    assert again.is_done(REFERENCE)
    sums_in(tmp_path / "store")


def test_a_damaged_block_is_scored_anew(unscored, tmp_path):
    store = copy_of(unscored, tmp_path / "store")
    work = all_blocks_of(store)
    damaged = Path(store + ".score") / "logps" / "00000002.npz"
    short = damaged.with_name("00000003.npz").read_bytes()
    for content in (b"", damaged.read_bytes()[:-30], short):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"00000002\.npz: damaged .* run the same command ag"):
            work.finish(BLOCKS)
        assert work.finish(BLOCKS) == [2]
    assert GroupReader(store).manifest["reference"] is None
