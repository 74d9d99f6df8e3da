"""What CPO training supports of Megatron: everything else is refused at start-up, with a reason."""

import argparse
from collections.abc import Callable

Check = tuple[str, Callable[[argparse.Namespace], bool], str]

_REFUSED: tuple[Check, ...] = (
    ("--context-parallel-size > 1", lambda a: a.context_parallel_size > 1,
     "rows of trees are not split over context-parallel ranks; use 1"),
    ("--attention-dropout > 0", lambda a: a.attention_dropout > 0,
     "tree attention has no dropout, and rewards against a fixed reference would be noise; pass "
     "--attention-dropout 0 (and --hidden-dropout 0, or the step-0 gate cannot hold)"),
    ("--dataloader-type other than single", lambda a: a.dataloader_type not in (None, "single"),
     "the packing plan is shuffled already and must be read in order; drop the flag"),
    ("--rampup-batch-size", lambda a: a.rampup_batch_size is not None,
     "the loss is averaged over a global batch of constant size; drop the flag"),
    ("--step-batch-size-schedule",
     lambda a: getattr(a, "step_batch_size_schedule", None) is not None,
     "the loss is averaged over a global batch of constant size; use --global-batch-size"),
    ("--mtp-num-layers", lambda a: bool(a.mtp_num_layers),
     "multi-token prediction looks ahead in the row, not down the tree; drop the flag"),
    ("--num-experts", lambda a: bool(a.num_experts),
     "padding tokens would take part in the routing and its auxiliary loss; use a dense model"),
    ("--multi-latent-attention", lambda a: a.multi_latent_attention,
     "tree attention replaces the core attention of ordinary and grouped-query attention only"),
    ("--experimental-attention-variant",
     lambda a: getattr(a, "experimental_attention_variant", None) is not None,
     "its layers carry a state along the row, across branches and groups; drop the flag"),
    ("--window-size", lambda a: a.window_size is not None,
     "a sliding window counts row indices, a tree counts depths"),
    ("--softmax-type other than vanilla", lambda a: a.softmax_type != "vanilla",
     "tree attention has no attention sink"),
    ("--position-embedding-type",
     lambda a: a.position_embedding_type not in ("learned_absolute", "rope"),
     "tree depths are known to learned_absolute and rope; use one of these"),
    ("--use-mup", lambda a: a.use_mup, "the log-prob head does not scale logits"),
    ("--sft", lambda a: a.sft, "its packed sequences are not rows of groups; drop the flag"),
    ("--overlap-moe-expert-parallel-comm", lambda a: a.overlap_moe_expert_parallel_comm,
     "its schedule plan has no place for the log-prob head; drop the flag"),
    ("Megatron or PyTorch FSDP", lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2,
     "the output layer's weight must be whole on its rank; use --use-distributed-optimizer"),
    ("--eod-mask-loss with --cpo-fraction < 1", lambda a: a.eod_mask_loss and a.cpo_fraction < 1,
     "a batch's number of supervised tokens must be known before it is read; drop one of them"),
    ("--qk-clip or --log-max-attention-logit",
     lambda a: getattr(a, "qk_clip", False) or getattr(a, "log_max_attention_logit", False),
     "tree attention does not keep its logits; drop the flag"),
    ("--defer-embedding-wgrad-compute",
     lambda a: getattr(a, "defer_embedding_wgrad_compute", False),
     "the log-prob head computes that gradient itself; drop the flag"),
    ("CUDA graphs", lambda a: getattr(a, "cuda_graph_impl", "none") not in (None, "none"),
     "the number of queries changes from row to row; pass --cuda-graph-impl none"),
)  # fmt: skip


def check_supported(args: argparse.Namespace) -> None:
    """Raise ValueError for a Megatron setting that CPO cannot honour."""
    for setting, is_set, reason in _REFUSED:
        if is_set(args):
            raise ValueError(f"--cpo-aux-loss with {setting}: not supported: {reason}")
