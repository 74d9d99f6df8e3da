"""Reference log-probs: K floats per group, computed once by the very path that training uses.

Under torchrun with the reference's own model flags, at any TP x PP x DP. Rows are dealt out to the
data-parallel ranks, every pipeline stage walks them in step, and rank 0 writes the store.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_cpo.checkpoints.identity import checkpoint_identity
from megatron_cpo.groups.dataset import GroupDataset, RowConfig
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.groups.writing import finish_publishing, write_reference_logps
from megatron_cpo.model.forward import RowForward, candidate_logps
from megatron_cpo.tree import Ints, build_tree


def score_args(extra_args_provider: Any = None) -> Any:
    """Megatron's parsed and validated arguments for scoring; nothing is trained or saved.

    Args:
        extra_args_provider: adds the caller's own flags to Megatron's parser.
    """
    from megatron.training import global_vars
    from megatron.training.arguments import parse_and_validate_args

    if global_vars._GLOBAL_ARGS is not None:  # Megatron takes them once per process
        return global_vars._GLOBAL_ARGS

    def provider(parser: Any) -> Any:
        parser = extra_args_provider(parser) if extra_args_provider is not None else parser
        # A row of trees may be longer than the longest sequence; see training.install.
        parser.set_defaults(tree_rows=True)
        return parser

    defaults = {"micro_batch_size": 1, "train_iters": 1, "eval_interval": 1, "lr": 0.0}
    args = parse_and_validate_args(extra_args_provider=provider, args_defaults=defaults)
    args.no_load_optim = args.no_load_rng = args.finetune = True
    return args


def score_groups(path_prefix: str, args: Any, model: list[Any] | None = None) -> None:
    """Score every group of a store under the checkpoint `args.load` and write the result into it.

    Args:
        path_prefix: the store's PREFIX.
        args: Megatron's parsed and validated arguments; rows are `--seq-length` tokens,
            `--micro-batch-size` of them at a time.
        model: what `load_model` gave for these arguments, if it is loaded already.

    Raises:
        ValueError: no checkpoint there, or a group's tree is longer than a row.
    """
    reference = require_checkpoint(args)
    if model is None:
        start_megatron()
    torch.distributed.barrier()  # the last rank may be putting the store together
    if torch.distributed.get_rank() == 0:
        finish_publishing(path_prefix)  # of a run that was killed
    torch.distributed.barrier()
    reader = GroupReader(path_prefix)
    config = RowConfig(row_tokens=args.seq_length, k=reader.manifest["k"])
    rows = GroupDataset(reader, config, rows=None, shuffle=False)
    if rows.too_long:
        raise ValueError(
            f"--seq-length {args.seq_length}: {rows.too_long} of {len(reader)} groups have more "
            "tokens in their tree; raise --seq-length (it may exceed --max-position-embeddings)"
        )
    scored = _score_rows(rows, load_model(args) if model is None else model, args)
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, scored)
    if torch.distributed.get_rank() == 0:
        merged = {group: logps for part in everywhere for group, logps in part.items()}
        write_reference_logps(path_prefix, [merged[i] for i in range(len(reader))], reference)
        print(
            f"scored {len(merged)} groups under {reference['name']} "
            f"iteration {reference['iteration']}"
        )
    torch.distributed.barrier()  # nobody reads the store before it is whole


def require_checkpoint(args: Any) -> dict[str, Any]:
    """The identity of the checkpoint `args.load`.

    Raises:
        ValueError: there is none.
    """
    identity = checkpoint_identity(args.load, args.ckpt_step)
    if identity is None:
        raise ValueError(
            f"--load {args.load}: no Megatron checkpoint there (no "
            "latest_checkpointed_iteration.txt); give the folder that --save wrote"
        )
    return identity


def start_megatron() -> None:
    """Megatron's process groups and seeds, once.

    Raises:
        ValueError: this process is no rank of torchrun or of another launcher.
    """
    from megatron.core import parallel_state
    from megatron.training.initialize import initialize_megatron

    if not torch.distributed.is_initialized() and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "--load: a Megatron checkpoint needs the ranks of torchrun; start this command with "
            "torchrun --standalone --nproc-per-node N in place of python"
        )
    if not parallel_state.model_parallel_is_initialized():
        initialize_megatron()


def load_model(args: Any) -> list[Any]:
    """The model of Megatron's flags with the weights of `args.load`, in evaluation mode.

    Tree attention and depth RoPE are in place; a chunk per virtual pipeline stage.
    """
    from megatron.training.checkpointing import load_checkpoint

    from megatron_cpo.compat import build_gpt
    from megatron_cpo.model.attach import attach_tree_attention

    model = build_gpt(args, attach_tree_attention)
    args.exit_on_missing_checkpoint = True
    load_checkpoint(model, None, None)
    for chunk in model:
        chunk.eval()
    return model


def _score_rows(rows: GroupDataset, model: list[Any], args: Any) -> dict[int, NDArray[np.float32]]:
    """Log-probs [K] of groups in this data-parallel rank's rows; empty on other pipeline stages."""
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import get_tokenizer

    step = _ScoringStep(get_tokenizer().vocab_size)
    dp_rank, dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    batch = args.micro_batch_size
    stages = mpu.get_pipeline_model_parallel_world_size()
    # Every rank runs the same number of micro-batches, a multiple of the pipeline stages as the
    # interleaved schedule wants it; rows past the end repeat the last one.
    rounds = -(-len(rows) // (batch * dp_size * stages)) * stages
    mine = [
        min((i * dp_size + dp_rank) * batch + j, len(rows) - 1)
        for i in range(rounds)
        for j in range(batch)
    ]
    # A few micro-batches at a time keep a pipeline full and the progress bar moving.
    together = 4 * stages
    scored: dict[int, NDArray[np.float32]] = {}
    bar = tqdm(
        total=len(rows), unit="rows", desc="reference", disable=torch.distributed.get_rank() != 0
    )
    for first in range(0, rounds, together):
        micro_batches = range(first, min(first + together, rounds))
        part = mine[micro_batches.start * batch : micro_batches.stop * batch]
        loaders = [_batches(rows, part, batch) for _ in model]
        with torch.no_grad():
            results = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=loaders if len(model) > 1 else loaders[0],
                model=model if len(model) > 1 else model[0],
                num_microbatches=len(micro_batches),
                seq_length=args.seq_length,
                micro_batch_size=batch,
                forward_only=True,
            )
        for result, at in zip(results, range(0, len(part), batch), strict=False):
            for row, logps in zip(part[at : at + batch], result["logps"], strict=True):
                for g, group in enumerate(rows.group_indices(row)):
                    stored = rows.reader[int(group)]
                    scored[int(group)] = by_candidate(stored.prefix, stored.candidates, logps[g])
        bar.update(min(len(part) * dp_size, len(rows) - bar.n))
    bar.close()
    return scored


def by_candidate(
    prefix: Ints, candidates: Sequence[Ints], logps: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A group's log-probs by candidate, from those by slot."""
    order = build_tree(prefix, candidates).candidate_order
    result = np.empty(len(order), dtype=np.float32)
    result[order] = logps[: len(order)]
    return result


def _batches(
    rows: GroupDataset, indices: list[int], batch: int
) -> Iterator[dict[str, torch.Tensor]]:
    for first in range(0, len(indices), batch):
        yield torch.utils.data.default_collate([rows[i] for i in indices[first : first + batch]])


class _ScoringStep:
    """A forward step whose "loss" is the candidates' log-probs, [B, G, K] by slot."""

    def __init__(self, vocab_size: int) -> None:
        self._forward = RowForward(vocab_size)

    def __call__(self, data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        output, batch = self._forward(next(data_iterator), model)

        def logps(query_logps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            mask = batch["candidate_mask"]
            sums = candidate_logps(
                query_logps, batch["first_slot"], batch["last_slot"], mask.numel()
            )
            return query_logps.sum(), {"logps": sums.view_as(mask).cpu().numpy()}

        return output, logps
