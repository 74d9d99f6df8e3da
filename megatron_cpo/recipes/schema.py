"""What a recipe may say, checked before anything runs."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from megatron_cpo.checkpoints.merging.alphas import check_alphas
from megatron_cpo.negatives.from_records import parse_mix
from megatron_cpo.objective import OBJECTIVES, PSS
from megatron_cpo.policies.writer import KIND


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
    limit: int | None = Field(default=None, ge=2)
    """Of the test records; of one alone nothing has an interval."""
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
    _named: set[Path] = PrivateAttr(default_factory=set)

    @property
    def named(self) -> set[Path]:
        """Files, and folders after `hf:`, that flags name."""
        return self._named

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
