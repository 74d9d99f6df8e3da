"""A recipe's stages run by ranks that have imported Megatron already: the same commands, sooner."""

import os
import runpy
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from harness.ranks import run_ranks
from megatron_cpo.recipes.stages import Stage

FLAGS = "$(cat "
Execute = Callable[[Stage, Path], None]


def run_line(line: str, log: str, lifetime: float = 0.0) -> set[str]:
    """On a rank: what bash would run. Returns the names of our modules that it has imported.

    Args:
        lifetime: seconds after which a signal ends the process, as a kill would; 0: none.
    """
    if lifetime:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, lifetime)
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    before = set(sys.modules)
    if FLAGS in line:
        start, _, rest = line.partition(FLAGS)
        path, _, end = rest.partition(")")
        line = f"{start}{Path(path).read_text()}{end}"
    program, *words = shlex.split(line)
    if program == "torchrun":
        module, *flags = words[words.index("-m") + 1 :]
    else:
        module, flags = "megatron_cpo", words
    sys.argv = [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(
                f"{line}: exit status {stop.code}: {Path(log).read_text()}"
            ) from stop
    return {name for name in set(sys.modules) - before if name.startswith("megatron_cpo")}


def warm(imported: dict[str, set[str]], lifetimes: dict[str, float] | None = None) -> Execute:
    """What takes the place of the runner's `_execute`, for stages of one rank.

    Args:
        imported: is filled: by the name of a stage, what it has imported.
        lifetimes: seconds after which a stage is killed, once, by its name; is emptied.
    """
    left = {} if lifetimes is None else lifetimes

    def execute(stage: Stage, log: Path) -> None:
        log.write_text(f"$ {stage.line}\n")
        lifetime = left.pop(stage.name, 0.0)
        [imported[stage.name]] = run_ranks(run_line, 1, stage.line, str(log), lifetime)

    return execute
