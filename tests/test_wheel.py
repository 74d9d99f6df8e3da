"""What pip installs is everything: the wheel in an environment of its own, from another folder.

The environment has the packages of this one, but not this checkout: it is not on the path, and the
link to it that an editable install leaves is not followed from there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.ranks import ROOT
from megatron_cpo import __version__
from tests.test_rooms import PACKAGE, imports
from tests.texts import write_jsonl

FEW = "one two three four five six seven eight nine ten red blue green big small".split()
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --max-position-embeddings 48 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
).split()
TRAIN = (
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3 --eval-iters 0 "
    "--log-interval 1 --split 1,0,0 --save-interval 2"
).split()


BETWEEN = "----\n"
VERBS = f"""\
import sys
from megatron_cpo.cli import main
for command in sys.argv[1:]:
    sys.argv[1:] = command.split()
    main()
    print({BETWEEN!r}, end="")
"""


class Installed:
    """The environment, and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a folder with spaces"
        self.bin = folder / "environment" / "bin"
        self.folder.mkdir()
        self.wheel = _build(folder)
        self._python("-m", "venv", folder / "environment", python=sys.executable)
        site = folder.glob("environment/lib/python*/site-packages")
        Path(next(site), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
        self._python(*pip, "--disable-pip-version-check", self.wheel)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """`python WORDS` in the folder; fails with all output when it does."""
        return self._python(*words)

    def verb(self, *words: object) -> str:
        """What `megatron-cpo WORDS` prints, all of it on standard output."""
        return self._quiet(self.bin / "megatron-cpo", *words)

    def verbs(self, *commands: str) -> list[str]:
        """What each prints, one after another in one process: Megatron's import takes seconds."""
        return self._quiet(self.bin / "python", "-c", VERBS, *commands).split(BETWEEN)[:-1]

    def _quiet(self, *words: object) -> str:
        done = self._run(*words)
        assert done.stderr == "", "a command that has nothing to complain about"
        return done.stdout

    def _python(
        self, *words: object, python: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self._run(python or self.bin / "python", *words)

    def _run(self, *words: object) -> subprocess.CompletedProcess[str]:
        ours = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PATH"] = f"{self.bin}:{environment['PATH']}"
        done = subprocess.run(
            [*map(str, words)], cwd=self.folder, env=environment, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done


def _build(folder: Path) -> Path:
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / "megatron_cpo", ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=source, check=True, capture_output=True)
    return folder / f"megatron_cpo-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_whole_package(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
    parts = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in parts if "__pycache__" not in name} <= names
    assert "megatron_cpo/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "harness", "tools"))]


def test_what_is_imported_is_the_wheel(installed: Installed) -> None:
    code = "import megatron_cpo, sys; print(megatron_cpo.__file__, *sys.path, sep='\\n')"
    found, *path = installed.run("-c", code).stdout.splitlines()
    assert found.startswith(str(installed.bin.parent))
    assert str(ROOT) not in path


def test_from_text_to_a_merged_model(installed: Installed) -> None:
    """Every verb, and training, on a tiny Llama: what each prints, and what it leaves."""
    records = [
        {"prompt": " ".join(FEW[i : i + 3]), "completion": " ".join(FEW[i % 7 : i % 7 + 6])}
        for i in range(12)
    ]
    write_jsonl(installed.folder / "data.jsonl", *records)
    records_of = "--input data.jsonl --max-length 48"

    tokenizer = " ".join(MODEL[-4:])
    trained, tokenized = installed.verbs(
        f"train-tokenizer {records_of} --output tokenizer.model --vocab-size 285",
        f"tokenize {records_of} --output-prefix text {tokenizer}",
    )
    assert trained == "tokenizer.model: 285 pieces; records dropped: none\n"
    assert tokenized == "text: 12 documents; dropped: none\n"

    def train(*flags: str) -> str:
        """Of two steps, by torchrun."""
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1)
        done = installed.run(*torchrun, "-m", "megatron_cpo.pretrain_gpt", *MODEL, *TRAIN, *flags)
        assert "not installed" not in done.stderr, "Megatron's warnings on import"
        return done.stdout

    train("--seq-length", "48", "--data-path", "text", "--data-cache-path", "c", "--save", "mle")
    build = ["--output-prefix", "groups", "--negatives", "bn=1,an=1,tn=1", "--load", "mle"]
    build += [*records_of.split(), *MODEL, "--seq-length", 128]
    said = installed.verb("--nproc-per-node", 1, "build", *build)
    assert said.startswith("scored 12 groups under mle iteration 2\ngroups ")
    log = train(
        *"--seq-length 128 --cpo-aux-loss --cpo-k 4 --cpo-data-path groups --save cpo".split(),
        "--cpo-no-warmup",
        *"--load mle --finetune".split(),
    )
    assert re.search("step-0 gate: .*: ok\n", log)
    (installed.folder / "cpo.log").write_text(log)

    merged, converted, inspected, summarized = installed.verbs(
        "merge --mle mle --cpo cpo --alpha 0.3 --output merged",
        "convert --from megatron --to hf --vocab-size 285 --input merged --output hf",
        f"inspect groups {tokenizer}",
        "summarize --log cpo.log",
    )
    assert merged == "merged: alpha 0.3 of mle, stored as float32\n"
    assert converted.startswith("hf: load it with from_pretrained")
    assert json.loads((installed.folder / "hf/config.json").read_text())["model_type"] == "llama"
    assert "12 of K = 4" in inspected
    assert "step-0 gate" in summarized


TYPED = """\
import numpy as np
from megatron_cpo import __version__
from megatron_cpo.tree import Tree, build_tree

tree: Tree = build_tree([1, 2], [[3, 4], [3]])
depths: np.ndarray = tree.position_ids
name: str = __version__
reveal_type(build_tree)
build_tree("text", 7)
"""


def test_types_reach_who_uses_it(installed: Installed) -> None:
    """py.typed: mypy of another project sees our types, and what breaks them."""
    script = installed.folder / "typed.py"
    script.write_text(TYPED)
    mypy = [sys.executable, "-m", "mypy", "--no-incremental"]
    done = subprocess.run(
        [*mypy, "--python-executable", str(installed.bin / "python"), script.name],
        cwd=installed.folder, capture_output=True, text=True, check=False, timeout=300,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    found = [line.removeprefix("typed.py:") for line in done.stdout.splitlines()]
    assert "-> megatron_cpo.tree.Tree" in found[0], done.stdout
    assert [line.partition(":")[0] for line in found[:-1]] == ["8", "9", "9"]
    assert all("[arg-type]" in line for line in found[1:3])


def test_what_is_imported_is_declared() -> None:
    """As a dependency or in an extra; triton comes with torch where there is one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *chain.from_iterable(extras)]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    known = packages_distributions()
    used = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for name in imports(path)}
    others = used - sys.stdlib_module_names - {"megatron_cpo", "triton"}
    assert {"torch", "transformers", "sentencepiece"} <= others
    missing = {
        name
        for name in others
        if not {canonicalize_name(found) for found in known.get(name, [])} & declared
    }
    assert missing == set()
