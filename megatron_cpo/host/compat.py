"""What differs between Megatron versions: what we bind to, by name, and how a model is built.

Branches look at names and signatures, never at version numbers: a checkout between two releases has
the number of one and the code of the other.
"""

import argparse
import copy
import functools
import importlib
import importlib.util
import inspect
import shlex
from collections.abc import Callable, Sequence
from typing import Any

TESTED = "0.18 and 0.19"
"""Megatron-Core releases the seam is tested with."""

BOUND = {
    # The order of `pretrain`'s parameters moved in 0.18 and in 0.19; their names did not.
    "megatron.training.training:pretrain": (
        "cfg_container",
        "train_valid_test_dataset_provider",
        "forward_step_func",
        "model_provider",
    ),
    "megatron.training.training:dummy_train_step": ("data_iterator",),
    "megatron.training.training:training_log": (
        "loss_dict",
        "total_loss_dict",
        "iteration",
        "skipped_iter",
    ),
    "megatron.training.training:evaluate": ("forward_step_func", "data_iterator", "model"),
    # 0.17 parses inside `pretrain`, out of reach of a check before it.
    "megatron.training.arguments:parse_and_validate_args": ("extra_args_provider",),
    "megatron.training.arguments:validate_args": ("args",),
    "megatron.core.models.gpt.gpt_model:GPTModel.forward": (
        "output_processor",
        "output_processor_context",
    ),
}
"""Functions of Megatron we wrap or call, and the parameters we name."""


def host() -> str:
    """Which Megatron this is: "Megatron-Core 0.19.2 in /path/megatron".

    The path tells a checkout from the wheel. `megatron` is a namespace package, so when both are
    there, the one that comes first on sys.path is used.
    """
    try:
        core = importlib.import_module("megatron.core")
        version = importlib.import_module("megatron.core.package_info").__version__
    except ImportError as error:
        return f"this Python, which cannot import Megatron-Core ({error})"
    return f"Megatron-Core {version} in {core.__path__[0].removesuffix('/core')}"


def load(path: str) -> Any:
    """The object at `module:name` or `module:Class.name`.

    Raises:
        ImportError: there is none; says which Megatron was found and which are tested.
    """
    module, _, names = path.partition(":")
    try:
        return functools.reduce(getattr, names.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise _unsupported(path, str(error)) from error


def check_host() -> None:
    """Raise ImportError unless this Megatron has every name we bind to."""
    for path, needed in BOUND.items():
        require_parameters(path, needed)


def require_parameters(path: str, needed: Sequence[str]) -> None:
    """Raise ImportError unless the function at `module:name` has parameters of these names."""
    parameters = inspect.signature(load(path)).parameters
    if missing := [name for name in needed if name not in parameters]:
        raise _unsupported(path, f"it has no parameter {', '.join(missing)}")


def _unsupported(path: str, reason: str) -> ImportError:
    name = path.replace(":", ".")
    return ImportError(
        f"megatron_cpo needs {name} and cannot use that of {host()}: {reason}. It is tested with "
        f"{TESTED}: install megatron-core[training]>=0.18,<0.20, or use a checkout of one of these"
    )


@functools.cache  # it takes a tenth of a second
def megatron_parser() -> argparse.ArgumentParser:
    """Megatron's own parser, without anybody's flags but its own."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    return add_megatron_arguments(parser)


def parsed_flags(words: Sequence[str]) -> dict[str, Any]:
    """What Megatron's parser makes of flags, its defaults included; others are passed over."""
    return vars(megatron_parser().parse_known_args(words)[0])


def flag_of(name: str, value: Any) -> tuple[str, bool]:
    """The flag of an argument of Megatron, and whether it has to be given for the argument to have
    a value: `("--swiglu", False)` for `swiglu` to be False."""
    for action in megatron_parser()._actions:
        if action.dest == name and action.option_strings:
            flag = action.option_strings[0]
            if action.nargs == 0:
                return flag, value == action.const
            if isinstance(value, str | list):
                value = shlex.quote(str(value))
            return (f"{flag} {value}", True) if value is not None else (flag, False)
    return f"--{name.replace('_', '-')} {value}", True


def skip_compiled_helpers() -> None:
    """Let Megatron use the dataset helper that its wheel ships instead of compiling it.

    `compile_helpers` runs make, the wheel has no Makefile, and a failure exits the process; on GPUs
    as well. A checkout whose helper is not compiled yet still compiles.
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def hooked(
    provider: Callable,
    hook: Callable[[list[Any]], list[Any]],
    before: Callable[[], None] = lambda: None,
) -> Callable:
    """A model provider whose chunks pass through a `pre_wrap_hooks` function.

    Up to 0.18 a function of the script builds a GPT, and there is no config to hang hooks on.

    Args:
        before: called before each chunk, by all ranks before their first. Between two chunks no
            rank may wait for all: others may be within one, where tied embeddings of the first and
            the last stage are summed.
    """

    @functools.wraps(provider)
    def build(*args: Any, **kwargs: Any) -> Any:
        before()
        return hook([provider(*args, **kwargs)])[0]

    return build


def _allow_context_parallelism() -> None:
    """Let a model of local modules be built under context parallelism, from now on.

    `DotProductAttention` refuses it when it is built, which is before tree attention takes its
    place. It refuses when it is called instead.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    build, run = DotProductAttention.__init__, DotProductAttention.forward
    if hasattr(build, "__wrapped__"):
        return

    @functools.wraps(build)
    def without_refusal(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        build(self, alone, *args, **kwargs)
        self.config = config

    @functools.wraps(run)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.config.context_parallel_size == 1, "tree attention is not in its place"
        return run(self, *args, **kwargs)

    DotProductAttention.__init__, DotProductAttention.forward = without_refusal, refuse


def hook_pretrain(
    arguments: dict[str, Any],
    hook: Callable[[list[Any]], list[Any]],
    before: Callable[[], None],
) -> dict[str, Any]:
    """`pretrain`'s arguments, by name, with a hook in whatever will build the model.

    0.19 builds from the config's `model` if there is one, else by `model_provider`; 0.18 always by
    the latter, and pretrain_hybrid.py passes both. So both are hooked, and one of them is used.

    Args:
        before: called once or more on each rank while the model is built, see `hooked`.
    """
    _allow_context_parallelism()
    model_config = getattr(arguments["cfg_container"], "model", None)
    if model_config is not None:

        def when_built(chunks: list[Any]) -> list[Any]:
            before()
            return hook(chunks)

        model_config.pre_wrap_hooks.append(when_built)
    provider = arguments.get("model_provider")
    if provider is not None:
        arguments = arguments | {"model_provider": hooked(provider, hook, before)}
    return arguments


def model_arguments(args: Any) -> dict[str, Any]:
    """`pretrain`'s `cfg_container` and `model_provider` for the model of Megatron's flags.

    A GPT, or with `--hybrid-layer-pattern` a HybridModel. 0.19 builds either from a config; 0.18
    has one for hybrids only, and builds by functions, of which its wheel lacks the GPT's.
    """
    from megatron.training import argument_utils

    hybrid = getattr(args, "hybrid_layer_pattern", None) is not None
    name = "hybrid_config_from_args" if hybrid else "gpt_config_from_args"
    make_config = getattr(argument_utils, name, None)
    config = None if make_config is None else make_config(args)
    provider: Callable | None = None
    if not hasattr(argument_utils, "gpt_config_from_args"):
        provider = functools.partial(_build_gpt, args)
        if config is not None:
            provider = functools.partial(_build_from_config, config)
    container = argument_utils.pretrain_cfg_container_from_args(args, config)
    return {"cfg_container": container, "model_provider": provider}


def _build_from_config(model_config: Any, config: Any = None, **stage: Any) -> Any:
    """One chunk by the builder of 0.18's model config; `stage` says which."""
    return model_config.get_builder_cls()(model_config).build_model(**stage)


def _build_gpt(args: Any, config: Any = None, **stage: Any) -> Any:
    """One chunk of a GPT from Megatron's flags, for 0.18; `stage` says which."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training.argument_utils import core_transformer_config_from_args

    config = core_transformer_config_from_args(args) if config is None else config
    if args.spec is not None:
        spec = import_module(args.spec)
    else:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=stage.get("vp_stage"),
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        **stage,
    )


def build_gpt(args: Any, hook: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """The model of Megatron's flags on this rank, a chunk per virtual stage, not wrapped in DDP.

    Args:
        args: Megatron's parsed and validated arguments, after `initialize_megatron`.
        hook: receives the chunks before they are moved and cast, as in `pre_wrap_hooks`.
    """
    from megatron.core.enums import ModelType

    _allow_context_parallelism()
    arguments = model_arguments(args)
    container, provider = arguments["cfg_container"], arguments["model_provider"]
    if provider is not None:
        from megatron.training.training import get_model

        chunks: list[Any] = get_model(
            hooked(provider, hook), ModelType.encoder_or_decoder, wrap_with_ddp=False
        )
        return chunks
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = container.model
    config.pre_wrap_hooks.append(hook)
    chunks = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=container.ddp,
        wrap_with_ddp=False,
        model_type=ModelType.encoder_or_decoder,
    )
    return chunks
