"""The parity matrix: one step of the real loop at every supported layout against one process.

A case is `examples/pretrain_gpt.py` with CPO flags on up to eight gloo ranks. Every run of an
architecture starts from the same checkpoint and reads the same global batch; what one process
computes is the twin. Compared are

    log-probs   of every candidate, the worst relative difference
    loss        the CPO and MLE losses of the global batch, relative
    gradient    of every parameter, whole, after Megatron's reductions and before the optimizer:
                the worst norm of a difference over the norm of the twin's

In float32 each must stay below 1e-5. With bf16 weights a layout rounds other partial sums than one
process does, so there is no such number: each must stay below twice what bf16 itself changes, the
difference between bf16 and float32 on one process.

`python -m tests.parity` runs all cases and writes the table in docs/parity.md; a few of them are
tests (`test_parity_matrix.py`).
"""

import argparse
import inspect
import logging
import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.ranks import ROOT, run_pretrain, run_ranks, run_script
from harness.stores import TOKENIZER_FLAGS, write_store
from tests.runs import plain_tensors

K = 5
REFERENCE = {"name": "random", "iteration": "0", "sha256": "0" * 64}
TOLERANCE = 1e-5
"""Relative, float32; seen are at most 1e-6. See the docstring for bf16."""
MEASURES = ("log-probs", "loss", "gradient")
TABLE = ROOT / "docs" / "parity.md"
BEGIN, END = "<!-- parity table: written by python -m tests.parity -->", "<!-- end of the table -->"
RUN = (
    "--seq-length 256 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8 "
    "--train-iters 1 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1 "
    "--seed 7 --split 1,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1 "
    "--ckpt-format torch_dist --no-load-optim --no-load-rng --clip-grad 0 "
    f"--cpo-aux-loss --cpo-k {K} --cpo-objective ranked --cpo-beta 0.2 --cpo-no-warmup"
).split() + TOKENIZER_FLAGS

DIMENSIONS = "--num-layers 4 --hidden-size 32 --num-attention-heads 4"
ROPE = "--position-embedding-type rope"
UNTIED = "--untie-embeddings-and-output-weights"
LLAMA = (
    f"{DIMENSIONS} {ROPE} {UNTIED} --group-query-attention --num-query-groups 2 "
    "--normalization RMSNorm --swiglu --disable-bias-linear"
)
HYBRID = LLAMA.replace("--num-layers 4", "--hybrid-layer-pattern {}")
ARCHITECTURES = {
    "learned positions, tied": DIMENSIONS,
    "learned positions, untied": f"{DIMENSIONS} {UNTIED}",
    "RoPE, tied": f"{DIMENSIONS} {ROPE}",
    "RoPE, GQA, RMSNorm, SwiGLU, untied": LLAMA,
    "4 experts, top 2": (
        f"{LLAMA} --num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
        "--moe-aux-loss-coeff 0.1 --moe-token-dispatcher-type alltoall"
    ),
    "hybrid *-*-, RoPE, GQA": HYBRID.format("*-*-"),
    "hybrid *E*E, no positions": (
        HYBRID.format("*E*E").replace("rope", "none")
        + " --num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
        "--moe-aux-loss-coeff 0.1 --moe-token-dispatcher-type alltoall"
    ),
}
TIED, SPLIT, ROTARY, GQA, EXPERTS, HYBRID_GQA, HYBRID_EXPERTS = ARCHITECTURES

TP, PP, CP, EP, ETP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
)
SP, VPP = "--sequence-parallel", "--num-layers-per-virtual-pipeline-stage 1"
PER_TOKEN = "--calculate-per-token-loss"
ZERO = "--use-distributed-optimizer"
OVERLAP = f"{ZERO} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1000"
HYBRID_VPP = "--hybrid-layer-pattern *|-|*|-"
SELECTIVE = "--recompute-granularity selective"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


BF16 = "--bf16"
LABELS = {
    f"{TP} ": "TP=",
    SP: "SP",
    f"{PP} ": "PP=",
    VPP: "VPP=2",
    HYBRID_VPP: "VPP=2",
    f"{CP} ": "CP=",
    f"{EP} ": "EP=",
    f"{ETP} ": "ETP=",
    OVERLAP: "distributed optimizer with overlap",
    ZERO: "distributed optimizer",
    SELECTIVE: "selective recompute",
    FULL: "full recompute",
    PER_TOKEN: "per-token loss",
    BF16: "bf16",
    "--moe-token-dispatcher-type allgather": "allgather dispatcher",
}


@dataclass(frozen=True)
class Case:
    """A layout of an architecture."""

    architecture: str
    ranks: int
    flags: str
    quick: bool = False
    """Runs in `make test`, too."""
    objective: str = ""
    """Flags of another loss than `RUN`'s; the twin has them as well."""

    @property
    def layout(self) -> str:
        """The flags in words; what is left of the ranks is data parallel."""
        text, words = self.flags, []
        for flags, label in LABELS.items():
            if flags.endswith(" "):
                if found := re.search(rf"(?<!\S){flags}(\d+)", text):
                    words.append(label + found[1])
            elif flags in text:
                text = text.replace(flags, "")
                words.append(label)
        sizes = dict(word.split("=") for word in words if "=" in word)
        data = self.ranks // math.prod(int(sizes.get(name, 1)) for name in ("TP", "PP", "CP"))
        return ", ".join(([f"DP={data}"] if data > 1 else []) + words) or "one process"

    @property
    def name(self) -> str:
        """Model and loss, ranks and layout."""
        return f"{self.model} | {self.ranks} | {self.layout}"

    @property
    def model(self) -> str:
        """The architecture, and the loss where it is another one."""
        loss = self.objective.replace("--cpo-", "").replace("objective ", "")
        return f"{self.architecture}; {loss}" if loss else self.architecture


CASES = [
    Case(TIED, 1, SELECTIVE),
    Case(TIED, 1, FULL),
    Case(TIED, 2, f"{TP} 2"),
    Case(TIED, 2, f"{TP} 2 {SP}"),
    Case(TIED, 2, f"{PP} 2"),
    Case(TIED, 2, f"{PP} 2 {VPP}"),
    Case(TIED, 2, f"{CP} 2"),
    Case(TIED, 2, ""),
    Case(TIED, 2, PER_TOKEN),
    Case(TIED, 2, f"{CP} 2 {PER_TOKEN}"),
    Case(TIED, 2, OVERLAP),
    Case(TIED, 4, f"{TP} 2 {SP} {PP} 2 {FULL}"),
    Case(TIED, 4, f"{CP} 4"),
    Case(TIED, 4, f"{CP} 2 {PP} 2 {VPP} {OVERLAP} {PER_TOKEN}", quick=True),
    Case(TIED, 8, f"{TP} 2 {SP} {CP} 2 {PP} 2 {ZERO} {SELECTIVE}"),
    Case(SPLIT, 4, f"{TP} 2 {CP} 2"),
    Case(SPLIT, 4, f"{PP} 2 {OVERLAP}"),
    Case(ROTARY, 4, f"{TP} 2 {SP} {CP} 2 {FULL}"),
    Case(ROTARY, 4, f"{PP} 2 {CP} 2 {PER_TOKEN}"),
    Case(GQA, 2, f"{TP} 2 {SP}"),
    Case(GQA, 2, f"{CP} 2"),
    Case(GQA, 4, f"{TP} 2 {SP} {CP} 2 {OVERLAP} {SELECTIVE}", quick=True),
    Case(GQA, 8, f"{TP} 2 {SP} {CP} 2 {PP} 2 {VPP} {OVERLAP} {PER_TOKEN} {FULL}"),
    Case(GQA, 8, f"{TP} 2 {SP} {PP} 2 {OVERLAP}"),
    Case(GQA, 8, f"{CP} 4 {ZERO}"),
    Case(TIED, 2, f"{TP} 2 {BF16}"),
    Case(TIED, 2, f"{CP} 2 {BF16}"),
    Case(GQA, 4, f"{TP} 2 {SP} {CP} 2 {OVERLAP} {BF16}"),
    Case(GQA, 4, f"{PP} 2 {VPP} {PER_TOKEN} {ZERO} {FULL} {BF16}"),
    Case(EXPERTS, 2, ""),
    Case(EXPERTS, 2, f"{EP} 2 --moe-token-dispatcher-type allgather"),
    Case(EXPERTS, 2, PER_TOKEN),
    Case(EXPERTS, 2, f"{EP} 2"),
    Case(EXPERTS, 2, f"{TP} 2 {SP} {SELECTIVE}"),
    Case(EXPERTS, 2, f"{TP} 2 {SP} {EP} 2 {ETP} 1"),
    Case(EXPERTS, 2, f"{CP} 2 {EP} 2 {PER_TOKEN}"),
    Case(EXPERTS, 4, f"{TP} 2 {SP} {PP} 2 {PER_TOKEN}"),
    Case(EXPERTS, 4, f"{TP} 2 {SP} {EP} 2 {ETP} 2 {ZERO}"),
    Case(EXPERTS, 4, f"{TP} 2 {SP} {CP} 2 {EP} 4 {ETP} 1 {PER_TOKEN}", quick=True),
    Case(EXPERTS, 8, f"{TP} 2 {SP} {PP} 2 {CP} 2 {EP} 2 {ETP} 1 {OVERLAP} {FULL}"),
    Case(EXPERTS, 8, f"{TP} 2 {SP} {EP} 4 {ETP} 1 {OVERLAP} {PER_TOKEN}"),
    Case(HYBRID_GQA, 2, f"{TP} 2 {SP}"),
    Case(HYBRID_GQA, 2, f"{CP} 2 {PER_TOKEN}", quick=True),
    Case(HYBRID_GQA, 2, f"{PP} 2"),
    Case(HYBRID_GQA, 2, f"{PP} 2 {HYBRID_VPP} {FULL}"),
    Case(HYBRID_GQA, 2, f"{OVERLAP} {SELECTIVE}"),
    Case(HYBRID_GQA, 8, f"{TP} 2 {SP} {PP} 2 {CP} 2 {FULL} {ZERO}"),
    Case(HYBRID_EXPERTS, 4, f"{TP} 2 {SP} {EP} 2 {ETP} 1"),
    Case(HYBRID_EXPERTS, 8, f"{TP} 2 {SP} {PP} 2 {CP} 2 {EP} 2 {ETP} 1 {OVERLAP}"),
]
RANKING_NCE = "--cpo-objective ranking-nce --cpo-beta 1"
LOSSES = (
    "--cpo-objective pss --cpo-mle-weight 0 --cpo-candidates 4",
    "--cpo-objective best --cpo-dpop-lambda 3 --cpo-candidates 3 --cpo-mle-average group",
    "--cpo-objective nce --cpo-beta 1 --cpo-mle-average group",
    "--cpo-objective ranked --cpo-beta 2 --cpo-dpop-lambda 2 --cpo-length-normalise",
    RANKING_NCE,
)
CASES += [Case(GQA, 2, f"{layout} 2", objective=loss) for loss in LOSSES for layout in (TP, CP, PP)]
CASES.append(Case(TIED, 4, f"{CP} 2 {PER_TOKEN}", objective=RANKING_NCE))


@dataclass
class Step:
    """What one step computed, whole."""

    losses: dict[str, float]
    logps: dict[bytes, torch.Tensor]
    """[K] by group, which its reference log-probs name."""
    gradients: dict[str, torch.Tensor]
    groups: list[tuple[int, bytes]]
    """Of the groups of the global batch, the place in the store and the reference log-probs."""


def measure(argv: list[str], folder: str) -> dict[str, Any]:
    """Run one iteration on this rank, and keep the parts of a `Step` that it has.

    The gradients are written to `folder` in the place of the weights, by Megatron's own sharded
    checkpoint, which knows which part of what a rank has.
    """
    from megatron.training import training

    from megatron_cpo.model.forward import candidate_logps
    from megatron_cpo.training.step import CPOStep

    found: dict[str, Any] = {"losses": {}, "logps": {}, "groups": []}
    train_step, loss = training.train_step, CPOStep.loss

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(train_step).bind(*args, **kwargs).arguments

        def keep_gradients() -> tuple[bool, float, int]:
            _save_gradients(bound["model"], folder)
            return True, 0.0, 0

        bound["optimizer"].step = keep_gradients
        result = train_step(*args, **kwargs)
        found["losses"] |= {name: float(value) for name, value in result[0].items()}
        return result

    def recording_loss(self: Any, batch: Any, logps: torch.Tensor) -> Any:
        mask = batch["candidate_mask"].flatten(0, 1)
        slots = batch["first_slot"], batch["last_slot"], mask.numel()
        sums = candidate_logps(logps.detach(), *slots).view_as(mask)
        indices, references = (
            batch[name].flatten(0, 1) for name in ("group_indices", "reference_logps")
        )
        for here, index, reference, policy in zip(mask, indices, references, sums, strict=True):
            if here[0]:
                found["groups"].append((int(index), reference[here].numpy().tobytes()))
                found["logps"][reference.numpy().tobytes()] = policy[here].clone()
        return loss(self, batch, logps)

    training.train_step, CPOStep.loss = step, recording_loss
    run_script(argv)
    return found


def _save_gradients(chunks: list[Any], folder: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            if chunk.ddp_config.use_distributed_optimizer:
                _gather_shards(buffer)
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.detach().float()
    state = {
        f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(unwrap_model(chunks))
    }
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, folder)


def _gather_shards(buffer: Any) -> None:
    """The distributed optimizer leaves each rank the sum of its shard alone; put them together."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        shards = bucket.grad_data.view(group.size(), -1)
        torch.distributed.all_gather_into_tensor(
            bucket.grad_data, shards[group.rank()].clone(), group=group
        )


class Matrix:
    """Runs cases, each architecture's twin once.

    Args:
        folder: for the store, the checkpoints and the gradients.
        groups: groups in the store; an epoch's last row is not full.
    """

    def __init__(self, folder: Path, groups: int = 60) -> None:
        self.folder = folder
        self._twins: dict[tuple[str, bool, str], Step] = {}
        self._runs = 0
        self.groups, self._stores = groups, {}
        self.store = self.store_for("")

    def compare(self, case: Case) -> dict[str, float]:
        """Worst relative differences between a case and one process."""
        twin = self._twin(case.architecture, BF16 in case.flags, case.objective)
        flags = f"{case.flags} {case.objective}"
        return differences(self.step(case.architecture, case.ranks, flags), twin)

    def limits(self, case: Case) -> dict[str, float]:
        """What each difference of a case must stay below."""
        if BF16 not in case.flags:
            return dict.fromkeys(MEASURES, TOLERANCE)
        twins = (self._twin(case.architecture, bf16, case.objective) for bf16 in (True, False))
        limits = {name: 2 * value for name, value in differences(*twins).items()}
        # A loss is one number, whose error may vanish by chance; it is made of the log-probs.
        return limits | {"loss": limits["log-probs"]}

    def _twin(self, architecture: str, bf16: bool, objective: str) -> Step:
        key = architecture, bf16, objective
        if key not in self._twins:
            flags = f"{BF16 if bf16 else ''} {objective}"
            self._twins[key] = self.step(architecture, 1, flags)
        return self._twins[key]

    def store_for(self, flags: str) -> str:
        """PREFIX of a store that a loss takes: NCE wants samples of the reference, PSS copies."""
        found = re.search(r"--cpo-objective (\S+)", flags)  # "nce" is in --sequence-parallel, too
        kind = {"nce": "an", "ranking-nce": "an", "pss": "pss"}.get(
            found[1] if found else "", "mixed"
        )
        if kind not in self._stores:
            kinds = ("bn", "mn", "tn") if kind == "mixed" else (kind,)
            path = self.folder / f"groups-{kind}"
            store = write_store(
                path, self.groups, K, longest=16, scored=False, kinds=kinds, policy=REFERENCE
            )
            _score_at_random(store)
            self._stores[kind] = store
        return self._stores[kind]

    def step(self, architecture: str, ranks: int, flags: str) -> Step:
        """One step at a layout, from the checkpoint of `start`."""
        run = ["--load", self.start(architecture), "--finetune", *flags.split()]
        self._runs += 1
        folder = str(self.folder / f"gradients-{self._runs}")
        parts = run_ranks(measure, ranks, self.command(architecture, run), folder)
        logps: dict[bytes, torch.Tensor] = {}
        for part in parts:
            logps |= part["logps"]
        [whole] = run_ranks(plain_tensors, 1, folder)
        return Step(parts[-1]["losses"], logps, whole, parts[-1]["groups"])

    def start(self, architecture: str) -> str:
        """The checkpoint that all runs of an architecture start from."""
        folder = self.folder / f"start-{list(ARCHITECTURES).index(architecture)}"
        if not folder.exists():
            run = ["--lr", "0", "--save", str(folder), "--save-interval", "1", "--no-save-optim"]
            run_pretrain(self.command(architecture, run), 1)
        return str(folder)

    def command(self, architecture: str, flags: list[str]) -> list[str]:
        """All flags of a run."""
        model = ARCHITECTURES[architecture].split()
        return [*model, *RUN, *flags, "--cpo-data-path", self.store_for(" ".join(flags))]


def _score_at_random(store: str) -> None:
    """Reference log-probs that name their group: no two alike."""
    from megatron_cpo.groups.store import GroupReader
    from megatron_cpo.groups.writing import write_reference_logps

    rng, reader = np.random.default_rng(1), GroupReader(store)
    scores = [
        (rng.normal(size=K) - 6 * np.array([len(c) for c in group.candidates])).astype(np.float32)
        for group in (reader[i] for i in range(len(reader)))
    ]
    write_reference_logps(store, scores, REFERENCE)


def differences(found: Step, twin: Step) -> dict[str, float]:
    """Worst relative differences, by what is compared; see the module's docstring."""
    assert found.logps.keys() == twin.logps.keys() and twin.logps
    assert found.gradients.keys() == twin.gradients.keys() and len(twin.gradients) > 5
    logps = max(
        float(((found.logps[group] - right).abs() / right.abs()).max())
        for group, right in twin.logps.items()
    )
    loss = max(abs(found.losses[name] / twin.losses[name] - 1) for name in ("cpo loss", "lm loss"))
    gradient = max(
        float((found.gradients[name] - right).norm() / right.norm())
        for name, right in twin.gradients.items()
    )
    return dict(zip(MEASURES, (logps, loss, gradient), strict=True))


def run(cases: list[Case], folder: Path) -> tuple[list[str], bool]:
    """Table rows of cases, each printed as it ends, and whether all stayed within their limits."""
    matrix, rows, held = Matrix(folder), [], True
    for case in cases:
        began = time.monotonic()
        worst, limits = matrix.compare(case), matrix.limits(case)
        good = all(worst[name] < limits[name] for name in MEASURES)
        held &= good
        cells = [case.model, str(case.ranks), case.layout]
        for name in MEASURES:
            limit = f" (of {limits[name]:.0e})" if BF16 in case.flags else ""
            cells.append(f"{worst[name]:.0e}{limit}")
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], "" if good else "FAILED", f"{time.monotonic() - began:.0f} s", flush=True)
    return rows, held


def main() -> None:
    """Run cases; write the table when all of them held."""
    parser = argparse.ArgumentParser(description="The parity matrix on CPU ranks.")
    parser.add_argument("--only", default="", help="cases whose table row contains this text")
    parser.add_argument("--core", action="store_true", help="the cases of `make test` alone")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    cases = [case for case in CASES if args.only in case.name and (case.quick or not args.core)]
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        rows, held = run(cases, Path(folder))
    if not held:
        raise SystemExit("parity: a case differs from one process by more than its limit")
    if cases == CASES:
        head = [f"| model | ranks | layout | {' | '.join(MEASURES)} |", "| --- " * 6 + "|"]
        before, rest = TABLE.read_text().split(BEGIN)
        table = "\n".join([BEGIN, *head, *rows, END])
        TABLE.write_text(before + table + rest.partition(END)[2])
        print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
