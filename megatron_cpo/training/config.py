"""`CPOConfig`: the `--cpo-*` flags, parsed once and checked before the first collective."""

import argparse
from dataclasses import dataclass, fields
from typing import Any

from megatron_cpo.objective import OBJECTIVES

MLE_TOKENS = ("continuation", "sequence")


@dataclass(frozen=True)
class CPOConfig:
    """Settings of the CPO loss (arXiv:2502.16433); a field is the flag `--cpo-<field>`."""

    data_path: str
    """PREFIX of the group store to train on (tools/build_negatives.py --output-prefix)."""
    valid_data_path: str | None = None
    """PREFIX of the store to evaluate on; None: Megatron's --split divides `data_path`."""
    k: int = 12
    """Candidates of a group, the true continuation included; must be the store's. The paper: 12."""
    objective: str = "best"
    """best: eq. 1, the truth against all; ranked: eq. 2, Plackett-Luce over the similarity order.
    """
    beta: float = 5.0
    """Inverse temperature of the reward beta * log(pi / pi_ref); > 0. The paper: 5."""
    weight: float = 1.0
    """Weight of the CPO loss, which is averaged over the groups of a global batch; >= 0."""
    mle_weight: float = 1.0
    """Weight of the MLE loss, averaged over supervised tokens; >= 0. 1: CPO is an auxiliary loss.
    The paper's own runs use 0 and merge the MLE and CPO weights afterwards."""
    mle_tokens: str = "continuation"
    """Tokens the MLE loss covers: the true continuation, or the whole sequence with its prefix."""
    fraction: float = 1.0
    """Share of rows that hold groups, in (0, 1]; the others are plain rows of --data-path. Counted
    in rows of --seq-length tokens, evenly interleaved: late pretraining."""


def add_cpo_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--cpo-*` flags to Megatron's parser, in one group."""
    group = parser.add_argument_group(
        title="cpo",
        description="Sequence-level training against K-1 synthetic negatives (CPO, "
        "arXiv:2502.16433).",
    )
    add = group.add_argument
    add("--cpo-aux-loss", action="store_true", help="Train with the CPO loss on rows of groups.")
    add(
        "--cpo-data-path",
        metavar="PREFIX",
        help="Group store to train on, from tools/build_negatives.py.",
    )
    add("--cpo-valid-data-path", metavar="PREFIX",
        help="Group store to evaluate on. Default: --split divides --cpo-data-path.")  # fmt: skip
    add("--cpo-k", type=int, default=12,
        help="Candidates per group, the true one included; must match the data (default 12, the "
        "paper's).")  # fmt: skip
    add("--cpo-objective", choices=sorted(OBJECTIVES), default="best",
        help="best: the truth against all candidates (eq. 1). ranked: Plackett-Luce over the "
        "similarity "
        "order (eq. 2).")  # fmt: skip
    add("--cpo-beta", type=float, default=5.0,
        help="Reward = beta * (log pi - log pi_ref), summed over the candidate's tokens (default "
        "5).")  # fmt: skip
    add("--cpo-weight", type=float, default=1.0, help="Weight of the CPO loss (default 1).")
    add("--cpo-mle-weight", type=float, default=1.0,
        help="Weight of the MLE loss next to it. 1 (default): CPO is an auxiliary loss. The "
        "paper's own runs "
        "use 0 and merge MLE and CPO weights afterwards.")  # fmt: skip
    add("--cpo-mle-tokens", choices=MLE_TOKENS, default="continuation",
        help="Tokens of the MLE loss: the true continuation, or the whole sequence with its "
        "prefix.")  # fmt: skip
    add("--cpo-fraction", type=float, default=1.0,
        help="Share of rows that hold groups; the others are plain rows of --data-path (late "
        "pretraining). "
        "Counts rows of --seq-length tokens (default 1: groups alone).")  # fmt: skip
    return parser


def cpo_config(args: argparse.Namespace) -> CPOConfig | None:
    """The configuration in parsed arguments; None without `--cpo-aux-loss`.

    Raises:
        ValueError: a value out of range, a missing path, or a `--cpo-*` flag without
        `--cpo-aux-loss`.
    """
    values: dict[str, Any] = {f.name: getattr(args, f"cpo_{f.name}") for f in fields(CPOConfig)}
    if not args.cpo_aux_loss:
        changed = [
            f"--cpo-{f.name.replace('_', '-')}"
            for f in fields(CPOConfig)
            if values[f.name] != (None if f.name == "data_path" else f.default)
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
            "tools/build_negatives.py --output-prefix PREFIX"
        )
    _require(values["k"] >= 1, "--cpo-k", values["k"], "at least 1 candidate, the true one")
    _require(values["beta"] > 0, "--cpo-beta", values["beta"], "a number above 0; the paper uses 5")
    for name in ("weight", "mle_weight"):
        flag = f"--cpo-{name.replace('_', '-')}"
        _require(values[name] >= 0, flag, values[name], "a number of at least 0")
    both = values["weight"] + values["mle_weight"]
    _require(both > 0, "--cpo-weight + --cpo-mle-weight", both, "one of the two above 0")
    _require(0 < values["fraction"] <= 1, "--cpo-fraction", values["fraction"], "a share in (0, 1]")
    return CPOConfig(**values)


def _require(holds: bool, flag: str, got: Any, needed: str) -> None:
    if not holds:
        raise ValueError(f"{flag} {got}: needs {needed}")
