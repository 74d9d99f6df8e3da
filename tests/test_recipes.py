"""Recipes: mistakes found before anything runs, and what runs again when something has changed.

The commands here are bash's own: the runner runs whatever line a stage has.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from harness.ranks import ROOT
from megatron_cpo.recipes.runner import digests, run_stages
from megatron_cpo.recipes.schema import read_recipe
from megatron_cpo.recipes.shell import script, slurm
from megatron_cpo.recipes.stages import Stage, stages
from tests.commands import run_python


@pytest.fixture
def recipe(tmp_path):
    """Write a good recipe with changes to its top level, and give its path."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text('{"text": "one two three"}\n')

    def write(**changes):
        variant = {"negatives": "bn=3", "lr": 1e-4, "steps": 2, "batch": 1, "seeds": [1, 2]}
        content = {
            "model": "hf",
            "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 64},
            "row_length": 256,
            "variants": {"a": variant, "b": variant | {"beta": 0.5, "rounds": 2, "seeds": [1]}},
            "alphas": [0, 0.5],
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def variant(**changes):
    return {"v": {"negatives": "bn=3", "lr": 1e-4, "steps": 2, "batch": 1} | changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alphs": [0]}, "alphs: no such key; did you mean alphas?"),
        ({"variants": variant(betta=1)}, "variants.v.betta: no such key; did you mean beta?"),
        ({"variants": variant(k=12)}, "variants.v: k 12: negatives bn=3 make 4, y_1 included"),
        ({"variants": variant(negatives="zn=3")}, "unknown kind 'zn'"),
        ({"variants": variant(seeds=[1, 1])}, "one is there twice"),
        ({"alphas": [1.5]}, "at least 0 and below 1"),
        ({"layout": {"ranks": 3, "tp": 2}}, "ranks 3 is not a multiple of tp 2 x pp 1 x cp 1"),
        ({"model": "nowhere"}, "nowhere is not there"),
        ({"row_length": "long"}, "row_length: Input should be a valid integer"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(recipe, changes, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the line is compared below
        read_recipe(recipe(**changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_depends_on_a_setting_changes(recipe, tmp_path):
    def now(**changes):
        return digests(stages(read_recipe(recipe(**changes)), tmp_path / "out"))

    before = now()
    variants = yaml.safe_load(recipe().read_text())["variants"]
    variants["b"] = variants["b"] | {"beta": 2.0}
    after = now(variants=variants)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "train-b", "build-b-r2-train", "build-b-r2-test", "train-b-r2", "rank-b", "merge-b-0.5",
        "generate-b-0.0", "generate-b-0.5", "score", "report",
    }  # fmt: skip
    (tmp_path / "test.jsonl").write_text('{"text": "four five six"}\n')
    after = now()
    changed = {name for name in before if before[name] != after[name]}
    assert not any(name.startswith(("convert", "train", "merge")) for name in changed)
    assert {"build-a-s1-test", "generate-reference", "rank-a-s2"} <= changed
    assert set(now(alphas=[0, 0.5, 0.7])) - set(before) == {
        f"{verb}-{own}-0.7" for verb in ("merge", "generate") for own in ("a-s1", "a-s2", "b")
    }


def test_groups_of_one_mix_are_built_once(recipe, tmp_path):
    names = [stage.name for stage in stages(read_recipe(recipe()), tmp_path)]
    built = [name for name in names if name.startswith("build")]
    assert built == ["build-a-s1-train", "build-a-s1-test", "build-b-r2-train", "build-b-r2-test"]


def copies(folder, first="cat"):
    """Three stages, of which the last does not need the first two; they count their runs."""

    def stage(name, line, inputs=(), needs=()):
        output = folder / f"{name}.txt"
        return Stage(name, f"bash -c 'echo {name} >> {folder}/ran; {line} > {output}'",
                     inputs, needs, (output,))  # fmt: skip

    return [
        stage("first", f"{first} {folder}/in", (folder / "in",)),
        stage("second", f"cat {folder}/first.txt", needs=("first",)),
        stage("third", "echo 3"),
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").write_text("input\n")
    return tmp_path


def test_a_stage_runs_again_only_when_something_has_changed(folder):
    assert run_stages(copies(folder), folder) == ["first", "second", "third"]
    assert run_stages(copies(folder), folder) == []
    assert run_stages(copies(folder, "tac"), folder) == ["first", "second"]
    (folder / "in").write_text("other\n")
    assert run_stages(copies(folder, "tac"), folder) == ["first", "second"]
    assert (folder / "second.txt").read_text() == "other\n"
    (folder / "third.txt").unlink()
    assert run_stages(copies(folder, "tac"), folder) == ["third"]
    assert (folder / "ran").read_text().split().count("third") == 2


def test_a_failure_names_its_log_and_is_not_taken_for_done(folder):
    bad = copies(folder, "cat /nowhere")
    with pytest.raises(ValueError, match=r"first: exit status 1: .*first.log"):
        run_stages(bad, folder)
    assert run_stages(copies(folder), folder) == ["first", "second", "third"]


def test_a_stage_that_makes_nothing_is_a_failure(folder):
    with pytest.raises(ValueError, match=r"ended well but did not make .*x"):
        run_stages([Stage("idle", "true", outputs=(folder / "x",))], folder)


def test_the_script_makes_the_same_files(folder, tmp_path):
    run_stages(copies(folder), folder)
    made = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    for name in made:
        (folder / name).unlink()
    subprocess.run(["bash"], input=script(copies(folder), folder).encode(), check=True)
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == made


SBATCH = """#!/usr/bin/env bash
# Runs a job at once, as a cluster would whose queue is empty; says what it was given.
echo "$@" >> "$(dirname "$0")/given"
bash "${@: -1}" > /dev/null && echo "$(wc -l < "$(dirname "$0")/given");cluster"
"""


def test_slurms_jobs_make_the_same_files_and_wait_for_what_they_need(folder):
    plan = copies(folder)
    run_stages(plan, folder)
    made = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    for name in made:
        (folder / name).unlink()
    (folder / "slurm").mkdir()
    for name, content in slurm(plan, folder).items():
        (folder / "slurm" / name).write_text(content)
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", folder / "slurm" / "submit.sh", "--gpus=8"], check=True,
                          env=os.environ | path, capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "submitted 3 jobs\n"
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == made
    first, second, third = (folder / "given").read_text().splitlines()
    assert "--dependency=afterok:1 " in second and "--gpus=8" in second
    assert "--dependency" not in first + third


RUN = """
import sys; from pathlib import Path
from megatron_cpo.recipes.runner import run_stages; from megatron_cpo.recipes.stages import Stage
folder = Path(sys.argv[1])
slow = f"bash -c 'echo $$ > {folder}/pid; sleep 30; echo late > {folder}/late; echo x > {folder}/a'"
run_stages([Stage("a", slow, outputs=(folder / "a",))], folder)
"""


def test_a_second_runner_is_refused_and_a_killed_one_leaves_nothing_at_work(folder):
    first = subprocess.Popen([sys.executable, "-c", RUN, folder], cwd=ROOT)
    pid = folder / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    second = run_python("-c", RUN, folder)
    assert second.returncode and "another run is at work in it" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    worker = int(pid.read_text())
    wait_for(lambda: not alive(worker))
    assert not json.loads((folder / "stages" / "a.json").read_text())["done"]
    assert run_stages([Stage("a", f"cp {folder}/in {folder}/a", outputs=(folder / "a",))], folder)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
