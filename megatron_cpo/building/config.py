"""What decides the bytes of a store, and what only decides how fast they come."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_cpo.negatives.from_records import NEGATIVES, parse_mix
from megatron_cpo.policies.policy import Policy, Sampling
from megatron_cpo.policies.writer import KIND, Writer
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import BLOCK_RECORDS


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of a store, beside the tokenizer and the policy."""

    source: Source
    output_prefix: str
    """The store's PREFIX."""
    negatives: str = "bn=3,tn=8"
    """A mix, see `from_records.parse_mix`. The default has the paper's K = 12 without a policy."""
    k: int | None = None
    """Candidates a group, y_1 included. None: as the mix says."""
    seed: int = 1234
    """Of every draw; not negative."""
    ranker: str = "lexical"
    """`--rank`: lexical, none, policy, or a model; see `negatives.embeddings`."""
    block_records: int = BLOCK_RECORDS
    """Records a block: what a policy or an embedder sees at once, and what a kill can lose."""
    writer: Writer | None = None
    """Of the kind `written`."""
    mix: dict[str, int] = field(init=False)
    """Negatives a group, by kind."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", parse_mix(self.negatives))
        negatives = sum(self.mix.values())
        if self.k not in (None, 1 + negatives):
            raise ValueError(
                f"--k {self.k}: --negatives {self.negatives} makes K = {1 + negatives} (y_1 and "
                f"{negatives} negatives); leave --k out or change one of the two"
            )
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: needs a number that is not negative")
        if self.block_records < 1:
            raise ValueError(f"--block-records {self.block_records}: needs at least 1")
        if self.writer is None and KIND in self.mix:
            raise ValueError(
                f"--negatives {KIND}={self.mix[KIND]}: an instruct model writes them; give "
                "--writer URL, an OpenAI-compatible server, and --writer-model NAME"
            )
        if self.writer is not None and KIND not in self.mix:
            raise ValueError(
                f"--writer-model {self.writer.model}: nothing is written with "
                f"--negatives {self.negatives}; add {KIND}=1 to it, or leave --writer out"
            )

    @property
    def needs_policy(self) -> bool:
        """Whether a kind of negative or the ranking asks a policy."""
        return self.ranker == "policy" or bool(set(self.mix) - {*NEGATIVES, KIND})


@dataclass(frozen=True)
class PolicyUse:
    """The policy of a build and what it is used for."""

    open: Callable[[], Policy]
    """Loads it; called once in each process that builds blocks."""
    sampling: Sampling = field(default_factory=Sampling)
    mask_share: float = 0.15
    replace_share: float = 0.5
    score: bool = False
    """Its log-probs of all candidates are the reference's."""
