"""`CPOConfig`: the `--cpo-*` flags, parsed once and checked before the first collective."""

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron_cpo.groups.store import read_manifest
from megatron_cpo.objective import NOISE_CONTRASTIVE, OBJECTIVES, PSS
from megatron_cpo.training.presets import PRESETS


@dataclass(frozen=True)
class CPOConfig:
    """Settings of the CPO loss (arXiv:2502.16433); a field is the flag `--cpo-<field>`."""

    data_path: str
    """PREFIX of the group store to train on (megatron-cpo build --output-prefix)."""
    valid_data_path: str | None = None
    """PREFIX of the store to evaluate on; None: Megatron's --split divides `data_path`."""
    k: int = 12
    """Candidates of a group, the true continuation included; must be the store's, which the flag
    need not say. The paper: 12."""
    candidates: int | None = None
    """N: each epoch contrasts y_1 with a random part of N-1 of its K-1 negatives; None: with all.
    The trees are smaller, and so is the cost. Evaluation uses all."""
    objective: str = "best"
    """best: eq. 1, truth against all; ranked: eq. 2, Plackett-Luce over the similarity order;
    nce, ranking-nce: noise-contrastive estimation, beta 1, with the reference as the noise; pss:
    parallel scheduled sampling, MLE on corrupted copies."""
    dpop_lambda: float = 0.0
    """lambda of DPO-Positive, >= 0: y_1's reward falls 1 + lambda times as fast below 0 as its
    log-ratio does, which holds the truth's log-prob up. With best and ranked."""
    length_normalise: bool = False
    """Rewards of mean log-probs a token in the place of sums (`objective.per_token`)."""
    beta: float = 5.0
    """Inverse temperature of the reward beta * log(pi / pi_ref); > 0. The paper: 5."""
    weight: float = 1.0
    """Weight of the CPO loss, which is averaged over the groups of a global batch; >= 0."""
    mle_weight: float = 1.0
    """Weight of the MLE loss, averaged over supervised tokens; >= 0. 1: CPO is an auxiliary loss.
    The paper's own runs use 0 and merge the MLE and CPO weights afterwards."""
    mle_average: str = "token"
    """What the MLE loss is averaged over: token, the supervised tokens of a global batch; group:
    summed over the tokens of a group and averaged over groups, the scale of the CPO loss."""
    mle_tokens: str = "continuation"
    """Tokens the MLE loss covers: the true continuation, or the whole sequence with its prefix."""
    fraction: float = 1.0
    """Share of rows that hold groups, in (0, 1]; the others are plain rows of --data-path. Counted
    in rows of --seq-length tokens, evenly interleaved: late pretraining."""
    no_warmup: bool = False
    """Train without a learning-rate warm-up, which is refused otherwise (`training.warmup`)."""
    preset: str | None = None
    """Settings by name that stand where no flag was given (`training.presets`)."""
    grad_norm_interval: int = 0
    """Iterations between logs of both terms' gradient norms (`training.gradients`); 0: never."""

    @property
    def contrasted(self) -> int:
        """Candidates of a group that a training step sees."""
        return self.candidates or self.k


_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": tuple(sorted([*OBJECTIVES, PSS])),
    "mle_average": ("token", "group"),
    "mle_tokens": ("continuation", "sequence"),
    "preset": tuple(PRESETS),
}
_HELP: dict[str, tuple[Callable[[str], Any], str | None, str]] = {
    "data_path": (
        str,
        "PREFIX",
        "Group store to train on, from megatron-cpo build.",
    ),
    "valid_data_path": (
        str,
        "PREFIX",
        "Group store to evaluate on, best of other records. Default: --split divides "
        "--cpo-data-path, whose batch negatives are then true continuations of training groups.",
    ),
    "k": (
        int,
        "K",
        "Candidates per group, the true one included; another K than the store's is refused "
        "(default: the store's; the paper has 12).",
    ),
    "candidates": (
        int,
        "N",
        "Train on y_1 and N-1 of its negatives, drawn anew each epoch: a step costs less, and the "
        "first loss is log N. Evaluation uses all (default: all K).",
    ),
    "objective": (
        str,
        None,
        "best (default): the truth against all candidates, eq. 1. "
        "ranked: Plackett-Luce over the similarity order, eq. 2. nce, ranking-nce: binary and "
        "ranking noise-contrastive estimation; both need --cpo-beta 1 and negatives that the "
        "reference drew (an). pss: parallel scheduled sampling, the mean MLE loss a token of y_1 "
        "and its corrupted copies (negatives pss); needs --cpo-mle-weight 0.",
    ),
    "dpop_lambda": (
        float,
        "LAMBDA",
        "Hold the truth up, DPO-Positive (arXiv:2402.13228) with K candidates: lowers its reward "
        "by beta * LAMBDA * max(0, log pi_ref - log pi), summed over its tokens (default 0: off).",
    ),
    "length_normalise": (
        bool,
        None,
        "Rewards per token: log pi - log pi_ref divided by the candidate's number of tokens, its "
        "end included. Without it they are sums, as in the paper.",
    ),
    "beta": (
        float,
        "BETA",
        "Reward = beta * (log pi - log pi_ref), summed over a candidate's tokens "
        "(default 5, as in the paper).",
    ),
    "weight": (
        float,
        "W",
        "Weight of the CPO loss, averaged over the groups of a global batch (default 1).",
    ),
    "mle_weight": (
        float,
        "W",
        "Weight of the MLE loss beside it. 1 (default): CPO is an auxiliary loss. The paper's own "
        "runs use 0 and merge the MLE and CPO weights afterwards.",
    ),
    "mle_average": (
        str,
        None,
        "token (default): the MLE loss is the mean over supervised tokens. group: the sum over a "
        "group's, averaged over groups as the CPO loss is, so that equal weights are comparable.",
    ),
    "mle_tokens": (
        str,
        None,
        "Tokens of the MLE loss: the true continuation (default), "
        "or the whole sequence with its prefix.",
    ),
    "fraction": (
        float,
        "SHARE",
        "Share of rows that hold groups; the others are plain rows of --data-path, for late "
        "pretraining. Counts rows of --seq-length tokens (default 1: groups alone).",
    ),
    "no_warmup": (
        bool,
        None,
        "Train without a learning-rate warm-up. Adam's first steps have the size of --lr whatever "
        "the gradient, so a run without --lr-warmup-iters is refused otherwise.",
    ),
    "preset": (
        str,
        None,
        "Settings by name, for flags that are not given. paper: --lr 1e-5 --weight-decay 0.05 "
        "--cpo-beta 5 --cpo-k 12 --cpo-mle-weight 0, 64 groups a batch, and a warm-up.",
    ),
    "grad_norm_interval": (
        int,
        "N",
        "Log the gradient norms of the weighted CPO and MLE terms every N iterations, in which "
        "each takes one more forward and backward (default 0: never).",
    ),
}
"""Type (bool: a switch), metavar and help of each field's flag."""
_FROM_STORE = "k"
"""The field whose flag has no default of its own."""


def _default(name: str) -> Any:
    """Of the flag of a field: the field's, if it has one and the store does not say it."""
    default = CPOConfig.__dataclass_fields__[name].default
    return None if default is MISSING or name == _FROM_STORE else default


def add_cpo_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--cpo-*` flags to Megatron's parser, in one group."""
    group = parser.add_argument_group(
        title="cpo",
        description="Sequence-level training against synthetic negatives: CPO, arXiv:2502.16433.",
    )
    group.add_argument(
        "--cpo-aux-loss",
        action="store_true",
        help="Train with the CPO loss on rows of groups. Without it Megatron is untouched.",
    )
    for name, (kind, metavar, text) in _HELP.items():
        flag = f"--cpo-{name.replace('_', '-')}"
        if kind is bool:
            group.add_argument(flag, action="store_true", help=text)
            continue
        group.add_argument(
            flag,
            type=kind,
            metavar=metavar,
            default=_default(name),
            choices=_CHOICES.get(name),
            help=text,
        )
    return parser


def cpo_config(args: argparse.Namespace) -> CPOConfig | None:
    """The configuration in parsed arguments; None without `--cpo-aux-loss`.

    `args.cpo_k` becomes the store's if it was not given.

    Raises:
        ValueError: a value out of range, a missing path or store,
            or a `--cpo-*` flag without `--cpo-aux-loss`.
    """
    values: dict[str, Any] = {f.name: getattr(args, f"cpo_{f.name}") for f in fields(CPOConfig)}
    if not args.cpo_aux_loss:
        changed = [
            f"--cpo-{f.name.replace('_', '-')}"
            for f in fields(CPOConfig)
            if values[f.name] != _default(f.name)
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} given without --cpo-aux-loss, so nothing would use it; add "
                "--cpo-aux-loss to train with CPO, or drop the flag"
            )
        return None
    if not values["data_path"]:
        raise ValueError(
            "--cpo-aux-loss needs --cpo-data-path PREFIX, a group store; build one with "
            "megatron-cpo build --output-prefix PREFIX"
        )
    if values["k"] is None:
        values["k"] = args.cpo_k = read_manifest(values["data_path"])["k"]
    _require(values["k"] >= 1, "--cpo-k", values["k"], "at least 1 candidate, the true one")
    if (some := values["candidates"]) is not None:
        wanted = f"2 to --cpo-k {values['k']} candidates, the true one included"
        _require(2 <= some <= values["k"], "--cpo-candidates", some, wanted)
    beta = values["beta"]
    _require(0 < beta < math.inf, "--cpo-beta", beta, "a number above 0; the paper uses 5")
    if values["objective"] == PSS:
        _require(
            values["mle_weight"] == 0,
            "--cpo-objective pss with --cpo-mle-weight",
            values["mle_weight"],
            "0: the true continuation is in its mean already",
        )
    if values["objective"] in NOISE_CONTRASTIVE:
        wanted = "1: NCE's log-ratio of policy and noise has no inverse temperature"
        _require(beta == 1, f"--cpo-objective {values['objective']} with --cpo-beta", beta, wanted)
    if values["objective"] not in ("best", "ranked"):
        for name in ("dpop_lambda", "length_normalise"):
            flag = f"--cpo-objective {values['objective']} with --cpo-{name.replace('_', '-')}"
            wanted = "its default: it changes rewards, which best and ranked alone have"
            _require(not values[name], flag, values[name], wanted)
    for name in ("weight", "mle_weight", "dpop_lambda"):
        flag = f"--cpo-{name.replace('_', '-')}"
        _require(0 <= values[name] < math.inf, flag, values[name], "a number of at least 0")
    interval = values["grad_norm_interval"]
    _require(interval >= 0, "--cpo-grad-norm-interval", interval, "at least 0 iterations")
    both = values["weight"] + values["mle_weight"]
    _require(both > 0, "--cpo-weight + --cpo-mle-weight", both, "one of the two above 0")
    if values["fraction"] < 1 and values["mle_weight"] == 0:
        raise ValueError(
            f"--cpo-fraction {values['fraction']} with --cpo-mle-weight 0: the plain rows would be "
            "computed and count for nothing; raise the weight, or use --cpo-fraction 1"
        )
    if values["fraction"] < 1 and values["mle_average"] == "group":
        raise ValueError(
            f"--cpo-fraction {values['fraction']} with --cpo-mle-average group: the plain rows "
            "have no groups to be averaged over; use --cpo-mle-average token, or --cpo-fraction 1"
        )
    _require(0 < values["fraction"] <= 1, "--cpo-fraction", values["fraction"], "a share in (0, 1]")
    return CPOConfig(**values)


def _require(holds: bool, flag: str, got: Any, needed: str) -> None:
    if not holds:
        raise ValueError(f"{flag} {got}: needs {needed}")
