"""The command `megatron-cpo`: verbs, each a module here that parses flags and calls the library.

A new verb is a module with a `main()` that reads `sys.argv`, and a line in `STEPS`.
"""

import difflib
import importlib
import os
import select
import signal
import sys
from pathlib import Path

from megatron_cpo import __version__, quiet
from megatron_cpo.cli.errors import fail, plain_warnings
from megatron_cpo.cli.ranks import is_left_to_another

COMMAND = "megatron-cpo"
TRAIN = "(train)"
STDOUT = 1
STEPS = (
    ("train-tokenizer", "a SentencePiece tokenizer from the records, if there is none yet"),
    ("tokenize", "the records as a Megatron dataset, to train a reference on"),
    (TRAIN, "the reference, by plain MLE: --data-path TEXT --save MLE"),
    ("convert", "or take a Hugging Face model as the reference; later, go back to one"),
    ("build", "groups: each record's prefix, y_1 and K - 1 negatives, scored under the reference"),
    ("inspect", "look at the groups before you train on them"),
    ("publish", "copy the groups to object storage, if training reads them from there"),
    (TRAIN, "with CPO: --cpo-aux-loss --cpo-data-path GROUPS --load MLE --finetune --save CPO"),
    ("summarize", "what a run did, from its log: the step-0 gate, metrics, a picture"),
    ("merge", "average the weights of both models, the paper's last step"),
    ("evaluate", "is the model better, and at which alpha? its subjects: --help"),
    ("run", "all of this in one command, from a recipe"),
)
"""The order of work: verbs, and where training comes in, which is torchrun's and not a verb."""
ALONE = ("train-tokenizer", "tokenize", "convert", "inspect", "publish", "summarize")
"""What one process does, however many there are. `evaluate` decides it by subject."""
VERBS = tuple(verb for verb, _ in STEPS if verb != TRAIN)


def help_text() -> str:
    """What `megatron-cpo --help` prints."""
    width = max(len(verb) for verb in VERBS)
    steps = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in STEPS)
    return f"""\
usage: {COMMAND} VERB [flags]       {COMMAND} VERB --help says what it does, and its flags

Sequence-level training for NVIDIA Megatron, CPO as in arXiv:2502.16433: the true continuation
y_1 of a prefix against K - 1 synthetic negatives. In the order of work:

{steps}

To train: torchrun ... -m megatron_cpo.pretrain_gpt [Megatron's flags] [--cpo-...]
or, with a script of yours: torchrun ... -m megatron_cpo SCRIPT.py [its flags] [--cpo-...]

A verb on several processes: {COMMAND} --nproc-per-node 8 VERB [flags], torchrun's flags
first; or torchrun --nproc-per-node 8 -m megatron_cpo VERB [flags]. `{COMMAND} --version`."""


def main() -> None:
    """Run a verb, a training script, or either of them on several processes."""
    try:
        _main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # or Python flushes there once more
        sys.exit(128 + signal.SIGPIPE)


def _reader_has_left() -> bool:
    """Whether nobody reads what is printed any more: `| head` has seen enough."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main() -> None:
    words = sys.argv[1:]
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        print(help_text())
    elif first == "--version":
        print(f"{COMMAND} {__version__}")
    elif first in VERBS:
        sys.argv = words
        run_verb(first)
    elif first.startswith("-"):
        from megatron_cpo.cli.launch import launch

        launch(words)
    elif first.endswith(".py") or Path(first).is_file():
        from megatron_cpo.cli.script import run_script

        run_script(words)
    else:
        near = difflib.get_close_matches(first, VERBS, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? " if near else ""
        fail(f"{COMMAND}: {first}: no such verb; {meant}{COMMAND} --help lists them")


def run_verb(verb: str, command: str | None = None) -> None:
    """Run a verb with the flags in `sys.argv[1:]`; a mistake of the user's is one line.

    Args:
        command: what the reader has typed, for usage and errors; None: `megatron-cpo VERB`.
    """
    from megatron_cpo.cli.parsing import VERBOSE

    command = command or f"{COMMAND} {verb}"
    # Parsers, Megatron's too, take the name from here, and some read the flags more than once.
    flags = [word for word in sys.argv[1:] if word not in VERBOSE]
    quiet.verbose = len(flags) < len(sys.argv) - 1
    sys.argv = [command, *flags]
    plain_warnings(command)
    quiet.ignore_library_warnings()
    if verb in ALONE and is_left_to_another(command):
        return
    try:
        importlib.import_module(f"{__name__}.{verb.replace('-', '_')}").main()
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            raise
        fail(f"{command}: {error}", error)
    except KeyboardInterrupt:
        fail(f"{command}: interrupted", status=130)
