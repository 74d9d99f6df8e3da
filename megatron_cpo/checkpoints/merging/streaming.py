"""Average box by box, into files that are laid out already."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import local

import torch

from megatron_cpo.checkpoints.formats.jobs import run_jobs
from megatron_cpo.checkpoints.formats.stored import (
    Box,
    Files,
    StoredTensor,
    boxes,
    read_box,
    read_new,
    write_box,
)
from megatron_cpo.checkpoints.merging.averaging import Averager, all_finite
from megatron_cpo.checkpoints.merging.matching import Match

LIMIT = 1 << 21
"""Bytes of an input's box: enough to call Python seldom, few enough for the cache."""


@dataclass(frozen=True)
class Combination:
    """A linear combination: one weighted sum of the inputs."""

    label: str
    """How messages call it."""
    weights: tuple[float, ...]
    """Per input. They need not add up to 1: task vectors subtract."""

    @property
    def copied(self) -> int | None:
        """The input that is the result as it stands: its weight is 1, the others are 0."""
        found = [i for i, weight in enumerate(self.weights) if weight]
        return found[0] if len(found) == 1 and self.weights[found[0]] == 1 else None


class Stream:
    """Writes the weighted sums of all tensors.

    Args:
        names: how messages call the inputs.
        combinations: the sums to write.
        outputs: per combination, where each tensor goes.
        allow_nan: False to raise ValueError for weights that are NaN or infinite.
        part, parts: do only the boxes of one of so many parts, which are about equal in bytes.
    """

    def __init__(
        self,
        matches: Sequence[Match],
        names: Sequence[str],
        combinations: Sequence[Combination],
        outputs: Sequence[dict[str, StoredTensor]],
        allow_nan: bool,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        # In the order of the first input's files, in which a disk reads fast.
        self._matches = sorted(matches, key=lambda match: _first_byte(match.tensors[0]))
        self._names, self._combinations, self._outputs = names, combinations, outputs
        self._allow_nan, self._part, self._parts = allow_nan, part, parts
        self._sources, self._targets = Files(), Files(os.O_WRONLY)
        self._memory = local()

    def run(self, progress: bool, check: Callable[[], None] = lambda: None) -> None:
        """Write and flush all boxes; the first error ends it. `check` is called often."""
        jobs = (partial(job, match, box) for job, match, box in self._jobs())
        with self._sources, self._targets:
            total = self._total() // self._parts
            run_jobs(jobs, self._targets, total, "merge", progress, check)

    def _total(self) -> int:
        """Bytes to read and write."""
        read = sum(tensor.nbytes for match in self._matches for tensor in match.tensors)
        return read + sum(tensor.nbytes for out in self._outputs for tensor in out.values())

    def _jobs(self) -> Iterator[tuple]:
        """The boxes of our part, in order."""
        total = sum(match.tensors[0].nbytes for match in self._matches)
        done = 0
        for job, match, box in self._all_jobs():
            if done * self._parts // total == self._part:
                yield job, match, box
            done += math.prod(box[1]) * match.tensors[0].dtype.itemsize

    def _all_jobs(self) -> Iterator[tuple]:
        for match in self._matches:
            ours = match.tensors[0]
            job = self._average if ours.dtype.is_floating_point else self._compare
            job = self._copy if match.copied else job
            limit = LIMIT // max(tensor.dtype.itemsize for tensor in match.tensors)
            for box in boxes(match.shape, limit):
                yield job, match, box
            if match.rows is not None:
                rest = (ours.shape[0] - match.rows, *ours.shape[1:])
                for (first, *others), sizes in boxes(rest, limit):
                    yield self._copy, match, ((first + match.rows, *others), sizes)

    def _average(self, match: Match, box: Box) -> int:
        inputs = self._read(match, box)
        written, finite = 0, self._allow_nan
        targets = [output[match.name] for output in self._outputs]
        plain = [  # untouched: NaNs have bits to keep, too
            copied if copied is not None and target.dtype == inputs[copied].dtype else None
            for copied, target in zip((c.copied for c in self._combinations), targets, strict=True)
        ]
        summed = [
            (combination.weights, target.dtype)
            for combination, target, copied in zip(self._combinations, targets, plain, strict=True)
            if copied is None
        ]
        sums = iter(self._memory.averager.average(inputs, summed))
        for combination, target, copied in zip(self._combinations, targets, plain, strict=True):
            if copied is not None:
                result = inputs[copied]
            else:
                result, whole = next(sums)
                if not whole:
                    self._check_fits(match, box, inputs, combination, result)
                finite = finite or (whole and all(combination.weights))
            write_box(self._targets, target, box, result)
            written += result.nbytes
        if not finite:
            self._check_finite(match, box, inputs)
        return sum(values.nbytes for values in inputs) + written

    def _check_finite(self, match: Match, box: Box, inputs: Sequence[torch.Tensor]) -> None:
        for values, name in zip(inputs, self._names, strict=True):
            if not all_finite(values):
                bad = int((~values.isfinite()).sum())
                raise ValueError(
                    f"{match.name} of the {name} checkpoint has NaN or infinite weights: {bad} of "
                    f"{values.numel()} in the box at {box[0]}. --allow-nan merges them anyway"
                )

    def _check_fits(
        self,
        match: Match,
        box: Box,
        inputs: Sequence[torch.Tensor],
        combination: Combination,
        result: torch.Tensor,
    ) -> None:
        """The result is not finite: are the inputs to blame, or the stored dtype?"""
        if not self._allow_nan:
            self._check_finite(match, box, inputs)
        exact = torch.zeros(result.shape, dtype=torch.float64)
        for weight, values in zip(combination.weights, inputs, strict=True):
            if weight:
                exact += weight * values.double()
        too_large = exact.abs()[exact.isfinite() & ~result.isfinite()]
        if len(too_large):
            kind, most = str(result.dtype).removeprefix("torch."), float(too_large.max())
            raise ValueError(
                f"{match.name} at {combination.label}: {most:g} does not fit {kind}; "
                "--dtype bf16 or fp32 has room for it"
            )

    def _compare(self, match: Match, box: Box) -> int:
        inputs = self._read(match, box)
        if not all(torch.equal(inputs[0], values) for values in inputs[1:]):
            raise ValueError(
                f"{match.name} holds {inputs[0].dtype} values, which cannot be averaged, and they "
                "differ between the checkpoints"
            )
        return sum(values.nbytes for values in inputs) + self._write(match, box, inputs[0])

    def _copy(self, match: Match, box: Box) -> int:
        [ours] = self._read(match, box, first_only=True)
        return ours.nbytes + self._write(match, box, ours)

    def _write(self, match: Match, box: Box, values: torch.Tensor) -> int:
        for output in self._outputs:
            target = output[match.name]
            write_box(self._targets, target, box, values.to(target.dtype))
        return sum(output[match.name].dtype.itemsize for output in self._outputs) * values.numel()

    def _read(self, match: Match, box: Box, first_only: bool = False) -> list[torch.Tensor]:
        count = len(self._names)
        if not hasattr(self._memory, "buffers"):
            self._memory.buffers = torch.empty(count + 1, LIMIT, dtype=torch.uint8)
            # An element has at least a byte. What is not written to takes no memory.
            self._memory.averager = Averager(LIMIT, count)
        *buffers, scratch = self._memory.buffers
        tensors = match.tensors[:1] if first_only else match.tensors
        return [
            read_box(self._sources, tensor, box, buffer, scratch)
            for tensor, buffer in zip(tensors, buffers, strict=False)
        ]


def _first_byte(tensor: StoredTensor) -> tuple[str, int]:
    first = min(tensor.pieces, key=lambda piece: (str(piece.path), piece.start), default=None)
    return (str(first.path), first.start) if first else ("", 0)


def verify_output(
    matches: Sequence[Match],
    combination: Combination,
    written: dict[str, StoredTensor],
    sample: int = 1 << 16,
) -> None:
    """Check one box of each tensor against the formula, in plain float64.

    Raises:
        ValueError: a value is off by more than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    with Files() as files:
        for match in matches:
            tensor = written[match.name]
            found = list(boxes(match.shape, sample))
            if not found:
                continue
            box = found[int(torch.randint(len(found), (), generator=generator))]
            inputs = [read_new(files, one, box) for one in match.tensors]
            stored = read_new(files, tensor, box)
            if match.copied or not tensor.dtype.is_floating_point:
                right = torch.equal(stored, inputs[0])
            else:
                exact = torch.zeros(box[1], dtype=torch.float64)
                size = exact.clone()  # of what is added up: opposite terms cancel, not their error
                for weight, values in zip(combination.weights, inputs, strict=True):
                    if weight:
                        exact += weight * values.double()
                        size += abs(weight) * values.double().abs()
                kind = torch.finfo(tensor.dtype)
                bound = kind.eps * stored.double().abs() + kind.smallest_normal * kind.eps
                off = (stored.double() - exact).abs() > bound + 1e-15 * size
                right = not bool((off & exact.isfinite()).any())
            if not right:
                raise ValueError(f"{match.name} was not written as it should be, at {box[0]}")
