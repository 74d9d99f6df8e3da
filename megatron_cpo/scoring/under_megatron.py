"""Reference log-probs: K floats per group, computed once by the very path that training uses.

Under torchrun with the reference's own model flags, at any TP x PP x DP. Blocks of rows that are
finished lie in the work folder PREFIX.score until all are there; rank 0 decides which are left, and
writes the store.
"""

from typing import Any

import torch

from megatron_cpo.checkpoints.arguments import check_model
from megatron_cpo.checkpoints.identity import require_checkpoint, require_folder
from megatron_cpo.groups.dataset import GroupDataset, RowConfig
from megatron_cpo.groups.finite import model_name
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.host.loading import load_model, start_megatron
from megatron_cpo.host.waiting import on_first_rank
from megatron_cpo.model.attach import attach_tree_attention
from megatron_cpo.quiet import say
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.scoring.folder import STAGE, ScoreFolder, require_positions
from megatron_cpo.scoring.rows import BLOCK_ROWS, row_blocks, scored_blocks
from megatron_cpo.work.folder import explained

MODEL_FLAGS = (
    "num_attention_heads", "num_query_groups", "position_embedding_type", "rotary_base",
    "rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor",
    "use_rope_scaling", "rope_scaling_factor", "no_rope_freq", "normalization",
    "layernorm_epsilon", "norm_epsilon", "layernorm_zero_centered_gamma", "apply_layernorm_1p",
    "swiglu", "squared_relu", "quick_geglu", "openai_gelu", "moe_router_topk",
    "moe_router_score_function", "moe_router_pre_softmax",
)  # fmt: skip
"""Arguments of Megatron, by any version's name, with which the same weights are another model."""


def check_checkpoint(args: Any, tokens: int) -> None:
    """Refuse a checkpoint that cannot score under the flags; quick, and before any rank is asked.

    Args:
        args: Megatron's parsed and validated arguments.
        tokens: of the run's tokenizer.

    Raises:
        ValueError: `args.load` has none, or it is of another model than the flags say.
    """
    require_folder(args)
    check_model(args, tokens)


def score_groups(path_prefix: str, args: Any, model: list[Any] | None = None) -> None:
    """Score every group of a store under the checkpoint `args.load` and write the result into it.

    Killed, the same call on the same ranks goes on where it was and ends in the same bytes; on
    others as well, but for rounding.

    Args:
        path_prefix: the store's PREFIX.
        args: Megatron's parsed and validated arguments; rows are `--seq-length` tokens,
            `--micro-batch-size` of them at a time.
        model: what `load_model` gave for these arguments, if it is loaded already.

    Raises:
        ValueError: no checkpoint there, or of another model than the flags say; a store of another
            tokenizer, or of sequences that are longer than the model reads; a group's tree is
            longer than a row; another reference or row length has begun to score this store.
        OSError: the disk is full; what is finished is kept.
    """
    from megatron.training import get_tokenizer

    if model is None:
        check_checkpoint(args, vocabulary_size(get_tokenizer()))
        start_megatron()
    reference = on_first_rank(lambda: reference_identity(args))
    work = ScoreFolder(path_prefix)

    def is_scored() -> bool:
        work.check(get_tokenizer())
        return work.is_done(reference)

    def begin() -> list[int]:
        shape = {"row_tokens": args.seq_length, "block_rows": BLOCK_ROWS}
        begun = work.begin(reference, **shape)
        return work.missing(STAGE, range(len(blocks))) if begun else []

    described = model_name(reference)
    # The last rank may be putting the store together, so rank 0 looks once all are here.
    if on_first_rank(is_scored):
        if torch.distributed.get_rank() == 0:
            say(f"{path_prefix} is scored under {described} already: it is left as it is")
        return
    reader = GroupReader(path_prefix)
    require_positions(
        path_prefix, reader.manifest, args.max_position_embeddings, "--max-position-embeddings"
    )
    tokens = vocabulary_size(get_tokenizer())
    config = RowConfig(args.seq_length, reader.manifest["k"], vocab_size=tokens)
    rows = GroupDataset(reader, config, rows=None, shuffle=False)
    if rows.too_long:
        raise ValueError(
            f"--seq-length {args.seq_length}: {rows.too_long} of {len(reader)} groups have more "
            "tokens in their tree; raise --seq-length (it may exceed --max-position-embeddings)"
        )
    blocks = row_blocks(rows)
    if model is None:
        model = load_model(args, attach_tree_attention)
    with explained(work.path):  # not before the model is there: wrong flags claim no folder
        for block, logps in scored_blocks(rows, set(on_first_rank(begin)), model, args):
            work.write_block(block, blocks[block], logps, described)
        missing = on_first_rank(lambda: work.finish(blocks))
    if missing:
        raise ValueError(
            f"{work.path}: {len(missing)} of {len(blocks)} blocks are not there, the first is "
            f"{missing[0]}; see that all ranks share this folder, and run the same command again"
        )
    if torch.distributed.get_rank() == 0:
        say(f"scored {len(reader)} groups under {described}")


def reference_identity(args: Any) -> dict[str, Any]:
    """What decides the log-probs under `args.load`, but for rounding: the manifest's `reference`.

    Raises:
        ValueError: there is no checkpoint.
    """
    dtype = str(args.params_dtype).removeprefix("torch.")
    flags = {name: getattr(args, name) for name in MODEL_FLAGS if hasattr(args, name)}
    return {**require_checkpoint(args), "dtype": dtype, **flags}
