"""The seam to Megatron: a few functions wrapped once, bound by parameter name.

`install()` wraps `parse_and_validate_args` (the `--cpo-*` flags and their checks), `pretrain`
(data, step and attention), `training_log` (one line of metrics) and `evaluate` (which is looked at
for diagnoses); `pretrain` wraps `train_step` where gradient norms are asked for. A host script that
imports Megatron afterwards runs unchanged; without `--cpo-aux-loss` all of them only pass through,
and nothing of Megatron is changed on a GPU. With it, `host.without_transformer_engine` is put in
place where that is missing. A machine without CUDA needs the CPU host either way.
"""

import functools
import inspect
import sys
from typing import Any

import torch

from megatron_cpo.host import compat
from megatron_cpo.host.help import readable
from megatron_cpo.host.importing import without_collections
from megatron_cpo.objective import NOISE_CONTRASTIVE, loss_at_reference
from megatron_cpo.processes import leave_dead_ranks
from megatron_cpo.quiet import ignore_import_warnings
from megatron_cpo.storage.copies import keep_in
from megatron_cpo.training.config import CPOConfig, add_cpo_args, cpo_config
from megatron_cpo.training.diagnosis import Setting, diagnose_store
from megatron_cpo.training.gate import TOLERANCE, TOLERANCE_16_BIT, StepZeroGate
from megatron_cpo.training.gradients import BOUND, TRAIN_STEP, GradientNorms, check_grad_norms
from megatron_cpo.training.log import MetricLog, format_diagnosis
from megatron_cpo.training.presets import complete_preset, set_preset_defaults
from megatron_cpo.training.support import check_given, check_supported
from megatron_cpo.training.warmup import check_warmup

USAGE = "%(prog)s [Megatron's flags] [--cpo-aux-loss --cpo-data-path PREFIX --cpo-...]"
_MARK = "_megatron_cpo"


def install() -> None:
    """Teach Megatron the `--cpo-*` flags. Call it before the script imports Megatron's functions.

    A second call changes nothing. Every replacement keeps `__wrapped__`.

    Raises:
        ImportError: this Megatron lacks a name we bind to; the message has the versions.
    """
    from megatron_cpo.host import cpu as cpu_host

    ignore_import_warnings()
    leave_dead_ranks()
    without_cuda = not torch.cuda.is_available()
    if without_cuda:
        cpu_host.leave_uncompiled()  # before the check, which imports Megatron
    with without_collections():
        compat.check_host()
    if without_cuda:
        cpu_host.enable()
    else:
        compat.skip_compiled_helpers()
    _replace("megatron.training.arguments:parse_and_validate_args", _parse_and_validate_args)
    _replace("megatron.training.arguments:validate_args", _validate_args)
    log, norms = MetricLog(), GradientNorms()
    _replace("megatron.training.training:pretrain", functools.partial(_pretrain, log, norms))
    _replace("megatron.training.training:training_log", log)
    _replace("megatron.training.training:evaluate", log.evaluated)


def _replace(path: str, wrap: Any) -> None:
    """Wrap a function where it is defined and wherever Megatron's own modules imported it."""
    original = compat.load(path)
    if getattr(original, _MARK, False):
        return
    name = path.partition(":")[2]
    wrapper = functools.wraps(original)(functools.partial(wrap, original))
    setattr(wrapper, _MARK, True)
    for loaded_name, loaded in list(sys.modules.items()):
        if loaded_name.startswith("megatron.") and vars(loaded).get(name) is original:
            setattr(loaded, name, wrapper)


def _parse_and_validate_args(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Megatron's parser with our flags, and a check of the stores before anything is set up."""
    bound = inspect.signature(original).bind(*args, **kwargs)
    theirs = bound.arguments.get("extra_args_provider")

    def provider(parser: Any) -> Any:
        parser = theirs(parser) if theirs is not None else parser
        if not torch.cuda.is_available():
            from megatron_cpo.host import cpu as cpu_host

            cpu_host.set_parser_defaults(parser)
        parser = readable(parser, usage=USAGE, first=add_cpo_args)
        set_preset_defaults(parser, sys.argv[1:])
        return parser

    bound.arguments["extra_args_provider"] = provider
    parsed = original(*bound.args, **bound.kwargs)
    config = _config(parsed)
    if config is not None:
        from megatron.training import get_tokenizer

        from megatron_cpo.checkpoints.arguments import check_model
        from megatron_cpo.groups.damage import check_contents
        from megatron_cpo.groups.store import GroupReader
        from megatron_cpo.records.vocabulary import vocabulary_size
        from megatron_cpo.training.data import check_store, split_spans

        split_spans(parsed.split, groups=1)  # refuses what is no split
        tokenizer = get_tokenizer()
        for path in filter(None, (config.data_path, config.valid_data_path)):
            reader = GroupReader(path)
            check_store(reader, config, tokenizer, parsed.max_position_embeddings)
            check_contents(reader, vocabulary_size(tokenizer), parsed.rank, parsed.world_size)
        check_model(parsed, vocabulary_size(tokenizer))
    return parsed


def _groups_per_row(config: CPOConfig, args: Any) -> float:
    """Mean number of groups in a row of groups, as a training step sees them."""
    from megatron_cpo.groups.draws import some_sizes
    from megatron_cpo.groups.plan import groups_per_row
    from megatron_cpo.groups.store import GroupReader

    reader = GroupReader(config.data_path)
    if config.candidates is None:
        return groups_per_row(reader.tree_sizes()[0], args.seq_length)
    return groups_per_row(some_sizes(reader, config.candidates, args.seed), args.seq_length)


def _config(args: Any) -> CPOConfig | None:
    """The settings in parsed arguments; None when CPO is off, or our flags were never parsed."""
    if hasattr(args, "cpo_aux_loss"):
        return cpo_config(args)
    # --yaml-cfg: Megatron drops the whole command line for what is in the file.
    if given := [word for word in sys.argv if word.startswith("--cpo-")]:
        raise ValueError(f"{given[0]} with --yaml-cfg: not supported: pass flags instead of a file")
    return None


def _validate_args(original: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Megatron's validation, with rows allowed to be longer than the longest sequence."""
    from megatron_cpo.host import cpu as cpu_host
    from megatron_cpo.host import without_transformer_engine as plain_torch

    keep_in(getattr(args, "object_storage_cache_path", None))  # --yaml-cfg makes arguments without
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cpu_host.check_args(args)
    config = _config(args)
    training = config is not None
    trees = training or getattr(args, "tree_rows", False)
    if trees or on_cpu:  # on a GPU a run without CPO is Megatron's own affair
        plain_torch.adapt()
        plain_torch.complete_args(args)
    if not trees:
        return original(args, *rest, **kwargs)
    # Megatron asserts that a row's indices have position embeddings; in a row of trees positions
    # are depths, so only the longest prefix + candidate must.
    positions = args.max_position_embeddings
    if positions is not None and args.seq_length is not None:
        args.max_position_embeddings = max(positions, args.seq_length)
    if config is not None:
        check_given(args)
    if config is not None and config.preset is not None:
        line = complete_preset(args, config.fraction * _groups_per_row(config, args))
        if args.rank == 0:
            print(line, flush=True)
    args = original(args, *rest, **kwargs)
    args.max_position_embeddings = positions
    if args.attention_dropout:
        # Tree attention has none. Megatron's default is 0.1, and --use-checkpoint-args forces it.
        if args.rank == 0:
            print(f"megatron_cpo: --attention-dropout {args.attention_dropout} is set to 0")
        args.attention_dropout = 0.0
    check_supported(args, training)
    if config is not None:
        check_warmup(args, config)
        check_grad_norms(args, config)
    return args


def _pretrain(
    log: MetricLog, norms: GradientNorms, original: Any, *args: Any, **kwargs: Any
) -> Any:
    """Megatron's `pretrain` with CPO's data, step and attention in place of the script's."""
    from megatron.training import get_args

    parsed = get_args()
    config = _config(parsed)
    if config is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    log.gate = _bind(bound.arguments, config, parsed)
    norms.measure(bound.arguments["forward_step_func"], config)
    if config.grad_norm_interval:
        compat.require_parameters(TRAIN_STEP, BOUND)
        _replace(TRAIN_STEP, norms)
    at_reference = loss_at_reference(
        config.objective, torch.ones(1, config.contrasted, dtype=torch.bool)
    )
    log.setting = Setting.of(vars(parsed), float(at_reference))
    return original(*bound.args, **bound.kwargs)


def _bind(arguments: dict[str, Any], config: CPOConfig, args: Any) -> StepZeroGate:
    """Replace, by name, what `pretrain` was called with; returns the gate of the step."""
    from megatron.training import get_tokenizer

    from megatron_cpo.groups.kinds import KINDS
    from megatron_cpo.groups.shortcuts import shortcuts
    from megatron_cpo.groups.store import GroupReader, read_manifest
    from megatron_cpo.host.reading import skip_on_every_rank
    from megatron_cpo.host.waiting import on_first_rank
    from megatron_cpo.model.attach import attach_tree_attention
    from megatron_cpo.records.vocabulary import check_rows, vocabulary_size
    from megatron_cpo.training.data import CPODatasets
    from megatron_cpo.training.noise import describe_noise
    from megatron_cpo.training.start import (
        check_reference,
        check_start,
        start_identity,
        store_digest,
    )
    from megatron_cpo.training.step import CPOStep

    check_rows(args.padded_vocab_size, get_tokenizer())
    if args.rank == args.world_size - 1:  # whose output has the metrics
        found = diagnose_store(shortcuts(GroupReader(config.data_path)), config.k)
        for diagnosis in found:
            print(format_diagnosis(0, diagnosis), flush=True)
    manifest = read_manifest(config.data_path)
    if (line := check_start(args, config, manifest)) and args.rank == 0:
        print(line, flush=True)
    args.cpo_store = store_digest(manifest)  # Megatron saves its arguments in each checkpoint
    tolerance = TOLERANCE_16_BIT if args.bf16 or args.fp16 else TOLERANCE
    gate = StepZeroGate(
        config.objective,
        config.contrasted,
        config.beta,
        manifest["reference"],
        tolerance,
        args.hidden_dropout,
        config.dpop_lambda,
    )
    if (
        config.objective in NOISE_CONTRASTIVE
        and args.rank == 0
        and (line := describe_noise(manifest))
    ):
        print(line, flush=True)

    def begin() -> None:
        """Runs while the model is built: ranks are there to be told what one of them has read."""
        if not gate.begun:
            start = on_first_rank(lambda: start_identity(args, gate.reference))
            check_reference(args, config, gate.reference, start)
            if (reason := gate.begin(start)) and args.rank == 0:
                print(reason, flush=True)

    skip_on_every_rank()
    kinds = [kind for kind in KINDS if kind in manifest["kinds"]]
    arguments["train_valid_test_dataset_provider"] = CPODatasets(config)
    arguments["forward_step_func"] = CPOStep(config, vocabulary_size(get_tokenizer()), kinds, gate)
    arguments.update(compat.hook_pretrain(arguments, attach_tree_attention, begin))
    if args.rank == 0:
        print(
            "megatron_cpo: CPO data, step and tree attention in place of the script's; "
            f"{compat.host()}",
            flush=True,
        )
    return gate
