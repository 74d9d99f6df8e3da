"""All knowledge of Megatron versions: what we bind to, by name, and what to say without it.

Branches look at names and signatures, never at version numbers: a checkout between two releases has
the number of one and the code of the other.
"""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
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
    "megatron.training.training:training_log": ("loss_dict", "iteration", "skipped_iter"),
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
        parameters = inspect.signature(load(path)).parameters
        if missing := [name for name in needed if name not in parameters]:
            raise _unsupported(path, f"it has no parameter {', '.join(missing)}")


def _unsupported(path: str, reason: str) -> ImportError:
    name = path.replace(":", ".")
    return ImportError(
        f"megatron_cpo needs {name} and cannot use that of {host()}: {reason}. It is tested with "
        f"{TESTED}: install megatron-core[training]>=0.18,<0.20, or use a checkout of one of these"
    )


def hooked(provider: Callable, hook: Callable[[list[Any]], list[Any]]) -> Callable:
    """A model provider whose chunks pass through a `pre_wrap_hooks` function.

    Up to 0.18 a function of the script builds a GPT, and there is no config to hang hooks on.
    """

    @functools.wraps(provider)
    def build(*args: Any, **kwargs: Any) -> Any:
        return hook([provider(*args, **kwargs)])[0]

    return build


def _allow_context_parallelism() -> None:
    """Let a model of local modules be built under context parallelism; twice is once.

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
    arguments: dict[str, Any], hook: Callable[[list[Any]], list[Any]]
) -> dict[str, Any]:
    """`pretrain`'s arguments, by name, with a hook in whatever will build the model.

    0.19 builds from the config's `model` if there is one, else by `model_provider`; 0.18 always by
    the latter, and pretrain_hybrid.py passes both. So both are hooked, and one of them is used.
    """
    _allow_context_parallelism()
    model_config = getattr(arguments["cfg_container"], "model", None)
    if model_config is not None:
        model_config.pre_wrap_hooks.append(hook)
    provider = arguments.get("model_provider")
    if provider is not None:
        arguments = arguments | {"model_provider": hooked(provider, hook)}
    return arguments


def build_gpt(args: Any, hook: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """The model of Megatron's flags on this rank, a chunk per virtual stage, not wrapped in DDP.

    A GPT, or with `--hybrid-layer-pattern` a HybridModel.

    Args:
        args: Megatron's parsed and validated arguments, after `initialize_megatron`.
        hook: receives the chunks before they are moved and cast, as in `pre_wrap_hooks`.

    Raises:
        ImportError: this Megatron builds a GPT with files that are not in its wheel.
    """
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils

    _allow_context_parallelism()
    if hasattr(argument_utils, "gpt_config_from_args"):
        from megatron.core.process_groups_config import ProcessGroupCollection

        hybrid = getattr(args, "hybrid_layer_pattern", None) is not None
        name = "hybrid_config_from_args" if hybrid else "gpt_config_from_args"
        config = getattr(argument_utils, name)(args)
        config.pre_wrap_hooks.append(hook)
        container = argument_utils.pretrain_cfg_container_from_args(args, config)
        chunks: list[Any] = config.get_builder_cls()(config).build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            ddp_config=container.ddp,
            wrap_with_ddp=False,
            model_type=ModelType.encoder_or_decoder,
        )
        return chunks
    try:
        builder = importlib.import_module("gpt_builders").gpt_builder
        provider = importlib.import_module("model_provider").model_provider
    except ImportError as error:
        raise ImportError(
            f"{host()} builds a GPT with gpt_builders.py and model_provider.py, which lie beside "
            f"pretrain_gpt.py in a Megatron-LM checkout ({error}): add the checkout's folder to "
            "PYTHONPATH, or install megatron-core[training] 0.19"
        ) from error
    from megatron.training.training import get_model

    build = hooked(functools.partial(provider, builder), hook)
    chunks = get_model(build, ModelType.encoder_or_decoder, wrap_with_ddp=False)
    return chunks
