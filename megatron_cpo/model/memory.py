"""Keys and values of earlier tokens, so that sequences grow by a token a forward.

Prefixes are read as chains in rows, like any other tokens, and `PrefixMemory` keeps the keys and
values that `TreeAttention` gets for them. Then every prefix has several samples, and a forward is a
row with one token of each. A sample attends to its prefix, whose keys and values exist once for all
its samples, and to its own tokens; the softmax over both parts is put together from the maximum and
the sum of each.

Prefixes of like length share a padded bucket. Own tokens lie in slots without gaps: when samples
finish, the last slots move into theirs. So a forward costs what is still growing.

Legend: n live samples, R prefixes of a bucket, P tokens of its longest, m most samples of one of
them, T own tokens, H heads and G key/value heads of this rank, D channels of a head.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLACK = 1.25
"""The longest prefix of a bucket is at most this many times as long as its shortest."""
DEAD = 0.25
"""Share of a bucket's prefixes that may have no live sample before they are dropped."""
FIRST_ROOM = 32
"""Own tokens there is room for at first; doubled when it is used up."""

Part = tuple[Tensor, Tensor, Tensor]
"""Attention over some of the keys, in float32: the largest score and the sum of exponentials below
it, [.., 1] each, and the sum of exponentials times values, [.., D]."""


@dataclass
class _Bucket:
    """Prefixes of like length and who grows from them; for all layers."""

    prefixes: NDArray[np.int64]
    """[R] which they are."""
    padding: Tensor
    """[R, 1, P] bool, True beyond a prefix's end."""
    samples: Tensor
    """[R, m] the live sample in each place; n where there is none."""


@dataclass
class _Layer:
    """What one layer remembers."""

    read: list[tuple[Tensor, Tensor]]
    """Keys and values [tokens, G, D] of the rows of prefixes that were read so far."""
    buckets: list[tuple[Tensor, Tensor]]
    """Keys and values of each bucket, [R, G, P, D]."""
    own: tuple[Tensor, ...] = ()
    """Keys and values of the samples' own tokens, [slots, G, room, D]; none at first."""


class PrefixMemory:
    """What a model's layers remember of a batch of prefixes and their samples.

    While `TreeAttention.memory` is set to it, prefixes are read in rows [1, S], in order; then
    each `grow` announces a forward with one token of each sample.

    Args:
        lengths: tokens of each prefix.
        count: samples a prefix.
    """

    def __init__(self, lengths: list[int], count: int) -> None:
        self._lengths = np.array(lengths)
        self._prefix_of = np.repeat(np.arange(len(lengths)), count)  # [n]
        self._slots = np.arange(len(self._prefix_of))  # [n] a permutation
        self._layers: dict[Any, _Layer] = {}
        self._buckets: list[_Bucket] = []
        self._own = -1  # own tokens before this forward; -1 while prefixes are read
        # [n] the sample in each slot, the slot of each sample, its place in buckets end to end.
        self._in_slots = self._by_sample = self._in_buckets = torch.empty(0, dtype=torch.long)
        self.row_tokens: int | None = None
        """Tokens of the row that is read next; None: all of it, no padding behind them."""

    def attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None:
        """Remember a layer's new keys and values; where samples grow, attend to all it remembers.

        Args:
            layer: whose they are.
            query: [n, H, D], row by row; key, value: [n, G, D].

        Returns:
            [n, H * D], or None while prefixes are read, which attend within their row.
        """
        memory = self._layers.setdefault(layer, _Layer([], []))
        if self._own < 0:
            memory.read.append((key[: self.row_tokens], value[: self.row_tokens]))
            return None
        n, heads, width = query.shape
        grouped = query.reshape(n, key.shape[1], -1, width)  # [n, G, H / G, D]
        ours = self._attend_own(memory, grouped, key, value, scale)
        theirs = self._attend_prefixes(memory, grouped, scale)
        largest = torch.maximum(ours[0], theirs[0])
        shares = (ours[0] - largest).exp(), (theirs[0] - largest).exp()
        total = shares[0] * ours[1] + shares[1] * theirs[1]
        out = shares[0] * ours[2] + shares[1] * theirs[2]
        return (out / total).to(query.dtype).reshape(n, heads * width)

    def grow(self, rows: NDArray[np.int64], device: torch.device) -> None:
        """Announce a forward that gives these samples a token; the others are forgotten.

        Args:
            rows: indices into the live samples, increasing.
        """
        first = self._own < 0
        if first:
            self._lay_out_prefixes(device)
        self._own += 1
        if first or len(rows) < len(self._prefix_of):
            self._prefix_of, slots = self._prefix_of[rows], self._slots[rows]
            self._slots = self._close_gaps(slots, device)
            self._place_samples(device)
            self._in_slots = torch.from_numpy(np.argsort(self._slots)).to(device)
            self._by_sample = torch.from_numpy(self._slots).to(device)

    def _attend_own(
        self, memory: _Layer, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Part:
        """Attention of each sample to its own tokens, this one included; parts [n, G, H / G, .]."""
        n, heads, _, width = query.shape
        if self._own == 0 or self._own == memory.own[0].shape[2]:
            room = 2 * self._own or FIRST_ROOM
            new = key.new_empty(n, heads, room, width), value.new_empty(n, heads, room, width)
            for tensor, old in zip(new, memory.own, strict=False):
                tensor[:, :, : self._own] = old[:n]
            memory.own = new
        for tensor, token in zip(memory.own, (key, value), strict=True):
            tensor[:n, :, self._own] = token[self._in_slots]
        keys, values = (t[:n, :, : self._own + 1].flatten(0, 1) for t in memory.own)
        part = _attend(query[self._in_slots].flatten(0, 1), keys, values, scale)
        return tuple(t.unflatten(0, (n, heads))[self._by_sample] for t in part)

    def _attend_prefixes(self, memory: _Layer, query: Tensor, scale: float) -> Part:
        """Attention of each sample to its prefix; parts [n, G, H / G, .]."""
        _, heads, group, width = query.shape
        nobody = query.new_zeros(1, *query.shape[1:])
        padded = torch.cat([query, nobody])
        parts = []
        for bucket, (keys, values) in zip(self._buckets, memory.buckets, strict=True):
            rows, most = bucket.samples.shape
            # [R, m, G, H / G, D] -> [R * G, m * H / G, D]
            queries = padded[bucket.samples].permute(0, 2, 1, 3, 4).reshape(rows * heads, -1, width)
            padding = bucket.padding.repeat_interleave(heads, dim=0)
            part = _attend(queries, keys.flatten(0, 1), values.flatten(0, 1), scale, padding)
            by_row = [t.reshape(rows, heads, most, group, -1) for t in part]
            parts.append([t.transpose(1, 2).flatten(0, 1) for t in by_row])
        together = (torch.cat(tensors)[self._in_buckets] for tensors in zip(*parts, strict=True))
        return tuple(together)  # type: ignore[return-value]

    def _lay_out_prefixes(self, device: torch.device) -> None:
        """All prefixes are read: sort them into buckets."""
        order = np.argsort(self._lengths, kind="stable")
        starts = [0]
        for at in range(1, len(order)):
            if self._lengths[order[at]] > SLACK * self._lengths[order[starts[-1]]]:
                starts.append(at)
        ends = np.cumsum(self._lengths)
        for prefixes in np.split(order, starts[1:]):
            lengths = self._lengths[prefixes]
            column = np.arange(lengths.max())
            padding = torch.from_numpy(column >= lengths[:, None])[:, None].to(device)
            self._buckets.append(_Bucket(prefixes, padding, torch.empty(0)))
            # Padding repeats a prefix's last token: finite, and masked.
            rows = (ends - self._lengths)[prefixes, None] + np.minimum(column, lengths[:, None] - 1)
            index = torch.from_numpy(rows).to(device)
            for memory in self._layers.values():
                keys, values = (torch.cat(parts) for parts in zip(*memory.read, strict=True))
                memory.buckets.append(
                    tuple(t[index].transpose(1, 2).contiguous() for t in (keys, values))  # type: ignore[arg-type]
                )
        for memory in self._layers.values():
            memory.read = []

    def _close_gaps(self, slots: NDArray[np.int64], device: torch.device) -> NDArray[np.int64]:
        """Move the last slots into free ones, in every layer; the new slots of the samples."""
        n = len(slots)
        moving = np.flatnonzero(slots >= n)
        free = np.setdiff1d(np.arange(n), slots)
        if len(free):
            # Once for all layers: each way to a GPU waits for it.
            to, of = (torch.from_numpy(rows).to(device) for rows in (free, slots[moving]))
            for memory in self._layers.values():
                for tensor in memory.own:
                    tensor[to, :, : self._own] = tensor[of, :, : self._own]
            slots[moving] = free
        return slots

    def _place_samples(self, device: torch.device) -> None:
        """Find each live sample's place in the buckets."""
        n, prefixes = len(self._prefix_of), len(self._lengths)
        number = np.bincount(self._prefix_of, minlength=prefixes)
        self._drop_prefixes(number > 0, device)
        # Samples of a prefix are neighbours.
        place = np.arange(n) - np.searchsorted(self._prefix_of, self._prefix_of)
        in_buckets = np.zeros(n, dtype=np.int64)
        size = 0
        for bucket in self._buckets:
            row_of = np.full(prefixes, -1)
            row_of[bucket.prefixes] = np.arange(len(bucket.prefixes))
            here = np.flatnonzero(row_of[self._prefix_of] >= 0)
            rows, most = row_of[self._prefix_of[here]], number[bucket.prefixes].max()
            samples = np.full((len(bucket.prefixes), most), n)
            samples[rows, place[here]] = here
            in_buckets[here] = size + rows * most + place[here]
            size += samples.size
            bucket.samples = torch.from_numpy(samples).to(device)
        self._in_buckets = torch.from_numpy(in_buckets).to(device)

    def _drop_prefixes(self, alive: NDArray[np.bool_], device: torch.device) -> None:
        """Forget prefixes that nothing grows from; a few of a bucket stay until it pays to move."""
        for at in reversed(range(len(self._buckets))):
            bucket = self._buckets[at]
            kept = alive[bucket.prefixes]
            if not kept.any():
                del self._buckets[at]
                for memory in self._layers.values():
                    del memory.buckets[at]
            elif kept.sum() < (1 - DEAD) * len(kept):
                rows = torch.from_numpy(np.flatnonzero(kept)).to(device)
                bucket.prefixes, bucket.padding = bucket.prefixes[kept], bucket.padding[rows]
                for memory in self._layers.values():
                    keys, values = memory.buckets[at]
                    memory.buckets[at] = keys[rows], values[rows]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padding: Tensor | None = None
) -> Part:
    """Attention of [B, M, D] queries to [B, N, D] keys without `padding` [B, 1, N], as a part."""
    if query.is_cuda and query.dtype != torch.float32:  # as flex attention keeps them
        scores = torch.bmm(query, key.transpose(1, 2), out_dtype=torch.float32).mul_(scale)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale)
    if padding is not None:
        scores.masked_fill_(padding, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    return largest, weights.sum(-1, keepdim=True), torch.bmm(weights.to(value.dtype), value).float()
