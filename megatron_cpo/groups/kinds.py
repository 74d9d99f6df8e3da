"""The kinds of candidates: everything that is said of one stands here and nowhere else.

What draws a kind is a function of the same name in `negatives` (`NEGATIVES` for those that need
records alone, `policy_samplers` for those that ask a policy), or `from_writer` for the one that an
instruct model writes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Where a candidate comes from."""

    name: str
    """In flags, files and logs."""
    label: str
    """In the legend of a picture."""
    needs_policy: bool
    """Whether it is drawn from a language model."""
    terminal: str
    """Its badge on a terminal, as a style of `rich`."""
    light: str
    """Its colour on a light page, CSS."""
    dark: str
    """Its colour on a dark page, CSS."""
    cut_short: bool = False
    """Whether it ends where it does on purpose, and nowhere by itself."""
    needs_writer: bool = False
    """Whether an instruct model behind a server writes it."""


_GT = Kind("gt", "the truth", False, "black on green", "#1a7f37", "#5ed587")
_AN = Kind("an", "AN, samples of the policy", True, "black on cyan", "#0b7285", "#52c6da")
_BN = Kind("bn", "BN, from other records", False, "white on blue", "#1f5fbf", "#86b4ff")
_MN = Kind("mn", "MN, tokens replaced", True, "white on magenta", "#9c36b5", "#e29bf1")
_TN = Kind("tn", "TN, the truth cut short", False, "black on yellow", "#9a5200", "#f3ae6b", True)
_GIVEN = Kind("given", "given ones", False, "white on red", "#c2255c", "#ff95b5")
_PSS = Kind("pss", "PSS, scheduled sampling", True, "black on white", "#5f3dc4", "#b9a3ff")
_WRITTEN = Kind(
    "written", "written by a model", False, "black on magenta", "#7a5c00", "#e0c341",
    needs_writer=True,
)  # fmt: skip

REGISTRY = {kind.name: kind for kind in (_GT, _AN, _BN, _MN, _TN, _GIVEN, _PSS, _WRITTEN)}
"""By name. The place in it is the code that stores hold, so a new kind goes to the end."""
KINDS = tuple(REGISTRY)
"""Names by code; gt is the true continuation y_1."""
NEEDS_POLICY = tuple(name for name, kind in REGISTRY.items() if kind.needs_policy)
"""Names of those that are drawn from a policy."""
NEEDS_WRITER = tuple(name for name, kind in REGISTRY.items() if kind.needs_writer)
"""Names of those that an instruct model writes."""
