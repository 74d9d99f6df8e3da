"""One training step (forward, backward) on the same groups: token trees, padded rows, MLE, floor.

- trees: rows of token trees, the path that training uses.
- padded K rows: what users run today. K right-padded rows a group through Megatron's own GPT with
  its own attention; logits and log-softmax at every position of every row.
- padded K rows, our parts: the same rows with our blocked attention and our log-prob head at
  candidate positions only, so that the ratio to it is due to the trees alone.
- MLE: the same prefixes and true continuations packed in one row, every token supervised; through
  Megatron's own attention and loss under a dense mask, and through ours. And other true
  continuations in a row of as many tokens as the trees have.
- floor: the model on the trees' tokens, and the output layer's three matrix products on their
  distinct logit rows into one buffer: no softmax, no loss.
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
    sample_batches,
    side_by_side,
)
from megatron_cpo.groups.rows import RowShape, documents_row, group_row
from megatron_cpo.groups.store import Group, GroupReader
from megatron_cpo.model.attention import tree_mask
from megatron_cpo.model.forward import RowForward, candidate_logps
from megatron_cpo.objective import OBJECTIVES, ranked

BETA = 5.0
FLOOR_ROWS = 512


def bench_step(setting: Setting) -> Rows:
    """Rows of the table."""
    reader = group_store(setting)
    model, tree_model = build_model(setting, trees=False), build_model(setting, trees=True)
    forward = RowForward(setting.vocab)
    batches = sample_batches(setting, reader, setting.groups, setting.repeats)

    buffer = floor_buffer(setting)

    def padded(repeat: int) -> None:
        _clear(model)
        _loss(_plain_padded(model, batches[repeat], setting), batches[repeat]).backward()

    def padded_ours(repeat: int) -> None:
        _clear(tree_model)
        logps = _chains_padded(forward, tree_model, batches[repeat])
        _loss(logps, batches[repeat]).backward()

    def trees(repeat: int) -> None:
        _clear(tree_model)
        tree_losses(forward, tree_model, batches[repeat]).mean().backward()

    def mle(repeat: int) -> None:
        _clear(tree_model)
        output, _ = forward(default_collate([document_row(batches[repeat])]), tree_model)
        (-output.mean()).backward()

    def floor(repeat: int) -> None:
        _clear(tree_model)
        floor_step(tree_model, on_device(tree_row(batches[repeat]), setting), buffer)

    def plain_mle(repeat: int) -> None:
        _clear(model)
        plain_mle_loss(model, on_device(document_row(batches[repeat]), setting)).backward()

    # As many tokens as the trees have, so that what a step costs per token is compared at one size.
    as_many = [len(tree_row(groups)["tokens"]) for groups in batches]
    full_rows = [truths_row(reader, n, first=64 * i) for i, n in enumerate(as_many)]

    def full_mle(repeat: int) -> None:
        _clear(model)
        plain_mle_loss(model, on_device(full_rows[repeat], setting)).backward()

    steps = {
        "trees": trees,
        "padded": padded,
        "padded, our parts": padded_ours,
        "MLE": mle,
        "plain MLE": plain_mle,
        "full MLE": full_mle,
        "floor": floor,
    }
    times = side_by_side(steps, setting.repeats)
    tree_tokens, padded_tokens, mle_tokens = _tokens(batches)
    median, ratio = times.median, times.ratio
    per_token = mle_tokens / tree_tokens
    one = f"{setting.groups} groups, hidden {setting.hidden}"
    return [
        (f"step: token trees ({one})", f"{median('trees'):.2f} s, {tree_tokens:.0f} tokens"),
        (
            "step: padded K rows, plain Megatron",
            f"{median('padded'):.2f} s, {padded_tokens:.0f} tokens: "
            f"{ratio('padded', 'trees'):.1f} x trees",
        ),
        (
            "step: padded K rows with our attention and head",
            f"{median('padded, our parts'):.2f} s: "
            f"{ratio('padded, our parts', 'trees'):.1f} x trees",
        ),
        *(
            (
                f"step: MLE on the same true continuations, {whose}",
                f"{median(name):.2f} s, {mle_tokens:.0f} tokens: trees take "
                f"{ratio('trees', name):.2f} x it, {ratio('trees', name) * per_token:.2f} x per "
                "token",
            )
            for name, whose in (("MLE", "our parts"), ("plain MLE", "plain Megatron"))
        ),
        (
            "step: MLE, a row of as many tokens as the trees, plain Megatron",
            f"{median('full MLE'):.2f} s: trees take {ratio('trees', 'full MLE'):.2f} x it",
        ),
        (
            "step: floor (model on tree tokens, output layer on logit rows)",
            f"{median('floor'):.2f} s: trees take {ratio('trees', 'floor'):.2f} x it; it is "
            f"{ratio('floor', 'plain MLE'):.2f} x plain Megatron's MLE",
        ),
    ]


def tree_losses(
    forward: RowForward, model: Any, groups: list[Group], objective: str = "ranked"
) -> torch.Tensor:
    """[groups] losses of one row of token trees, the path that training uses."""
    return row_losses(forward, model, default_collate([tree_row(groups)]), objective)


def row_losses(
    forward: RowForward, model: Any, batch: dict[str, torch.Tensor], objective: str = "ranked"
) -> torch.Tensor:
    """[B * groups] losses of collated rows; references that were not scored count as zero."""
    output, batch = forward(batch, model)
    mask = batch["candidate_mask"].flatten(0, 1)
    logps = candidate_logps(output, batch["first_slot"], batch["last_slot"], mask.numel())
    logps = logps.view_as(mask)
    reference, ranks = (batch[n].flatten(0, 1) for n in ("reference_logps", "ranks"))
    return OBJECTIVES[objective](logps, reference.nan_to_num(), ranks, BETA, mask)


def _clear(model: Any) -> None:
    model.zero_grad(set_to_none=True)


def tree_row(groups: list[Group]) -> dict[str, Any]:
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


def document_row(groups: list[Group]) -> dict[str, Any]:
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


def truths_row(reader: GroupReader, tokens: int, first: int = 0) -> dict[str, Any]:
    """A row of that many tokens of true continuations, from group `first` on; the last one cut."""
    groups, over = [], -tokens
    while over < 0:
        group = reader[(first + len(groups)) % len(reader)]
        groups.append(group)
        over += len(group.prefix) + len(group.candidates[0]) - 1
    last = groups[-1]
    kept = len(last.candidates[0]) - over
    if kept > 0:
        last.candidates[0] = last.candidates[0][:kept]
    else:
        groups.pop()
    return document_row(groups)


def plain_mle_loss(model: Any, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss of a row's tokens through Megatron's own attention, head and cross entropy."""
    masked = ~tree_mask(row["subtree_end"])[:, None]
    inputs = row["tokens"], row["position_ids"], masked
    loss: torch.Tensor = model(*inputs, labels=row["query_targets"]).mean()
    return loss


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


def on_device(row: dict[str, Any], setting: Setting) -> dict[str, torch.Tensor]:
    return {n: t.to(setting.device) for n, t in default_collate([row]).items()}


def floor_buffer(setting: Setting) -> torch.Tensor:
    """Where the floor's logits go, chunk after chunk."""
    size = FLOOR_ROWS, -(-setting.vocab // 128) * 128
    return torch.empty(size, dtype=setting.dtype, device=setting.device)


def floor_step(model: Any, row: dict[str, torch.Tensor], buffer: torch.Tensor) -> None:
    """The model on the row's tokens, and the output layer's products on its logit rows."""
    at = row["query_positions"][row["query_targets"] >= 0].unique()
    inputs = (row["tokens"], row["position_ids"], row["subtree_end"])
    context = (at, buffer)
    model(*inputs, output_processor=_project, output_processor_context=context).backward()


def _project(*, hidden_states: Any, output_weight: Any, context: Any, **_: Any) -> torch.Tensor:
    at, buffer = context
    total: torch.Tensor = _Product.apply(hidden_states.flatten(0, 1)[at], output_weight, buffer)
    return total


class _Product(torch.autograd.Function):
    """hidden @ weight.T and its two backward products with something of that shape."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, buffer: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, buffer)
        for part in hidden.split(len(buffer)):
            torch.mm(part, weight.t(), out=buffer[: len(part)])
        return hidden.sum()

    @staticmethod
    def backward(ctx: Any, _grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, buffer = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for part, into in zip(
            hidden.split(len(buffer)), grad_hidden.split(len(buffer)), strict=True
        ):
            torch.mm(buffer[: len(part)], weight, out=into)
            grad_weight.addmm_(buffer[: len(part)].t(), part)
        return grad_hidden, grad_weight, None


def _tokens(batches: list[list[Group]]) -> tuple[float, float, float]:
    """Mean tokens a step through the model: as trees, as padded rows, as plain documents."""
    trees = np.mean([len(tree_row(groups)["tokens"]) for groups in batches])
    padded = np.mean([_padded_rows(groups)[0].numel() for groups in batches])
    mle = np.mean([len(document_row(groups)["tokens"]) for groups in batches])
    return float(trees), float(padded), float(mle)
