"""Numbers that are none, and ids that no token has, are refused where they arise, by group."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

REMEDY = (
    "weights that are not finite (a loss that diverged) or an overflow in 16 bits do this: check "
    "that model, or run it in float32"
)


def require_finite(values: NDArray[np.floating[Any]], where: str, what: str, source: str) -> None:
    """Raise ValueError for a value that is NaN or infinite.

    Args:
        values: [K], of a group's candidates.
        where: begins the message, such as "group 7".
        what: of each candidate, such as "log-prob".
        source: whose values they are.
    """
    finite = np.isfinite(values)
    if not finite.all():
        wrong = int(finite.argmin())
        raise ValueError(
            f"{where}: the {what} of candidate {wrong} is {values[wrong]} under {source}, "
            f"not a finite number; {REMEDY}"
        )


def require_tokens(tokens: NDArray[np.integer[Any]], vocab_size: int, where: str) -> None:
    """Raise ValueError for a token id that the vocabulary has not; `where` begins the message."""
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(
            f"{where}: token id {wrong} is outside the vocabulary of {vocab_size} tokens: it was "
            "made by another tokenizer, or is damaged; make it again"
        )


def model_name(identity: dict[str, Any]) -> str:
    """A model in a message, from what a manifest says of it."""
    iteration = f" iteration {identity['iteration']}" if "iteration" in identity else ""
    return f"{identity['name']}{iteration}"
