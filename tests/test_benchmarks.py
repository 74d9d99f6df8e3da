"""What benchmarks count must be right; what they time cannot be tested."""

import sys

import pytest
import torch

from benchmarks.__main__ import PARTS, main
from benchmarks.communication import Counted
from benchmarks.head import PeakBytes
from benchmarks.scaling import _group
from benchmarks.setting import Times
from harness.ranks import run_ranks


def test_help_names_every_part(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert ", ".join(PARTS) in " ".join(capsys.readouterr().out.split())


def counted_collectives() -> dict[str, int]:
    """10 numbers summed over both ranks, 20 gathered from them, 100 in a group of one."""
    torch.distributed.init_process_group("gloo")
    alone = [torch.distributed.new_group([rank]) for rank in range(2)]
    with Counted() as found:
        torch.distributed.all_reduce(torch.ones(10))
        torch.distributed.all_gather_into_tensor(torch.ones(20), torch.ones(10))
        torch.distributed.all_reduce(torch.ones(100), group=alone[torch.distributed.get_rank()])
    assert found.calls == dict.fromkeys(found.bytes, 1)
    return dict(found.bytes)


def test_communication_is_counted_in_bytes() -> None:
    """float32; a rank alone sends nothing."""
    for found in run_ranks(counted_collectives, 2):
        assert sorted(found.values()) == [40, 80]


def test_ratios_are_medians_of_ratios() -> None:
    """A repetition that is slow for both does not count: 2, 2 and 3, where medians give 3."""
    times = Times(a=[2.0, 20.0, 3.0], b=[1.0, 10.0, 1.0])
    assert times.ratio("a", "b") == 2
    assert times.median("a") == 3


def test_peak_bytes() -> None:
    """1000 float32 and a sum of them, then one of the two is dropped."""
    with PeakBytes() as found:
        one = torch.zeros(1000)
        two = one + 1
        del one
        two.add_(1)
    assert found.peak == 8000


@pytest.mark.parametrize("k", [2, 12, 48])
def test_groups_of_given_lengths(k: int) -> None:
    group = _group(k, prefix=26, continuation=40, seed=0)
    assert len(group.prefix) == 26
    assert len(group.candidates) == k
    assert len(group.candidates[0]) == 40
    assert max(map(len, group.candidates)) <= 40
