"""Which edits of our code make which stages of a recipe run again."""

import pytest

from megatron_cpo.recipes import runner
from megatron_cpo.recipes.code import Code, our_code
from megatron_cpo.recipes.stages import Stage

FILES = {
    "__init__.py": "VERSION = '1'\ndef install():\n    from pack.loss import f\n",
    "run.py": "from pack import VERSION\ndef main():\n    import pack.cli.deep\n",
    "cli/__init__.py": "def other():\n    import pack.other\n",
    "cli/deep.py": "from pack.tools import helper\n",
    "tools.py": "def helper():\n    '''Says.'''\n    from pack.table import KINDS\n",
    "table.py": "KINDS = {'a': 1}\ndef late():\n    import pack.latest\n",
    "latest.py": "x = 1\n",
    "loss.py": "def f():\n    return 1\n",
    "other.py": "import pack.loss\n",
    "train.py": "from pack import install\n",
    "cli/page.css": "body {}\n",
}


@pytest.fixture
def digests(tmp_path):
    """Write the package with changes; the digests of `run` and of `train`."""

    def write(**changes):
        folder = tmp_path / "pack"
        for name, content in (FILES | changes).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        code = Code(folder)
        return code.digest("x -m pack.run --flag"), code.digest("x -m pack.train")

    return write


@pytest.mark.parametrize(
    ("file", "content", "runs_again"),
    [
        ("tools.py", "def helper():\n    from pack.table import KINDS\n    return 3\n", (1, 0)),
        ("tools.py", FILES["tools.py"].replace("Says.", "# Says so.") + "# why\n", (0, 0)),
        ("latest.py", "x = 2\n", (1, 0)),  # KINDS might hold `late`
        ("loss.py", "def f():\n    return 2\n", (0, 1)),
        ("other.py", "", (0, 0)),
        ("__init__.py", FILES["__init__.py"].replace("1", "2"), (1, 1)),
        ("cli/page.css", "p {}\n", (1, 0)),
        ("new.py", "", (0, 0)),
    ],
)
def test_an_edit_counts_where_the_code_can_run(digests, file, content, runs_again):
    before, after = digests(), digests(**{file: content})
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == runs_again


@pytest.mark.parametrize(
    ("module", "runs_again"),
    [
        ("objective", {"build", "train", "report"}),
        ("negatives.from_records", {"build"}),
        ("evaluation.reporting.page", {"report"}),
        ("checkpoints.formats.torch_dist", {"convert", "build", "train", "report"}),
        ("recipes.stages", set()),
    ],
)
def test_our_own_code(module, runs_again):
    lines = {
        "convert": "megatron-cpo convert --from hf",
        "build": "megatron-cpo --nproc-per-node 2 build --k 4",
        "train": "torchrun --nproc-per-node 2 -m megatron_cpo.pretrain_gpt --seed 1",
        "report": "megatron-cpo evaluate report results",
    }
    found = {
        name for name, line in lines.items() if f"megatron_cpo.{module}" in our_code().modules(line)
    }
    assert found == runs_again


def test_a_stage_and_what_needs_it_run_again(digests, tmp_path, monkeypatch):
    plan = [
        Stage("build", "x -m pack.run"),
        Stage("train", "x -m pack.train", needs=("build",)),
        Stage("other", "x -m pack.train"),
    ]

    def now(**changes):
        digests(**changes)
        code = Code(tmp_path / "pack")
        monkeypatch.setattr(runner, "our_code", lambda: code)
        return runner.digests(plan)

    before, after = now(), now(**{"latest.py": "x = 2\n"})
    assert {name for name in before if before[name] != after[name]} == {"build", "train"}
