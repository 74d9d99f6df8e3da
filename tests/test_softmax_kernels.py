"""The Triton kernels of the log-prob head: on a GPU as they are, elsewhere interpreted.

Without a GPU they are compiled as well, to the machine code of two. The twin is plain torch:
`softmax.Softmax`, and a float64 log-softmax.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_cpo.model import logprobs
from megatron_cpo.model.logprobs import Queries, query_logps
from megatron_cpo.model.softmax import Chunk
from megatron_cpo.model.vocabulary import VocabShard
from megatron_cpo.model.workspace import Workspace

pytest.importorskip("triton")

from megatron_cpo.model import softmax_kernels
from megatron_cpo.model.softmax_kernels import FusedSoftmax, logit_gradients

ROWS, HIDDEN, COLUMNS, VOCAB = 5, 8, 37, 33  # columns from 33 on pad the vocabulary
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three blocks a row, the last one not full; tensors on the GPU if there is one."""
    monkeypatch.setattr(softmax_kernels, "BLOCK", 16)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def some_logits(spread: float = 10.0) -> Tensor:
    logits = spread * torch.randn(ROWS, COLUMNS)
    logits[:, VOCAB:] = float("-inf")
    return logits


def some_chunk(logits: Tensor, first_token: int) -> Chunk:
    """One to three queries a row, two of them for one token; one target lies in another shard."""
    rows = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
    targets = torch.tensor([0, 32, 16, 15, 7, 7, 100, 31]) + first_token
    factors, grads = torch.linspace(-3, 3, ROWS), torch.linspace(-55, 5, len(rows))
    hidden = torch.zeros(ROWS, HIDDEN)
    return Chunk(hidden, logits.amax(dim=1), factors, rows, targets, grads)


def test_row_sums_equal_logsumexp() -> None:
    logits = some_logits()
    before = logits.clone()
    largest, sums = FusedSoftmax().forward(logits)
    assert torch.equal(logits, before)
    assert torch.equal(largest, logits.amax(dim=1))
    expected = logits.double().logsumexp(dim=1)
    torch.testing.assert_close(sums.log().double() + largest, expected, rtol=1e-6, atol=1e-6)


def test_a_shard_of_padding_alone() -> None:
    """No real token: its sum is zero, relative to any maximum of the other shards."""
    largest, sums = FusedSoftmax().forward(torch.full((2, COLUMNS), float("-inf")))
    assert torch.isfinite(largest).all()
    assert (sums * (largest - 3.0).exp()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("first_token", [0, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_gradients_by_formula(first_token: int, dtype: torch.dtype) -> None:
    """float32 in place of the logits; bf16 is the float32 result, rounded once.

    By up to a unit of its 8 bits: the interpreter cuts off where a GPU rounds to the nearest.
    """
    logits = some_logits()
    chunk = some_chunk(logits, first_token)
    expected = chunk.factors[:, None] * (logits - chunk.largest[:, None]).exp()
    for row, target, grad in zip(chunk.rows, chunk.targets, chunk.grads, strict=True):
        if target - first_token < COLUMNS:
            expected[row, target - first_token] += grad
    shard = VocabShard(torch.zeros(COLUMNS, HIDDEN), VOCAB, None)
    shard.weight, shard.first = shard.weight.to(dtype), first_token
    found = logit_gradients(logits, chunk, shard)
    assert found.dtype == dtype
    assert (found.data_ptr() == logits.data_ptr()) == (dtype == torch.float32)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("kept_logits", [0, 2**20])
@pytest.mark.parametrize("expanded", [False, True])
def test_the_whole_head(monkeypatch: pytest.MonkeyPatch, kept_logits: int, expanded: bool) -> None:
    """Values and gradients of the head with the kernels equal those with plain torch.

    The gradient of a plain sum arrives as one number, expanded to all queries.
    """
    hidden = torch.randn(6, 2, HIDDEN, requires_grad=True)
    weight = (2 * torch.randn(COLUMNS, HIDDEN)).requires_grad_()
    with torch.device("cpu"):
        positions = torch.tensor([[0, 0, 1, 3, 5], [0, 2, 2, 2, 4]])
        targets = torch.tensor([[3, 32, 7, 0, 12], [9, 1, 1, 30, -1]])
        queries = Queries.of(positions, targets, DEVICE)
    upstream = torch.linspace(-55, 5, len(queries.targets))
    if expanded:
        upstream = torch.tensor(-3.0).expand_as(upstream)
    results = []
    for softmax in (logprobs.Softmax(), FusedSoftmax()):
        monkeypatch.setattr(logprobs, "_softmax", lambda _, softmax=softmax: softmax)
        logps = query_logps(
            hidden, weight, queries, VOCAB, workspace=Workspace(3 * COLUMNS, kept_logits)
        )
        results.append([logps, *torch.autograd.grad(logps, (hidden, weight), upstream)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_cpo.model import softmax_kernels as kernels

sums = {"logits": "*fp32", "largest": "*fp32", "sums": "*fp32", "COLUMNS": "constexpr"}
gradients = {"logits": "*fp32", "out": "*bf16", "largest": "*fp32", "factors": "*fp32"}
gradients |= {"starts": "*i64", "targets": "*i64", "grads": "*fp32"}
gradients |= {"first_token": "i32", "columns": "i32"}
for kernel, arguments in ((kernels._row_sums, sums), (kernels._logit_gradients, gradients)):
    constants = {"BLOCK": kernels.BLOCK}
    if "COLUMNS" in arguments:
        constants["COLUMNS"] = 50304
    source = ASTSource(kernel, arguments | {"BLOCK": "constexpr"}, constants)
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        assert triton.compile(source, target, {"num_warps": 8}).asm["cubin"]
"""


def test_kernels_compile(tmp_path: Path) -> None:
    """To machine code of A100 and H100, which needs no GPU: the interpreter accepts more."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
