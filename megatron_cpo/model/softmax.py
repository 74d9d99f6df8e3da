"""What the log-prob head does to a chunk of logits besides its matrix products, in plain torch.

Forward overwrites the logits with exp(logit - row maximum); backward never touches them again. With
E these exponentials, f a factor for each row and g the gradients of the queries,

    d loss / d logit(r, v) = f_r E(r, v) + sum over the queries q of row r of g_q [v = target_q]

so the factors go to the small operand of each product, and the targets' part is added to the
results: Q rows of the weight, Q rows of the hidden states. `softmax_kernels.py` is the same for
GPUs, where 16-bit operands want the whole gradient in one matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cpo.model.vocabulary import VocabShard

PASS_LOGITS = 2**20
"""Logits that maximum, subtraction, exp and sum go over together (4 MiB), to find them in cache."""


@dataclass(frozen=True)
class Chunk:
    """What backward knows of a chunk: r logit positions and their q queries."""

    hidden: Tensor
    """[r, H]."""
    largest: Tensor
    """[r] the shard's maxima, as `forward` found them."""
    factors: Tensor
    """[r] of exp(logit - largest) in the gradient of the logits."""
    rows: Tensor
    """[q] row of each query, increasing."""
    targets: Tensor
    """[q] token ids."""
    grads: Tensor
    """[q] d loss / d log-prob, float32, contiguous."""


class Softmax:
    """Passes over a chunk's logits [r, V], float32."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum of each row and sum of exp(logit - maximum); exponentials replace the logits."""
        largest = torch.empty(len(logits), dtype=logits.dtype, device=logits.device)
        sums = torch.empty_like(largest)
        rows = max(PASS_LOGITS // logits.shape[1], 1)
        parts = (t.split(rows) for t in (logits, largest, sums))
        for part, high, total in zip(*parts, strict=True):
            # A shard that only pads the vocabulary has no finite maximum.
            torch.amax(part, dim=1, out=high).clamp_(min=torch.finfo(high.dtype).min)
            torch.sum(part.sub_(high[:, None]).exp_(), dim=1, out=total)
        return largest, sums

    def again(self, logits: Tensor) -> None:
        """Bring logits that were computed again to where `forward` left them."""
        self.forward(logits)

    def backward(
        self,
        exponentials: Tensor,
        chunk: Chunk,
        shard: VocabShard,
        grad_hidden: Tensor,
        grad_weight: Tensor,
    ) -> None:
        """Write `grad_hidden` [r, H] and add to `grad_weight` [V, H], float32.

        Args:
            exponentials: [r, V] as `forward` left them.
        """
        hidden, factors = chunk.hidden.float(), chunk.factors[:, None]
        column, here = shard.locate(chunk.targets)
        grads = torch.where(here, chunk.grads, 0.0)[:, None]
        grad = shard.times_weight(exponentials).mul_(factors)
        grad.index_add_(0, chunk.rows, grads * shard.weight[column])
        grad_hidden.copy_(grad)
        shard.add_to_weight_gradient(grad_weight, exponentials, hidden * factors)
        grad_weight.index_add_(0, column, grads * hidden[chunk.rows])
