"""What decides the bytes of a store, and what only decides how fast they come."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_cpo.groups.source import Source
from megatron_cpo.negatives.policy import Policy, Sampling
from megatron_cpo.negatives.samplers import NEGATIVES, parse_mix

BLOCK_RECORDS = 64
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of a store, beside the tokenizer and the policy."""

    source: Source
    output_prefix: str
    """The store's PREFIX."""
    negatives: str = "bn=3,tn=8"
    """A mix, see `samplers.parse_mix`. The default has the paper's K = 12 without a policy."""
    k: int | None = None
    """Candidates a group, y_1 included. None: as the mix says."""
    seed: int = 1234
    """Of every draw; not negative."""
    ranker: str = "lexical"
    """`--rank`: lexical, none, policy, or a sentence-transformers model; see `embeddings`."""
    block_records: int = BLOCK_RECORDS
    """Records a block: what a policy or an embedder sees at once, and what a kill can lose."""
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

    @property
    def needs_policy(self) -> bool:
        """Whether a kind of negative or the ranking asks a policy."""
        return self.ranker == "policy" or bool(set(self.mix) - set(NEGATIVES))


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


@dataclass(frozen=True)
class Run:
    """Who builds: which share of the blocks, and with what. Never changes a byte."""

    executor: str = "local"
    """`local` or `ray`."""
    workers: int | None = None
    """Processes, or actors, each with one thread. None: the cores of this rank, or 1 where forks
    cannot help: a model on a GPU, a policy of Megatron's, a server."""
    share: int = 0
    """Number of this shard and rank, from 0; its blocks are share, share + shares, ..."""
    shares: int = 1
    writer: bool = True
    """Ranks that hold one policy together build the same blocks, and one of them writes."""
    merge_only: bool = False
    """Build nothing; make the store of what all shards built."""

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(
                f"--executor {self.executor}: unknown; give one of {', '.join(EXECUTORS)}"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: needs at least 1")


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` to (i, n); shards are numbered from 0.

    Raises:
        ValueError: not of that form, or i is not below n.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"--shard {text}: write i/n with i from 0 to n - 1, such as 0/8 for the first of 8; "
            "under a Slurm array $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    return int(index), int(count)
