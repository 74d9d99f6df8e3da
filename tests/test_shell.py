"""ShellCheck has nothing to say of our shell scripts, those in files and those that we write."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.ranks import ROOT
from megatron_cpo.evaluation.mauve_size import ENOUGH
from megatron_cpo.recipes.reading import read_recipe
from megatron_cpo.recipes.shell import script, slurm
from megatron_cpo.recipes.stages import stages
from tests.paper_recipes import RECIPES


def said(*files: Path) -> str:
    command = [Path(sys.executable).with_name("shellcheck"), "--external-sources", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_our_scripts():
    listed = subprocess.run(["git", "ls-files", "*.sh", ".ci/run"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.split()  # fmt: skip
    assert "scripts/setup.sh" in listed and ".ci/run" in listed
    assert said(*map(Path, listed)) == ""


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_becomes(name, tmp_path):
    content = yaml.safe_load(RECIPES[name].read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text('{"text": "one two three"}\n' * ENOUGH)
    data = {"train": "data.jsonl", "test": "data.jsonl"}
    content |= {"model": "model", "data": content["data"] | data}
    content["evaluate"]["judge"] = {"url": "http://127.0.0.1:1/v1?a=b&c=d", "model": "a judge"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    folder = tmp_path / "run"
    plan = stages(read_recipe(tmp_path / "recipe.yaml"), folder)
    files = slurm(plan, folder) | {"all.sh": script(plan, folder)}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    assert said(*(tmp_path / file for file in files)) == ""
    (tmp_path / "all.sh").write_text(files["all.sh"].replace("$(", "$x $("))
    assert "SC2086" in said(tmp_path / "all.sh")
