"""Each diagnosis is provoked: in histories made by hand, in stores, and in real runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from harness.ranks import ROOT, run_pretrain
from harness.stores import VOCAB_SIZE, null_tokenizer, random_group, write_store
from megatron_cpo.evaluation.summary import describe, read_log
from megatron_cpo.groups.shortcuts import ended_accuracy, rule_accuracy, shortcuts
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.groups.writing import GroupWriter, write_reference_logps
from megatron_cpo.training.diagnosis import (
    REMEDIES,
    Setting,
    diagnose,
    diagnose_store,
)
from tests.runs import MODEL

SETTING = Setting(2.485, warmup=5, named="--lr 2e-05 --cpo-beta 5.0")
K = 5


def names(train: dict, validation: dict | None = None, setting: Setting = SETTING) -> list[str]:
    return [d.name for d in diagnose(train, validation or {}, setting)]


def history(name: str, *values: float, start: int = 1) -> dict[int, dict[str, float]]:
    return {start + i: {name: value} for i, value in enumerate(values)}


def test_loss_above_its_start_by_hand() -> None:
    """Iterations 6 to 10 count, their mean is 3.0; 1.05 times 2.485 is 2.609."""
    values = [2.485, 9, 9, 9, 9, 2.8, 2.9, 3.0, 3.1, 3.2]
    [found] = diagnose(history("cpo_loss", *values), {}, SETTING)
    assert str(found) == (
        "loss above its start: the CPO loss is 3.000 over iterations 6 to 10, after a warm-up of "
        "5; its step-0 value is 2.485 (--lr 2e-05 --cpo-beta 5.0); "
        + REMEDIES["loss above its start"]
    )


@pytest.mark.parametrize(
    ("values", "warmup"),
    [
        ([2.485, 2.6, 2.6, 2.6, 2.6], 0),  # within 5%
        ([2.485, 9, 9, 9, 9, 9, 3, 3], 6),  # two lines after the warm-up say little
        ([2.485, 9, 9, 2.4, 2.4, 2.4, 2.4, 2.4], 0),  # it came back
        ([9, 9, 9, 9, 9], 0),  # it starts from another model than the reference
        ([float("nan")] * 5, 0),  # Megatron ends such a run itself
    ],
)
def test_loss_that_is_no_diagnosis(values: list[float], warmup: float) -> None:
    assert names(history("cpo_loss", *values), setting=Setting(2.485, warmup)) == []


def test_a_resumed_run_compares_with_the_loss_at_the_reference() -> None:
    assert names(history("cpo_loss", 3, 3, 3, start=100)) == ["loss above its start"]
    assert names(history("cpo_loss", 2.5, 2.5, 2.5, start=100)) == []


def test_saturated_accuracy_by_hand() -> None:
    train = history("accuracy", 0, 0.5, 0.98, 0.99, 1, 0.99, 1)
    [found] = diagnose(train, {6: {"accuracy": 0.7}}, SETTING)
    assert found.name == "accuracy saturated"
    assert found.found == (
        "rank-1 accuracy is 0.992 over iterations 3 to 7, 0.700 on held-out groups"
    )
    assert names(history("accuracy", 0.9, 0.9, 1, 1, 1)) == []


def test_truth_that_falls_by_hand() -> None:
    assert names(history("truth_logratio", 0, -1.5, -2)) == ["truth falls"]
    assert names(history("truth_logratio", 0, -0.5, -2)) == []
    assert names(history("truth_logratio", 3, 3, 3)) == []


def test_held_out_loss_that_turns_up_by_hand() -> None:
    """2.0, 1.5, 1.6 held out, training 2.2, 1.8, 1.2: up by 7% since the second evaluation."""
    train = history("cpo_loss", 2.2, 1.8, 1.2)
    held_out = history("cpo_loss", 2.0, 1.5, 1.6)
    [found] = diagnose(train, held_out, SETTING)
    assert found.name == "held-out loss turns up"
    assert "was 1.500 at iteration 2 and is 1.600 at 3" in found.found
    assert "went from 2.000 to 1.200" in found.found
    assert names(train, history("cpo_loss", 2.0, 1.5, 1.57)) == []  # 4.7%
    assert names(train, history("cpo_loss", 2.0)) == []
    rising = history("cpo_loss", 2.2, 1.8, 2.6)
    assert names(rising, held_out) == [], "both rise: that is no over-fitting"
    assert names(history("lm_loss", 3, 2, 1), history("lm_loss", 3, 3, 4)) != []


def test_rules_by_hand() -> None:
    """The longest: alone, one of two, not: (1 + 1/2 + 0) / 3; a missing candidate is none."""
    lengths = np.array([[3, 1, 2], [3, 3, 1], [1, 2, -1]])
    assert rule_accuracy(lengths) == pytest.approx(0.5)
    assert ended_accuracy({"gt": 10, "an": 10}, {"an": 0.5, "gt": 1}) == pytest.approx(0.75)
    # Two draws, each ended in a half: (1/4) 1 + (1/2) 1/2 + (1/4) 1/3.
    assert ended_accuracy({"gt": 10, "an": 20}, {"an": 0.5}) == pytest.approx(7 / 12)
    assert ended_accuracy({"gt": 10, "tn": 10}, {}) == pytest.approx(1 / 2), "cut on purpose"


def test_a_store_that_tells_by_the_end() -> None:
    """11 samples, all of them cut: whatever ends by itself is the truth."""
    found = {"the shortest": 0.2, "the longest": 0.1}
    rule = ended_accuracy({"gt": 10, "an": 110}, {"an": 0.0})
    [diagnosis] = diagnose_store(found | {"ends by itself": rule}, 12)
    assert str(diagnosis).startswith(
        'the end alone tells: "ends by itself" is the truth in 100% of the groups, by chance in 8%;'
    )
    assert diagnose_store(found, 12) == []
    assert diagnose_store({"the longest": 1.0}, 1) == [], "a group of one candidate has no contest"


def truncations(path: Path, groups: int, seed: int = 0) -> str:
    """A store whose negatives are all truncations of y_1, under made-up references."""
    from megatron_cpo.records.tokenizing import tokenizer_identity

    rng = np.random.default_rng(seed)
    writer = GroupWriter(
        str(path),
        {"tokenizer": tokenizer_identity(null_tokenizer())},
        VOCAB_SIZE + 1,
    )
    references = []
    for _ in range(groups):
        group = random_group(rng, K, longest=16)
        truth = group.candidates[0]
        for k in range(1, K):
            group.candidates[k] = np.append(truth[: rng.integers(1, len(truth) - 1)], truth[-1])
            group.kinds[k] = 4
        writer.add(group)
        references.append(np.array([-6.2 * len(c) for c in group.candidates], dtype=np.float32))
    writer.close()
    identity = {"name": "made up", "iteration": "0", "sha256": "0" * 64}
    write_reference_logps(str(path), references, identity)
    return str(path)


def test_rules_of_stores(tmp_path: Path) -> None:
    """Equal to a loop over the groups; of truncations, the longest is the truth in every one."""
    reader = GroupReader(truncations(tmp_path / "tn", 20))
    reader.manifest["statistics"] |= {"ended_share": {"gt": 1.0}}
    found = shortcuts(reader)
    assert found == pytest.approx({"the shortest": 0, "the longest": 1, "ends by itself": 1 / K})
    mixed = GroupReader(write_store(tmp_path / "mixed", 40, K))
    expected = []
    for index in range(len(mixed)):
        lengths = [len(c) for c in mixed[index].candidates]
        ties = lengths.count(min(lengths))
        expected.append((lengths[0] == min(lengths)) / ties)
    assert shortcuts(mixed)["the shortest"] == pytest.approx(np.mean(expected))
    assert "ends by itself" not in shortcuts(mixed)


RUN = (
    "--seq-length 256 --micro-batch-size 1 --global-batch-size 2 --lr-decay-style constant "
    f"--log-interval 1 --eval-iters 1 --clip-grad 0 --cpo-aux-loss --cpo-k {K} "
    "--cpo-no-warmup"
).split()


def said(output: str) -> dict[str, int]:
    """The iteration of each diagnosis of a log, and that each was said once."""
    found = re.findall(r"\[cpo\] diagnosis at iteration (\d+): (.*?): ", output)
    assert len({name for _, name in found}) == len(found)
    return {name: int(at) for at, name in found}


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    """Real steps at a rate far too high: said in the log, and at the end of the summary."""
    store = write_store(tmp_path / "groups", 60, K, longest=16)
    flags = f"--lr 0.3 --train-iters 10 --eval-interval 1000 --cpo-data-path {store}".split()
    [output] = run_pretrain([*MODEL, *RUN, *flags], 1)
    found = said(output)
    assert 4 <= found["loss above its start"] <= 10
    assert 3 <= found["truth falls"] <= 10
    assert "(--lr 0.3 --cpo-beta 5.0); lower --lr or --cpo-beta" in output
    summary = describe(read_log(output.splitlines()))
    assert "diagnosis    loss above its start: the CPO loss is " in summary
    assert "(--lr 0.3 --cpo-beta 5.0)" in summary


def test_a_run_that_memorises_says_so(tmp_path: Path) -> None:
    """A dozen groups whose length tells the truth, again and again; evaluated on strangers."""
    store = truncations(tmp_path / "tn", 12)
    other = write_store(tmp_path / "other", 60, K, seed=1, longest=16)
    reader = GroupReader(other)
    logps = [reader[index].reference_logps for index in range(len(reader))]
    write_reference_logps(other, logps, {"name": "old", "iteration": "5", "sha256": "1" * 64})
    flags = (
        "--lr 3e-3 --train-iters 40 --eval-interval 10 --cpo-beta 0.5 "
        f"--cpo-data-path {store} --cpo-valid-data-path {other}"
    )
    [output] = run_pretrain([*MODEL, *RUN, *flags.split()], 1)
    assert f"{other} was scored under old iteration 5 (111111111111), {store} under made" in output
    found = said(output)
    assert found["length alone tells"] == 0
    assert found["accuracy saturated"] > 3
    assert found["held-out loss turns up"] in (20, 30, 40)
    summary = describe(read_log(output.splitlines()))
    for name in ("length alone tells", "accuracy saturated", "held-out loss turns up"):
        assert f"diagnosis    {name}: " in summary


def test_a_diagnosis_that_has_passed_is_said_to_have(tmp_path: Path) -> None:
    """And one of an attempt that was repeated is forgotten."""
    line = " [cpo] diagnosis at iteration {}: truth falls: log pi(y_1 | x) is 3 below; raise it"
    lines = [f" [cpo] iteration {i}: truth_logratio={v:.6e}"
             for i, v in enumerate((0, -2, -2, 2, 2, 2, 2, 2), start=1)]  # fmt: skip
    lines.insert(3, line.format(3))
    text = describe(read_log(lines))
    assert "diagnosis    passed since iteration 3: truth falls: log pi" in text
    again = [*lines[:4], *lines[2:3], *lines[4:]]  # resumed at 3
    assert "diagnosis" not in describe(read_log(again))


def test_the_page_has_a_row_for_each_diagnosis() -> None:
    rows = re.findall(r"^\| `([a-z][a-z -]+)` \|", (ROOT / "docs/settings.md").read_text(), re.M)
    assert rows == list(REMEDIES)
