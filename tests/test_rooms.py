"""The rooms of the package, and the one direction of their imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_cpo"
ORDER = (
    "objective", "tree", "files", "kept", "processes", "progress", "quiet", "extras",
    "storage",
    "host", "model", "groups", "records",
    "checkpoints.folders", "checkpoints.digest", "checkpoints.defaults", "checkpoints.meaning",
    "checkpoints.tokens", "checkpoints.formats", "checkpoints.identity", "checkpoints.merging",
    "checkpoints.conversion",
    "checkpoints", "policies", "negatives", "work", "building", "scoring", "inspection",
    "training", "evaluation", "recipes", "cli",
)  # fmt: skip
"""A room imports those before it, never one after it."""
NO_MEGATRON = ("objective", "tree", "files", "kept", "processes", "progress", "quiet", "extras")


def room(module: str) -> str:
    """The longest name in ORDER that a module of the package begins with; "" for the package."""
    names = [name for name in ORDER if f"{module}.".startswith(f"{name}.")]
    return max(names, key=len, default="")


def imports(path: Path) -> list[str]:
    """Modules that a file imports anywhere, in functions and for type checkers as well."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return found


def violations(package: Path) -> list[str]:
    """Every import of a later room, as `file imports room`."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        own = room(".".join(parts).removesuffix(".__init__"))
        if not own:  # the package's door, which leads everywhere
            continue
        for module in imports(path):
            other = room(module.removeprefix("megatron_cpo."))
            if (
                module.startswith("megatron_cpo.")
                and other
                and ORDER.index(other) > ORDER.index(own)
            ):
                wrong.append(f"{'/'.join(parts)} imports {other}")
    return sorted(set(wrong))


def test_imports_point_one_way():
    assert violations(PACKAGE) == []


def test_an_import_of_a_later_room_is_found(tmp_path):
    """Also one inside a function, and one of the room itself."""
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "plan.py").write_text(
        "import megatron_cpo.tree\ndef f():\n    from megatron_cpo import training\n"
    )
    (tmp_path / "tree.py").write_text("from megatron_cpo.groups.plan import pack\n")
    assert violations(tmp_path) == ["groups/plan imports training", "tree imports groups"]


def test_every_module_has_a_room():
    doors = {"__init__.py", "__main__.py", "pretrain_gpt.py"}
    lost = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if not room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        and path.name not in doors
    ]
    assert lost == []


@pytest.mark.parametrize("name", NO_MEGATRON)
def test_the_lowest_rooms_know_no_megatron(name):
    assert not [m for m in imports(PACKAGE / f"{name}.py") if m.split(".")[0] == "megatron"]


def test_no_two_modules_import_each_other():
    """At the top of a file; `checkpoints.formats.opening` asks its formats when it is called."""
    edges: dict[str, set[str]] = {}
    modules = {
        ".".join(("megatron_cpo", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in PACKAGE.rglob("*.py")
    }
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("megatron_cpo", *path.relative_to(PACKAGE).with_suffix("").parts))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        edges[name] = {
            target
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for target in (node.module, *(f"{node.module}.{n.name}" for n in node.names))
            if target in modules and target != name
        }
    free = dict(edges)
    while leaves := [name for name, needs in free.items() if not needs & free.keys()]:
        for name in leaves:
            del free[name]
    assert sorted(free) == []
