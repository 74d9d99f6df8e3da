"""docs/seams.md names every module that holds on to Megatron, and tests that there are."""

import ast
import re

from harness.ranks import ROOT
from megatron_cpo.host import compat

PAGE = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "megatron_cpo"


def imports_megatron(source: str) -> bool:
    """Whether a module imports Megatron, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return any(name.split(".")[0] == "megatron" for name in names)


def test_every_module_that_imports_megatron_is_there() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if imports_megatron(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 20
    assert {name for name in found if f"`{name}`" not in PAGE} == set()
    named = set(re.findall(r"`([a-z_/0-9]+\.py)`", PAGE)) - {"pretrain_gpt.py"}
    assert {name for name in named if not (PACKAGE / name).exists()} - set(named_tests()) == set()


def named_tests() -> dict[str, set[str]]:
    """Test modules on the page, with the tests that are named of each."""
    found: dict[str, set[str]] = {}
    at = ""
    for module, test in re.findall(r"`(tests/test_\w+\.py)?(?:::(test_\w+))?`", PAGE):
        at = module or at  # `::test_x` is of the module before it
        found.setdefault(at, set()).update({test} - {""})
    return {module: tests for module, tests in found.items() if module}


def test_tests_on_the_page_exist() -> None:
    named = named_tests()
    assert len(named) > 20
    for module, tests in named.items():
        there = set(re.findall(r"^def (test_\w+)", (ROOT / module).read_text(), re.MULTILINE))
        assert there and tests <= there, (module, tests - there)


def test_every_name_that_is_bound_is_on_the_page() -> None:
    for path in compat.BOUND:
        name = path.partition(":")[2]
        assert f"`{name}`" in PAGE or f"`{name}(" in PAGE, path
