"""A report as one HTML page: tables, figures, and the models' texts of each prompt side by side.

See `inspection.document` for what all pages are: texts only ever become text nodes.
"""

from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from megatron_cpo.evaluation.reporting.contents import Report
from megatron_cpo.evaluation.reporting.curves import curve_figure, training_figure
from megatron_cpo.evaluation.reporting.folder import Folder
from megatron_cpo.evaluation.reporting.tables import WORDS, Table, shown
from megatron_cpo.evaluation.results import Text
from megatron_cpo.evaluation.text_metrics import repetition, words
from megatron_cpo.inspection.document import KEYS, header, note, render_document
from megatron_cpo.inspection.text import visible

TRUTH = "truth"


def render_page(report: Report, folder: Folder, most: int) -> str:
    """The HTML of a report.

    Args:
        most: prompts whose texts are in the page, evenly spaced in the data; the numbers are of
            all prompts.
    """
    style, script = (
        (files(__package__) / file).read_text(encoding="utf-8") for file in ("page.css", "page.js")
    )
    data = samples(folder, most)
    prompts = len({text.id for text in folder.results[0].texts})
    sample = (
        f"{len(data['groups']):,} of {prompts:,} prompts are in this page"
        if len(data["groups"]) < prompts
        else f"all {prompts:,} prompts"
    )
    kinds = "".join(
        f'<label><input type="checkbox" name="kind" value="{model["key"]}" checked>'
        f'<span class="badge">{escape(model["label"])}</span></label>'
        for model in data["models"]
    )
    notes = "".join(f"<li>{escape(visible(words))}</li>" for words in report.notes)
    left_out = f'<ul class="note">{notes}</ul>' if notes else ""
    facts = [(label, visible(said)) for label, said in report.facts]
    plots = "\n".join(
        [*map(training_figure, report.training), *(curve_figure(plot) for plot in report.plots)]
    )
    body = f"""\
{header(visible(report.name), facts)}
<main>
<section aria-labelledby="numbers"><h2 id="numbers">Numbers</h2>
{"".join(map(_table, report.tables))}
<div class="figures">{plots}</div>
{left_out}
</section>
<section aria-labelledby="texts"><h2 id="texts" tabindex="-1">Texts</h2>
<p class="note">{sample}. Numbers above are of all prompts.</p>
<form id="tools" role="search">
<label class="search">Search <input id="query" type="search" autocomplete="off" spellcheck="false"
 placeholder="words, or #17 for a prompt"></label>
<fieldset class="bare"><legend>Models</legend>{kinds}</fieldset>
<label>Prompts <select id="which"><option value="all">all</option>
<option value="differ">verdicts differ</option>
<option value="won">a model won</option>
<option value="lost">a model lost</option>
<option value="limit">a text hit the length limit</option>
<option value="empty">a text is empty</option></select></label>
<label>Sort <select id="sort"><option value="data">as in the data</option>
<option value="best">highest mean score first</option>
<option value="worst">lowest mean score first</option>
<option value="repeated">most repetition first</option>
<option value="longest">longest text first</option></select></label>
<output id="count" aria-live="polite"></output>
</form>
<p class="legend">
{KEYS}</p>
<noscript><p class="note">The texts need JavaScript; the numbers above do not.</p></noscript>
<div id="list"></div>
</section>
</main>"""
    return render_document(visible(report.name), "evaluation", body, data, style, script, "texts")


def samples(folder: Folder, most: int) -> dict[str, Any]:
    """What the page's script reads: the models, and the texts of each prompt.

    A prompt's texts are in the order of the models, the truth first.
    """
    first = folder.results[0]
    ids = list(dict.fromkeys(text.id for text in first.texts))
    chosen = {ids[at] for at in np.linspace(0, len(ids) - 1, min(most, len(ids))).astype(int)}
    prompts = {text.id: text for text in first.texts if text.id in chosen}
    several = len(folder.decodings) > 1
    models: list[dict[str, Any]] = [{"key": TRUTH, "name": TRUTH, "label": TRUTH, "decoding": "",
                                     "truth": True}]  # fmt: skip
    texts: dict[str, list[dict[str, Any]]] = {id: [] for id in prompts}
    for id, text in prompts.items():
        if text.truth is not None:
            texts[id].append(_text(0, text.truth, None, "", []))
    against = list(dict.fromkeys(each.against for each in folder.judged))
    for results in folder.results:
        decoding = visible(results.made.decoding)
        name = visible(results.generator)
        label = f"{name} · {decoding}" if several else name
        at = len(models)
        models.append({"key": f"m{at}", "name": name, "label": label, "truth": False,
                       "decoding": decoding if several else ""})  # fmt: skip
        scores: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for each in folder.judged:
            if each.candidate is results:
                for pair in each.pairs:
                    if pair.score is not None:
                        scores.setdefault((pair.id, pair.sample), []).append(
                            (against.index(each.against), pair.score)
                        )
        sampled = any(text.sample for text in results.texts)
        for text in results.texts:
            if text.id in chosen:
                sample = text.sample if sampled else None
                found = scores.get((text.id, text.sample), [])
                texts[text.id].append(_text(at, text.output, sample, text.finish, found))
    places = {id: place for place, id in enumerate(ids)}
    return {
        "models": models
        if any(text.truth is not None for text in prompts.values())
        else models[1:],
        "against": [visible(name) for name in against],
        "groups": [_group(places[id], prompts[id], texts[id]) for id in prompts],
    }


def _group(place: int, text: Text, texts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "index": place,
        "id": _seen(text.id),
        "prompt": _seen(text.instruction),
        "texts": texts,
    }


def _text(
    model: int, output: str, sample: int | None, finish: str, scores: list[tuple[int, float]]
) -> dict[str, Any]:
    return {
        "model": model,
        "sample": sample,
        "output": _seen(output) if output.strip() else "",
        "finish": finish,
        "words": len(words(output)),
        "repetition": round(repetition(output), 3),
        "scores": scores,
    }


def _seen(text: str) -> str:
    """Text with hidden characters made visible, and line breaks and tabs as they are."""
    return "\n".join("\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_class(name)}>{escape(visible(name))}</th>' for name in table.columns
    )
    rows = []
    for at, row in enumerate(table.rows):
        first, *others = [escape(visible(shown(cell))) for cell in row]
        cells = "".join(
            f"<td{_class(name)}>{words}</td>"
            for name, words in zip(table.columns[1:], others, strict=True)
        )
        marked = ' class="marked"' if at == table.marked else ""
        rows.append(f'<tr{marked}><th scope="row">{first}</th>{cells}</tr>')
    title = escape(visible(table.title))
    return (
        f'<div class="table"><h3>{title}</h3>{note(visible(table.note))}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{_meanings(table)}</div>"
    )


def _meanings(table: Table) -> str:
    if not table.meanings:
        return ""
    items = "".join(
        f"<dt>{escape(visible(label))}</dt><dd>{escape(visible(words))}</dd>"
        for label, words in table.meanings
    )
    summary = "<summary>What the figures are</summary>"
    return f'<details class="note">{summary}<dl>{items}</dl></details>'


def _class(column: str) -> str:
    return ' class="words"' if column in WORDS else ""
