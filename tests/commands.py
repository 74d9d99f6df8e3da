"""Python as a process of its own, the way users start the tools, and what every tool promises."""

import io
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

from harness.ranks import ROOT
from megatron_cpo import cli, quiet


def run_python(
    *arguments: Any, timeout: float = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` with this project importable; whatever its exit status, output as text."""
    # Where byte code is forbidden, Megatron is compiled anew, which takes seconds.
    environment = {k: v for k, v in (env or os.environ).items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def run_command(monkeypatch: Any, *words: str) -> int | str | None:
    """The exit status of `megatron-cpo WORDS` in this process, whose settings are put back."""
    return _run_here(monkeypatch, cli.main, "megatron-cpo", *words)


def _run_here(monkeypatch: Any, main: Callable[[], Any], *argv: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [*argv])
    monkeypatch.setattr(quiet, "verbose", False)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        main()
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class Done(NamedTuple):
    """What came of a tool."""

    returncode: int
    stdout: str
    stderr: str
    imported: set[str]
    """Names of modules."""


def run_tool(name: str, *flags: Any) -> Done:
    """Run a script of `tools/`."""
    done = run_python("-X", "importtime", ROOT / "tools" / name, *flags)
    said, imported = [], set()
    for line in done.stderr.splitlines(keepends=True):
        if line.startswith("import time:"):
            imported.add(line.rpartition("|")[2].strip())
        else:
            said.append(line)
    assert "argparse" in imported
    return Done(done.returncode, done.stdout, "".join(said), imported)


def run_tool_here(name: str, *flags: Any) -> Done:
    """Run a script of `tools/` in this process, which has imported what it needs; `run_tool` is for
    what has to be seen in a process of its own."""
    path, out, err = str(ROOT / "tools" / name), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        status = _run_here(
            patch, lambda: runpy.run_path(path, run_name="__main__"), path, *map(str, flags)
        )
    return Done(int(status or 0), out.getvalue(), err.getvalue(), set())


def assert_quick(done: Done) -> None:
    """Neither torch nor Megatron was imported: both take seconds."""
    assert not {"torch", "megatron.core"} & done.imported


def assert_one_line_error(done: Done, name: str) -> None:
    """A mistake of the user's is one line that starts with the tool's name."""
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name}: ")
    assert done.stderr.count("\n") == 1
