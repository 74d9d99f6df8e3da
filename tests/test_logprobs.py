"""The log-prob head against a log-softmax over all logits: values, gradients, layouts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.ranks import run_ranks
from megatron_cpo.model.logprobs import Queries, query_logps
from megatron_cpo.model.workspace import Workspace

S, B, H, ROWS, VOCAB = 12, 3, 8, 32, 27  # ROWS of the output layer, the last 5 of them padding


def some_queries(vocab: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[B, Q] positions and targets: up to 4 queries on a position, some positions with none."""
    generator = torch.Generator().manual_seed(seed)
    positions, targets = torch.zeros(B, 30).long(), torch.full((B, 30), -1)
    for b in range(B):
        counts = torch.randint(0, 5, (S,), generator=generator)
        at = torch.arange(S).repeat_interleave(counts)[:30]
        positions[b, : len(at)] = at
        targets[b, : len(at)] = torch.randint(vocab, at.shape, generator=generator)
    return positions, targets


def some_inputs(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Hidden states [S, B, H] and an output layer [rows, H]; logits spread over about +-10."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(S, B, H, generator=generator).to(dtype)
    weight = (2 * torch.randn(rows, H, generator=generator)).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def twin(hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """[Q] by all logits of all positions, in float64, row after row of the micro-batch."""
    logps = torch.log_softmax(hidden.double() @ weight.double()[:vocab].t(), dim=-1)
    return torch.stack(
        [
            logps[int(positions[b, q]), b, int(targets[b, q])]
            for b in range(B)
            for q in range(positions.shape[1])
            if targets[b, q] >= 0
        ]
    )


def upstream_for(values: Tensor) -> Tensor:
    """Gradients as large and of both signs as the ranked loss has: up to beta * (K - 1)."""
    return torch.linspace(-55, 5, len(values), dtype=values.dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def test_queries_are_compacted_by_hand() -> None:
    """Two rows: positions 0 0 2 and 1, hidden states [S, B] flattened, so 0, 4 and 3 of them."""
    positions = torch.tensor([[0, 0, 2, 0], [1, 0, 0, 0]])
    targets = torch.tensor([[7, 8, 9, -1], [6, -1, -1, -1]])
    queries = Queries.of(positions, targets, "cpu")
    assert queries.positions.tolist() == [0 * 2 + 0, 2 * 2 + 0, 1 * 2 + 1]
    assert queries.rows.tolist() == [0, 0, 1, 2]
    assert queries.targets.tolist() == [7, 8, 9, 6]
    assert queries.ends.tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_queries_are_the_distinct_positions(seed: int) -> None:
    positions, targets = some_queries(seed=seed)
    wanted = [
        (int(positions[b, q]) * B + b, int(targets[b, q]))
        for b in range(B)
        for q in range(30)
        if targets[b, q] >= 0
    ]
    queries = Queries.of(positions, targets, "cpu")
    distinct = list(dict.fromkeys(at for at, _ in wanted))
    assert queries.positions.tolist() == distinct
    assert queries.positions[queries.rows].tolist() == [at for at, _ in wanted]
    assert queries.targets.tolist() == [target for _, target in wanted]
    for r, at in enumerate(distinct):
        first, last = queries.ends[r : r + 2].tolist()
        assert [place for place, _ in wanted[first:last]] == [at] * (last - first)
    assert queries.ends[-1] == len(wanted)


@pytest.mark.parametrize("kept_logits", [0, 5 * ROWS, 2**24])
@pytest.mark.parametrize("chunk_logits", [1, ROWS, 3 * ROWS + 5, 2**14])
def test_values_and_gradients_equal_log_softmax(chunk_logits: int, kept_logits: int) -> None:
    """Chunks of 1, 1, 3 and all positions; none, a few and all kept; float32, relative 1e-5."""
    positions, targets = some_queries()
    hidden, weight = some_inputs()
    queries = Queries.of(positions, targets, "cpu")
    workspace = Workspace(chunk_logits, kept_logits)
    logps = query_logps(hidden, weight, queries, VOCAB, workspace=workspace)
    expected = twin(hidden, weight, positions, targets, VOCAB)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = upstream_for(expected)
    gradients = torch.autograd.grad(logps, (hidden, weight), upstream.float())
    slow_gradients = torch.autograd.grad(expected, (hidden, weight), upstream)
    for found, slow in zip(gradients, slow_gradients, strict=True):
        assert relative(found, slow) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_are_those_computed_again(dtype: torch.dtype) -> None:
    """Bit for bit, whatever is kept; and once they are used up, a second backward works as well."""
    positions, targets = some_queries()
    hidden, weight = some_inputs(dtype)
    queries = Queries.of(positions, targets, "cpu")
    results = []
    for kept_logits in (0, 7 * ROWS, 2**24):
        logps = query_logps(
            hidden, weight, queries, VOCAB, workspace=Workspace(3 * ROWS, kept_logits)
        )
        upstream = upstream_for(logps)
        for _ in range(2):
            again = torch.autograd.grad(logps, (hidden, weight), upstream, retain_graph=True)
            results.append([logps, *again])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert torch.equal(found, expected)


def test_two_micro_batches_wait_for_backward_together() -> None:
    """Neither overwrites what the other has kept."""
    hidden, weight = some_inputs()
    batches = [Queries.of(*some_queries(seed=seed), "cpu") for seed in range(3)]
    expected = []
    for queries in batches:
        logps = query_logps(hidden, weight, queries, VOCAB, workspace=Workspace(3 * ROWS))
        expected.append(torch.autograd.grad(logps.sum(), (hidden, weight)))
    waiting = [
        query_logps(hidden, weight, q, VOCAB, workspace=Workspace(3 * ROWS)) for q in batches
    ]
    for logps, slow in zip(waiting, expected, strict=True):
        for found, gradient in zip(
            torch.autograd.grad(logps.sum(), (hidden, weight)), slow, strict=True
        ):
            assert torch.equal(found, gradient)


def test_rows_that_pad_the_vocabulary_do_not_count() -> None:
    """Whatever stands in them: the values are those of 27 rows, and they get no gradient."""
    positions, targets = some_queries()
    queries = Queries.of(positions, targets, "cpu")
    hidden, weight = some_inputs()
    with torch.no_grad():
        weight[VOCAB:] = 100.0
    logps = query_logps(hidden, weight, queries, VOCAB)
    torch.testing.assert_close(logps, query_logps(hidden, weight[:VOCAB], queries, VOCAB))
    logps.sum().backward()
    assert (weight.grad[VOCAB:] == 0).all()
    assert torch.isfinite(hidden.grad).all()


OUTSIDE = (VOCAB - 1, VOCAB, ROWS - 1, ROWS, 4000)
"""The last token, the first and last padding rows, and what no output layer has."""


def outside_logps() -> Tensor:
    """Log-probs of `OUTSIDE` at one position, by this rank's part of the output layer."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    hidden, weight = (t.detach() for t in some_inputs())
    part = weight.chunk(group.size())[group.rank()]
    targets = torch.tensor([OUTSIDE, *[[-1] * len(OUTSIDE)] * (B - 1)])
    queries = Queries.of(torch.zeros_like(targets), targets, "cpu")
    return query_logps(hidden, part, queries, VOCAB, tp_group=group)


def test_what_no_token_has_has_no_probability() -> None:
    """Not that of logit 0, which looks like any other; on one rank and on two."""
    [one] = run_ranks(outside_logps, 1)
    for found in [one, *run_ranks(outside_logps, 2)]:
        assert torch.isfinite(found[0])
        assert found[1:].tolist() == [-float("inf")] * 4


def test_probabilities_of_all_targets_sum_to_one() -> None:
    """One position with a query for every token of the vocabulary, repeated targets included."""
    hidden, weight = some_inputs()
    targets = torch.full((B, VOCAB + 1), -1)
    targets[1] = torch.tensor([*range(VOCAB), 5])
    queries = Queries.of(torch.full((B, VOCAB + 1), 4), targets, "cpu")
    logps = query_logps(hidden, weight, queries, VOCAB)
    assert logps[:-1].exp().sum().item() == pytest.approx(1, rel=1e-6)
    assert logps[-1] == logps[5]
    # The sum is constant, so its gradient is zero: a wrong sign or a lost query would show.
    logps[:-1].exp().sum().backward()
    assert hidden.grad.norm() < 1e-5


def test_logits_of_any_size() -> None:
    """Logits of +-1e4 stay finite, and a certain token has log-prob 0."""
    hidden = torch.full((S, B, H), 50.0, requires_grad=True)
    weight = torch.zeros(ROWS, H)
    weight[3], weight[4] = 25.0, -25.0
    weight.requires_grad_()
    queries = Queries.of(torch.zeros(B, 2).long(), torch.tensor([[3, 4]] * B), "cpu")
    logps = query_logps(hidden, weight, queries, VOCAB)
    assert logps.tolist() == [0.0, -20000.0] * B
    logps.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_bfloat16() -> None:
    """Products and sums are float32, so only the inputs' own rounding is left: values to 1e-5.

    Gradients come back in bf16 and pass through one bf16 product: relative 1e-2 (8 bits are 4e-3).
    """
    positions, targets = some_queries()
    hidden, weight = some_inputs(torch.bfloat16)
    queries = Queries.of(positions, targets, "cpu")
    logps = query_logps(hidden, weight, queries, VOCAB, workspace=Workspace(100))
    expected = twin(hidden, weight, positions, targets, VOCAB)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = upstream_for(expected)
    gradients = torch.autograd.grad(logps, (hidden, weight), upstream.float())
    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = twin(wide_hidden, wide_weight, positions, targets, VOCAB)
    slow_gradients = torch.autograd.grad(expected, (wide_hidden, wide_weight), upstream)
    for found, slow in zip(gradients, slow_gradients, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found, slow) < 1e-2


def test_the_weight_gradient_is_summed_in_float32() -> None:
    """512 positions of the same small gradient: a bf16 sum stalls at 256 times its first term."""
    hidden = torch.ones(512, 1, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    queries = Queries.of(torch.arange(512)[None], torch.zeros(1, 512).long(), "cpu")
    query_logps(hidden, weight, queries, 2, workspace=Workspace(2)).sum().backward()
    assert weight.grad.flatten().tolist() == [256, -256]  # 512 * (1 - 1/2) and 512 * (0 - 1/2)


def test_a_micro_batch_without_a_query() -> None:
    """No value, and zero gradients rather than none: the other ranks wait for a backward pass."""
    hidden, weight = some_inputs()
    queries = Queries.of(torch.zeros(B, 30).long(), torch.full((B, 30), -1), "cpu")
    logps = query_logps(hidden, weight, queries, VOCAB)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


# Output layers of 32 rows: over 4 ranks with 13 tokens the third and fourth rank only pad.
LAYOUTS = [
    {"vocab_size": vocab, "sequence_parallel": split, "workspace": Workspace(chunk)}
    for vocab in (VOCAB, 13)
    for split in (False, True)
    for chunk in (10, 2**24)
]


def run_layouts(empty: bool) -> list[list[Tensor]]:
    """On each rank of a tensor-parallel group: values and this rank's part of both gradients."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    results = []
    for layout in LAYOUTS:
        hidden, weight = (t.detach() for t in some_inputs())
        positions, targets = some_queries(layout["vocab_size"])
        if empty:
            targets = torch.full_like(targets, -1)
        weight = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
        if layout["sequence_parallel"]:
            hidden = hidden.chunk(group.size())[group.rank()].clone()
        hidden.requires_grad_()
        queries = Queries.of(positions, targets, "cpu")
        logps = query_logps(hidden, weight, queries, tp_group=group, **layout)
        gradients = torch.autograd.grad(logps, (hidden, weight), upstream_for(logps))
        results.append([logps.detach(), *gradients])
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallel_ranks_equal_one_process(world_size: int) -> None:
    """The vocabulary over 2 and 4 ranks, with and without sequence parallelism; relative 1e-5."""
    by_rank = run_ranks(run_layouts, world_size, empty=False)
    for index, layout in enumerate(LAYOUTS):
        hidden, weight = some_inputs()
        positions, targets = some_queries(layout["vocab_size"])
        queries = Queries.of(positions, targets, "cpu")
        expected = query_logps(hidden, weight, queries, layout["vocab_size"])
        of_hidden, of_weight = torch.autograd.grad(
            expected, (hidden, weight), upstream_for(expected)
        )
        parts = [ranks[index] for ranks in by_rank]
        for logps, part_of_hidden, _ in parts:
            torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
            if not layout["sequence_parallel"]:
                assert relative(part_of_hidden, of_hidden) < 1e-5
        if layout["sequence_parallel"]:
            assert relative(torch.cat([part[1] for part in parts]), of_hidden) < 1e-5
        assert relative(torch.cat([part[2] for part in parts]), of_weight) < 1e-5


def test_tensor_parallel_ranks_without_a_query() -> None:
    for results in run_ranks(run_layouts, 2, empty=True):
        for logps, of_hidden, of_weight in results:
            assert logps.shape == (0,)
            assert (of_hidden == 0).all()
            assert (of_weight == 0).all()


def count_reductions(kept_logits: int) -> tuple[list[int], list[int]]:
    """Numbers in each all-reduce of the head: of its forward pass, then of its backward pass."""
    torch.distributed.init_process_group("gloo")
    group, sizes = torch.distributed.group.WORLD, []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    hidden, weight = (t.detach() for t in some_inputs())
    weight = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    queries = Queries.of(*some_queries(), "cpu")
    workspace = Workspace(7 * len(weight), kept_logits)
    logps = query_logps(hidden.requires_grad_(), weight, queries, VOCAB, group, workspace=workspace)
    forward = sizes.copy()
    logps.sum().backward()
    return forward, sizes[len(forward) :]


@pytest.mark.parametrize("kept_logits", [0, 2**24])
def test_a_chunk_costs_two_reductions(kept_logits: int) -> None:
    """A maximum per position, then a sum per position and per query; backward: the hidden states.

    What is said of scaling rests on this (docs/scaling.md).
    """
    positions = len(Queries.of(*some_queries(), "cpu").positions)
    queries = int((some_queries()[1] >= 0).sum())
    for forward, backward in run_ranks(count_reductions, 2, kept_logits):
        assert len(forward) == 2 * -(-positions // 7)
        assert sum(forward) == 2 * positions + queries
        assert backward == [S * B * H]
