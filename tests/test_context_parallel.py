"""Which tokens a context-parallel rank holds, and attention over its part of a row."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.ranks import run_ranks, run_script
from harness.stores import write_store
from megatron_cpo.groups.dataset import GroupDataset, RowConfig
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.model.attention import QUERY_TILE, live_tiles
from megatron_cpo.model.context_parallel import STRIPE, row_order
from megatron_cpo.model.flex import BLOCK, flex_attend, tree_block_mask
from tests.forests import dense, ends_of, mask_of, qkv, random_parents, relative
from tests.runs import MODEL


def test_zig_zag_by_hand() -> None:
    """8 tokens, 2 ranks: blocks 0 1 2 3 of two tokens go to ranks 0 1 1 0."""
    assert row_order(8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_long_rows_take_several_turns() -> None:
    """Blocks of a long row go to ranks 0 1 1 0 0 1 1 0."""
    owners = torch.empty(8 * STRIPE, dtype=torch.long)
    for rank, indices in enumerate(row_order(len(owners), 2)):
        owners[indices] = rank
    assert owners[::STRIPE].tolist() == [0, 1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("size", [256, 1024, 4096, 80 * 16])
def test_every_token_has_one_rank(size: int, ranks: int) -> None:
    order = row_order(size, ranks)
    assert order.shape == (ranks, size // ranks)
    assert order.flatten().sort().values.equal(torch.arange(size))
    assert (order.diff(dim=1) > 0).all()


def imbalance(lengths: torch.Tensor, order: torch.Tensor) -> float:
    """Keys that the busiest rank's tokens see, over the mean, for a row of chains."""
    seen = torch.cat([torch.arange(1, int(length) + 1) for length in lengths])[: order.numel()]
    work = seen[order].sum(dim=1).double()
    return float(work.max() / work.mean())


def test_one_long_document_gives_equal_work() -> None:
    assert imbalance(torch.tensor([8192]), row_order(8192, 8)) == pytest.approx(1, abs=1e-9)


def test_short_turns_balance_packed_groups() -> None:
    """Groups of 20 to 2000 tokens on 8 ranks: 1.28 of the mean, Megatron's single turn 1.80."""
    size, ranks = 16384, 8
    forth, back = torch.arange(size).view(2, ranks, -1).unbind(0)
    megatron = torch.cat([forth, back.flip(0)], dim=1)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = [], []
    for _ in range(50):
        lengths = torch.empty(900).log_normal_(5.3, 0.8, generator=generator).clamp(20, 2000)
        ours.append(imbalance(lengths, row_order(size, ranks)))
        theirs.append(imbalance(lengths, megatron))
    assert sum(ours) / 50 < 1.3 < 1.6 < sum(theirs) / 50


@pytest.mark.parametrize("ranks", [2, 4])
def test_blocks_of_a_part_cover_its_rows_of_the_mask(ranks: int) -> None:
    """A rank's blocks together are its rows of the mask, with live keys alone."""
    size = 16 * QUERY_TILE
    parents = random_parents(size, seed=1, padding=10)
    mask = mask_of(parents)
    for own in row_order(size, ranks):
        rebuilt = torch.zeros(len(own), size, dtype=torch.bool)
        for part in live_tiles(ends_of(parents), own=own):
            rebuilt[part.first : part.last, part.keys] = part.mask
            assert part.mask.any(dim=0).all()
        assert torch.equal(rebuilt, mask[own])


@pytest.mark.parametrize("size", [4 * BLOCK, 8 * BLOCK])
def test_flex_attention_over_a_part_equals_dense_attention(size: int) -> None:
    """The GPU path's mask for two ranks, run eagerly on the CPU."""
    parents = random_parents(size, seed=3, padding=20)
    ends = ends_of(parents)[None]
    query, key, value = (t.detach() for t in qkv(size, 1, 4, 2))
    expected = dense(query, key, value, mask_of(parents)[None], 0.3)
    for own in row_order(size, 2):
        heads_first = [t.permute(1, 2, 0, 3) for t in (query[own], key, value)]
        out = flex_attend(*heads_first, tree_block_mask(ends, own), 0.3)
        assert relative(out.permute(2, 0, 1, 3).flatten(2), expected[own]) < 1e-5


def _count_traffic(argv: list[str]) -> dict[str, list[int]]:
    """Numbers sent over the context-parallel group in one step, by collective and call."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    sent: dict[str, list[int]] = {}

    def counted(name: str, collective: Any, argument: int) -> Any:
        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if group is parallel_state.get_context_parallel_group(check_initialized=False):
                sent.setdefault(name, []).append(args[argument].numel())
            return collective(*args, **kwargs)

        return call

    torch.distributed.all_reduce = counted("all-reduce", torch.distributed.all_reduce, 0)
    for name, whole in (("dist_all_gather_func", 0), ("dist_reduce_scatter_func", 1)):
        setattr(mappings, name, counted(name, getattr(mappings, name), whole))
    run_script(argv)
    return sent


def test_a_step_sends_keys_values_and_one_float_a_candidate(tmp_path: Path) -> None:
    """CP=2, 4 layers, 2 micro-batches of 2 rows: what docs/design.md says, and nothing else."""
    store = write_store(tmp_path / "groups", 40, 5, longest=16)
    run = (
        "--context-parallel-size 2 --seq-length 256 --micro-batch-size 2 --global-batch-size 4 "
        "--train-iters 1 --lr 1e-3 --eval-iters 0 --split 1,0,0 --log-interval 1 "
        f"--cpo-aux-loss --cpo-k 5 --cpo-no-warmup --cpo-data-path {store}"
    )
    sent = run_ranks(_count_traffic, 2, [*MODEL, *run.split()])[0]
    keys_and_values = 256 * 2 * 2 * 32  # row tokens, rows, two of them, hidden size
    assert sent["dist_all_gather_func"] == [keys_and_values] * 4 * 2
    assert sent["dist_reduce_scatter_func"] == [keys_and_values] * 4 * 2
    rows = GroupDataset(GroupReader(store), RowConfig(row_tokens=256, k=5, seed=7), rows=4)
    assert sent["all-reduce"] == [2 * rows.shape.groups * 5] * 2
