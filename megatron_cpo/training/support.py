"""What CPO training supports of Megatron: everything else is refused at start-up, with a reason."""

import argparse
from collections.abc import Callable
from typing import Any

Check = tuple[str, Callable[[argparse.Namespace], bool], str]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _stage_without_experts(args: argparse.Namespace) -> bool:
    """Whether some pipeline stages of a hybrid model have expert layers and others have none.

    Their logged losses then differ in size, [E layers] and [layers], and are summed over the stages
    (Megatron 0.18 and 0.19).
    """
    pattern, stages = getattr(args, "hybrid_layer_pattern", None), args.pipeline_model_parallel_size
    if not pattern or "E" not in pattern or stages == 1:
        return False
    segments = pattern.split("|")
    if len(segments) == 1:
        size = max(len(pattern) // stages, 1)
        segments = [pattern[first : first + size] for first in range(0, len(pattern), size)]
    return not all("E" in "".join(segments[stage::stages]) for stage in range(stages))


_MODEL: tuple[Check, ...] = (
    ("--hierarchical-context-parallel-sizes or --hybrid-context-parallel",
     lambda a: bool(getattr(a, "hierarchical_context_parallel_sizes", None)
                    or getattr(a, "hybrid_context_parallel", False)),
     "keys and values are gathered over one flat group; use --context-parallel-size alone"),
    ("--hybrid-layer-pattern with layers other than * - E",
     lambda a: bool(set(getattr(a, "hybrid_layer_pattern", None) or "") - set("*-E|")),
     "Mamba-like layers carry a state along the row, across branches and groups, and MTP (/) looks "
     "ahead in it; use attention *, MLP - and expert E layers"),
    ("--hybrid-layer-pattern with a pipeline stage that has no expert layer E",
     _stage_without_experts,
     "Megatron would wait forever when it logs the routers' losses; give each stage an E"),
    ("--mtp-num-layers", lambda a: bool(a.mtp_num_layers),
     "multi-token prediction looks ahead in the row, not down the tree; drop the flag"),
    ("--moe-expert-capacity-factor or --moe-expert-rank-capacity-factor",
     lambda a: getattr(a, "moe_expert_capacity_factor", None) is not None
     or getattr(a, "moe_expert_rank_capacity_factor", None) is not None,
     "which tokens are dropped would depend on what else is in the row; drop the flag"),
    ("--moe-use-upcycling", lambda a: getattr(a, "moe_use_upcycling", False),
     "its model is not that of the checkpoint; make it in a run of its own, and load that"),
    ("--moe-router-load-balancing-type sinkhorn or quantile_balancing",
     lambda a: bool({"sinkhorn", "quantile_balancing"} & set(_as_list(
         getattr(a, "moe_router_load_balancing_type", None)))),
     "a token's experts would depend on what else is in the row; use aux_loss or none"),
    ("--moe-router-enable-expert-bias",
     lambda a: getattr(a, "moe_router_enable_expert_bias", False),
     "Megatron counts padding tokens in the bias, or fails on their mask; use aux_loss"),
    ("--moe-input-jitter-eps or a --moe-router-force-* flag",
     lambda a: getattr(a, "moe_input_jitter_eps", None) is not None
     or getattr(a, "moe_router_force_load_balancing", False)
     or getattr(a, "moe_router_force_biased", None) is not None,
     "routing would be random, so the policy would not be its reference; drop the flag"),
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
     lambda a: a.position_embedding_type not in ("learned_absolute", "rope", "none"),
     "tree depths are known to learned_absolute and rope; use one of these, or none"),
    ("--use-mup", lambda a: a.use_mup, "the log-prob head does not scale logits"),
    ("Megatron or PyTorch FSDP", lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2,
     "the output layer's weight must be whole on its rank; use --use-distributed-optimizer"),
    ("CUDA graphs", lambda a: getattr(a, "cuda_graph_impl", "none") not in (None, "none"),
     "the number of queries changes from row to row; pass --cuda-graph-impl none"),
    ("--tensor-parallel-num-weight-shards other than the tensor-parallel size",
     lambda a: getattr(a, "tensor_parallel_num_weight_shards", None)
     not in (None, a.tensor_model_parallel_size),
     "the log-prob head needs a rank's whole part of the output weight; drop the flag"),
)  # fmt: skip
"""Models whose tokens cannot follow a tree."""

_TRAINING: tuple[Check, ...] = (
    ("--dataloader-type other than single", lambda a: a.dataloader_type not in (None, "single"),
     "the packing plan is shuffled already and must be read in order; drop the flag"),
    ("--rampup-batch-size", lambda a: a.rampup_batch_size is not None,
     "the loss is averaged over a global batch of constant size; drop the flag"),
    ("--step-batch-size-schedule",
     lambda a: getattr(a, "step_batch_size_schedule", None) is not None,
     "the loss is averaged over a global batch of constant size; use --global-batch-size"),
    ("--sft", lambda a: a.sft, "its packed sequences are not rows of groups; drop the flag"),
    ("--overlap-moe-expert-parallel-comm", lambda a: a.overlap_moe_expert_parallel_comm,
     "its schedule plan has no place for the log-prob head; drop the flag"),
    ("--eod-mask-loss with --cpo-fraction < 1", lambda a: a.eod_mask_loss and a.cpo_fraction < 1,
     "a batch's number of supervised tokens must be known before it is read; drop one of them"),
    ("--allow-ambiguous-pad-tokens with --cpo-fraction < 1",
     lambda a: getattr(a, "allow_ambiguous_pad_tokens", False) and a.cpo_fraction < 1,
     "ends of documents that are padding tokens, too, would count among a batch's supervised "
     "tokens and have no loss; drop the flag"),
    ("--qk-clip or --log-max-attention-logit",
     lambda a: getattr(a, "qk_clip", False) or getattr(a, "log_max_attention_logit", False),
     "tree attention does not keep its logits; drop the flag"),
    ("--defer-embedding-wgrad-compute",
     lambda a: getattr(a, "defer_embedding_wgrad_compute", False),
     "the log-prob head computes that gradient itself; drop the flag"),
    ("--deterministic-mode", lambda a: a.deterministic_mode,
     "the sum over a candidate's queries has no deterministic kernel on GPUs; drop the flag"),
    ("--decrease-batch-size-if-needed",
     lambda a: getattr(a, "decrease_batch_size_if_needed", False),
     "the loss is averaged over a global batch of constant size; drop the flag"),
    ("--phase-transition-iterations", lambda a: bool(a.phase_transition_iterations),
     "every phase would start at the first row again; run the phases one by one"),
    ("--full-validation", lambda a: a.full_validation,
     "Megatron's own loop fails on it without several validation sets; use --eval-iters"),
    ("--reset-position-ids or --reset-attention-mask with --cpo-fraction < 1",
     lambda a: (a.reset_position_ids or a.reset_attention_mask) and a.cpo_fraction < 1,
     "plain rows are one chain for each sample; drop the flag"),
    ("--dataloader-inter-document-masking or --fim-data with --cpo-fraction < 1",
     lambda a: (getattr(a, "dataloader_inter_document_masking", False)
                or getattr(a, "fim_data", False)) and a.cpo_fraction < 1,
     "plain rows are Megatron's plain GPT samples; drop the flag"),
    ("--logits-load-dir or --logits-save-dir",
     lambda a: bool(getattr(a, "logits_load_dir", None) or getattr(a, "logits_save_dir", None)),
     "the log-prob head makes no logits of whole rows; drop the flag"),
    ("--perform-rl-step", lambda a: getattr(a, "perform_rl_step", False),
     "its rollouts would take the place of the groups; drop one of the two"),
    ("--check-for-spiky-loss", lambda a: a.check_for_spiky_loss,
     "the CPO loss rises at first by design; drop the flag"),
)  # fmt: skip
"""Runs whose batches or losses would not be what they say."""

_REFUSED = _MODEL + _TRAINING


def check_given(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag that Megatron needs and asserts without a word."""
    if args.micro_batch_size is None:
        raise ValueError(
            "--micro-batch-size is not given: rows that a rank computes at a time; give 1, and as "
            "many groups as fit into --seq-length are in it"
        )
    if args.save is not None and args.save_interval is None:
        raise ValueError(
            f"--save {args.save} without --save-interval: Megatron needs it; --save-interval "
            f"{args.train_iters or 'N'} saves once, at the end"
        )


def check_supported(args: argparse.Namespace, training: bool = True) -> None:
    """Raise ValueError for a Megatron setting that cannot be honoured.

    Args:
        training: False for scoring references, which has no batches and no loss.
    """
    who = "--cpo-aux-loss" if training else "scoring"
    for setting, is_set, reason in _REFUSED if training else _MODEL:
        if is_set(args):
            raise ValueError(f"{who} with {setting}: not supported: {reason}")
