"""docs/api.md: its examples run, and the names in its table are there and say what they do."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from harness.ranks import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
TABLE = re.findall(r"`(megatron_cpo[\w.]*)`: ((?:`\w+`(?:, )?)+)", PAGE)
NAMES = [(module, name) for module, names in TABLE for name in re.findall(r"\w+", names)]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """From top to bottom; each holds its results against what they must be."""
    monkeypatch.chdir(tmp_path)
    blocks = list(re.finditer(r"```python\n(.*?)```", PAGE, re.DOTALL))
    assert len(blocks) == PAGE.count("```") // 2
    namespace: dict[str, object] = {}
    for block in blocks:
        line = PAGE[: block.start(1)].count("\n")  # for the traceback
        exec(compile("\n" * line + block[1], "docs/api.md", "exec"), namespace)
    assert "10 of K = 5" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_public_name_says_what_it_does(module: str, name: str) -> None:
    """A docstring; where it takes something, types, and shapes or meanings of the arguments."""
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        return
    assert inspect.getdoc(found)
    if inspect.isfunction(found):
        assert all(
            p.annotation is not p.empty for p in inspect.signature(found).parameters.values()
        )
        assert inspect.signature(found).return_annotation is not inspect.Signature.empty


def test_table_is_read() -> None:
    assert ("megatron_cpo.objective", "ranked") in NAMES
    assert ("megatron_cpo.groups.store", "read_manifest") in NAMES
    assert ("megatron_cpo.checkpoints", "convert") in NAMES
    assert len(NAMES) >= 25
