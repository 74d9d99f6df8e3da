"""How a model ranks the candidates of held-out groups: what `evaluate score --groups` does.

A candidate's score is its log-prob, summed over its tokens, or, where the store has log-probs of
a reference, its reward s_k = beta * (log pi - log pi_ref). Against all negatives, and against those
of each kind: the share of groups whose truth is strictly above all of them, and the mean margin to
the best of them. A sum over tokens favours short candidates, which the mean over tokens
(`token_logp`) and a reward do not.

It writes an object with

    groups        {"path", "groups", "beta", "model": identity, "reference": identity or null,
                  "figures": {NAME: {"value", "low", "high", "prompts", "method"}}}
    definitions   {NAME: {"label", "definition"}}
    tool          this package and its version

where NAME is `nll_truth`, `perplexity_truth`, and SCORE_accuracy, SCORE_margin of all negatives and
SCORE_accuracy_KIND, SCORE_margin_KIND of a kind's; SCORE is `logp`, `token_logp` or `reward`;
there are no rewards under the reference itself, where all are 0.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cpo.checkpoints.identity import same_checkpoint
from megatron_cpo.evaluation.figures import Figure, PerText, Pooled
from megatron_cpo.evaluation.scores import TOOL, definition_rows, figure_rows
from megatron_cpo.evaluation.statistics import Estimate
from megatron_cpo.files import make_folder, write_json
from megatron_cpo.groups.finite import model_name, require_finite, require_tokens
from megatron_cpo.groups.kinds import KINDS, REGISTRY
from megatron_cpo.groups.store import Group, GroupReader
from megatron_cpo.host.waiting import leave_together
from megatron_cpo.policies.policy import Policy
from megatron_cpo.progress import progress
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.scoring.folder import require_positions, require_tokenizer
from megatron_cpo.training.metrics import margins
from megatron_cpo.work.job import BLOCK_RECORDS

SCORES = {
    "logp": "log-prob, nats, summed over tokens",
    "token_logp": "log-prob, nats a token",
    "reward": "reward, nats times beta, summed over tokens",
}


@dataclass(frozen=True)
class GroupScores:
    """How a model ranks the candidates of a store."""

    path_prefix: str
    groups: int
    beta: float
    model: dict[str, Any]
    reference: dict[str, Any] | None
    """Of the rewards."""
    figures: dict[str, Figure]
    definitions: dict[str, tuple[str, str]]
    """Label and definition of each figure."""

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Of each figure."""
        return {name: figure.estimate() for name, figure in self.figures.items()}


def score_store(
    path_prefix: str, policy: Policy, tokenizer: Any, beta: float, replicas: Any = None
) -> GroupScores:
    """Ask a model for the log-probs of all candidates of a store, and compare them.

    Args:
        path_prefix: the store's PREFIX.
        policy: the model; on all ranks that hold it.
        tokenizer: Megatron's, of the store and the model.
        beta: of the rewards; it scales their margins.
        replicas: the process group of the ranks that hold the same part of the model's
            data-parallel copies, which share the groups out. None: there is one copy.

    Raises:
        ValueError: no store, of another tokenizer, of fewer than two groups, or with longer groups
            than the model reads; a log-prob is not finite.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"--beta {beta}: needs a number above 0, and finite")
    reader = GroupReader(path_prefix)
    require_tokenizer(path_prefix, reader.manifest, tokenizer)
    if len(reader) < 2:
        raise ValueError(f"{path_prefix}: {len(reader)} group; an interval needs at least 2")
    require_positions(path_prefix, reader.manifest, policy.positions, model_name(policy.identity))
    groups, size = [reader[index] for index in range(len(reader))], vocabulary_size(tokenizer)
    for index, group in enumerate(groups):
        require_tokens(group.tokens, size, f"group {index} of {path_prefix}")
    logps = _logps(groups, policy, replicas)
    figures, definitions = _truth_figures(groups, logps)
    reference = reader.manifest["reference"]
    lengths = [np.array([len(c) for c in group.candidates], dtype=np.float32) for group in groups]
    values = {
        "logp": logps,
        "token_logp": [ours / n for ours, n in zip(logps, lengths, strict=True)],
    }
    if reference is not None and not same_checkpoint(policy.identity, reference):
        for index, group in enumerate(groups):
            source = f"the reference of {path_prefix}"
            require_finite(group.reference_logps, f"group {index}", "stored log-prob", source)
        values["reward"] = [
            beta * (ours - group.reference_logps) for ours, group in zip(logps, groups, strict=True)
        ]
    for name, by_group in values.items():
        more, what = _ranking_figures(name, groups, by_group)
        figures, definitions = figures | more, definitions | what
    identity = policy.identity
    return GroupScores(path_prefix, len(groups), beta, identity, reference, figures, definitions)


def _logps(groups: Sequence[Group], policy: Policy, replicas: Any) -> list[NDArray[np.float32]]:
    """log pi(y_k | x) of the candidates of each group, [K] float32, nats, summed over tokens.

    A block of groups is the same whatever the number of replicas, and so are its log-probs.

    Raises:
        ValueError: one is not finite, or another rank has failed; on all ranks.
    """
    own, count = (replicas.rank(), replicas.size()) if replicas is not None else (0, 1)
    starts = range(0, len(groups), BLOCK_RECORDS)
    name, mine = model_name(policy.identity), {}
    with leave_together(), progress(None, name, "groups", len(groups)) as bar:
        for start in starts[own::count]:
            block = groups[start : start + BLOCK_RECORDS]
            mine[start] = policy.logps([g.prefix for g in block], [g.candidates for g in block])
            bar.update(min(count * BLOCK_RECORDS, len(groups) - start))  # the others do as many
    parts: list[Any] = [mine] * count
    if replicas is not None:
        torch.distributed.all_gather_object(parts, mine, group=replicas)
    by_start = {start: logps for part in parts for start, logps in part.items()}
    found = [logps for start in starts for logps in by_start[start]]
    for index, logps in enumerate(found):
        require_finite(logps, f"group {index}", "log-prob", name)
    return found


def under_folder(
    path_prefix: str, folder: str, batch: int, beta: float, args: argparse.Namespace
) -> GroupScores:
    """`score_store` under the Hugging Face model in a folder.

    Args:
        batch: most sequences at a time.
        args: the flags of `inspection.tokenizer`; none: the tokenizer of the folder.

    Raises:
        ValueError: as `score_store`, or there is no such model.
    """
    from megatron_cpo.inspection.tokenizer import folder_tokenizer, store_tokenizer
    from megatron_cpo.policies.hugging_face import HuggingFacePolicy

    tokenizer = store_tokenizer(GroupReader(path_prefix).manifest, args)
    if tokenizer is None:
        tokenizer = folder_tokenizer(f"--policy hf:{folder}", folder)
    policy = HuggingFacePolicy(folder, tokenizer, batch)
    return score_store(path_prefix, policy, tokenizer, beta)


def under_checkpoint(path_prefix: str, args: Any, batch: int, beta: float) -> GroupScores:
    """`score_store` under a Megatron checkpoint, on all ranks together.

    Args:
        args: Megatron's parsed and validated arguments, see `host.loading.score_args`.

    Raises:
        ValueError: as `score_store`, or there is no such checkpoint.
    """
    from megatron.core import mpu

    from megatron_cpo.host.loading import open_tokenizer
    from megatron_cpo.policies.megatron import MegatronPolicy

    tokenizer = open_tokenizer(args)
    policy = MegatronPolicy.load(args, tokenizer, batch)
    return score_store(path_prefix, policy, tokenizer, beta, mpu.get_data_parallel_group())


def write_group_scores(path: Path, found: GroupScores) -> None:
    """Write the result, whole or not at all; see this module."""
    make_folder(path.parent)
    content = {
        "path": found.path_prefix,
        "groups": found.groups,
        "beta": found.beta,
        "model": found.model,
        "reference": found.reference,
        "figures": figure_rows(found.estimates),
    }
    definitions = definition_rows(found.definitions, found.figures)
    write_json(path, {"groups": content, "definitions": definitions, "tool": TOOL})


def describe_groups(found: GroupScores) -> str:
    """The figures for people."""
    lines = [f"{found.path_prefix} under {model_name(found.model)}: {found.groups} groups"]
    width = max(len(label) for label, _ in found.definitions.values())
    for name, estimate in found.estimates.items():
        lines.append(f"  {found.definitions[name][0]:<{width}}  {estimate}")
    if "reward_accuracy" not in found.figures:
        why = "the model is the store's reference, so all are 0"
        if found.reference is None:
            why = "the store has no reference log-probs (build --score-only)"
        lines.append(f"  no rewards: {why}")
    return "\n".join(lines)


def _truth_figures(
    groups: Sequence[Group], logps: Sequence[NDArray[np.float32]]
) -> tuple[dict[str, Figure], dict[str, tuple[str, str]]]:
    """NLL and perplexity of the truths, EOD included, a mean over all their tokens."""
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for key, group, scores in zip(_prompts(groups), groups, logps, strict=True):
        nats[key] = nats.get(key, 0.0) - float(scores[0])
        tokens[key] = tokens.get(key, 0) + len(group.candidates[0])
    total, count = sum(nats.values()), sum(tokens.values())
    if len(nats) < 2:
        raise ValueError("all groups have one prefix; an interval needs at least 2")
    without = {key: (total - nats[key]) / (count - tokens[key]) for key in nats}
    nll = Pooled(total / count, without)
    perplexity = Pooled(total / count, without, shown=math.exp)
    said = "of the truths given their prefixes, over all tokens, ends included"
    return {"nll_truth": nll, "perplexity_truth": perplexity}, {
        "nll_truth": ("NLL of the truth", f"nats a token {said}"),
        "perplexity_truth": ("perplexity of the truth", f"exp of the nats a token {said}"),
    }


def _ranking_figures(
    score: str, groups: Sequence[Group], values: Sequence[NDArray[np.float32]]
) -> tuple[dict[str, Figure], dict[str, tuple[str, str]]]:
    """Rank-1 accuracy and margin by a score, against all negatives and those of each kind."""
    k = max(map(len, values))
    scores, kinds = torch.zeros(len(groups), k, dtype=torch.float64), torch.zeros(len(groups), k)
    mask = torch.zeros(len(groups), k, dtype=torch.bool)
    for row, (group, found) in enumerate(zip(groups, values, strict=True)):
        scores[row, : len(found)] = torch.from_numpy(found.astype(np.float64))
        kinds[row, : len(found)] = torch.from_numpy(group.kinds.astype(np.float32))
        mask[row, : len(found)] = True
    prompts, label = _prompts(groups), score.replace("_", " ")
    figures: dict[str, Figure] = {}
    definitions: dict[str, tuple[str, str]] = {}
    present = set(kinds[mask].int().tolist())
    for code in [None, *(i for i in range(1, len(KINDS)) if i in present)]:
        counted = mask.clone()
        if code is not None:
            counted[:, 1:] &= kinds[:, 1:] == code
        margin, contested = margins(scores, counted)
        rows = torch.nonzero(contested)[:, 0].tolist()
        keys = [prompts[row] for row in rows]
        if len(set(keys)) < 2:  # no interval
            continue
        suffix = "" if code is None else f"_{KINDS[code]}"
        against = "all negatives" if code is None else REGISTRY[KINDS[code]].label
        short = "" if code is None else f", {KINDS[code]}"
        ahead = (margin[rows] > 0).double().numpy()
        figures[f"{score}_accuracy{suffix}"] = PerText(keys, ahead, share=True)
        figures[f"{score}_margin{suffix}"] = PerText(keys, margin[rows].numpy())
        definitions[f"{score}_accuracy{suffix}"] = (
            f"{label} accuracy{short}",
            f"share of groups whose truth is strictly above {against}, by {SCORES[score]}",
        )
        definitions[f"{score}_margin{suffix}"] = (
            f"{label} margin{short}",
            f"the truth's minus the best of {against}, by {SCORES[score]}",
        )
    return figures, definitions


def _prompts(groups: Sequence[Group]) -> list[str]:
    """What tells the groups' prefixes apart: groups of one prefix are one prompt."""
    return [group.prefix.tobytes().hex() for group in groups]
