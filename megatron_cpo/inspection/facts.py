"""What a store is, in words and numbers that the terminal and the page share."""

import math
from typing import Any

from megatron_cpo.inspection.statistics import StoreStatistics
from megatron_cpo.inspection.text import visible


def describe_store(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what the manifest says; nothing for what it does not."""
    tokenizer = manifest.get("tokenizer")
    facts = [
        ("groups", f"{manifest['groups']:,} of K = {manifest['k']}"),
        ("candidates", _listed(manifest.get("kinds"))),
        ("records", ", ".join(source["name"] for source in manifest.get("source") or [])),
        ("dropped", _listed(manifest.get("dropped"))),
        (
            "tokenizer",
            f"{tokenizer['library']} of {tokenizer['vocab_size']:,}" if tokenizer else "",
        ),
        ("ranked by", str(manifest.get("ranker") or "")),
        ("seed", str(manifest.get("seed", ""))),
        ("policy", _model(manifest.get("policy"))),
        ("reference", _model(manifest.get("reference")) or "not scored yet"),
    ]
    return [(label, visible(text)) for label, text in facts if text]


UNSCORED = "No reference log-probs yet: megatron-cpo build --score-only adds them."
IDS = "Token ids are shown; --tokenizer-model PATH, where the tokenizer is, shows text."


def describe_tokens(found: StoreStatistics) -> list[tuple[str, int, str]]:
    """(what, tokens, how it compares with the trees) of three ways to run the groups."""
    tree = round(found.tree_tokens.total)
    rows = {
        "K rows a group, padded": found.padded_tokens,
        "K rows a group, no padding": found.sequence_tokens,
    }
    compared = [(what, n, f"{n / tree:.1f} times the trees") for what, n in rows.items()]
    return [*compared, ("token trees", tree, "")]


def _model(identity: dict[str, Any] | None) -> str:
    """A checkpoint or another policy, by what its identity has of name, iteration and backend."""
    known = identity or {}
    iteration = f"iteration {known['iteration']}" if "iteration" in known else None
    return ", ".join(
        str(part) for part in (known.get("name"), iteration, known.get("backend")) if part
    )


def _listed(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in (counts or {}).items())


def number(value: float, digits: int = 2) -> str:
    """A number for a table; a dash if there is none."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "–"


def share(part: int, whole: int) -> str:
    """A share as a percentage; a dash if there is nothing to share."""
    return f"{100 * part / whole:.1f}%" if whole else "–"
