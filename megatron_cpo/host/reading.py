"""Data that every rank reads for itself, where Megatron takes something else for granted."""

import importlib
from collections.abc import Sequence
from typing import Any


def skip_on_every_rank() -> None:
    """Let `--iterations-to-skip` pass over a batch on every rank; a second call changes nothing.

    Megatron's own step reads it on the first rank of a tensor-parallel group and broadcasts it, so
    where all ranks read their rows themselves the others would fall behind, and be a batch apart
    from there on. The result-rejected tracker file is the same flag.

    A checkpoint that Megatron wrote because of a bad loss wants its iteration to be run again;
    where that one is passed over nothing is left to do, and Megatron would end the next one in its
    place.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    def skip(data_iterator: Any) -> None:
        machine = get_rerun_state_machine()
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while machine.should_run_forward_backward(data_iterator):
            for _ in range(get_num_microbatches()):
                for each in iterators:  # one a virtual pipeline stage
                    next(each)
        machine.state, machine.data_iterator_checkpoints = RerunState.NOT_RUNNING_YET, None

    training: Any = importlib.import_module("megatron.training.training")
    training.dummy_train_step = skip


def require_documents(config: Any, samples: Sequence[int | None]) -> None:
    """Refuse splits that have no token, of which Megatron would gather samples for ever.

    Splits of which no sample is wanted are not built: a default `--split` has one for tests.

    Args:
        config: a `GPTDatasetConfig`; its unwanted splits are taken out.
        samples: wanted of the train, validation and test split; None: one epoch.

    Raises:
        ValueError: names the split and the files.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    if config.mock:
        return
    for split in Split:
        at, flag = split.value, f"--split {config.split}"
        blend, part = config.blend, config.split_matrix and config.split_matrix[at]
        if config.blend_per_split is not None:
            blend, part = config.blend_per_split[at], (0.0, 1.0)
            flag = f"--{split.name}-data-path"
        elif samples[at] == 0:
            config.split_matrix[at] = None
        if blend is None or part is None or not samples[at]:
            continue
        prefixes, weights = blend
        if len(prefixes) > 1 and weights is None:  # one epoch of each
            continue
        for prefix in prefixes:
            stored = GPTDataset.build_low_level_dataset(prefix, config)
            lengths = stored.sequence_lengths  # a view, which must not outlive it
            first, last = (round(edge * float(len(lengths))) for edge in part)
            if not lengths[first:last].sum():
                raise ValueError(
                    f"{flag}: the {len(lengths)} documents of {prefix} leave the {split.name} "
                    f"split none with a token, and {samples[at]} samples of it are wanted; give "
                    "it a larger share or more documents"
                    + ("" if split is Split.train else ", or pass --eval-iters 0")
                )
