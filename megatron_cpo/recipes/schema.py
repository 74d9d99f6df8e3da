"""What a recipe may say, checked before anything runs."""

import argparse
import difflib
import os
import shlex
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_cpo.checkpoints.merging.alphas import check_alphas
from megatron_cpo.evaluation.mauve_size import check_records
from megatron_cpo.negatives.from_records import parse_mix
from megatron_cpo.objective import OBJECTIVES, PSS
from megatron_cpo.policies.writer import KIND
from megatron_cpo.records.source import add_source_arguments, source_from_args


class Part(BaseModel):
    """A mapping of a recipe; a key that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid")


class Data(Part):
    """Records as `megatron-cpo build` reads them."""

    train: Path
    test: Path
    max_length: int = Field(ge=3)
    flags: str = ""
    """More flags of the records, such as `--format text --prefix-fraction 0.15`."""


class Layout(Part):
    """Processes of training, and how a model is split over them."""

    ranks: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> "Layout":
        if self.ranks % (self.tp * self.pp * self.cp):
            split = f"tp {self.tp} x pp {self.pp} x cp {self.cp}"
            raise ValueError(f"ranks {self.ranks} is not a multiple of {split}")
        return self


class Optimization(Part):
    """Steps of training."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    """Sequences a step; of CPO, rows of groups."""
    lr: float = Field(gt=0)
    warmup: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    flags: str = ""
    """More flags of `megatron_cpo.pretrain_gpt`."""

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup >= self.steps and "--lr-" not in self.flags:
            raise ValueError(f"warmup {self.warmup}: needs fewer than the {self.steps} steps")
        return self


class Variant(Optimization):
    """A model to train by CPO, once a seed."""

    negatives: str
    k: int | None = None
    """Candidates of a group, y_1 included: checked against the mix."""
    objective: str = "best"
    beta: float = Field(default=5.0, gt=0)
    mle_weight: float = Field(default=0.0, ge=0)
    seeds: list[int] = Field(default=[1234], min_length=1)
    rounds: int = Field(default=1, ge=1)
    """Each round after the first takes the model just trained as policy and reference."""
    build_flags: str = ""
    row_length: int | None = Field(default=None, ge=1)
    """Of this variant instead of the recipe's."""
    alphas: list[float] | None = None
    """Of this variant instead of the recipe's."""

    @model_validator(mode="after")
    def _fills(self) -> "Variant":
        mix = parse_mix(self.negatives)
        made = 1 + sum(mix.values())
        if self.k not in (None, made):
            raise ValueError(f"k {self.k}: negatives {self.negatives} make {made}, y_1 included")
        if self.objective not in (known := sorted([*OBJECTIVES, PSS])):
            raise ValueError(f"objective {self.objective}: unknown; known are {', '.join(known)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: one is there twice")
        if self.alphas is not None:
            _shares(self.alphas)
        self.k = made
        return self


def _shares(alphas: list[float]) -> list[float]:
    if 1 in check_alphas(alphas, "alphas"):
        raise ValueError("alphas 1: that is the reference, which is compared anyway; leave it out")
    return alphas


def _check_names(named: dict[str, Any]) -> None:
    for name in named:
        if not name.replace("-", "").replace("_", "").isalnum() or name == "reference":
            raise ValueError(f"{name!r}: use letters, digits, - and _; reference is taken")
    if not named:
        raise ValueError("names nothing")


class Judge(Part):
    """An OpenAI-compatible endpoint; its key comes from the environment."""

    url: str
    model: str
    flags: str = ""
    """More flags of `evaluate winrate`, such as `--max-unread 0.2`."""


class Writer(Part):
    """OpenAI-compatible servers of an instruct model, for `written` negatives; their key comes from
    the environment."""

    url: str | list[str]
    """One server, or several that share the work."""
    model: str
    flags: str = ""
    """More flags of `build`, such as `--writer-tries 8`."""

    @property
    def urls(self) -> list[str]:
        """All of them."""
        return [self.url] if isinstance(self.url, str) else self.url


class Evaluation(Part):
    """Texts of every model for the test records, and what is said of them."""

    decode: str | dict[str, str] = "greedy"
    """One way to decode, or flags of `evaluate generate` by the name of each of several ways."""
    max_new_tokens: int = Field(default=256, ge=1)
    limit: int | None = Field(default=None, ge=1)
    external: str | None = None
    """`hf:PATH`: a model that says how likely the texts are."""
    similarity: str | None = None
    """`minilm`, or another sentence-transformers model, by path or name: how near texts are to the
    truths."""
    mauve: bool = False
    judge: Judge | None = None
    flags: str = ""
    """More flags of `evaluate generate`."""

    @property
    def decodings(self) -> dict[str, str]:
        """Flags by the name of a way to decode; the only one has none."""
        return {"": f"--decode {self.decode}"} if isinstance(self.decode, str) else self.decode

    @field_validator("decode")
    @classmethod
    def _ways(cls, decode: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(decode, dict):
            _check_names(decode)
        return decode


class Recipe(Part):
    """From a model and records to trained and evaluated models."""

    model: Path
    """A Hugging Face folder, or a Megatron checkpoint with its megatron_flags.txt beside."""
    data: Data
    row_length: int = Field(ge=1)
    """Tokens of a row of groups."""
    layout: Layout = Layout()
    mle: Optimization | None = None
    """Training of the reference on the records; without it the model is the reference."""
    variants: dict[str, Variant] = Field(min_length=1)
    alphas: list[float] = [0.0]
    """Shares of the reference in merged models; 0 is the trained model itself."""
    writer: Writer | None = None
    """Who writes rejected answers, where a variant has some."""
    evaluate: Evaluation = Evaluation()
    export: Literal["none", "all"] = "none"
    """Whether trained models become Hugging Face folders as well."""

    @field_validator("alphas")
    @classmethod
    def _differ(cls, alphas: list[float]) -> list[float]:
        return _shares(alphas)

    @field_validator("variants")
    @classmethod
    def _names(cls, variants: dict[str, Variant]) -> dict[str, Variant]:
        _check_names(variants)
        return variants

    @model_validator(mode="after")
    def _shares_batches(self) -> Self:
        split = self.layout
        replicas = split.ranks // (split.tp * split.pp * split.cp)
        trained: dict[str, Optimization] = {"mle": self.mle} if self.mle else {}
        trained |= {f"variants.{name}": variant for name, variant in self.variants.items()}
        for name, how in trained.items():
            if how.batch % replicas and "-batch-size" not in how.flags:
                raise ValueError(
                    f"{name}: batch {how.batch} is not a multiple of the {replicas} copies of the "
                    f"model that layout {split.ranks} ranks, tp {split.tp}, pp {split.pp}, cp "
                    f"{split.cp} makes"
                )
        return self

    @model_validator(mode="after")
    def _writes(self) -> "Recipe":
        names = [name for name, v in self.variants.items() if KIND in parse_mix(v.negatives)]
        if names and self.writer is None:
            mix = self.variants[names[0]].negatives
            raise ValueError(
                f"variants.{names[0]}: negatives {mix} need a writer; give "
                "writer: {url: http://localhost:8000/v1, model: NAME}"
            )
        return self


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
    if recipe.evaluate.mauve:
        _check_mauve(recipe, path)
    return recipe


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
