"""The real training loop at every supported layout against one process, from one checkpoint.

Each run is `examples/pretrain_gpt.py` with CPO flags, Megatron's own `pretrain()` on gloo ranks.
The checkpoint is written by one process and resharded by torch_dist on loading.
"""

from pathlib import Path

import pytest

from harness.ranks import run_pretrain, run_ranks
from harness.stores import write_store
from tests.runs import CPO, MODEL, cpo_curves, weights

STEPS = 10

# SGD at rate 1 without clipping: what a step takes from the weights is its gradient.
TRAIN = (
    "--seq-length 256 --global-batch-size 8 --optimizer sgd --sgd-momentum 0 --weight-decay 0 "
    "--lr 0.1 --lr-decay-style constant --clip-grad 0 --log-interval 1 --eval-iters 1 "
    "--eval-interval 1000 --save-interval 1 --ckpt-format torch_dist --no-load-optim --no-load-rng"
).split()

LAYOUTS = {
    "TP=2": (2, "--tensor-model-parallel-size 2"),
    "TP=2, SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "CP=2": (2, "--context-parallel-size 2"),
    "PP=2": (2, "--pipeline-model-parallel-size 2"),
    "TP=2 x PP=2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "PP=2, VPP=2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "DP=2": (2, ""),
    "DP=2, distributed optimizer": (2, "--use-distributed-optimizer --optimizer adam"),
    "micro-batch 4": (1, "--micro-batch-size 4"),
    "per-token loss, DP=2": (2, "--calculate-per-token-loss"),
    "full recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "untied, RoPE, GQA, TP=2": (2, "--tensor-model-parallel-size 2"),
}

IN_OTHERS = ("TP=2", "PP=2", "TP=2 x PP=2", "DP=2")
"""What the others have and more; `make parity` has all of them."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_store(tmp_path_factory.mktemp("store") / "groups", 400, 5, longest=16)


class Start:
    """A checkpoint of random weights written by one process, and runs that continue from it."""

    def __init__(self, folder: Path, store: str, model_flags: list[str]) -> None:
        self.folder, self.store, self.model_flags = folder, store, model_flags
        self.start = str(folder / "start")
        flags = ["--train-iters", "1", "--lr", "0", "--save", self.start]
        self._run(1, [*TRAIN, *flags, "--micro-batch-size", "1"])

    def train(self, name: str, world_size: int, flags: str, steps: int = STEPS) -> dict:
        """Curves by name, and `step`: what the first step changed, by parameter."""
        save = str(self.folder / name.replace(" ", "_"))
        run = ["--train-iters", str(steps), "--save", save, "--load", self.start, "--finetune"]
        output = self._run(world_size, [*TRAIN, "--micro-batch-size", "2", *run, *flags.split()])
        curves = cpo_curves(output[-1])
        [before] = run_ranks(weights, 1, self.start, 1)
        [after] = run_ranks(weights, 1, save, 1)
        assert before.keys() == after.keys() and len(before) > 8
        curves["step"] = {key: after[key] - before[key] for key in before}
        # A weight is rounded to float32 after the step: half a unit in its last place is no
        # difference.
        curves["rounding"] = {key: float(after[key].norm()) * 2.0**-24 for key in before}
        return curves

    def _run(self, world_size: int, flags: list[str]) -> list[str]:
        return run_pretrain(
            [*MODEL, *self.model_flags, *flags, *CPO, "--cpo-data-path", self.store], world_size
        )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, store: str) -> Start:
    return Start(tmp_path_factory.mktemp("tied"), store, [])


@pytest.fixture(scope="module")
def rope_start(tmp_path_factory: pytest.TempPathFactory, store: str) -> Start:
    flags = (
        "--position-embedding-type rope --group-query-attention --num-query-groups 2 "
        "--untie-embeddings-and-output-weights"
    )
    return Start(tmp_path_factory.mktemp("rope"), store, flags.split())


@pytest.fixture(scope="module")
def one_process(start: Start, rope_start: Start) -> dict[str, dict]:
    """The twins: one process with the same optimizer and architecture."""
    return {
        "sgd": start.train("one", 1, ""),
        "adam": start.train("one-adam", 1, "--optimizer adam"),
        "rope-sgd": rope_start.train("one", 1, ""),
    }


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.long] * (name in IN_OTHERS)) for name in LAYOUTS],
)
def test_layout_equals_one_process(
    layout: str, start: Start, rope_start: Start, one_process: dict[str, dict]
) -> None:
    """Losses over 10 steps and the gradient of the first step within 1e-5 relative, float32."""
    world_size, flags = LAYOUTS[layout]
    rope, adam = "RoPE" in layout, "adam" in flags
    optimizer = "adam" if adam else "sgd"
    twin = one_process[f"rope-{optimizer}" if rope else optimizer]
    found = (rope_start if rope else start).train(layout, world_size, flags)
    for name in ("cpo_loss", "lm_loss", "margin", "truth_logp", "rank_tau"):
        assert len(found[name]) == STEPS
        assert found[name] == pytest.approx(twin[name], rel=1e-5, abs=1e-5), name
    # Something is learnt, so equal curves mean equal updates.
    assert twin["lm_loss"][-1] < twin["lm_loss"][0] - 0.1
    if adam:
        return  # Adam's first step is the gradient's sign: nothing to compare at 1e-5
    for name, step in twin["step"].items():
        off = float((found["step"][name] - step).norm()) - 2 * twin["rounding"][name]
        assert off < 1e-5 * float(step.norm()), f"{name}: the first step differs by {off:.1e}"


def test_output_weight_is_waited_for_when_its_gather_is_overlapped(store: str) -> None:
    """DP=2, a bucket per parameter, untied: the head uses a weight whose module nobody calls."""
    flags = (
        "--seq-length 256 --micro-batch-size 1 --global-batch-size 4 --train-iters 5 --lr 1e-2 "
        "--lr-decay-style constant --eval-iters 0 --log-interval 1 --use-distributed-optimizer "
        "--overlap-grad-reduce --ddp-bucket-size 1000 --untie-embeddings-and-output-weights"
    ).split()
    run = [*MODEL, *CPO, "--cpo-data-path", store, *flags]
    plain = cpo_curves(run_pretrain(run, 2)[-1])
    overlapped = cpo_curves(run_pretrain([*run, "--overlap-param-gather"], 2)[-1])
    assert len(plain["cpo_loss"]) == 5
    assert overlapped == plain
