"""Tree attention against parents and a dense masked softmax in plain torch."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megatron_cpo.model import attention
from megatron_cpo.model.attention import (
    QUERY_TILE,
    TreeAttention,
    TreeMaskCache,
    live_tiles,
    tree_mask,
)
from megatron_cpo.model.flex import BLOCK, flex_attend, tree_block_mask
from tests.forests import dense, ends_of, mask_of, qkv, random_parents, relative


def test_mask_by_hand() -> None:
    """0 - 1 with branches 2 - 3 and 4, then a root 5: rows see their ancestors and themselves."""
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
    ).bool()
    assert torch.equal(tree_mask(torch.tensor([5, 5, 4, 4, 5, 6])), expected)


@pytest.mark.parametrize("seed", range(4))
def test_mask_is_ancestors(seed: int) -> None:
    forests = [random_parents(90, seed, padding) for padding in (0, 20)]
    masks = tree_mask(torch.stack([ends_of(parents) for parents in forests]))
    assert torch.equal(masks, torch.stack([mask_of(parents) for parents in forests]))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_cover_the_mask_with_live_keys_alone(block: int) -> None:
    """The blocks put together are the mask, and no block carries a key which nobody in it sees."""
    parents = random_parents(150, seed=1, padding=10)
    rebuilt = torch.zeros(150, 150, dtype=torch.bool)
    firsts = []
    for part in live_tiles(ends_of(parents), block):
        firsts.append(part.first)
        rebuilt[part.first : part.last, part.keys] = part.mask
        assert part.mask.any(dim=0).all()
        assert part.mask.any(dim=1).all()
    assert torch.equal(rebuilt, mask_of(parents))
    assert firsts == list(range(0, 150, block))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("size", [1, QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1, 200])
def test_output_and_gradients_equal_dense_attention(size: int, kv_heads: int) -> None:
    """Three rows per micro-batch, one of them mostly padding; float32, relative 1e-5."""
    forests = [random_parents(size, seed, padding) for seed, padding in ((0, 0), (1, 5), (2, 150))]
    ends = torch.stack([ends_of(parents) for parents in forests])
    masks = torch.stack([mask_of(parents) for parents in forests])
    tensors = qkv(size, 3, 4, kv_heads)
    upstream = torch.randn(size, 3, 32, generator=torch.Generator().manual_seed(9))

    out = TreeAttention(0.3, TreeMaskCache())(*tensors, ends)
    expected = dense(*tensors, masks, 0.3)
    assert out.shape == (size, 3, 32)
    assert relative(out, expected) < 1e-5
    gradients = torch.autograd.grad(out, tensors, upstream)
    slow_gradients = torch.autograd.grad(expected, tensors, upstream)
    for found, slow in zip(gradients[2:], slow_gradients[2:], strict=True):
        assert relative(found, slow) < 1e-5
    for found, slow in zip(gradients[:2], slow_gradients[:2], strict=True):
        # A row of one token has no choice, so queries and keys may have no gradient at all.
        assert float((found - slow).norm()) <= 1e-5 * float(slow.norm()) + 1e-6


@pytest.mark.parametrize("block", [1, 5, 33])
def test_the_block_size_changes_nothing(monkeypatch, block: int) -> None:
    ends = torch.stack([ends_of(random_parents(100, seed)) for seed in range(2)])
    tensors = qkv(100, 2, 4, 2)
    expected = TreeAttention(0.3, TreeMaskCache())(*tensors, ends)
    monkeypatch.setattr(attention, "live_tiles", lambda end, **own: live_tiles(end, block, **own))
    assert relative(TreeAttention(0.3, TreeMaskCache())(*tensors, ends), expected) < 1e-6


def test_bfloat16() -> None:
    """Against float32 on the same rounded inputs: within 1e-2, as bf16 keeps 8 bits (4e-3)."""
    parents = random_parents(150, 0)
    tensors = qkv(150, 1, 4, 2, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    upstream = torch.randn(150, 1, 32, generator=torch.Generator().manual_seed(9)).bfloat16()
    out = TreeAttention(0.3, TreeMaskCache())(*tensors, ends_of(parents)[None])
    expected = dense(*wide, mask_of(parents)[None], 0.3)
    assert out.dtype == torch.bfloat16
    assert relative(out, expected) < 1e-2
    gradients = torch.autograd.grad(out, tensors, upstream)
    slow_gradients = torch.autograd.grad(expected, wide, upstream.float())
    for found, slow in zip(gradients, slow_gradients, strict=True):
        assert relative(found, slow) < 2e-2  # two rounded factors


def test_padding_sees_itself_and_stays_finite() -> None:
    """A row of nothing but padding: the output is the value, whatever the scores."""
    query, key, value = qkv(100, 1, 2, 2)
    out = TreeAttention(1e4, TreeMaskCache())(query, key, value, torch.arange(1, 101)[None])
    torch.testing.assert_close(out, value.flatten(2))
    out.sum().backward()
    for tensor in (query, key, value):
        assert torch.isfinite(tensor.grad).all()


def test_the_blocks_are_worked_out_once_for_all_layers_and_anew_for_a_new_mask(monkeypatch) -> None:
    calls = []

    def counted(end: Tensor, **own: Tensor | None) -> list:
        calls.append(end)
        return live_tiles(end, **own)

    monkeypatch.setattr(attention, "live_tiles", counted)
    cache = TreeMaskCache()
    layers = [TreeAttention(0.3, cache), TreeAttention(0.3, cache)]
    tensors = qkv(80, 1, 2, 2)
    forests = [random_parents(80, seed) for seed in range(2)]
    for parents in forests:  # two micro-batches of the same shape
        ends = ends_of(parents)[None]
        for layer in layers:
            assert (
                relative(layer(*tensors, ends), dense(*tensors, mask_of(parents)[None], 0.3)) < 1e-5
            )
    assert len(calls) == 2


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 4, 4, dtype=torch.bool)])
def test_another_mask_is_refused(mask: Tensor | None) -> None:
    with pytest.raises(
        ValueError, match=r"tree attention needs subtree_end \[micro-batch, row tokens\]"
    ):
        TreeAttention(1.0, TreeMaskCache())(*qkv(4, 1, 2, 2), mask)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("size", [BLOCK, 2 * BLOCK + 44, 3 * BLOCK])
def test_flex_attention_equals_dense_attention(size: int, kv_heads: int) -> None:
    """The GPU path's mask, run eagerly on the CPU; torch has no backward there."""
    forests = [random_parents(size, seed, padding) for seed, padding in ((0, 0), (1, 150))]
    ends = torch.stack([ends_of(parents) for parents in forests])
    masks = torch.stack([mask_of(parents) for parents in forests])
    tensors = [t.detach() for t in qkv(size, 2, 4, kv_heads)]
    heads_first = [t.permute(1, 2, 0, 3) for t in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is slow without compilation
        out = flex_attend(*heads_first, tree_block_mask(ends), 0.3)
    assert relative(out.permute(2, 0, 1, 3).flatten(2), dense(*tensors, masks, 0.3)) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_flex_blocks_cover_the_mask(seed: int) -> None:
    """No pair that the rule allows lies in a skipped block; the kernel trusts this list."""
    size = 5 * BLOCK - 30
    parents = random_parents(size, seed)
    listed = tree_block_mask(ends_of(parents)[None]).to_dense()[0, 0].bool()
    pairs = torch.nonzero(mask_of(parents)) // BLOCK
    assert listed[pairs[:, 0], pairs[:, 1]].all()
    assert not listed.triu(1).any()


def test_flex_skips_blocks_of_other_groups() -> None:
    """Two chains of two blocks each: block rows 2 and 3 never read blocks 0 and 1."""
    ends = torch.tensor([2 * BLOCK] * 2 * BLOCK + [4 * BLOCK] * 2 * BLOCK)
    listed = tree_block_mask(ends[None]).to_dense()[0, 0].bool()
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert listed.tolist() == [[bool(x) for x in row] for row in expected]


def element_mask(counts: Tensor, indices: Tensor, row: int) -> Tensor:
    """[blocks * BLOCK] squared: the pairs that a block list of one row names."""
    blocks = indices.shape[-1]
    listed = torch.zeros(blocks, blocks, dtype=torch.bool)
    for query in range(blocks):
        listed[query, indices[row, 0, query, : counts[row, 0, query]].long()] = True
    return listed.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


@pytest.mark.parametrize("size", [4 * BLOCK, 4 * BLOCK - 30])
def test_flex_full_blocks_need_no_rule(size: int) -> None:
    """The kernel does not ask the rule inside a full block, so it must hold for every pair there.

    A chain has every full block there can be; groups that end inside a block spoil some; in a
    random forest hardly any is left. A block is never both full and partial.
    """
    two = [i - 1 if i % (2 * BLOCK + 50) else None for i in range(size)]
    forests = [[None, *range(size - 1)], two, random_parents(size, 0)]
    mask = tree_block_mask(torch.stack([ends_of(parents) for parents in forests]))
    full_pairs = []
    for row, parents in enumerate(forests):
        full = element_mask(mask.full_kv_num_blocks, mask.full_kv_indices, row)[:size, :size]
        partial = element_mask(mask.kv_num_blocks, mask.kv_indices, row)[:size, :size]
        allowed = mask_of(parents)
        assert not (full & partial).any()
        assert not (full & ~allowed).any()
        assert not (allowed & ~full & ~partial).any()
        full_pairs.append(int(full.sum()))
    complete = size // BLOCK  # query blocks that the row fills
    assert full_pairs[0] == complete * (complete - 1) // 2 * BLOCK**2
    assert full_pairs[0] > full_pairs[1] > 0


@torch.compiler.set_stance("default")  # whatever an earlier test in this process needed
def test_flex_is_compiled_once_for_all_micro_batches() -> None:
    """A new mask vector of the same shape is a new input, not a new graph."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    attend = torch.compile(flex_attention, backend=count, dynamic=False)
    for seed in range(3):
        parents = random_parents(3 * BLOCK, seed)
        tensors = [t.detach() for t in qkv(3 * BLOCK, 1, 4, 2)]
        out = attend(
            *(t.permute(1, 2, 0, 3) for t in tensors),
            block_mask=tree_block_mask(ends_of(parents)[None]),
            scale=0.3,
            enable_gqa=True,
        )
        expected = dense(*tensors, mask_of(parents)[None], 0.3)
        assert relative(out.permute(2, 0, 1, 3).flatten(2), expected) < 1e-5
    assert len(graphs) == 1
