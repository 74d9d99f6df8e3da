"""Rotary positions by depth in the tree instead of index in the row."""

from typing import Any

from torch import Tensor, nn


class DepthRotaryEmbedding(nn.Module):
    """Wraps Megatron's `RotaryEmbedding`, which ignores `position_ids`, and looks depths up in it.

    Megatron calls it with the length of the whole row and gets angles [S, 1, 1, D] by row index;
    this returns [S, B, 1, D] by depth, of this context-parallel rank's tokens alone, which its
    unfused RoPE broadcasts over the heads. The depths come from the model's own `position_ids`
    argument through `remember`, a forward pre-hook of the model.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self._position_ids: Tensor | None = None
        self.depths = 0
        """Depths below this may come, however short the row: when sequences grow by a token."""

    def remember(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the `position_ids` [B, S] that the model is called with, for this forward pass."""
        self._position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def forward(self, max_seq_len: int, **_: Any) -> Tensor:
        """Angles [S, B, 1, D] of the depths of this micro-batch's tokens."""
        assert self._position_ids is not None
        # A depth is smaller than its row index + 1, so a table as long as the row has them all.
        # As if packed: else Megatron cuts the table to a context-parallel rank's row indices.
        table = self.rotary(max(max_seq_len, self.depths), packed_seq=True)
        angles: Tensor = table[:, 0][self._position_ids.t()]
        return angles

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Megatron asks for this first; the answer is its own."""
        length: int = self.rotary.get_rotary_seq_len(*args, **kwargs)
        return length
