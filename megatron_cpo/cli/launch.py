"""`megatron-cpo --nproc-per-node 8 VERB`: torchrun, without its traceback after a verb's error.

The launcher is torch's own, with all of its flags. It differs in what a person reads: the error
that a rank has printed stays the last line, and the exit status is that rank's.
"""

import argparse
import logging
import os
import signal
import sys
from typing import Any


def launch(argv: list[str]) -> None:
    """Run a verb or a script on the processes that torchrun's flags describe; see `main`.

    Args:
        argv: torchrun's flags, then the verb and its own.

    Raises:
        SystemExit: a process failed, with its status; 128 + the number of a signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    parser = get_args_parser()
    parser.prog, parser.usage = "megatron-cpo", "%(prog)s [torchrun's flags] VERB [flags]"
    for action in parser._actions:  # as our usage calls them
        if action.dest == "training_script":
            action.metavar = "VERB"
        elif action.dest == "training_script_args":
            action.required = False
    ours, words = _split(parser, argv)
    args = parser.parse_args(ours)
    args.training_script_args = [args.training_script, *words]
    args.training_script, args.module = "megatron_cpo", True
    # One machine, and no rendezvous named: one that takes a free port.
    rendezvous = ("nnodes", "rdzv_endpoint", "rdzv_backend", "master_addr", "master_port")
    if all(getattr(args, name) == parser.get_default(name) for name in rendezvous):
        args.standalone = True
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun, which says so in six lines
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(args)
    except ChildFailedError as error:
        sys.exit(_status(error.failures))


def _split(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Torchrun's words up to the verb or script, and those of the verb.

    The parser looks at them all: a verb's `--log` would be one of its own, shortened and ambiguous.
    """
    options = parser._option_string_actions  # there is no public way to ask
    for at, word in enumerate(argv):
        before = argv[at - 1] if at else ""
        value = before.startswith("-") and any(
            action.nargs != 0 for option, action in options.items() if option.startswith(before)
        )
        if not (word.startswith("-") or value):
            return argv[: at + 1], argv[at + 1 :]
    return argv, []


def _status(failures: dict[int, Any]) -> int:
    """The exit status of the processes that failed, by rank; says which one a signal has ended.

    The launcher ends the others by SIGTERM, also the one that has told why it failed.
    """
    statuses = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    if statuses or any(os.path.isfile(failure.error_file) for failure in failures.values()):
        return max(statuses, default=1)
    rank, failure = min(failures.items(), key=lambda item: item[1].exitcode == -signal.SIGTERM)
    hint = ", often for lack of memory" if failure.exitcode == -signal.SIGKILL else ""
    print(f"megatron-cpo: rank {rank} was ended by {failure.signal_name()}{hint}", file=sys.stderr)
    return 128 - int(failure.exitcode)
