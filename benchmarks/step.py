"""One training step (forward, backward) on the same groups: token trees, padded rows, MLE, floor.

- padded K rows: what users run today. K right-padded rows a group through Megatron's own GPT with
  its own attention; logits and log-softmax at every position of every row.
- padded K rows, our parts: the same rows with our blocked attention and our log-prob head at
  candidate positions only, so that the ratio to it is due to the trees alone.
- trees: rows of token trees, the path that training uses.
- MLE: the same prefixes and true continuations as packed plain rows, every token supervised.
- floor: the model on the trees' tokens and the output layer on their logit rows, nothing else.
"""

from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from benchmarks.setting import (
    Rows,
    Setting,
    build_model,
    group_store,
    sample_groups,
    side_by_side,
)
from megatron_cpo.groups.rows import RowShape, documents_row, group_row
from megatron_cpo.groups.store import Group
from megatron_cpo.model.forward import RowForward, candidate_logps
from megatron_cpo.objective import ranked

BETA = 5.0


def bench_step(setting: Setting) -> Rows:
    """Rows of the table."""
    reader = group_store(setting)
    model, tree_model = build_model(setting, trees=False), build_model(setting, trees=True)
    forward = RowForward(setting.vocab)
    batches = [sample_groups(reader, setting.groups, i) for i in range(setting.repeats)]

    def padded(repeat: int) -> None:
        _clear(model)
        _loss(_plain_padded(model, batches[repeat], setting), batches[repeat]).backward()

    def padded_ours(repeat: int) -> None:
        _clear(tree_model)
        logps = _chains_padded(forward, tree_model, batches[repeat])
        _loss(logps, batches[repeat]).backward()

    def trees(repeat: int) -> None:
        _clear(tree_model)
        groups = batches[repeat]
        output, batch = forward(default_collate([_tree_row(groups)]), tree_model)
        mask = batch["candidate_mask"]
        logps = candidate_logps(output, batch["first_slot"], batch["last_slot"], mask.numel())
        reference = torch.zeros_like(logps.view_as(mask)[0])
        losses = ranked(logps.view_as(mask)[0], reference, batch["ranks"][0], BETA, mask[0])
        losses.mean().backward()

    def mle(repeat: int) -> None:
        _clear(tree_model)
        output, _ = forward(default_collate([_document_row(batches[repeat])]), tree_model)
        (-output.mean()).backward()

    def floor(repeat: int) -> None:
        _clear(tree_model)
        row = _tree_row(batches[repeat])
        tokens = torch.from_numpy(row["tokens"])[None].to(setting.device)
        ends = torch.from_numpy(row["subtree_end"])[None].to(setting.device)
        positions = torch.from_numpy(row["position_ids"])[None].to(setting.device)
        at = np.unique(row["query_positions"][row["query_targets"] >= 0])
        output = tree_model(
            tokens, positions, ends, output_processor=_project, output_processor_context=at
        )
        output.mean().backward()

    steps = {
        "padded": padded,
        "padded, our parts": padded_ours,
        "trees": trees,
        "MLE": mle,
        "floor": floor,
    }
    times = side_by_side(steps, setting.repeats)
    tree_tokens, padded_tokens, mle_tokens = _tokens(batches)
    per_token = (times["trees"] / tree_tokens) / (times["MLE"] / mle_tokens)
    one = f"{setting.groups} groups, hidden {setting.hidden}"
    return [
        (f"step: token trees ({one})", f"{times['trees']:.2f} s, {tree_tokens:.0f} tokens"),
        (
            "step: padded K rows, plain Megatron",
            f"{times['padded']:.2f} s, {padded_tokens:.0f} tokens: "
            f"{times['padded'] / times['trees']:.1f} x trees",
        ),
        (
            "step: padded K rows with our attention and head",
            f"{times['padded, our parts']:.2f} s: "
            f"{times['padded, our parts'] / times['trees']:.1f} x trees",
        ),
        (
            "step: MLE on the same true continuations",
            f"{times['MLE']:.2f} s, {mle_tokens:.0f} tokens: trees take "
            f"{times['trees'] / times['MLE']:.2f} x it, {per_token:.2f} x per token",
        ),
        (
            "step: floor (model on tree tokens, output layer on logit rows)",
            f"{times['floor']:.2f} s: trees take {times['trees'] / times['floor']:.2f} x it",
        ),
    ]


def _clear(model: Any) -> None:
    model.zero_grad(set_to_none=True)


def _tree_row(groups: list[Group]) -> dict[str, Any]:
    """The groups in one row that is exactly as long as they are."""
    from megatron_cpo.tree import build_tree

    trees = [build_tree(g.prefix, g.candidates) for g in groups]
    shape = RowShape(
        tokens=sum(len(t.tokens) for t in trees),
        queries=sum(len(t.query_targets) for t in trees),
        groups=len(groups),
        candidates=max(len(g.candidates) for g in groups),
    )
    return group_row(groups, shape, lm_prefix=False)


def _document_row(groups: list[Group]) -> dict[str, Any]:
    """Prefix and true continuation of each group as plain chains, every token supervised."""
    samples = []
    for group in groups:
        sequence = np.concatenate([group.prefix, group.candidates[0]])
        samples.append(
            {
                "tokens": sequence[:-1],
                "labels": sequence[1:],
                "loss_mask": np.ones(len(sequence) - 1),
            }
        )
    tokens = sum(len(s["tokens"]) for s in samples)
    return documents_row(samples, RowShape(tokens, tokens, 1, 1))


def _padded_rows(groups: list[Group]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """[groups * K, longest] token ids, and (first, last) of each row's candidate."""
    rows, spans = [], []
    for group in groups:
        for candidate in group.candidates:
            rows.append(np.concatenate([group.prefix, candidate]))
            spans.append((len(group.prefix), len(rows[-1])))
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row)
    return tokens, spans


def _plain_padded(model: Any, groups: list[Group], setting: Setting) -> torch.Tensor:
    """[groups * K] log-probs the usual way: logits of everything, log-softmax, gather."""
    tokens, spans = _padded_rows(groups)
    tokens = tokens.to(setting.device)
    size = tokens.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=setting.device).triu(1)[None, None]
    positions = torch.arange(size, device=setting.device).expand_as(tokens)
    logits = model(tokens, positions, causal)[:, :-1].float()
    logps = torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0]
    at = torch.arange(1, size, device=setting.device)
    first, last = torch.tensor(spans, device=setting.device).t()
    return (logps * ((at >= first[:, None]) & (at < last[:, None]))).sum(1)


def _chains_padded(forward: RowForward, model: Any, groups: list[Group]) -> torch.Tensor:
    """[groups * K] log-probs of the same padded rows through our attention and head."""
    tokens, spans = _padded_rows(groups)
    size = tokens.shape[1]
    rows = []
    for row, (first, last) in zip(tokens.numpy(), spans, strict=True):
        mask = np.zeros(size - 1)
        mask[first - 1 : last - 1] = 1
        sample = {"tokens": row[:-1], "labels": row[1:], "loss_mask": mask}
        rows.append(documents_row([sample], RowShape(size - 1, size - 1, 1, 1)))
    output, _ = forward(default_collate(rows), model)
    lengths = torch.tensor([last - first for first, last in spans], device=output.device)
    owner = torch.arange(len(spans), device=output.device).repeat_interleave(lengths)
    return output.new_zeros(len(spans)).index_add(0, owner, output)


def _loss(logps: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    logps = logps.view(len(groups), -1)
    ranks = torch.from_numpy(np.stack([g.ranks for g in groups])).to(logps.device)
    return ranked(logps, torch.zeros_like(logps), ranks, BETA).mean()


def _project(*, hidden_states: Any, output_weight: Any, context: Any, **_: Any) -> torch.Tensor:
    """The output layer on the logit rows, in chunks that are dropped: matrix products alone."""
    hidden = hidden_states.flatten(0, 1)[torch.from_numpy(context).to(hidden_states.device)]
    return torch.cat([_Product.apply(part, output_weight) for part in hidden.split(256)])


class _Product(torch.autograd.Function):
    """hidden @ weight.T and its two backward products, keeping no logits."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return (hidden @ weight.t()).amax(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        wide = grad[:, None].expand(-1, len(weight)).contiguous()
        return wide @ weight, wide.t() @ hidden


def _tokens(batches: list[list[Group]]) -> tuple[float, float, float]:
    """Mean tokens a step through the model: as trees, as padded rows, as plain documents."""
    trees = np.mean([len(_tree_row(groups)["tokens"]) for groups in batches])
    padded = np.mean([_padded_rows(groups)[0].numel() for groups in batches])
    mle = np.mean([len(_document_row(groups)["tokens"]) for groups in batches])
    return float(trees), float(padded), float(mle)
