"""The command `megatron-cpo`: its verbs, what a person reads of them, and help that prints."""

import argparse
import importlib
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.ranks import ROOT, run_pretrain, run_ranks
from megatron_cpo import __version__, cli, quiet
from megatron_cpo.cli.errors import plain_warnings
from megatron_cpo.cli.launch import _split, _status
from megatron_cpo.cli.ranks import Turn
from megatron_cpo.host.help import readable
from tests.commands import run_command, run_python

SHIMS = {
    "build_negatives.py": "build",
    "convert_checkpoint.py": "convert",
    "inspect_negatives.py": "inspect",
    "evaluate.py": "evaluate",
    "merge_checkpoints.py": "merge",
    "publish_negatives.py": "publish",
    "summarize_run.py": "summarize",
    "run.py": "run",
    "tokenize_lm.py": "tokenize",
    "train_tokenizer.py": "train-tokenizer",
}


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command changes for its process."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(quiet, "verbose", False)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """The exit status of `megatron-cpo WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["megatron-cpo", *words])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


# ---- verbs


def test_help_gives_the_order_of_work_at_once() -> None:
    """Before numpy, torch or Megatron: these take from a tenth of a second to ten."""
    done = run_python("-X", "importtime", "-m", "megatron_cpo", "--help")
    assert done.returncode == 0
    at = [done.stdout.index(f"\n  {verb} ") for verb in cli.VERBS]
    assert at == sorted(at)
    assert "pretrain_gpt --data-path" not in done.stdout
    assert done.stdout.count("torchrun ... -m megatron_cpo") == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "megatron_cpo.cli" in imported
    assert not {"torch", "numpy", "megatron.core", "tqdm"} & imported


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)])
def test_help_is_the_answer_to_nothing(words, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *words) == 0
    assert capsys.readouterr().out.startswith("usage: megatron-cpo VERB")


def test_version(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"megatron-cpo {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("biuld", "build"),
        ("tokenise", "tokenize"),
        ("train_tokenizer", "train-tokenizer"),
        ("sumarize", "summarize"),
        ("merge-checkpoints", "merge"),
        ("build_negatives", "build"),
        ("xyz", None),
    ],
)
def test_unknown_verb_names_the_nearest(typed, meant, monkeypatch, capsys) -> None:
    assert run(monkeypatch, typed, "--input", "x") == 1
    hint = f"did you mean {meant}? " if meant else ""
    said = f"megatron-cpo: {typed}: no such verb; {hint}megatron-cpo --help lists them\n"
    assert capsys.readouterr().err == said


def test_a_launch_of_nothing_asks_for_a_verb(monkeypatch, capsys) -> None:
    assert run_command(monkeypatch, "--nproc-per-node", "2") == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: VERB\n")


def test_a_reader_that_has_seen_enough_is_no_mistake() -> None:
    """`megatron-cpo | head` ended in a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megatron_cpo"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys) -> None:
    """Such as a server's; standard output is read."""

    def main() -> None:
        raise BrokenPipeError(32, "pipe")

    monkeypatch.setattr("megatron_cpo.cli.inspect.main", main)
    assert run_command(monkeypatch, "inspect", "x") == 1
    assert capsys.readouterr().err == "megatron-cpo inspect: [Errno 32] pipe\n"


def test_missing_script_is_named(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "pretrain_gtp.py", "--cpo-aux-loss") == 1
    assert capsys.readouterr().err.startswith("megatron-cpo: pretrain_gtp.py: no such script;")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb, monkeypatch, capsys) -> None:
    """By the name that was typed, with an example to paste that the verb would take."""
    assert run(monkeypatch, verb, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: megatron-cpo {verb} ")
    assert re.search(rf"\n  megatron-cpo {verb} (--|runs/|winrate )", said)
    assert "--verbose" in said
    doc = importlib.import_module(f"megatron_cpo.cli.{verb.replace('-', '_')}").__doc__
    assert doc.splitlines()[0] in said
    assert ".py" not in doc


def test_every_verb_has_its_tool(monkeypatch, capsys) -> None:
    """tools/ holds shims alone: the same help under the name that the reader has typed."""
    assert {path.name for path in (ROOT / "tools").glob("*.py")} == SHIMS.keys()
    assert sorted(SHIMS.values()) == sorted(cli.VERBS)
    for name, verb in SHIMS.items():
        run(monkeypatch, verb, "--help")
        expected = capsys.readouterr().out.partition("\n\n")[2]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / name), "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        said = capsys.readouterr().out
        assert said.startswith(f"usage: {name} ")
        assert said.partition("\n\n")[2] == expected


# ---- errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("merge --mle a --cpo b --alpha 2 --output c", "--alpha 2: "),
        ("convert --from hf --to megatron --input nowhere --output c", "nowhere "),
        ("inspect nowhere", "nowhere.json: no manifest there"),
        ("summarize --log nowhere", "--log nowhere: no such file"),
        ("train-tokenizer --input nowhere --output c", "--input nowhere: "),
    ],
)
def test_mistake_is_one_line(words, said, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-cpo {words.split()[0]}: {said}")
    assert error.count("\n") == 1


def test_verbose_shows_where_it_was_raised(monkeypatch, capsys) -> None:
    for flag in ("-v", "--verbose"):
        assert run(monkeypatch, "inspect", flag, "nowhere") == 1
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.splitlines()[-1].startswith("megatron-cpo inspect: nowhere.json")


MERGE = "import os, sys\nsys.argv = ['megatron-cpo', 'merge', *'{flags}'.split()]\n"
CALL = """
from megatron_cpo.cli import main
try:
    main()
except SystemExit as stop:
    print("status", stop.code)
"""


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        ("--mle nowhere --cpo nowhere --alpha 0.3 --output c", 1, "merge: nowhere is not a "),
        ("--foo", 2, "merge: error: unrecognized arguments: --foo"),
        ("--mle a --alpha 0.3 --output c", 2, "merge: error: give --mle, --cpo and --alpha"),
    ],
)
def test_ranks_say_it_once(flags, status, said, tmp_path) -> None:
    """And all of them leave with the same status."""
    script = tmp_path / "script.py"
    script.write_text(MERGE.format(flags=flags) + CALL)
    outputs = run_pretrain([], 3, script=str(script))
    assert "".join(outputs).count(f"megatron-cpo {said}") == 1
    assert all(output.endswith(f"status {status}\n") for output in outputs)


def test_the_one_rank_that_fails_says_it(tmp_path) -> None:
    """Not the first alone: what is wrong may be wrong on one machine."""
    script = tmp_path / "script.py"
    broken = MERGE.format(flags="--foo") + CALL
    script.write_text("import os\nif os.environ['RANK'] == '1':\n    exec('''" + broken + "''')\n")
    outputs = run_pretrain([], 2, script=str(script))
    assert "--foo" not in outputs[0]
    assert "unrecognized arguments: --foo" in outputs[1]


def _take_turns() -> list[bool]:
    """On a rank: whether it is the first to come to two subjects, the first of them twice."""
    taken = []
    for subject in ("error", "report", "error"):
        with Turn(subject) as first:
            taken.append(first)
    return taken


def test_one_rank_has_the_turn() -> None:
    turns = run_ranks(_take_turns, 3)
    assert [sum(rank[i] for rank in turns) for i in range(3)] == [1, 1, 0]


def test_a_process_alone_has_every_turn() -> None:
    assert _take_turns() == [True, True, True]


def test_our_launcher_ends_with_the_error(tmp_path) -> None:
    """One line, and the status of the verb; torch's report of the failure does not follow it."""
    done = run_python("-m", "megatron_cpo", "--nproc-per-node", 2, "merge", "--foo")
    assert done.returncode == 2
    assert done.stdout == ""
    usage, error = done.stderr.rsplit("megatron-cpo merge: error: ", 1)
    assert usage.startswith("usage: megatron-cpo merge ") and "Traceback" not in usage
    assert error == "unrecognized arguments: --foo\n"


def test_one_process_does_what_one_can(tmp_path) -> None:
    """Two ranks wrote one output, or one summary twice, and one of them failed."""
    log = tmp_path / "train.log"
    log.write_text("".join(f"[cpo] iteration {at}: cpo_loss=1.0e+00\n" for at in (1, 2)))
    done = run_python("-m", "megatron_cpo", "--nproc-per-node", 2, "summarize", "--log", log)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("curves       ") == 1
    assert done.stderr == "megatron-cpo summarize: one process does it, rank 0 of 2\n"


@pytest.mark.parametrize("words", ["summarize --log", "evaluate mauve --candidate"])
def test_ranks_of_nobody_are_one_process(words, tmp_path, monkeypatch, capsys) -> None:
    """A job's own RANK, without torchrun, does not leave the work to another."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_command(monkeypatch, *words.split(), str(tmp_path / "none.json")) == 1
    assert re.search(r"none\.json: (no such file|cannot be read)", capsys.readouterr().err)


def test_a_recipe_is_not_run_by_ranks(tmp_path, monkeypatch, capsys) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    assert run_command(monkeypatch, "run", "r.yaml", "--output", str(tmp_path / "out")) == 1
    assert "2 ranks of torchrun: a recipe's stages start their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("--nproc-per-node 2 summarize --log x", 3),
        ("--nproc_per_node=2 --standalone merge --log x", 3),
        ("--nproc 2 --stand merge", 4),
        ("--role build --log-dir merge build --role x", 5),
        ("--nproc-per-node 2", 2),
    ],
)
def test_a_verbs_flags_are_not_the_launchers(words, ours) -> None:
    """Up to the verb, the first word that is neither a flag nor its value."""
    from torch.distributed.run import get_args_parser

    split = words.split()
    assert _split(get_args_parser(), split) == (split[:ours], split[ours:])


def test_torchrun_repeats_the_reason(tmp_path) -> None:
    """Its traceback cannot be kept away; the last thing in it is the line that came before it."""
    flags = ["--standalone", "--nproc-per-node", 2, "-m", "megatron_cpo", "inspect", "nowhere"]
    done = run_python("-m", "torch.distributed.run", *flags)
    said = "megatron-cpo inspect: nowhere.json: no manifest there"
    assert done.returncode == 1
    before, _, report = done.stderr.partition("Traceback (most recent call last)")
    assert before.count(said) == 1
    assert f"traceback : {said}" in report


@pytest.mark.parametrize(
    ("failures", "status", "said"),
    [
        ([(1, True), (-15, False)], 1, ""),
        ([(-15, True), (2, False)], 2, ""),  # the one that spoke was ended while it left
        ([(-15, True), (-15, False)], 1, ""),
        ([(3, False)], 3, ""),  # a traceback, which is there already
        ([(-15, False), (-9, False)], 137, "rank 1 was ended by SIGKILL, often for lack of mem"),
        ([(-11, False), (-15, False)], 139, "rank 0 was ended by SIGSEGV\n"),
    ],
)
def test_status_of_processes(failures, status, said, tmp_path, capsys) -> None:
    """By exit code, and whether the process has said why."""
    (tmp_path / "error.json").touch()
    found = {
        rank: SimpleNamespace(
            exitcode=code,
            error_file=str(tmp_path / ("error.json" if told else "<N/A>")),
            signal_name=lambda code=code: signal.Signals(-code).name,
        )
        for rank, (code, told) in enumerate(failures)
    }
    assert _status(found) == status
    assert said in capsys.readouterr().err


def test_our_warnings_read_as_our_errors() -> None:
    plain_warnings("megatron-cpo convert")
    ours = str(Path(cli.__file__).parents[1] / "checkpoints" / "x.py")
    line = warnings.formatwarning("it is copied", UserWarning, ours, 7)
    assert line == "megatron-cpo convert: it is copied\n"
    for name, category in ((ours, DeprecationWarning), ("/torch/x.py", UserWarning)):
        assert warnings.formatwarning("it is", category, name, 7).startswith(f"{name}:7: ")


# ---- what is hidden


def chatter() -> None:
    """What Megatron prints and logs."""
    print("printed")
    logging.getLogger("megatron.core.x").warning("logged")
    logging.getLogger("httpx").info("logged")


def test_chatter_is_hidden_and_our_words_are_not(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-cpo build"])
    with quiet.hidden_chatter():
        chatter()
        quiet.say("ours")
        logging.getLogger("megatron_cpo.policies.x").info("51 requests answered")
        logging.getLogger("megatron_cpo.policies.x").error("none answered")
        logging.getLogger("ray").error("of a library")
    print("after")
    seen = capsys.readouterr()
    assert seen.out == "ours\nafter\n"
    ours = ["megatron-cpo build: 51 requests answered", "megatron-cpo build: none answered"]
    assert seen.err.splitlines() == [*ours, "of a library"]
    assert not logging.getLogger("megatron_cpo").handlers


def test_verbose_hides_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(quiet, "verbose", True)
    with quiet.hidden_chatter():
        chatter()
    assert capsys.readouterr().out == "printed\n"


@pytest.mark.parametrize(
    ("module", "text", "shown", "shown_when_verbose"),
    [
        ("megatron.core._rank_utils", "Could not determine rank", False, True),
        ("torch.distributed.checkpoint.utils", "torch.distributed is disabled", False, True),
        ("megatron.core.optimizer", "Transformer Engine and Apex are not installed.", False, False),
        ("megatron_cpo.checkpoints.conversion.convert", "it is copied", True, True),
        ("torchmetrics.x", "of somebody else", True, True),
    ],
)
def test_warnings_of_libraries(module, text, shown, shown_when_verbose, monkeypatch) -> None:
    for verbose, expected in ((False, shown), (True, shown_when_verbose)):
        monkeypatch.setattr(quiet, "verbose", verbose)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            quiet.ignore_library_warnings()
            warnings.warn_explicit(text, UserWarning, "x.py", 1, module=module)
        assert len(found) == expected


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("x"), False),
        (OSError("x"), False),
        (quiet.Refused(1), False),
        (KeyboardInterrupt(), False),
        (SystemExit(), True),  # how Megatron leaves, after it has printed why
        (AssertionError(), True),
        (RuntimeError("x"), True),
    ],
)
def test_a_crash_shows_what_came_before(error, shown, capsys) -> None:
    def crash() -> None:
        with quiet.hidden_chatter():
            print("line of before\n" * 100 + "why it leaves")
            raise error

    with pytest.raises(type(error)):
        crash()
    said = capsys.readouterr().err
    assert said.count("\n") == (quiet.TAIL if shown else 0)
    assert said.endswith("why it leaves\n" if shown else "")


# ---- Megatron's parser


HELPS = {
    "50% of the tokens": "50% of the tokens",
    "a share, 100%": "a share, 100%",
    "in %s or %d": "in %s or %d",
    "%(missing)s is not there": "%(missing)s is not there",
    "(default: %(default)s)": "(default: 3)",
    "100%% of %(dest)s": "100% of x",
    "plain": "plain",
}


@pytest.mark.parametrize("text", HELPS)
def test_help_with_a_percent_sign(text) -> None:
    """Printed as argparse prints it where it can, else as it stands."""
    parser = readable(argparse.ArgumentParser(), usage="%(prog)s [flags]")
    parser.add_argument("--x", default=3, help=text)
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    parser.add_argument("--none")
    found = " ".join(parser.format_help().split())
    assert f"--x X {HELPS[text]} --none" in found
    assert "--hidden" not in found


@pytest.mark.parametrize(
    "script",
    ["examples/pretrain_gpt.py", "megatron_cpo/pretrain_gpt.py", "megatron_cpo/__main__.py"],
)
def test_help_of_training_lists_all_flags(script) -> None:
    """The three ways to start it; CPO's flags are first, and Megatron's bare % does no harm."""
    argv = [str(ROOT / "examples" / "pretrain_gpt.py")] if script.endswith("__main__.py") else []
    [output] = run_pretrain([*argv, "--help"], 1, script=script)
    usage, _, groups = output.partition("usage: ")[2].partition("\n\n")
    assert usage.count("\n") == 0
    assert groups.index("--cpo-aux-loss") < groups.index("--help") < groups.index("--num-layers")
    assert groups.count("--cpo-fraction") == 1


def _refused(flags: str) -> str:
    """On a rank: what our call of Megatron's parser and tokenizer says to flags."""
    from megatron_cpo.host.loading import open_tokenizer, score_args

    sys.argv = ["megatron-cpo build", *flags.split()]
    try:
        open_tokenizer(score_args())
    except ValueError as error:
        return str(error)
    return ""


MODEL = "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 "


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (MODEL + "--max-position-embeddings 8 --tensor-model-parallel-size 3", "world size (1) is"),
        (MODEL, "max_position_embeddings argument is None"),
        # Megatron says nothing; its condition does.
        (MODEL + "--micro-batch-size 0", "assert args.micro_batch_size > 0"),
        (
            MODEL + "--max-position-embeddings 8 --tokenizer-type SentencePieceTokenizer",
            "Tokenizer path must be specified",
        ),
    ],
)
def test_what_megatron_refuses_is_a_mistake_of_the_user(flags, said) -> None:
    """Megatron asserts; a command would end in a traceback from each rank."""
    [found] = run_ranks(_refused, 1, flags)
    assert found.startswith(f"Megatron refuses these flags: {said}")
