"""What only a GPU runs: compiled FlexAttention over trees and bf16 products in the head."""

import pytest
import torch

from megatron_cpo.model.attention import TreeAttention, TreeMaskCache, tree_mask
from megatron_cpo.model.logprobs import Queries, query_logps
from megatron_cpo.model.workspace import Workspace
from megatron_cpo.tree import build_tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def subtree_ends(rows: int, size: int) -> torch.Tensor:
    """[rows, size] mask vectors: one tree of random branches in each row, then padding."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.arange(1, size + 1).repeat(rows, 1)
    for row in ends:
        prefix = torch.randint(0, 50, (size // 4,), generator=generator).tolist()
        lengths = (size // 16, size // 8, size // 9)
        candidates = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in lengths]
        end = torch.from_numpy(build_tree(prefix, candidates).subtree_end)
        row[: len(end)] = end
    return ends.cuda()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_flex_attention_equals_dense_attention(dtype: torch.dtype, tolerance: float) -> None:
    """Output and gradients against a dense mask; float32 may use TF32 in both, hence 1e-2."""
    ends = subtree_ends(rows=2, size=512)
    shapes = [(512, 2, 8, 64), (512, 2, 2, 64), (512, 2, 2, 64)]
    inputs = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
    found = TreeAttention(0.125, TreeMaskCache())(*inputs, ends)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, inputs, upstream)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in inputs),
        attn_mask=tree_mask(ends)[:, None],
        scale=0.125,
        enable_gqa=True,
    )
    expected = dense.permute(2, 0, 1, 3).flatten(2)
    assert (found - expected).norm() < tolerance * expected.norm()
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert (mine - theirs).norm() < tolerance * theirs.norm()


def test_bf16_head_equals_float32_log_softmax() -> None:
    """bf16 inputs, float32 products: the twin differs by the rounding of its own inputs only."""
    hidden = torch.randn(300, 1, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 1000, (1, 300))
    queries = Queries.of(torch.arange(300)[None], targets, "cuda")
    found = query_logps(hidden, weight, queries, vocab_size=1000, workspace=Workspace(1024 * 64))
    logits = hidden[:, 0].float() @ weight[:1000].float().t()
    expected = torch.log_softmax(logits, -1).gather(1, targets.cuda().t())[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    mine = torch.autograd.grad(found.sum(), (hidden, weight))
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).float().norm() < 2e-2 * b.float().norm()
