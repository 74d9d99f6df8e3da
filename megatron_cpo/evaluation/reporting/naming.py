"""The model that a generator's name says: `NAME`, or `NAME@negatives=MixN,alpha=0.3`.

Either of both may be missing. `evaluate sweep` names its models so. Files keep AlpacaEval's shape,
and a name that says nothing of the kind is a method of its own.
"""

import math
import re
from dataclasses import dataclass, replace

from megatron_cpo.checkpoints.merging.alphas import alpha_name

_NAMED = re.compile(
    r"(?P<method>.+?)@(?:negatives=(?P<negatives>[^@]+?)(?:,|$))?(?:alpha=(?P<alpha>[^,@=]+))?"
)


@dataclass(frozen=True)
class Model:
    """A method, what its negatives were, and the share of the MLE model in its weights."""

    method: str
    negatives: str = ""
    """Such as `MixN` or `bn=3,tn=8`; empty: not said."""
    alpha: float | None = None
    """In theta = alpha * theta_MLE + (1 - alpha) * theta_CPO."""

    def __str__(self) -> str:
        said = [f"negatives={self.negatives}"] if self.negatives else []
        said += [f"alpha={alpha_name(self.alpha)}"] if self.alpha is not None else []
        return f"{self.method}@{','.join(said)}" if said else self.method

    @property
    def family(self) -> "Model":
        """The same at whatever alpha."""
        return replace(self, alpha=None)

    @property
    def title(self) -> str:
        """The method with its negatives, for people."""
        return f"{self.method}, {self.negatives}" if self.negatives else self.method


def read_name(generator: str) -> Model:
    """The model of a generator's name.

    >>> read_name("cpo@negatives=MixN,alpha=0.3")
    Model(method='cpo', negatives='MixN', alpha=0.3)
    >>> read_name("cpo@negatives=bn=3,tn=8,alpha=0.3").negatives
    'bn=3,tn=8'
    >>> read_name("org/name@main").method
    'org/name@main'

    Raises:
        ValueError: an alpha that is no number in [0, 1].
    """
    found = _NAMED.fullmatch(generator)
    if not found or not (found["negatives"] or found["alpha"]):
        return Model(generator)
    alpha = None
    if found["alpha"]:
        try:
            alpha = float(found["alpha"])
        except ValueError:
            alpha = math.nan
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"generator {generator!r}: alpha {found['alpha']} is not in [0, 1]; it is the MLE "
                "model's share, name it NAME@alpha=0.3"
            )
    return Model(found["method"], found["negatives"] or "", alpha)
