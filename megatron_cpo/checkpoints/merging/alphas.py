"""The shares of the MLE model that merges are made at: what is one share, and its name."""

from collections.abc import Sequence


def alpha_name(alpha: float) -> str:
    """Its decimals, for files and people; shares that differ in rounding alone have one name."""
    return f"{alpha + 0.0:.15g}"  # -0 is 0


def check_alphas(alphas: Sequence[float], flag: str = "--alpha") -> list[float]:
    """The shares, as floats.

    Args:
        flag: what a refusal begins with.

    Raises:
        ValueError: there is none, one lies outside [0, 1], or two have the same name.
    """
    shares = [float(alpha) for alpha in alphas]
    names = [alpha_name(share) for share in shares]
    if not shares or len(set(names)) < len(names):
        raise ValueError(f"{flag} {' '.join(names) or '(none)'}: give at least one, and each once")
    for share, name in zip(shares, names, strict=True):
        if not 0 <= share <= 1:
            raise ValueError(f"{flag} {name}: the MLE model's share must lie in [0, 1]")
    return shares
