"""Which of our code a stage can run: every module that its command imports, wherever it does.

An edit of the page of a report shall not train models anew, and one of the loss shall.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from blake3 import blake3

PACKAGE = Path(__file__).parents[1]
_STARTS = ("{}", "megatron_cpo.cli.{}", "megatron_cpo.cli.evaluating.{}")
"""What a word of a command may name: a module to run, a verb, a subject of `evaluate`."""
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Code:
    """The modules of a package, and what each imports.

    Args:
        package: its folder.
    """

    def __init__(self, package: Path) -> None:
        files = {_name(path, package): path for path in package.rglob("*.py")}
        self._modules = {name: _Module(path) for name, path in files.items()}

    def digest(self, line: str) -> str:
        """Of all code that a command can run.

        Comments, docstrings and how lines are broken do not count. Files of a package that are no
        Python count with its `__init__.py`.
        """
        found = blake3()
        for name in sorted(self.modules(line)):
            found.update(f"{name}\0".encode() + self._modules[name].digest)
        return found.hexdigest()

    def modules(self, line: str) -> set[str]:
        """Names of all modules that a command runs, and that those import, and so on.

        Importing a module runs the packages that it is in, too, but none of their functions: what
        those import counts where somebody imports one of them.
        """
        seen: set[tuple[str, bool]] = set()
        starts = {form.format(word) for word in line.split() for form in _STARTS}
        left = [(name, True) for name in starts & self._modules.keys()]
        while left:
            name, functions = left.pop()
            if (name, functions) not in seen:
                seen.add((name, functions))
                left += [(parent, False) for parent in _parents(name)]
                left += self._imported(self._modules[name], functions)
        return {name for name, _ in seen}

    def _imported(self, module: "_Module", functions: bool) -> Iterator[tuple[str, bool]]:
        for source, thing in module.imports + (module.later_imports if functions else []):
            if f"{source}.{thing}" in self._modules:
                yield f"{source}.{thing}", True
            elif source in self._modules:
                yield source, thing not in self._modules[source].constants


@cache
def our_code() -> Code:
    """As it is now; read once in a process."""
    return Code(PACKAGE)


class _Module:
    def __init__(self, path: Path) -> None:
        tree = ast.parse(path.read_bytes())
        self.imports: list[tuple[str, str]] = []
        """Of what from where; those that run when it is imported."""
        self.later_imports: list[tuple[str, str]] = []
        """Those of its functions."""
        self.constants = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        """Names of numbers and texts."""
        left: list[tuple[ast.AST, bool]] = [(tree, False)]
        while left:
            node, late = left.pop()
            late = late or isinstance(node, _FUNCTIONS)
            left += [(child, late) for child in ast.iter_child_nodes(node)]
            found = self.later_imports if late else self.imports
            if isinstance(node, ast.Import):
                found += [(each.name, "") for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path}: a relative import"
                found += [(node.module, each.name) for each in node.names]
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
        found_bytes = blake3(ast.dump(tree).encode())
        if path.name == "__init__.py":
            for file in sorted(path.parent.iterdir()):
                if file.is_file() and file.suffix != ".py":
                    found_bytes.update(f"\0{file.name}\0".encode() + file.read_bytes())
        self.digest = found_bytes.digest()


def _name(path: Path, package: Path) -> str:
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
