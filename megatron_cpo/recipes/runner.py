"""Run a recipe's stages; those whose command and inputs are as they were are not run again."""

import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from megatron_cpo.files import asides, make_folder, write_json
from megatron_cpo.processes import end_with_parent
from megatron_cpo.progress import progress
from megatron_cpo.quiet import say
from megatron_cpo.recipes.code import our_code
from megatron_cpo.recipes.stages import TRAINING, Stage
from megatron_cpo.work.locking import only_process

_TORCHRUNS = re.compile(r"^.*(?:failed \(exitcode|closing signal)", re.MULTILINE)
"""The first line of torchrun's report."""
_ERROR = re.compile(r"(?:Error|Exception|error): ")


def run_stages(plan: list[Stage], folder: Path, whole: Sequence[Stage] = ()) -> list[str]:
    """Run what is not done yet, in order.

    Args:
        whole: all stages of the recipe, where `plan` is a part of them: what the others have made
            stays, if they would not run again.

    Returns:
        Names of the stages that ran.

    Raises:
        ValueError: a stage failed, or another process is at work in the folder.
    """
    try:
        with only_process(folder, wait=False):
            return _run(plan, folder, whole)
    except TimeoutError as error:
        raise ValueError(f"{folder}: another run is at work in it; wait, or stop that") from error


def digests(plan: Sequence[Stage], contents: dict[Path, str] | None = None) -> dict[str, str]:
    """Of each stage: its command, the content of its inputs, those before it, our code for it.

    Args:
        contents: digests of inputs that are known; takes those that are found.
    """
    found: dict[str, str] = {}
    contents = {} if contents is None else contents
    for stage in plan:
        said = [our_code().digest(stage.line), stage.line, *(found[name] for name in stage.needs)]
        for path in stage.inputs:
            if path not in contents:
                contents[path] = _content(path)
            said.append(contents[path])
        found[stage.name] = blake3(json.dumps(said).encode()).hexdigest()
    return found


def _content(path: Path) -> str:
    digest = blake3()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        digest.update_mmap(file)
    return digest.hexdigest()


def _run(plan: list[Stage], folder: Path, whole: Sequence[Stage]) -> list[str]:
    records, logs = folder / "stages", folder / "logs"
    for place in (records, logs):
        place.mkdir(exist_ok=True)
    contents: dict[Path, str] = {}
    wanted, ran = digests(plan, contents), []
    _forget_results(digests(whole, contents), wanted, folder, records)
    for stage in plan:
        if stage.name.startswith(TRAINING):
            record = records / f"{stage.name}.json"
            _, done = _state(stage, record, wanted[stage.name])
            if done:
                _require_log(logs / f"{stage.name}.log", record)
    with progress(None, "stages", "stages", len(plan)) as bar:
        for number, stage in enumerate(plan, 1):
            bar.set_postfix_str(stage.name)
            record = records / f"{stage.name}.json"
            same, done = _state(stage, record, wanted[stage.name])
            if not done:
                if not (same and stage.resumes):
                    for output in stage.outputs:
                        _remove(output)
                for output in stage.outputs:
                    make_folder(output.parent)
                state = {"digest": wanted[stage.name], "outputs": [str(p) for p in stage.outputs]}
                write_json(record, state | {"done": False})
                began = time.monotonic()
                _execute(stage, logs / f"{stage.name}.log")
                write_json(record, state | {"done": True})
                ran.append(stage.name)
                bar.clear()
                took = time.monotonic() - began
                say(f"{number:>3} of {len(plan)}  {stage.name:<28} {took:4.0f} s")
                for line in warnings_of(logs / f"{stage.name}.log"):
                    say(f"          {line}")
            bar.update()
    say(f"{folder}: {len(ran)} of {len(plan)} stages ran, the others were done")
    return ran


def _state(stage: Stage, record: Path, wanted: str) -> tuple[bool, bool]:
    """Whether a stage was begun as it is now, and whether it is done."""
    before = json.loads(record.read_text()) if record.exists() else {}
    same = before.get("digest") == wanted
    return same, same and before["done"] and all(map(_made, stage.outputs))


def _require_log(log: Path, record: Path) -> None:
    """Refuse a training that is done and has no log, which the report draws its curves from.

    Raises:
        ValueError: says what trains it again.
    """
    if not log.exists():
        raise ValueError(
            f"{log}: it is gone, and the report shows the curves of training by it; put it back, "
            f"or delete {record}, and the same command trains again"
        )


def _execute(stage: Stage, log: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    }
    with open(log, "wb") as file:
        file.write(f"$ {stage.line}\n".encode())
        file.flush()
        status = subprocess.run(
            ["bash", "-c", f"exec {stage.line}"],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env=environment, preexec_fn=_end_with_parent, check=False,
        ).returncode  # fmt: skip
    if status:
        why = _reason(log.read_text(errors="replace"))
        raise ValueError(f"{stage.name}: exit status {status}: {why}; all of it: {log}")
    missing = [str(path) for path in stage.outputs if not _made(path)]
    if missing:
        raise ValueError(f"{stage.name}: ended well but did not make {missing[0]}; see {log}")


def _reason(said: str) -> str:
    """The line of a failed command's output that says why: the last one.

    Behind those of training stands a report of torchrun's, which ends in a rule.
    """
    before, *report = _TORCHRUNS.split(said, maxsplit=1)
    lines = before.strip().splitlines()
    errors = [line for line in lines if _ERROR.search(line)] if report else []
    return (errors or lines)[-1]


def warnings_of(log: Path) -> list[str]:
    """What a stage warned of, a line each; nothing of one without a log."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if line.startswith("warning: ")]


def _end_with_parent() -> None:
    """Nothing of a runner that is killed goes on to write beside the next one."""
    end_with_parent(signal.SIGTERM)


def _made(output: Path) -> bool:
    return any(map(Path.exists, _files_of(output)))


def _files_of(output: Path) -> list[Path]:
    """A file or folder itself, or the files of a prefix that ends in a dot."""
    if output.name.endswith("."):
        return [*output.parent.glob(f"{glob.escape(output.name)}*")]
    return [output]


def _remove(output: Path) -> None:
    """Remove an output, and what a command that was killed has left beside it.

    That is blocks of texts, and what was not whole.
    """
    paths = _files_of(output)
    if not output.name.endswith("."):
        paths += [output.with_name(f"{output.name}.generate"), *asides(output)]
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _forget_results(
    whole: Mapping[str, str], wanted: Mapping[str, str], folder: Path, records: Path
) -> None:
    """Remove results of stages that the recipe no longer has: a report reads the whole folder.

    Args:
        whole: digests of all its stages, of which those that do not run now may be as they were.
        wanted: of those that run now.
    """
    for record in records.glob("*.json"):
        if record.stem in wanted or not record.is_file():
            continue
        before = json.loads(record.read_text())
        if whole.get(record.stem) == before["digest"]:
            continue
        for output in map(Path, before["outputs"]):
            if output.parent == folder.resolve() / "results":
                _remove(output)
                record.unlink(missing_ok=True)
