"""What one process of a machine reads for all of its processes."""

import datetime
import os
import time

import pytest
import torch

from harness.ranks import run_ranks
from megatron_cpo.checkpoints.formats.opening import open_model
from megatron_cpo.host.node import once_a_node
from megatron_cpo.host.waiting import leave_together, on_first_rank
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from tests.texts import ToyTokenizer
from tests.tiny_models import save_hugging_face


def two_nodes() -> list[int]:
    """On 4 ranks, two a node: who found what this rank is told."""
    rank = int(os.environ["RANK"])
    os.environ |= {
        "GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"
    }  # fmt: skip
    told = once_a_node("who", lambda: rank)

    def fails() -> int:
        if rank == 2:
            raise ValueError("cannot be read here")
        return rank

    if rank == 2:
        with pytest.raises(ValueError, match="cannot be read here"):
            once_a_node("who reads it", fails)
        return [told]
    return [told, once_a_node("who reads it", fails)]


def test_the_first_of_each_node_finds_out() -> None:
    """And where it fails the others find out for themselves, as they would have without it."""
    assert run_ranks(two_nodes, 4) == [[0, 0], [0, 0], [2], [2, 3]]


def identity_and_reads(folder: str) -> tuple[dict[str, str], int]:
    """On a rank: a policy's identity, and the bytes that were read for it."""
    policy = HuggingFacePolicy(folder, ToyTokenizer())
    read, count = os.preadv, 0

    def counted(*args: int) -> int:
        nonlocal count
        count += (found := read(*args))
        return found

    os.preadv = counted
    return policy.identity, count


def test_a_hugging_face_model_is_digested_once(tmp_path) -> None:
    folder = save_hugging_face(tmp_path, "gpt2")
    (ours, all_bytes), (theirs, none) = run_ranks(identity_and_reads, 2, folder)
    files = [tmp_path / name for name in os.listdir(tmp_path)]
    weights = [path for path in files if path.suffix == ".safetensors" or path.stem == "config"]
    assert all_bytes == sum(path.stat().st_size for path in weights) and none == 0
    assert ours == theirs
    assert ours["digest"] == open_model(tmp_path).identity()["digest"]


def patient() -> str:
    """On a rank of a process group whose collectives may take a second: rank 0 takes longer.

    And rank 0, which waits for one that fails, is told why.
    """
    patience = datetime.timedelta(seconds=1)
    torch.distributed.init_process_group("gloo", timeout=patience)
    found = on_first_rank(lambda: time.sleep(2.5) or "found")

    def meet() -> None:
        with leave_together():
            if torch.distributed.get_rank() == 1:
                raise ValueError("a bad record")

    with pytest.raises(ValueError, match=r"^a bad record$"):
        meet()
    return found


def test_a_rank_that_takes_long_is_waited_for() -> None:
    """Whatever --distributed-timeout-minutes is: to read a large checkpoint takes longer."""
    assert run_ranks(patient, 2) == ["found", "found"]
