"""What benchmarks count must be right; what they time cannot be tested."""

import sys

import pytest
import torch

from benchmarks.__main__ import PARTS, main
from benchmarks.communication import Counted
from benchmarks.evidence_lines import name_of
from benchmarks.evidence_tables import tables
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


def evidence(variant, seed, values, highest=1.7):
    """A line of a model whose texts have these shares of repeated 4-grams."""
    mean = sum(values) / len(values)
    training = {
        "command": "train", "reference_loss": 1.6, "highest": highest, "last": 1.0,
        "lm_loss": 2.0, "truth_logratio": -1.0,
    }  # fmt: skip
    return {
        "variant": variant, "seed": seed, "alpha": 0.0, "decoding": "greedy", "commit": "abc",
        "command": f"run --seeds {seed}",
        "figures": {"seq_rep_4": [mean, 0, 1]}, "values": {"seq_rep_4": values},
        "training": training, "ranking": {"accuracy": [0.5, 0, 1]},
    }  # fmt: skip


def test_evidence_pairs_prompts_of_the_same_seed():
    lines = [
        evidence("mle", 1, [0.1, 0.3, 0.2]), evidence("mle", 2, [0.5, 0.5, 0.5]),
        evidence("bn", 1, [0.2, 0.4, 0.3], highest=1.76), evidence("bn", 2, [0.5, 0.5, 0.5]),
        evidence("an", 1, [0.1, 0.1, 0.5]),
    ]  # fmt: skip
    page = tables(lines)
    rows = {row.split(" |")[0][2:]: row for row in page.split("**greedy**, minus")[1].splitlines()}
    assert "+0.050 [+0.050, +0.050]" in rows["bn"] and "(+0.100, +0.000)" in rows["bn"]
    assert "| an | 1 | +0.033 [-" in rows["an"], "with seed 1 of mle alone"
    assert "| bn | 1, 2 | 1.10, 1.06 | 1.00 | 2.00 | -1.00 | 0.50 |" in page
    assert page.endswith("Commits abc; `run --seeds 1 2`.")
    assert tables([]) == "No run of it has ended yet."


def test_evidence_shows_mauve_of_each_seed():
    lines = [
        evidence("mle", 1, [0.1, 0.3, 0.2]) | {"mauve": [0.5, 0.0125, 200]},
        evidence("mle", 2, [0.5, 0.5, 0.5]) | {"mauve": [0.625, 0.0, 200]},
    ]  # fmt: skip
    assert "| mle | 1, 2 | 0.350 | 0.500 ± 0.013, 0.625 ± 0.000 |" in tables(lines)


def test_evidence_keeps_two_ways_of_sampling_apart():
    """Decodings as files of texts name them."""
    named = [
        name_of("greedy, at most 8 tokens"), name_of("4 beams, at most 8 tokens"),
        name_of("sampled, top-k 50, temperature 1, seed 1, 1 a prompt, at most 8 tokens"),
        name_of("sampled, all tokens, top-p 0.95, temperature 1, seed 1, 1 a prompt"),
    ]  # fmt: skip
    assert named == ["greedy", "4 beams", "sampled", "sampled, top-p 0.95"]
