"""Is a model better, and at which alpha?

  megatron-cpo evaluate winrate --help

A subject is a module of `cli.evaluating`.
"""

import difflib
import importlib
import sys

from megatron_cpo.cli import evaluating
from megatron_cpo.cli.errors import fail
from megatron_cpo.cli.ranks import is_left_to_another

SUBJECTS = {
    "generate": "the texts of a model for the records of a file",
    "score": "without a judge: likelihood, repetition, variety, lengths; ranking of the truth",
    "mauve": "how much alike the distributions of its texts and of people's are",
    "winrate": "by a language model as judge, against another model or the records' own answers",
    "sweep": "all of it for the merges of two checkpoints: which alpha is best",
    "report": "tables, figures and one page of a folder of results, best alpha chosen and checked",
}
"""In the order of work; a new one is a line here and a module in `cli/evaluating`."""
ALONE = ("mauve", "winrate", "report")
"""What one process does; `score` too, but for groups under a checkpoint."""


def help_text(command: str) -> str:
    """What `megatron-cpo evaluate --help` prints."""
    width = max(map(len, SUBJECTS))
    lines = "\n".join(
        f"  megatron-cpo evaluate {name:<{width}}  {what}" for name, what in SUBJECTS.items()
    )
    return f"""\
usage: {command} SUBJECT [flags]       SUBJECT --help says what it does, and its flags

Is a model better, and at which alpha? In the order of work:

{lines}

-v, --verbose with any of them shows what Megatron prints, and the traceback of an error."""


def main() -> None:
    """Run the subject that the command line names first."""
    command, *words = sys.argv
    subject = words[0] if words else "--help"
    if subject in ("-h", "--help"):
        print(help_text(command))
        sys.exit(0)
    if subject not in SUBJECTS:
        near = difflib.get_close_matches(subject, SUBJECTS, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? " if near else ""
        fail(f"{command}: {subject}: no such subject; {meant}{command} --help lists them", status=2)
    if subject in ALONE and is_left_to_another(f"{command} {subject}"):
        return
    sys.argv = [f"{command} {subject}", *words[1:]]
    importlib.import_module(f"{evaluating.__name__}.{subject}").main()
