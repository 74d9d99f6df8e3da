"""Starting Megatron outside its training loop, and loading a model with a checkpoint's weights."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_cpo.host.compat import build_gpt
from megatron_cpo.processes import leave_dead_ranks


@contextmanager
def _refusals(remedy: str = "") -> Iterator[None]:
    """Raise ValueError where Megatron refuses flags by an assertion, at times without a word.

    Args:
        remedy: ends the message if Megatron speaks of the number of ranks.
    """
    try:
        yield
    except AssertionError as error:
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        remedy = remedy if said and "world size" in said else ""
        raise ValueError(f"Megatron refuses these flags: {said}{remedy}") from error


def open_tokenizer(args: Any) -> Any:
    """Megatron's tokenizer of its parsed flags.

    Raises:
        ValueError: the flags name none that is there.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    with _refusals():
        return build_tokenizer(args)


def score_args(extra_args_provider: Any = None) -> Any:
    """Megatron's parsed and validated arguments for scoring; nothing is trained or saved.

    Args:
        extra_args_provider: adds the caller's own flags to Megatron's parser.

    Raises:
        ValueError: Megatron refuses the flags.
    """
    from megatron.training import global_vars
    from megatron.training.arguments import parse_and_validate_args

    if global_vars._GLOBAL_ARGS is not None:  # Megatron takes them once per process
        return global_vars._GLOBAL_ARGS

    def provider(parser: Any) -> Any:
        parser = extra_args_provider(parser) if extra_args_provider is not None else parser
        # A row of trees may be longer than the longest sequence; see `training.install`.
        parser.set_defaults(tree_rows=True)
        return parser

    needs_ranks = "" if _launched() else "; N ranks: megatron-cpo --nproc-per-node N VERB [flags]"
    defaults = {"micro_batch_size": 1, "train_iters": 1, "eval_interval": 1, "lr": 0.0}
    with _refusals(needs_ranks):
        args = parse_and_validate_args(extra_args_provider=provider, args_defaults=defaults)
    args.no_load_optim = args.no_load_rng = args.finetune = True
    if args.exit_signal_handler:  # for a training loop: nothing else asks it, or would ever end
        global_vars.get_signal_handler().release()
    return args


def load_next(checkpoint: str) -> None:
    """Let Megatron's arguments, which it takes once per process, name another checkpoint."""
    from megatron.training import global_vars

    if global_vars._GLOBAL_ARGS is not None:
        global_vars._GLOBAL_ARGS.load = checkpoint


def start_megatron() -> None:
    """Megatron's process groups and seeds, once; a process that nothing launched is one rank."""
    from megatron.core import parallel_state
    from megatron.training.initialize import initialize_megatron

    if not torch.distributed.is_initialized() and not _launched():
        from torch.distributed.elastic.utils.distributed import get_free_port

        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": get_free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if not parallel_state.model_parallel_is_initialized():
        leave_dead_ranks()
        initialize_megatron()


def _launched() -> bool:
    return "MASTER_ADDR" in os.environ


def load_model(args: Any, hook: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """The model of Megatron's flags with the weights of `args.load`, in evaluation mode.

    A chunk per virtual pipeline stage.

    Args:
        args: Megatron's parsed and validated arguments, after `start_megatron`.
        hook: receives the chunks before they are moved and cast, such as
            `model.attach.attach_tree_attention`.
    """
    from megatron.training.checkpointing import load_checkpoint

    model = build_gpt(args, hook)
    args.exit_on_missing_checkpoint = True
    load_checkpoint(model, None, None)
    for chunk in model:
        chunk.eval()
    return model
