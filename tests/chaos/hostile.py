"""The campaign of hostile files: each opens right, or is refused in one line.

Never a traceback, memory without bound, an endless loop, code of a pickle, or a file outside of the
folder that was named. Cases run in forks, so that a crash is a finding and not the end.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.stores import VOCAB_SIZE
from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.formats.opening import open_checkpoint
from megatron_cpo.checkpoints.formats.stored import Files, boxes, read_new
from megatron_cpo.checkpoints.identity import checkpoint_identity
from megatron_cpo.groups.damage import check_contents
from megatron_cpo.groups.sizes import group_sizes
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.records.pair_files import write_lm_dataset
from megatron_cpo.records.source import Source
from tests.chaos import mutations
from tests.chaos.mutations import OUTSIDE
from tests.texts import ToyTokenizer

MEMORY = 400 << 20
"""Bytes that a case may take beyond what the process has."""
SECONDS = 20.0
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Target:
    """A kind of input."""

    folder: Path
    """As it should be."""
    changes: dict[str, mutations.Change]
    """By pattern of the files that are changed."""
    use: Callable[[Path, Path], Any]
    """What a user does with it, and where an output may go."""


def use_store(folder: Path, output: Path) -> None:
    """What training reads of it."""
    reader = GroupReader(str(folder / "groups"))
    check_contents(reader, VOCAB_SIZE + 1)
    group_sizes(reader, None)
    for index in range(len(reader)):
        reader[index].tokens.sum()


def use_checkpoint(folder: Path, output: Path) -> None:
    """Identify it, read all of it, and average it with itself."""
    checkpoint = open_checkpoint(folder)
    checkpoint.identity()
    with Files() as files:
        for tensor in checkpoint.tensors.values():
            for box in boxes(tensor.shape, 1 << 20):
                read_new(files, tensor, box)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, symlinks=True)
    merge(folder, copy, 0.5, output)


def use_run(folder: Path, output: Path) -> None:
    """The identity, by which a scored store knows it, and then as any checkpoint."""
    checkpoint_identity(str(folder))
    use_checkpoint(folder, output)


def use_records(folder: Path, output: Path) -> None:
    """Tokenise them."""
    output.mkdir()
    write_lm_dataset(Source((str(folder / "r.jsonl"),)), ToyTokenizer(), str(output / "text"))


def findings_of(target: Target, seed: int, numbers: range) -> tuple[Counter[str], list[str]]:
    """What became of these cases, and what is wrong with which."""
    counts: Counter[str] = Counter()
    found: list[str] = []
    todo = numbers
    while todo:
        receive, send = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_cases, args=(target, seed, todo, send))
        process.start()
        send.close()
        done = todo.start
        while receive.poll(SECONDS):
            try:
                number, verdict, text = receive.recv()
            except EOFError:
                break
            counts[verdict] += 1
            done = number + 1
            if text:
                found.append(f"case {number}: {text}")
        process.kill()
        process.join()
        if done < todo.stop:  # it hangs, or the kernel ended it
            counts["bad"] += 1
            found.append(f"case {done}: ended with {process.exitcode}, or longer than {SECONDS} s")
            done += 1
        todo = range(done, todo.stop)
    return counts, found


def _cases(target: Target, seed: int, numbers: range, send: Any) -> None:
    opened: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.rename", "os.remove") and OUTSIDE in str(arguments):
            opened.append(f"{event} {arguments[0]}")

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    sys.addaudithook(hook)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            verdict, text = one_case(target, seed, number, Path(folder), opened)
            send.send((number, verdict, text))


def one_case(
    target: Target, seed: int, number: int, root: Path, opened: list[str]
) -> tuple[str, str]:
    """Change a file of a copy and use it; a verdict, and what is wrong.

    Args:
        opened: an audit hook's list of what was done to `OUTSIDE`.
    """
    chance = random.Random(f"{seed} {target.folder.name} {number}")
    folder, trap = root / target.folder.name, root / "trap"
    shutil.copytree(target.folder, folder)
    (root / OUTSIDE).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    pattern = chance.choice(list(target.changes))
    path = chance.choice(sorted(folder.rglob(pattern)))
    change: Any = target.changes[pattern]
    if change is mutations.change_metadata:
        change = partial(change, trap=trap)
    path.write_bytes(change(path.read_bytes(), chance))
    before = {p: p.stat().st_mtime_ns for p in root.iterdir()}
    resident, start = _peak(), time.monotonic()
    what = f"{pattern}: "
    opened.clear()
    try:
        target.use(folder, root / "output")
        verdict = "opens"
    except (ValueError, OSError) as error:
        verdict = "refused"
        if "\n" in str(error).strip():
            return "bad", f"{what}several lines: {error}"
        if len(str(error)) < 15 or isinstance(error, FileNotFoundError | UnicodeError):
            return "bad", f"{what}does not say which: {error!r} {traceback.format_exc()[-500:]}"
    except Exception:
        return "bad", what + traceback.format_exc()[-1200:]
    if opened:
        return "bad", f"{what}outside of its folder: {opened}"
    if trap.exists() or Path("pwned").exists():
        return "bad", f"{what}the pickle ran"
    if (grown := _peak() - resident) > MEMORY:
        return "bad", f"{what}{grown >> 20} MiB"
    if time.monotonic() - start > SECONDS / 2:
        return "bad", f"{what}{time.monotonic() - start:.0f} s"
    new = {p.name for p in root.iterdir()} - {p.name for p in before} - {"output", "copy"}
    if new or (root / OUTSIDE).stat().st_mtime_ns != before[root / OUTSIDE]:
        return "bad", f"{what}wrote {new or OUTSIDE}"
    return verdict, ""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def targets(folder: Path) -> dict[str, Target]:
    """Small inputs of every kind, made in a folder."""
    from harness.stores import write_store
    from tests.checkpoints import weights, write_model
    from tests.conversions import CONFIGS, to_megatron
    from tests.conversions import write_model as write_hugging_face
    from tests.texts import write_jsonl

    (folder / "store").mkdir()
    write_store(folder / "store" / "groups", 12, 4)
    small = {name: tensor for name, tensor in weights(0, torch.float32).items() if "0" not in name}
    write_model(folder / "shards", small, shards=2)
    source = write_hugging_face(
        folder / "source", CONFIGS["llama"] | {"num_hidden_layers": 2, "vocab_size": 64}
    )
    to_megatron(source, folder / "megatron")
    (folder / "records").mkdir()
    records = [{"prompt": f"{i} 1", "completion": f"{i} 2 3"} for i in range(20)]
    write_jsonl(folder / "records" / "r.jsonl", *records)
    return {
        "store": Target(
            folder / "store",
            {
                "*.bin": mutations.change_bytes,
                "*.idx": mutations.change_bytes,
                "*.json": mutations.change_json_file,
            },
            use_store,
        ),
        "safetensors": Target(
            folder / "shards",
            {
                "*.safetensors": mutations.change_safetensors,
                "*.index.json": mutations.change_json_file,
                "config.json": mutations.change_json_file,
                "tokenizer.json": mutations.change_json_file,
            },
            use_checkpoint,
        ),
        "torch_dist": Target(
            folder / "megatron",
            {
                ".metadata": mutations.change_metadata,
                "*.distcp": mutations.change_bytes,
                "metadata.json": mutations.change_json_file,
                "latest*.txt": mutations.change_bytes,
            },
            use_run,
        ),
        "records": Target(folder / "records", {"*.jsonl": mutations.change_jsonl}, use_records),
    }


def campaign(folder: Path, cases: int, seed: int, only: list[str], log: Path) -> int:
    """Print a table; the number of findings."""
    bad = 0
    print("| input | changed | opens | refused | bad |\n| --- | --- | --- | --- | --- |")
    with open(log, "a", encoding="utf-8") as notes:
        for name, target in targets(folder).items():
            if only and not any(part in name for part in only):
                continue
            counts, found = findings_of(target, seed, range(cases))
            bad += counts["bad"]
            print(
                f"| {name} | {cases} | {counts['opens']} | {counts['refused']} | {counts['bad']} |",
                flush=True,
            )
            for text in found:
                notes.write(json.dumps({"input": name, "seed": seed, "finding": text}) + "\n")
    return bad
