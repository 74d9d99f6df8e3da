"""A Ray cluster of several raylets on this machine, one of which dies in the middle of a build."""

import json
import random
import shutil
import sys
import threading
import time
from pathlib import Path

from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
from tests.chaos.places import Outcome, files_of
from tests.texts import DOLLY, dolly_tokenizer

NODES = 2
"""Beside the head, a core each."""


def campaign(folder: Path, runs: int, seed: int, log: Path) -> int:
    """Print the table; the number of runs whose store is not that of one process, or is not there.

    A node dies when so many files of the build are there, drawn anew for each run: SIGKILL for its
    raylet, with the workers and the objects that it holds.
    """
    import ray

    tokenizer = dolly_tokenizer(folder)
    usual = _build(folder / "usual", tokenizer, Run(workers=1))
    bad = lost = 0
    ray.cloudpickle.register_pickle_by_value(sys.modules["tests.texts"])
    for number in range(runs):
        chance = random.Random(f"{seed} nodes {number}")
        where = folder / str(number)
        killed, found = _with_a_death(where, tokenizer, chance.randrange(2, 30))
        lost += killed
        if found != usual:
            bad += 1
            note = {"part": "nodes", "run": number, "differ": sorted(found.items() ^ usual.items())}
            with open(log, "a", encoding="utf-8") as notes:
                notes.write(json.dumps(note) + "\n")
        shutil.rmtree(where)
    print("| nodes | runs | a node died | lost or wrong |\n| --- | --- | --- | --- |")
    print(f"| {NODES} and the head | {runs} | {lost} | {bad} |", flush=True)
    return bad


def _build(folder: Path, tokenizer: object, run: Run) -> Outcome:
    folder.mkdir()
    source = Source((DOLLY,), max_length=256)
    config = BuildConfig(
        source, str(folder / "groups"), negatives="bn=3,tn=8", seed=7, block_records=4
    )
    build_groups(config, tokenizer, run=run)
    return files_of(folder)


def _with_a_death(folder: Path, tokenizer: object, files: int) -> tuple[bool, Outcome]:
    """Whether a node died before the build had ended, and the build's result."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(NODES)]
    done = threading.Event()
    killed: list[bool] = []

    def kill() -> None:
        while not done.is_set() and len(list(folder.rglob("*"))) < files:
            time.sleep(0.02)
        if not done.is_set():
            cluster.remove_node(nodes[0], allow_graceful=False)
            killed.append(not done.is_set())

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = _build(folder, tokenizer, Run(executor="ray", workers=NODES))
    except Exception as error:
        found = {"error": repr(error)}
    finally:
        done.set()
        killer.join()
        ray.shutdown()
        cluster.shutdown()
    return any(killed), found
