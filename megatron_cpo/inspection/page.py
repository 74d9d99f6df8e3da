"""The report of a store as one HTML page: see `document` for what all pages are."""

import math
from html import escape
from importlib.resources import files
from typing import Any

from megatron_cpo.inspection.document import KEYS, header, note, render_document
from megatron_cpo.inspection.facts import IDS, UNSCORED, describe_store
from megatron_cpo.inspection.plots import kind_class, kind_colours, kind_table, store_figures
from megatron_cpo.inspection.statistics import StoreStatistics
from megatron_cpo.inspection.text import TokenText
from megatron_cpo.inspection.view import (
    CandidateView,
    GroupView,
    Span,
)
from megatron_cpo.tree import Ints

LONGEST_RUN = 1500
"""Most tokens of a run that are in the page; of longer ones both ends are."""

Cells = list[str | int]
"""Texts of tokens; a number stands for so many tokens that are left out."""


def render_page(
    name: str,
    manifest: dict[str, Any],
    found: StoreStatistics,
    groups: list[GroupView],
    text: TokenText,
) -> str:
    """The HTML of a store's page.

    Args:
        name: of the store, its heading.
        groups: the ones to show; the statistics are of the whole store.
    """
    style, script = (
        (files(__package__) / file).read_text(encoding="utf-8") for file in ("page.css", "page.js")
    )
    kinds = "".join(
        f'<label><input type="checkbox" name="kind" value="{escape(kind)}" checked>'
        f'<span class="badge {kind_class(kind)}">{escape(kind)}</span></label>'
        for kind in found.kinds
    )
    sample = (
        f"{len(groups):,} of {manifest['groups']:,} groups are in this page"
        if len(groups) < manifest["groups"]
        else f"all {len(groups):,} groups"
    )
    data = {"separator": text.separator, "groups": [_group(group, text) for group in groups]}
    body = f"""\
{header(name, describe_store(manifest))}
<main>
<section aria-labelledby="store"><h2 id="store">The whole store</h2>
{note("" if found.scored else UNSCORED)}
{kind_table(found)}
<div class="figures">{store_figures(found)}</div>
</section>
<section aria-labelledby="groups"><h2 id="groups" tabindex="-1">Groups</h2>
<p class="note">{sample}. A group is one token tree: what a candidate shares with one drawn before
it is computed once.</p>
{note("" if text.has_text else IDS)}
<form id="tools" role="search">
<label class="search">Search <input id="query" type="search" autocomplete="off" spellcheck="false"
 placeholder="words, or #17 for a group"></label>
<fieldset><legend>Candidates</legend>{kinds}</fieldset>
<label>Groups <select id="which"><option value="all">all</option>
<option value="place">y_1 not the likeliest</option>
<option value="token">y_1 not the likeliest per token</option>
<option value="repeats">with repeated candidates</option></select></label>
<label>Sort <select id="sort"><option value="store">as stored</option>
<option value="place">y_1 least likely first</option>
<option value="similar">most similar negative first</option>
<option value="tree">largest tree first</option>
<option value="gain">most saved by the tree first</option></select></label>
<label>Candidates by <select id="order"><option value="index">number</option>
<option value="rank">rank</option>
<option value="logp">log-prob</option>
<option value="slot">place in the tree</option></select></label>
<label class="check"><input id="was" type="checkbox"> y_1's words beside changes</label>
<label class="check"><input id="borders" type="checkbox"> token borders</label>
<output id="count" aria-live="polite"></output>
</form>
<p class="legend">
<span><span class="shared">shared</span> in the tree already</span>
<span><ins>changed</ins> other tokens than y_1's</span>
<span><del>gone</del> y_1's tokens</span>
<span><b class="cut">✂7</b> candidate 7 cuts y_1 here</span>
<span><b class="eod">∎</b> end of document</span>
{KEYS}</p>
<noscript><p class="note">The groups need JavaScript; the numbers above do not.</p></noscript>
<div id="list"></div>
</section>
</main>"""
    return render_document(
        name, "groups of negatives", body, data, kind_colours() + style, script, "groups"
    )


def _group(view: GroupView, text: TokenText) -> dict[str, Any]:
    return {
        "index": view.index,
        "prefix": _cells(view.prefix, text),
        "prefixTokens": len(view.prefix),
        "tree": view.tree_tokens,
        "padded": view.padded_tokens,
        "place": view.truth_place,
        "placePerToken": view.truth_place_per_token,
        "candidates": [_candidate(candidate, text) for candidate in view.candidates],
    }


def _candidate(view: CandidateView, text: TokenText) -> dict[str, Any]:
    return {
        "index": view.index,
        "kind": view.kind,
        "style": kind_class(view.kind),
        "rank": view.rank,
        "similarity": _rounded(view.similarity, 3),
        "logp": _rounded(view.logp, 2),
        "perToken": _rounded(view.logp_per_token, 2),
        "tokens": view.tokens,
        "branch": view.branch,
        "slot": view.slot,
        "cut": view.cut,
        "repeats": view.repeats,
        "spans": [_span(span, text) for span in view.spans],
    }


def _span(span: Span, text: TokenText) -> dict[str, Any]:
    """What the script needs of a span; what is false or empty is left out."""
    entry = {
        "mark": span.mark,
        "shared": span.shared,
        "n": len(span.tokens),
        "cells": _cells(span.tokens, text),
        "was": _cells(span.truth, text) if span.truth is not None else None,
        "by": list(span.cut_by),
    }
    return {key: value for key, value in entry.items() if value}


def _cells(tokens: Ints, text: TokenText) -> Cells:
    ids = tokens.tolist()
    if len(ids) <= LONGEST_RUN:
        return list(text.cells(ids))
    half = LONGEST_RUN // 2
    return [*text.cells(ids[:half]), len(ids) - 2 * half, *text.cells(ids[-half:])]


def _rounded(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
