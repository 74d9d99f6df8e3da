"""What a user relies on in a run: resuming, packing, evaluation, and Megatron left alone."""

import re
import signal
from pathlib import Path

import pytest
import torch

from harness.ranks import ROOT, parse_losses, run_pretrain, run_ranks
from harness.stores import write_store
from megatron_cpo.groups.plan import pack
from megatron_cpo.groups.store import GroupReader
from tests.corpora import write_corpus
from tests.runs import CPO, MODEL, cpo_curves, signalled, weights

RUN = (
    "--seq-length 256 --micro-batch-size 1 --lr 0.01 --lr-decay-style constant --log-interval 1 "
    "--eval-iters 2 --eval-interval 1000 --ckpt-format torch_dist"
).split()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_store(tmp_path_factory.mktemp("store") / "groups", 300, 5, longest=16)


def train(store: str, *flags: str, world_size: int = 1, cpo: list[str] = CPO) -> str:
    """The last rank's log of a run."""
    return run_pretrain([*MODEL, *RUN, *cpo, "--cpo-data-path", store, *flags], world_size)[-1]


@pytest.mark.parametrize("objective", ["best", "ranked"])
def test_one_batch_is_one_batch_however_it_is_packed(tmp_path: Path, objective: str) -> None:
    """The same groups in rows of 160, 256 and 512 tokens give the same curve over 10 steps."""
    store = write_store(tmp_path / "groups", 24, 5, longest=16)
    sizes, _ = GroupReader(store).tree_sizes()
    assert sizes.max() <= 160, "every group must fit the shortest row"
    start = str(
        tmp_path / "start"
    )  # random weights depend on the row length, through Megatron's warm-up
    one = "--global-batch-size 1 --train-iters 1 --lr 0 --eval-iters 0 --save-interval 1"
    train(store, *one.split(), "--save", start)
    curves = []
    for tokens in (160, 256, 512):
        rows = len(pack(sizes, tokens, None, seed=7))  # one epoch is one global batch
        flags = f"--seq-length {tokens} --global-batch-size {rows} --split 1,0,0 --eval-iters 0"
        flags += f" --train-iters 10 --cpo-objective {objective} --optimizer sgd --lr 0.05"
        curves.append(cpo_curves(train(store, *flags.split(), "--load", start, "--finetune")))
    rows_used = {round(curve["groups_per_row"][0], 3) for curve in curves}
    assert len(rows_used) == 3, "the three runs must be packed differently to show anything"
    for name in ("cpo_loss", "lm_loss", "margin"):
        assert len(curves[0][name]) == 10
        for other in curves[1:]:
            assert other[name] == pytest.approx(curves[0][name], rel=1e-5, abs=1e-5)


def test_killed_run_continues_exactly(store: str, tmp_path: Path) -> None:
    """Kill -9 after iteration 5; the restart from iteration 4 repeats the uninterrupted curve."""
    flags = "--global-batch-size 2 --train-iters 8 --save-interval 4".split()
    whole = cpo_curves(train(store, *flags, "--save", str(tmp_path / "whole")))
    flags += ["--save", str(tmp_path / "killed"), "--load", str(tmp_path / "killed")]
    run = [*MODEL, *RUN, *CPO, "--cpo-data-path", store, *flags]
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_ranks(signalled, 1, run, "[cpo] iteration 5:", signal.SIGKILL)
    resumed = cpo_curves(train(store, *flags))
    assert len(whole["cpo_loss"]) == 8
    for name in ("cpo_loss", "lm_loss", "margin", "truth_logp"):
        assert resumed[name] == whole[name][4:]
    ends = [run_ranks(weights, 1, str(tmp_path / n), 8)[0] for n in ("whole", "killed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_evaluation_reports_the_same_metrics(store: str) -> None:
    """At rate 0, evaluating the training store gives the training metrics of the same rows."""
    flags = "--global-batch-size 4 --train-iters 2 --lr 0 --eval-interval 2 --eval-iters 2".split()
    output = train(store, *flags, "--cpo-valid-data-path", store)
    trained, evaluated = cpo_curves(output), parse_losses(output)
    for name, key in (("cpo_loss", "cpo loss"), ("margin", "cpo margin"), ("lm_loss", "lm loss")):
        found = evaluated[f"{key} value"][0]
        # Per-batch means weigh two batches alike, the evaluation weighs their groups alike.
        assert min(trained[name]) - 1e-5 <= found <= max(trained[name]) + 1e-5


def test_groups_longer_than_a_row_are_left_out_and_counted(store: str) -> None:
    """The log has their number; the others train."""
    sizes, _ = GroupReader(store).tree_sizes()
    tokens = int(sizes.max()) - 1
    too_long = int((sizes > tokens).sum())
    flags = f"--seq-length {tokens} --global-batch-size 2 --train-iters 1 --eval-iters 0".split()
    output = train(store, *flags, "--split", "1,0,0")
    assert f"cpo train data: {too_long} groups have more than --seq-length {tokens}" in output
    assert len(cpo_curves(output)["cpo_loss"]) == 1


def test_attention_dropout_is_set_to_zero_and_said(store: str) -> None:
    """Megatron's default of 0.1, which --use-checkpoint-args may force, trains like 0."""
    flags = "--global-batch-size 2 --train-iters 2 --eval-iters 0".split()
    output = train(store, *flags, "--attention-dropout", "0.1")
    assert "--attention-dropout 0.1 is set to 0" in output
    assert cpo_curves(output) == cpo_curves(train(store, *flags))


def test_metrics_are_in_tensorboard(store: str, tmp_path: Path) -> None:
    """Every metric of the log, negative ones included, with the same values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--global-batch-size 4 --train-iters 3 --eval-iters 0 --tensorboard-log-interval 1"
    output = train(store, *flags.split(), "--tensorboard-dir", str(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curves = cpo_curves(output)
    for name, tag in (
        ("cpo_loss", "cpo loss"),
        ("margin", "cpo margin"),
        ("packing", "cpo packing"),
    ):
        values = [event.value for event in events.Scalars(tag)]
        assert values == pytest.approx(curves[name], rel=1e-5)


def test_split_keeps_groups_apart(store: str) -> None:
    """Without a store of its own, evaluation uses the share that --split gives it."""
    flags = "--global-batch-size 4 --train-iters 1 --split 80,20,0 --eval-iters 1".split()
    output = train(store, *flags)
    assert re.search(r"cpo train data: .* with \d+ groups", output)
    assert "cpo loss value" in output


def test_late_pretraining_mixes_plain_rows(store: str, tmp_path: Path) -> None:
    """--cpo-fraction 0.5: half the rows hold groups, the LM loss covers the plain rows' tokens.

    4 samples of 64 tokens in a row of 280 leave 24 of them empty, which the log says.
    """
    text = write_corpus(tmp_path, 499, documents=100, tokens=200)
    flags = "--global-batch-size 4 --train-iters 3 --cpo-fraction 0.5 --eval-iters 0".split()
    flags += ["--seq-length", "280"]
    output = train(store, *flags, *text)
    [said] = re.findall(r"plain rows hold .*", output)
    assert said.startswith("plain rows hold 4 samples of 64 tokens")
    assert said.endswith("8.6% padding; a --seq-length of 256 or 320 leaves them none")
    [(epochs, rows)] = re.findall(r"data: 12 rows .* ([\d.]+) epochs of (\d+) rows", output)
    assert float(epochs) == pytest.approx(6 / int(rows), abs=0.01)  # half of them hold groups
    mixed = cpo_curves(output)
    alone = cpo_curves(train(store, *flags, "--cpo-fraction", "1"))
    half = [rows / 2 for rows in alone["groups_per_row"]]
    assert mixed["groups_per_row"][0] == pytest.approx(half[0], rel=0.3)
    parallel = cpo_curves(train(store, *flags, *text, world_size=2))
    for name in ("cpo_loss", "lm_loss"):
        assert parallel[name] == pytest.approx(mixed[name], rel=1e-5)


def test_megatrons_line_leaves_out_batches_without_a_group(store: str, tmp_path: Path) -> None:
    """Of 6 batches of one row 3 are plain; their losses of 0 halved the mean, and were plotted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = write_corpus(tmp_path, 499, documents=100, tokens=200)
    flags = "--global-batch-size 1 --train-iters 6 --log-interval 6 --cpo-fraction 0.5".split()
    board = tmp_path / "tensorboard"
    flags += ["--tensorboard-dir", str(board), "--tensorboard-log-interval", "1"]
    output = train(store, *flags, "--eval-iters", "0", *text)
    ours, theirs = cpo_curves(output), parse_losses(output)
    names = {"cpo loss": "cpo_loss", "lm loss": "lm_loss", "cpo groups per row": "groups_per_row"}
    for name, own in names.items():
        assert theirs[name][-1] == pytest.approx(ours[own][-1], rel=1e-5), name
    events = EventAccumulator(str(board))
    events.Reload()
    written = [event.value for event in events.Scalars("cpo loss")]
    assert len(written) == 3 and min(written) > 0
    assert len(events.Scalars("lm loss")) == 6


def test_without_cpo_flags_megatron_is_unchanged(tmp_path: Path) -> None:
    """20 steps of plain pretraining, installed or not: the same losses and weights, bit for bit."""
    script = (ROOT / "megatron_cpo" / "pretrain_gpt.py").read_text()
    plain = script.replace(
        "from megatron_cpo import install\n",
        "from megatron_cpo.host.cpu import enable as install\n",
    )
    assert plain != script
    (tmp_path / "plain.py").write_text(plain)
    flags = [*MODEL, *RUN, "--seq-length", "64", "--global-batch-size", "2", "--train-iters", "20"]
    flags += "--mock-data --transformer-impl local --distributed-backend gloo".split()
    flags += "--no-persist-layer-norm --no-gradient-accumulation-fusion --num-workers 0".split()
    flags += "--no-masked-softmax-fusion --no-rope-fusion --save-interval 20".split()
    outputs, ends = [], []
    for name, path in (("plain", tmp_path / "plain.py"), ("installed", "examples/pretrain_gpt.py")):
        save = str(tmp_path / name)
        outputs.append(run_pretrain([*flags, "--save", save], 1, script=str(path))[0])
        ends.append(run_ranks(weights, 1, save, 20)[0])
    losses = [parse_losses(output)["lm loss"] for output in outputs]
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert "[cpo]" not in outputs[1]


def planned_on_rank(store, cache, candidates):
    """On a rank: how often it packed and read the shapes of trees, and its plan."""
    from megatron_cpo.groups import draws, plan
    from megatron_cpo.groups.dataset import RowConfig
    from megatron_cpo.training.data import _planned

    torch.distributed.init_process_group("gloo")
    calls, pack, shapes = [], plan.pack, draws._shapes
    plan.pack = lambda *arguments: calls.append(1) or pack(*arguments)
    draws._shapes = lambda reader: calls.append(1) or shapes(reader)
    config = RowConfig(64, 5, cache=cache, candidates=candidates)
    rows = _planned(GroupReader(store), config, 9, (0, 12))
    return len(calls), rows.plan.groups.tolist()


@pytest.mark.parametrize("candidates", [None, 3])
def test_rank_0_plans_for_all_where_plans_are_kept(tmp_path, candidates):
    store, made = write_store(tmp_path / "groups", 12, 5), 2 if candidates else 1
    cache = str(tmp_path / "cache")
    first, second = run_ranks(planned_on_rank, 2, store, cache, candidates)
    assert (first[0], second[0]) == (made, 0)
    assert first[1] == second[1]
    alone = run_ranks(planned_on_rank, 2, store, None, candidates)
    assert alone == [(made, first[1])] * 2
