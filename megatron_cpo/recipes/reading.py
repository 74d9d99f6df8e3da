"""A recipe's file: read, checked, and its paths made absolute before anything runs."""

import argparse
import difflib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpo.evaluation.mauve_size import check_records
from megatron_cpo.recipes.flags import flags_of
from megatron_cpo.recipes.schema import (
    Data,
    Evaluation,
    Judge,
    Layout,
    Optimization,
    Part,
    Recipe,
    Variant,
    Writer,
)
from megatron_cpo.records.source import add_source_arguments, source_from_args

_WORD = re.compile(r"""(?<![^\s=])(hf:)?([^\s='"\\$]+)(?!\S)""")
"""A word of flags without quotes, or what follows a `=` in it."""


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file; its paths are relative to the file.

    Raises:
        ValueError: it is not YAML, a key or value is wrong, or what it names is not there.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_keys(path, yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping that begins with model:, not {content!r}")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_mistake(error)}") from error
    return _found(recipe, path)


def _check_keys(path: Path, root: Any) -> None:
    """Refuse a key that a mapping has twice, of which YAML takes the last without a word.

    Args:
        root: node of a YAML document. Nodes say what is written, before `<<` brings keys along
            that may be written over.
    """
    import yaml

    left: list[Any] = [root]
    seen: set[int] = set()
    while left:
        node = left.pop()
        if id(node) in seen:  # an alias is the node that it names
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            left += [value for _, value in node.value]
            lines: dict[Any, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                line = key.start_mark.line + 1
                if key.value in lines and key.value != "<<":
                    raise ValueError(
                        f"{path}: {key.value!r} is there twice, in line {lines[key.value]} and in "
                        f"line {line}; remove one, or give it another name"
                    )
                lines[key.value] = line


def check_plain(path: Path, what: str) -> None:
    """That bash and Slurm read a path as it is, without quotes.

    Raises:
        ValueError: a character of it means something there.
    """
    wrong = next((c for c in str(path) if not (c.isalnum() or c in "/._-+=:,@~")), None)
    if wrong is not None:
        raise ValueError(
            f"{what}: {wrong!r} in {str(path)!r}: shells read it otherwise; choose another path"
        )


def _first_mistake(error: ValidationError) -> str:
    mistakes = error.errors()
    first: Any = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    where = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    known = list(_fields(first["loc"][:-1]))
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
    meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{where}: no such key; {meant}"


def _fields(location: tuple[int | str, ...]) -> dict[str, Any]:
    parts: dict[str, type[Part]] = {
        "data": Data, "layout": Layout, "mle": Optimization, "variants": Variant,
        "evaluate": Evaluation, "judge": Judge, "writer": Writer,
    }  # fmt: skip
    names = [name for name in location if name in parts]
    return (parts[str(names[-1])] if names else Recipe).model_fields


def _place(folder: Path, path: Path | str) -> Path:
    return Path(os.path.normpath(folder / path))


def _found(recipe: Recipe, path: Path) -> Recipe:
    folder = path.resolve().parent
    recipe.model = _place(folder, recipe.model)
    recipe.data.train = _place(folder, recipe.data.train)
    recipe.data.test = _place(folder, recipe.data.test)
    named = {"model": recipe.model, "data.train": recipe.data.train, "data.test": recipe.data.test}
    if recipe.evaluate.external:
        external = _place(folder, recipe.evaluate.external.removeprefix("hf:"))
        recipe.evaluate.external = f"hf:{external}"
        named["evaluate.external"] = external
    # What is no folder here is a name, of which sentence-transformers knows more.
    similar = _place(folder, recipe.evaluate.similarity or "minilm")
    if recipe.evaluate.similarity not in (None, "minilm") and similar.exists():
        recipe.evaluate.similarity = str(similar)
        named["evaluate.similarity"] = similar
    for key, place in named.items():
        if not place.exists():
            raise ValueError(f"{path}: {key}: {place} is not there")
        check_plain(place, f"{path}: {key}")
    for flags in flags_of(recipe):
        flags.holder[flags.name] = _absolute(flags.holder[flags.name], folder, recipe.named)
    if recipe.evaluate.mauve:
        _check_mauve(recipe, path)
    return recipe


def _absolute(flags: str, folder: Path, named: set[Path]) -> str:
    """Flags with the files that lie beside a recipe by their absolute paths.

    A word is one if it has a dot or a slash in it, and the file is there; a folder after `hf:`.

    Args:
        named: takes what is found.
    """

    def place(found: re.Match[str]) -> str:
        prefix, word = found[1] or "", found[2]
        path = _place(folder, word)
        if not (path.is_dir() if prefix else path.is_file() and {".", "/"} & {*word}):
            return found[0]
        named.add(path)
        return f"{prefix}{shlex.quote(str(path))}"

    return _WORD.sub(place, flags)


def _check_mauve(recipe: Recipe, path: Path) -> None:
    """Refuse MAUVE of too few texts, which its stage would only find out after all training."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_source_arguments(parser).add_argument("--limit", type=int)
    data, how = recipe.data, recipe.evaluate
    words = [f"--max-length={data.max_length}", *([f"--limit={how.limit}"] if how.limit else [])]
    words += shlex.split(f"{data.flags} {how.flags}")
    try:
        args, _ = parser.parse_known_args([*words, "--input", str(data.test)])
        check_records(source_from_args(args), args.limit)
    except (ValueError, argparse.ArgumentError) as error:
        raise ValueError(f"{path}: evaluate.mauve: {error}") from error
