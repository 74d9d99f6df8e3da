"""How the candidates of a store end: in EOD, or as a chat template ends a turn."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_cpo.tree import Ints

Endings = tuple[tuple[int, ...], ...]
"""Token ids that may end a candidate, the longest first."""


def endings_of(manifest: Mapping[str, Any]) -> Endings:
    """Those of a store: what its y_1 end in, its EOD, and what its policy stops at.

    Stores of earlier releases end in EOD; none at all where that is not known.
    """
    eod = (manifest.get("tokenizer") or {}).get("eod", manifest.get("eod"))
    found = [tuple(ending["ids"]) for ending in manifest.get("endings", [])]
    found += [(token,) for token in (eod, *(manifest.get("ends") or ())) if token is not None]
    return longest_first(found)


def cut_counts(manifest: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Candidates of a store that a limit of tokens cut: how many, by kind and by the limit's flag.

    Nothing of stores of earlier releases, which do not say.
    """
    found: dict[str, dict[str, int]] = {}
    for name, count in manifest.get("statistics", {}).get("cut", {}).items():
        kind, flag = name.split()
        found.setdefault(kind, {})[flag] = count
    return found


def longest_first(endings: Iterable[tuple[int, ...]]) -> Endings:
    """Each once, the longest first."""
    return tuple(sorted(set(endings), key=lambda ending: (-len(ending), ending)))


def ending_length(tokens: Ints, endings: Endings) -> int:
    """How many of the last tokens of a candidate are its ending; 0 if it has none."""
    for ending in endings:
        size = len(ending)
        if size <= len(tokens) and tuple(tokens[len(tokens) - size :].tolist()) == ending:
            return size
    return 0
