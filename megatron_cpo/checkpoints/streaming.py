"""Average box by box, a few boxes at a time in threads, into files that are laid out already."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import local

import torch
from tqdm import tqdm

from megatron_cpo.checkpoints.averaging import Averager
from megatron_cpo.checkpoints.pairing import Pair
from megatron_cpo.checkpoints.stored import Box, Files, StoredTensor, boxes, read_box, write_box

LIMIT = 1 << 18
"""Elements of a box: large enough for the disk, small enough for the processor's cache."""


class Stream:
    """Writes the averages of all pairs.

    Args:
        alphas: the MLE's shares.
        outputs: per alpha, where each tensor goes.
        allow_nan: False to raise ValueError for weights that are NaN or infinite.
    """

    def __init__(
        self,
        pairs: list[Pair],
        alphas: Sequence[float],
        outputs: Sequence[dict[str, StoredTensor]],
        allow_nan: bool,
    ) -> None:
        # In the order of the MLE's files, which is the order in which a disk reads fast.
        self._pairs = sorted(pairs, key=lambda pair: _first_byte(pair.mle))
        self._alphas, self._outputs, self._allow_nan = alphas, outputs, allow_nan
        self._sources, self._targets = Files(), Files(os.O_WRONLY)
        self._memory = local()

    def run(self, progress: bool) -> None:
        """Do it; the first error ends it and is raised."""
        # One writes while another computes. More than the cores, which a container may have fewer
        # of than it sees, halves the speed; more than four wait for the disk.
        threads = min(4, max(2, len(os.sched_getaffinity(0)) // 2))
        before = torch.get_num_threads()
        total = sum(pair.mle.nbytes + pair.cpo.nbytes for pair in self._pairs)
        total += sum(tensor.nbytes for output in self._outputs for tensor in output.values())
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc="merge",
            disable=None if progress else True,
        )
        with self._sources, self._targets, bar:
            try:
                for done in as_completed([pool.submit(*job) for job in self._jobs()]):
                    bar.update(done.result())
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(before)

    def _jobs(self) -> Iterator[tuple]:
        for pair in self._pairs:
            rows = pair.rows
            shape = pair.mle.shape if rows is None else (rows, *pair.mle.shape[1:])
            job = self._average if pair.mle.dtype.is_floating_point else self._compare
            for box in boxes(shape, LIMIT):
                yield job, pair, box
            if rows is not None:
                rest = (pair.mle.shape[0] - rows, *shape[1:])
                for (first, *others), sizes in boxes(rest, LIMIT):
                    yield self._copy, pair, ((first + rows, *others), sizes)

    def _average(self, pair: Pair, box: Box) -> int:
        ours, theirs = self._read(pair.mle, box, 0), self._read(pair.cpo, box, 1)
        averager = self._averager()
        for values, side, finite in zip(
            (ours, theirs), ("MLE", "CPO"), averager.load(ours, theirs), strict=True
        ):
            if not finite and not self._allow_nan:
                bad = int((~values.isfinite()).sum())
                raise ValueError(
                    f"{pair.name} of the {side} checkpoint has NaN or infinite weights: {bad} of "
                    f"{values.numel()} in the box at {box[0]}. --allow-nan merges them anyway"
                )
        written = 0
        for alpha, output in zip(self._alphas, self._outputs, strict=True):
            target = output[pair.name]
            if alpha in (0, 1) and target.dtype == pair.mle.dtype:
                average = ours if alpha else theirs  # untouched: NaNs have bits to keep, too
            else:
                try:
                    average = averager.average(alpha, target.dtype)
                except ValueError as error:
                    raise ValueError(f"{pair.name} at alpha {alpha:g}: {error}") from error
            write_box(self._targets, target, box, average)
            written += average.nbytes
        return ours.nbytes + theirs.nbytes + written

    def _compare(self, pair: Pair, box: Box) -> int:
        ours, theirs = self._read(pair.mle, box, 0), self._read(pair.cpo, box, 1)
        if not torch.equal(ours, theirs):
            raise ValueError(
                f"{pair.name} holds {pair.mle.dtype} values, which cannot be averaged, and they "
                "differ between the two checkpoints"
            )
        return theirs.nbytes + self._write_ours(pair, box, ours)

    def _copy(self, pair: Pair, box: Box) -> int:
        return self._write_ours(pair, box, self._read(pair.mle, box, 0))

    def _write_ours(self, pair: Pair, box: Box, ours: torch.Tensor) -> int:
        for output in self._outputs:
            target = output[pair.name]
            write_box(self._targets, target, box, ours.to(target.dtype))
        return ours.nbytes * (1 + len(self._outputs))

    def _read(self, tensor: StoredTensor, box: Box, side: int) -> torch.Tensor:
        if not hasattr(self._memory, "buffers"):
            self._memory.buffers = torch.empty(3, LIMIT * 8, dtype=torch.uint8)
        buffers = self._memory.buffers
        return read_box(self._sources, tensor, box, buffers[side], buffers[2])

    def _averager(self) -> Averager:
        if not hasattr(self._memory, "averager"):
            self._memory.averager = Averager(LIMIT)
        return self._memory.averager


def _first_byte(tensor: StoredTensor) -> tuple[str, int]:
    first = min(tensor.pieces, key=lambda piece: (str(piece.path), piece.start), default=None)
    return (str(first.path), first.start) if first else ("", 0)


def verify_output(
    pairs: list[Pair], alpha: float, written: dict[str, StoredTensor], sample: int = 1 << 16
) -> None:
    """Check one box of each tensor against the formula, in plain float64.

    Raises:
        ValueError: a value is off by more than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    buffers = torch.empty(4, sample * 8, dtype=torch.uint8)
    with Files() as files:
        for pair in pairs:
            tensor = written[pair.name]
            shape = pair.mle.shape if pair.rows is None else (pair.rows, *pair.mle.shape[1:])
            found = list(boxes(shape, sample))
            if not found:
                continue
            box = found[int(torch.randint(len(found), (), generator=generator))]
            ours = read_box(files, pair.mle, box, buffers[0], buffers[3])
            theirs = read_box(files, pair.cpo, box, buffers[1], buffers[3])
            stored = read_box(files, tensor, box, buffers[2], buffers[3])
            if not tensor.dtype.is_floating_point:
                right = torch.equal(stored, ours)
            else:
                exact = theirs.double() if alpha == 0 else ours.double()
                if 0 < alpha < 1:
                    exact = alpha * ours.double() + (1 - alpha) * theirs.double()
                kind = torch.finfo(tensor.dtype)
                bound = kind.eps * stored.double().abs() + kind.smallest_normal * kind.eps
                off = (stored.double() - exact).abs() > bound
                right = not bool((off & exact.isfinite()).any())
            if not right:
                raise ValueError(f"{pair.name} was not written as it should be, at {box[0]}")
