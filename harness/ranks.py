"""Run a function on N fresh gloo ranks, in a fraction of a second each.

Importing Megatron takes many seconds, so torchrun per test is out. A fork server imports it once
per test session, without threads and without a process group; every rank of every test is a fork of
that server and so starts warm, with Megatron's global state untouched.

    run_ranks(function, 2, *args)                 results by rank
    run_pretrain(["--num-layers", "2", ...], 2)   what each rank of a training script printed
    run_script(argv)                              the same, called by a function on each rank
    parse_losses(output)                          {"lm loss": [5.1, 4.9, ...], "grad norm": ...}

Ranks run on the CPU even where there is a GPU.
"""

import faulthandler
import io
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
WARM = [
    "pytest",  # test modules import it
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.helpers",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text",
    "megatron.training.argument_utils",
    "megatron.training.checkpointing",
    "megatron.training.training",
    "megatron_cpo.host.cpu",
]
TAIL = 4000  # characters of each rank's output that an error shows


def run_ranks(
    function: Callable, world_size: int, *args: Any, timeout: float = 300, **kwargs: Any
) -> list:
    """`function(*args, **kwargs)` on `world_size` new processes; the results in order of rank.

    `function` must be importable (top level of a module). It finds RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT in the environment, the CPU host enabled and no process group:
    Megatron or `torch.distributed.init_process_group("gloo")` makes one. Tensors return by value.

    The first exception of any rank ends the others and is raised here; its notes have the rank, the
    traceback there and what all ranks printed. After `timeout` seconds: TimeoutError, with stacks.
    """
    return _launch(function, world_size, args, kwargs, timeout)[0]


def run_pretrain(
    argv: list[str],
    world_size: int,
    script: str = "examples/pretrain_gpt.py",
    timeout: float = 300,
    variables: dict[str, str] | None = None,
) -> list[str]:
    """Run a training script with `argv` on ranks; what each printed (stdout and stderr) by rank.

    Args:
        variables: of their environment.
    """
    arguments = ([str(argument) for argument in argv], script)
    return _launch(run_script, world_size, arguments, {}, timeout, variables)[1]


def run_script(argv: list[str], script: str = "examples/pretrain_gpt.py") -> None:
    """Run a training script with `argv` in this process, a rank; raises when it exits in error.

    Args:
        script: its path, from the project's root or absolute.
    """
    sys.argv = [str(ROOT / script), *argv]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:  # Megatron's --exit-interval leaves this way
        if stop.code not in (None, 0):
            why = f"{stop.code!r}: {stop.__cause__ or 'no reason is known'}"
            raise RuntimeError(f"{script} exited with {why}") from stop


def parse_losses(output: str) -> dict[str, list[float]]:
    """Every `name: number |` of Megatron's log, by name, in order of appearance.

    Iterations give "lm loss", "grad norm" and so on, evaluations "lm loss value". At
    --log-interval 1 there is one value per iteration: the second that Megatron prints is the mean
    of the first two, which is undone here. It prints seven digits, so compare at 1e-6 or coarser;
    it leaves out averages below zero; and only the last rank logs iterations.
    """
    found: dict[str, list[float]] = {}
    iterations: list[int] = []
    for line in output.splitlines():
        pairs = re.findall(r"(?<=\|)\s*([^|:]+?):\s+([-+\d.]+(?:E[-+]\d+)?|nan|inf)\s*(?=\|)", line)
        names = [name for name, _ in pairs]
        means: list[str] = []
        if match := re.search(r"iteration +(\d+)/ *\d+ \|", line):
            iterations.append(int(match[1]))
            if len(iterations) == 2 and iterations[1] == iterations[0] + 1:
                means = names[names.index("global batch size") + 1 : names.index("loss scale")]
        for name, text in pairs:
            values = found.setdefault(name, [])
            values.append(2 * float(text) - values[-1] if name in means else float(text))
    return found


def _launch(
    function: Callable,
    world_size: int,
    args: tuple,
    kwargs: dict,
    timeout: float,
    variables: dict[str, str] | None = None,
) -> tuple[list, list[str]]:
    # This process owns the rendezvous on a port that the system picks: no two runs can collide.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the way torchrun says that the store exists
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        **(variables or {}),
    }
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _forkserver_environment():
        ranks = [
            context.Process(
                target=_rank_main,
                args=(folder, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
                kwargs={"call": (function, args, kwargs)},
                name=f"rank{rank}",
            )
            for rank in range(world_size)
        ]
        try:
            for rank in ranks:
                rank.start()
            _wait(ranks, timeout, Path(folder))
        finally:
            for rank in ranks:
                _kill(rank)
        results = [
            torch.load(Path(folder, f"{rank}.result"), weights_only=False)
            for rank in range(world_size)
        ]
        return results, [_output(folder, rank) for rank in range(world_size)]


@contextmanager
def _forkserver_environment():
    """The environment in which the first use starts the server; later uses find it running."""
    changes = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(":")]),
        "PYTHONWARNINGS": "ignore",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(WARM)
        forkserver.ensure_running()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait(ranks: list, timeout: float, folder: Path) -> None:
    """Until all ranks are done; raises the earliest failure, or TimeoutError."""
    deadline = time.monotonic() + timeout
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if [sentinel for sentinel in ended if running.pop(sentinel).exitcode]:
            raise _failure(ranks, folder)
        if not ended:
            for rank in running.values():
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGUSR1)  # faulthandler prints the stacks
            time.sleep(1)
            names = ", ".join(rank.name for rank in running.values())
            error = TimeoutError(f"{names} of {len(ranks)} ranks still ran after {timeout} s")
            raise _with_outputs(error, folder, len(ranks))


def _failure(ranks: list, folder: Path) -> Exception:
    """The cause: a rank that died without a report, else the exception of the first that raised.

    The others lose their peer and fail as well, but a little later.
    """
    time.sleep(0.1)  # the causing rank may not be the first whose end we see
    reports = {path.stem: pickle.loads(path.read_bytes()) for path in folder.glob("*.failure")}
    for number, rank in enumerate(ranks):
        if rank.exitcode and str(number) not in reports:
            died = RuntimeError(f"{rank.name} of {len(ranks)} died with exit code {rank.exitcode}")
            return _with_outputs(died, folder, len(ranks))
    _, number, text, pickled = min(reports.values(), key=lambda report: report[0])
    error = RuntimeError(text.strip().splitlines()[-1])
    with suppress(Exception):  # some exceptions cannot be pickled, some not unpickled
        if isinstance(raised := pickle.loads(pickled), Exception):  # not SystemExit
            error = raised
    error.add_note(f"raised on rank {number} of {len(ranks)}:\n{text}")
    return _with_outputs(error, folder, len(ranks))


def _with_outputs(error: Exception, folder: Path, world_size: int) -> Exception:
    for rank in range(world_size):
        error.add_note(f"---- output of rank {rank}, end:\n{_output(folder, rank)[-TAIL:]}")
    return error


def _output(folder: str | Path, rank: int) -> str:
    path = Path(folder, f"{rank}.output")
    return path.read_text(errors="replace") if path.exists() else "(it never started)"


def _kill(rank: Any) -> None:
    """End a rank and whatever it started (loader workers, checkpoint helpers)."""
    if rank.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.kill()  # in case it was not yet in a group of its own
        rank.join()


def _rank_main(folder: str, environment: dict[str, str], call: tuple) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    number = environment["RANK"]
    with open(Path(folder, f"{number}.output"), "w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    faulthandler.enable(file=2)  # a crash says where
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    torch.set_num_threads(1)
    # What a process outside this harness has, and what Megatron's data loaders expect.
    multiprocessing.set_start_method("fork", force=True)
    function, args, kwargs = call
    try:
        from megatron_cpo.host import cpu as cpu_host

        cpu_host.enable()
        result = function(*args, **kwargs)
    except BaseException as error:
        _report(Path(folder, f"{number}.failure"), int(number), error)
        sys.exit(1)
    # By value: shared memory would die with this process.
    buffer = io.BytesIO()
    torch.save(result, buffer)
    Path(folder, f"{number}.result").write_bytes(buffer.getvalue())


def _report(path: Path, rank: int, error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr)
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = b""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(pickle.dumps((time.time(), rank, text, pickled)))
    unfinished.rename(path)
