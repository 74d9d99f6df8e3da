"""Where a recipe has flags of commands."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_cpo.recipes.schema import Recipe


class Flags(NamedTuple):
    """A text of flags in a recipe: `holder[name]`, which may be written."""

    key: str
    """Where it is, such as `variants.a.flags`."""
    command: str
    """Whose flags they are: `build`, `train`, `generate` or `winrate`."""
    holder: dict[str, Any]
    name: str


def flags_of(recipe: Recipe) -> Iterator[Flags]:
    """All of a recipe, but for one way to decode that is a word."""
    yield Flags("data.flags", "build", vars(recipe.data), "flags")
    if recipe.mle:
        yield Flags("mle.flags", "train", vars(recipe.mle), "flags")
    for name, variant in recipe.variants.items():
        yield Flags(f"variants.{name}.build_flags", "build", vars(variant), "build_flags")
        yield Flags(f"variants.{name}.flags", "train", vars(variant), "flags")
    if recipe.writer:
        yield Flags("writer.flags", "build", vars(recipe.writer), "flags")
    how = recipe.evaluate
    yield Flags("evaluate.flags", "generate", vars(how), "flags")
    if isinstance(how.decode, dict):
        for way in how.decode:
            yield Flags(f"evaluate.decode.{way}", "generate", how.decode, way)
    if how.judge:
        yield Flags("evaluate.judge.flags", "winrate", vars(how.judge), "flags")
