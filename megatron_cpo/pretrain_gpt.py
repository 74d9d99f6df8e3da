"""Pretrain with Megatron's own loop, for people who have the megatron-core wheel only.

    torchrun --nproc-per-node 2 -m megatron_cpo.pretrain_gpt --tensor-model-parallel-size 2 ...

Megatron's pretrain_gpt.py and pretrain_hybrid.py are not in the wheel; this is their plain path:
next-token loss on indexed datasets, at any TP x PP x VPP x CP x DP, with Megatron's flags, on GPUs
or CPU ranks. `install()` adds the `--cpo-*` flags; without one of them this is ordinary
pretraining. The model is a GPT, or with `--hybrid-layer-pattern '*-*-'` a HybridModel of attention
(`*`), MLP (`-`) and expert (`E`) layers.

Megatron is imported where it is used: `install()` comes before that, because what is imported
earlier would be Megatron's own functions.
"""

from functools import partial
from typing import Any

import torch

from megatron_cpo import install

FIELDS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


def main() -> None:
    """Train as the command line says."""
    install()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.arguments import parse_and_validate_args

    from megatron_cpo.host.compat import model_arguments
    from megatron_cpo.host.reading import skip_on_every_rank

    skip_on_every_rank()
    # Megatron 0.19 has no default here and fails on the missing one long after parsing.
    args = parse_and_validate_args(args_defaults={"eval_interval": 1000})
    # By name: the order of `pretrain`'s parameters, and what builds the model, differ by version.
    pretrain(
        **model_arguments(args),
        train_valid_test_dataset_provider=datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
    )


def datasets_provider(train_valid_test_num_samples: Any, vp_stage: Any = None) -> Any:
    """Train, validation and test sets of `--data-path` (or `--mock-data`), built on every rank."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_cpo.host.reading import require_documents

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    require_documents(config, train_valid_test_num_samples)
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        dataset, train_valid_test_num_samples, lambda: True, config
    ).build()


# Every rank builds the datasets and reads its rows. The ranks of one tensor-parallel group read the
# same ones, so nothing has to be broadcast.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def get_batch(data_iterator: Any, vp_stage: Any = None) -> tuple[Any, ...]:
    """The next micro-batch, `FIELDS` in order, on this rank's device; None inside a pipeline."""
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank
    from megatron.training.utils import is_first_or_last_pipeline_stage

    if not is_first_or_last_pipeline_stage(vp_stage):
        return (None,) * len(FIELDS)
    rows = next(data_iterator)
    batch = {name: rows[name].cuda(non_blocking=True) for name in FIELDS if name in rows}
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return tuple(batch.get(name) for name in FIELDS)


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor) -> tuple[Any, ...]:
    """(summed loss, number of tokens, report) of one micro-batch.

    Megatron divides the sum by the count, per global batch with --calculate-per-token-loss.
    """
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens])}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """Next-token losses of a micro-batch, [rows, tokens] in nats, and the function to sum them."""
    from megatron.core.utils import get_attr_wrapped_model

    tokens, position_ids, attention_mask, labels, loss_mask = get_batch(
        data_iterator, get_attr_wrapped_model(model, "vp_stage")
    )
    losses = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return losses, partial(loss_func, loss_mask)


if __name__ == "__main__":
    main()
