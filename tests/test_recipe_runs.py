"""Running a recipe's stages: what runs again, what a failure leaves, as scripts and Slurm's jobs.

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

from harness.ranks import ROOT
from megatron_cpo.recipes.runner import run_stages
from megatron_cpo.recipes.shell import script, slurm
from megatron_cpo.recipes.stages import Stage
from tests.commands import run_python


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


def test_a_training_without_its_log_says_what_to_do(folder):
    """The report read it, and ended in "No such file"."""
    plan = [Stage("train-a", f"bash -c 'echo > {folder}/a'", outputs=(folder / "a",))]
    assert run_stages(plan, folder) == ["train-a"]
    (folder / "logs" / "train-a.log").unlink()
    with pytest.raises(ValueError, match=r"train-a\.log: it is gone, .* delete .*train-a\.json"):
        run_stages(plan, folder)
    (folder / "stages" / "train-a.json").unlink()
    assert run_stages(plan, folder) == ["train-a"]


def texts(folder, *names, line="echo {}"):
    """A stage for the results of each of some variants."""
    return [
        Stage(f"generate-{name}", f"bash -c '{line.format(name)} > {folder}/results/{name}.json'",
              outputs=(folder / "results" / f"{name}.json",), resumes=True)
        for name in names
    ]  # fmt: skip


def test_results_of_other_variants_stay_while_the_recipe_has_them_as_they_were(folder):
    whole = texts(folder, "a", "b")
    assert run_stages(whole[:1], folder, whole) == ["generate-a"]
    assert run_stages(whole[1:], folder, whole) == ["generate-b"]
    assert run_stages(whole, folder) == []
    edited = [*texts(folder, "a", line="echo other {}"), whole[1]]
    assert run_stages(edited[1:], folder, edited) == []
    assert not (folder / "results" / "a.json").exists(), "no text of the recipe of before"
    assert run_stages(texts(folder, "a"), folder) == ["generate-a"]
    assert not (folder / "results" / "b.json").exists(), "the recipe has it no longer"


def test_what_an_interrupted_stage_left_is_gone_when_it_is_another(folder):
    """As `evaluate generate` does, which refuses to go on with the blocks of another command."""
    begin = 'mkdir -p {0}; test -z "$(ls {0})" || exit 1; touch {0}/block; exit 9; echo'
    left = folder / "results" / "a.json.generate"
    with pytest.raises(ValueError, match="generate-a: exit status 9"):
        run_stages(texts(folder, "a", line=begin.format(left)), folder)
    assert (left / "block").exists()
    with pytest.raises(ValueError, match="generate-a: exit status 9"):
        run_stages(texts(folder, "a", line=begin.format(left) + " again"), folder)
    with pytest.raises(ValueError, match="generate-a: exit status 1:"):
        run_stages(texts(folder, "a", line=begin.format(left) + " again"), folder)
    assert (left / "block").exists(), "the same command goes on"
    mine = folder / "results" / "a.json.txt"
    mine.write_text("notes")
    assert run_stages(texts(folder, "a"), folder) == ["generate-a"]
    assert mine.exists() and not left.exists()


def test_what_a_stage_warns_of_is_said(folder, capsys):
    """It stood in a log that nobody reads."""
    line = f"bash -c 'echo warning: 66% were cut; echo more; echo > {folder}/a'"
    run_stages([Stage("build-a", line, outputs=(folder / "a",))], folder)
    assert "build-a" in (said := capsys.readouterr().out)
    assert "\n          warning: 66% were cut\n" in said
    assert "more" not in said


def test_a_failure_names_its_log_and_is_not_taken_for_done(folder):
    bad = copies(folder, "cat /nowhere")
    with pytest.raises(ValueError, match=r"first: exit status 1: .*first.log"):
        run_stages(bad, folder)
    assert run_stages(copies(folder), folder) == ["first", "second", "third"]


def test_a_failed_training_says_why_and_not_how_torchrun_ends(folder):
    """Its report ends in a rule of `=`, which was all that a run said."""
    script = folder / "train.py"
    script.write_text(
        "import sys, time\n"
        "sys.stderr.write('ValueError: --cpo-k 7: groups of 5\\n')\n"
        "print('a warning', flush=True)\n"
        "time.sleep(0.2)\n"
        "sys.exit(3)\n"
    )
    line = f"torchrun --standalone --nproc-per-node 2 {script}"
    with pytest.raises(ValueError, match=r"status 1: ValueError: --cpo-k 7: groups of 5; all of"):
        run_stages([Stage("train", line)], folder)


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


def submit(folder, plan):
    """Write jobs, and submit them."""
    (folder / "slurm").mkdir(exist_ok=True)
    for name, content in slurm(plan, folder).items():
        (folder / "slurm" / name).write_text(content)
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", folder / "slurm" / "submit.sh", "--gpus=8"], check=False,
                          env=os.environ | path, capture_output=True, text=True)  # fmt: skip


def test_slurms_jobs_make_the_same_files_and_wait_for_what_they_need(folder):
    plan = copies(folder)
    run_stages(plan, folder)
    made = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    for name in made:
        (folder / name).unlink()
    done = submit(folder, plan)
    assert done.stdout == "submitted 3 jobs\n"
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == made
    first, second, third = (folder / "given").read_text().splitlines()
    assert "--dependency=afterok:1 " in second and "--gpus=8" in second
    assert "--dependency" not in first + third


def test_slurms_jobs_go_on_where_they_were(folder):
    """Most of our commands refuse an output that is there, so the first job of a second submission
    failed and Slurm cancelled the others."""

    def plan(word, fails="true"):
        once = (
            f"bash -c 'test ! -e {folder}/x && echo x >> {folder}/ran && echo {word} > {folder}/x'"
        )
        more = f"bash -c 'echo y >> {folder}/ran; echo {word} >> {folder}/y.0; {fails}'"
        return [Stage("x", once, outputs=(folder / "x",)),
                Stage("y", more, needs=("x",), outputs=(folder / "y.",), resumes=True)]  # fmt: skip

    def ran(*words):
        (folder / "ran").write_text("")
        done = submit(folder, plan(*words))
        return done.returncode == 0, "".join((folder / "ran").read_text().split())

    assert ran("one", f"test -e {folder}/in2") == (False, "xy")
    (folder / "in2").touch()
    assert ran("one", f"test -e {folder}/in2") == (True, "y")
    assert (folder / "y.0").read_text() == "one\none\n", "it goes on with what was begun"
    assert ran("one", f"test -e {folder}/in2") == (True, "")
    assert ran("two") == (True, "xy")
    assert (folder / "y.0").read_text() == "two\n", "another command begins anew"
    (folder / "y.0").unlink()
    assert ran("two") == (True, "y")


RUN = """
import sys; from pathlib import Path
from megatron_cpo.recipes.runner import run_stages; from megatron_cpo.recipes.stages import Stage
folder = Path(sys.argv[1])
slow = f"bash -c 'echo $$ > {folder}/pid; sleep 300; echo x > {folder}/a'"
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
