"""The seam to Megatron: what install() replaces, the ways to start it, and refusals at start-up.

Runs against checkouts of Megatron-LM are listed in patches/README.md; nothing here needs one.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.ranks import ROOT, parse_losses, run_pretrain, run_ranks, run_script
from harness.stores import write_store
from megatron_cpo.host import compat
from tests.runs import CPO, MODEL, cpo_curves

SCRIPT = str(ROOT / "examples" / "pretrain_gpt.py")
RUN = (
    "--seq-length 256 --micro-batch-size 1 --global-batch-size 2 --lr 0.01 --train-iters 2 "
    "--lr-decay-style constant --log-interval 1 --eval-iters 0"
).split()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_store(tmp_path_factory.mktemp("store") / "groups", 60, 5, longest=16)


def _install_twice() -> dict[str, bool]:
    """On a rank: what became of Megatron's functions."""
    import megatron.training
    from megatron.training import arguments, training

    from megatron_cpo import install

    names = {"pretrain": training, "training_log": training}
    names |= dict.fromkeys(("parse_and_validate_args", "validate_args"), arguments)
    before = {name: getattr(module, name) for name, module in names.items()}
    install()
    once = {name: getattr(module, name) for name, module in names.items()}
    install()
    twice = {name: getattr(module, name) for name, module in names.items()}
    return {
        "replaced": all(once[name] is not before[name] for name in names),
        "a second call changes nothing": once == twice,
        "keeps __wrapped__": all(once[name].__wrapped__ is before[name] for name in names),
        "keeps the name": all(once[name].__name__ == name for name in names),
        "where it was imported": megatron.training.pretrain is once["pretrain"],
    }


def test_install_wraps_once() -> None:
    [facts] = run_ranks(_install_twice, 1)
    assert all(facts.values()), facts


def _install_into(broken: str) -> tuple[str, bool]:
    """On a rank: the refusal by a Megatron that lacks something, and whether it stayed whole."""
    from megatron.training import arguments, training

    from megatron_cpo import install

    if broken == "name":  # as in 0.17
        del arguments.parse_and_validate_args
    elif broken == "parameter":
        pretrain = training.pretrain

        def renamed(cfg_container: Any, provider: Any, model_provider: Any, step: Any) -> None:
            pretrain(cfg_container, provider, model_provider, step)

        training.pretrain = renamed
    elif broken == "hook":  # as in a GPTModel before 0.18
        from megatron.core.models.gpt.gpt_model import GPTModel

        GPTModel.forward = lambda self, input_ids, position_ids, attention_mask: None
    validate = arguments.validate_args
    try:
        install()
    except ImportError as error:
        return str(error), arguments.validate_args is validate
    return "", False


@pytest.mark.parametrize(
    ("broken", "symbol", "reason"),
    [
        ("name", "megatron.training.arguments.parse_and_validate_args", "no attribute"),
        (
            "parameter",
            "megatron.training.training.pretrain",
            "no parameter train_valid_test_dataset_provider, forward_step_func",
        ),
        (
            "hook",
            "megatron.core.models.gpt.gpt_model.GPTModel.forward",
            "no parameter output_processor, output_processor_context",
        ),
    ],
)
def test_another_megatron_is_refused(broken: str, symbol: str, reason: str) -> None:
    """The message has the symbol, what is wrong with it, which version is where, and the tested."""
    [(message, untouched)] = run_ranks(_install_into, 1, broken)
    assert untouched, "nothing may be replaced in a Megatron that is refused"
    assert f"needs {symbol} " in message
    assert reason in message
    assert re.search(r"Megatron-Core \d+\.\d+\S* in /.*megatron: ", message)
    assert f"tested with {compat.TESTED}: install megatron-core[training]" in message


def test_no_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ImportError, match=r"cannot import Megatron-Core .*It is tested with 0\.18"):
        compat.check_host()


def _parse(argv: list[str]) -> Any:
    """On a rank: arguments of a script that adds flags of its own."""
    from megatron_cpo import install

    install()
    from megatron.training.arguments import parse_and_validate_args

    def mine(parser: Any) -> Any:
        parser.add_argument("--mine", type=int)
        return parser

    sys.argv = ["script.py", *argv]
    # By position, as a script may.
    args = parse_and_validate_args(mine, args_defaults={"eval_interval": 1000})
    return args.mine, args.cpo_aux_loss, args.cpo_k, args.max_position_embeddings


def test_flags_of_the_script_are_kept(store: str) -> None:
    """`extra_args_provider` and our flags are both parsed; a row may be longer than positions."""
    flags = [*MODEL, *RUN, "--mine", "3"]
    assert run_ranks(_parse, 1, [*flags, *CPO, "--cpo-data-path", store]) == [(3, True, 5, 64)]
    plain = [*flags, "--max-position-embeddings", "256"]
    assert run_ranks(_parse, 1, plain) == [(3, False, None, 256)]


def _parse_past_us() -> str:
    """On a rank: a namespace without our flags, as --yaml-cfg makes one."""
    from megatron_cpo.training.install import _config

    sys.argv = ["script.py", "--yaml-cfg", "x.yaml"]
    assert _config(SimpleNamespace()) is None
    sys.argv += ["--cpo-aux-loss"]
    try:
        _config(SimpleNamespace())
    except ValueError as error:
        return str(error)
    return ""


def test_flags_that_megatron_drops_are_refused() -> None:
    [message] = run_ranks(_parse_past_us, 1)
    assert message.startswith("--cpo-aux-loss with --yaml-cfg: not supported")


def test_the_model_is_hooked_whichever_way_it_is_built() -> None:
    """What all ranks do together comes before a function of the script builds the first chunk."""
    config, done = SimpleNamespace(pre_wrap_hooks=[]), []

    def provider(pre_process: bool = True) -> str:
        done.append("built")
        return f"model, pre_process={pre_process}"

    def hook(chunks: list[Any]) -> list[Any]:
        return [f"hooked {chunk}" for chunk in chunks]

    def before() -> None:
        done.append("met")

    by_config = {"cfg_container": SimpleNamespace(model=config)}
    assert compat.hook_pretrain(by_config, hook, before) == by_config
    [when_built] = config.pre_wrap_hooks
    assert when_built(["chunk"]) == ["hooked chunk"] and done == ["met"]
    by_function = {"cfg_container": SimpleNamespace(model=None), "model_provider": provider}
    hooked = compat.hook_pretrain(by_function, hook, before)["model_provider"]
    assert hooked(pre_process=False) == "hooked model, pre_process=False"
    assert done[1:] == ["met", "built"]
    assert hooked.__wrapped__ is provider
    assert by_function["model_provider"] is provider, "the caller's arguments stay as they are"


def test_module_and_script_train_alike(store: str) -> None:
    """`-m megatron_cpo SCRIPT` gives the losses of a script that installs by itself."""
    flags = [*MODEL, *RUN, *CPO, "--cpo-data-path", store]
    [direct] = run_pretrain(flags, 1)
    [module] = run_pretrain([SCRIPT, *flags], 1, script="megatron_cpo/__main__.py")
    curves = cpo_curves(direct)
    assert len(curves["cpo_loss"]) == 2
    assert cpo_curves(module) == curves
    assert parse_losses(module)["grad norm"] == parse_losses(direct)["grad norm"]
    found = re.search(r"in place of the script's; (Megatron-Core .* in .*megatron)", module)
    assert found, "the log must say which Megatron it is"


def test_module_runs_a_script_as_python_would(tmp_path: Path) -> None:
    """Its name, its arguments, and what lies beside it; and Megatron's names are already ours."""
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    (tmp_path / "script.py").write_text(
        "import sys\nimport beside\nfrom megatron.training import pretrain\n"
        "print(__name__, sys.argv[1:], beside.WORD, hasattr(pretrain, '__wrapped__'))\n"
    )
    argv = [str(tmp_path / "script.py"), "--cpo-k", "4"]
    [output] = run_pretrain(argv, 1, script="megatron_cpo/__main__.py")
    assert "__main__ ['--cpo-k', '4'] found True" in output


def test_patch_adds_two_lines() -> None:
    lines = (ROOT / "patches" / "pretrain_gpt.patch").read_text().splitlines()
    start = lines.index("--- a/pretrain_gpt.py")
    hunk = lines[start + 3 :]
    assert lines[start + 1] == "+++ b/pretrain_gpt.py"
    assert [line for line in hunk if line[:1] != " "] == [
        "+from megatron_cpo import install",
        "+install()",
    ]
    header = re.fullmatch(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", lines[start + 2])
    assert header is not None
    assert [int(n) for n in header.groups()] == [len(hunk) - 2, len(hunk)]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_patch_applies_before_the_first_megatron_import(tmp_path: Path) -> None:
    """On a script with the same first import, further down than in any tag."""
    before = "\n".join(
        ["import torch", *["x = 1"] * 40, "", "from gpt_builders import gpt_builder"]
    )
    path = tmp_path / "pretrain_gpt.py"
    path.write_text(f"{before}\nfrom megatron.core import mpu\n")
    patch = str(ROOT / "patches" / "pretrain_gpt.patch")
    # Outside of any repository, wherever the temporary folder lies.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for undo in ([], ["--reverse"]):
        command = ["git", "apply", *undo, patch]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        lines = path.read_text().splitlines()
        if not undo:
            at = lines.index("install()")
            assert lines[at - 1] == "from megatron_cpo import install"
            assert lines[at + 1] == "from gpt_builders import gpt_builder"
    assert "install()" not in lines


def _refusal(argv: list[str]) -> tuple[str, bool]:
    """On a rank: the ValueError of a real run, and whether there was a process group by then."""
    try:
        run_script(argv)
    except ValueError as error:
        return str(error), torch.distributed.is_initialized()
    return "", torch.distributed.is_initialized()


def refusals(argv: list[str], world_size: int = 1) -> list[str]:
    """What each rank of a run says that must not start."""
    answers = run_ranks(_refusal, world_size, [*MODEL, *RUN, *argv])
    assert not any(initialized for _, initialized in answers), "refused after the first collective"
    return [message for message, _ in answers]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cpo-k 4", r"--cpo-k 4: .*groups has groups of K=5 candidates; pass --cpo-k 5, or"),
        ("--split 0,0,0", r"--split 0,0,0: needs the weights of train, valid and test"),
        ("--vocab-size 600", r"groups was tokenised by .*'vocab_size': 500.*, this run has .*600"),
        (
            "--max-position-embeddings 16",
            r"--max-position-embeddings 16: the longest prefix \+ candidate of .*groups has \d+ to",
        ),
        ("--cpo-data-path nowhere", r"nowhere\.json: no manifest there, so nowhere is not a "),
        ("--cpo-valid-data-path nowhere", r"nowhere\.json: no manifest there"),
    ],
)
def test_run_that_does_not_fit_its_store_is_refused(store: str, flags: str, message: str) -> None:
    [said] = refusals([*CPO, "--cpo-data-path", store, *flags.split()])
    assert re.search(message, said), said


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".values.bin", ".values.idx"])
def test_truncated_store_is_refused(tmp_path: Path, suffix: str) -> None:
    store = write_store(tmp_path / "groups", 8, 5, longest=16)
    path = Path(store + suffix)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    [said] = refusals([*CPO, "--cpo-data-path", store])
    assert f"{path}: {size - 1} bytes, its manifest says {size} bytes: the file is tru" in said


def test_store_without_reference_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "groups", 8, 5, longest=16, scored=False)
    [said] = refusals([*CPO, "--cpo-data-path", store])
    assert f"{store} has no reference log-probs; score it with megatron-cpo build" in said


def test_flags_without_the_switch_are_refused(store: str) -> None:
    [said] = refusals(["--max-position-embeddings", "256", "--cpo-k", "5"])
    assert "--cpo-k given without --cpo-aux-loss" in said


def test_every_rank_refuses(store: str) -> None:
    """Both ranks of a tensor-parallel run, so that none waits for the other."""
    layout = ["--tensor-model-parallel-size", "2"]
    said = refusals([*CPO, "--cpo-data-path", store, *layout, "--cpo-k", "4"], world_size=2)
    assert len(said) == 2
    assert all("has groups of K=5 candidates" in message for message in said)


_ON_A_GPU = """
import argparse
import torch
from megatron.core.models.hybrid import hybrid_block
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron_cpo import install
from megatron_cpo.training.config import add_cpo_args
from megatron_cpo.training.install import _validate_args

def state():
    optimizer = distrib_optimizer.DistributedOptimizer
    return (hybrid_block.TENorm, WrappedTorchNorm.__new__, optimizer.sharded_state_dict,
            optimizer.load_state_dict, optimizer._set_main_param_and_optimizer_states)

torch.cuda.is_available = lambda: True
before = state()
install()
class Validated(Exception): ...
def validate(args): raise Validated
for flags in ([], ["--cpo-aux-loss", "--cpo-k", "5", "--cpo-data-path", "x"]):
    args = add_cpo_args(argparse.ArgumentParser()).parse_args(flags)
    args.hybrid_layer_pattern, args.spec = "*-*-", None
    args.max_position_embeddings = args.seq_length = args.save = None
    args.micro_batch_size = 1
    try:
        _validate_args(validate, args)
    except Validated:
        print(sum(a is not b for a, b in zip(before, state())), args.spec)
"""


def test_without_cpo_nothing_of_megatron_is_changed_on_a_gpu() -> None:
    """One without Transformer Engine, whose norms and distributed optimizer CPO needs repaired."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ON_A_GPU],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    without, with_cpo = done.stdout.splitlines()[-2:]
    assert without == "0 None"
    assert with_cpo == "5 ['megatron_cpo.model.hybrid', 'local_stack_spec']"
