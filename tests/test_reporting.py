"""The tables of a report against plain twins, the honest alpha, and folders that are refused."""

import hashlib
import json
import random
import re
from dataclasses import replace

import pytest
from scipy.stats import wasserstein_distance

from megatron_cpo.evaluation.command import write_verdicts
from megatron_cpo.evaluation.external import ExternalModel
from megatron_cpo.evaluation.reporting.choosing import choose, half
from megatron_cpo.evaluation.reporting.contents import contents
from megatron_cpo.evaluation.reporting.folder import read_folder
from megatron_cpo.evaluation.reporting.markdown import render_markdown
from megatron_cpo.evaluation.reporting.measures import curves
from megatron_cpo.evaluation.reporting.naming import Model, read_name
from megatron_cpo.evaluation.reporting.page import render_page
from megatron_cpo.evaluation.reporting.quantities import QUANTITIES
from megatron_cpo.evaluation.reporting.report import write_report
from megatron_cpo.evaluation.scores import score_files, write_scores
from megatron_cpo.evaluation.statistics import Estimate
from megatron_cpo.evaluation.win_rate import comparisons, judged
from megatron_cpo.kept import KeptLines
from tests.commands import assert_one_line_error, assert_quick, run_tool, run_tool_here
from tests.results_folders import MADE, judge, texts_of, write_model, write_sweep
from tests.scored_texts import records, save_with_tokenizer, write_texts

IDS = [f"r{i}" for i in range(60)]


def halves(ids, seed=0):
    """The halves again, by their definition."""
    parts = {"A": [], "B": []}
    for id in ids:
        byte = hashlib.sha256(f"{seed} {id}".encode()).digest()[0]
        parts["B" if byte % 2 else "A"].append(id)
    return parts


def mean(values):
    return sum(values) / len(values)


def table(report, title):
    (found,) = [each for each in report.tables if each.title.startswith(title)]
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def random_scores(alphas=(0.0, 0.3, 1.0), seed=0):
    rng = random.Random(seed)
    return {a: {id: rng.choice([0.0, 0.5, 1.0]) for id in IDS} for a in alphas}


def test_names():
    for model in (Model("cpo", "MixN", 0.3), Model("cpo", "", 1.0), Model("a@b", "BN4"),
                  Model("org/Llama-3.1"), Model("x@y", "", 0.05),
                  Model("cpo", "bn=3,mn=5,tn=3", 0.3), Model("cpo", "bn=4")):  # fmt: skip
        assert read_name(str(model)) == model
    for plain in ("m@alpha", "@alpha=0.3", "m@", "m@alpha=0.3,negatives=x"):
        assert read_name(plain) == Model(plain)
    for wrong in ("1.5", "x", "nan"):
        with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
            read_name(f"m@alpha={wrong}")


def test_halves_depend_on_id_and_seed_alone():
    parts = halves(IDS, 3)
    assert {id: half(id, 3) for id in IDS} == {i: h for h, ids in parts.items() for i in ids}
    assert min(map(len, parts.values())) > 20
    assert parts != halves(IDS, 4)


def test_tables_equal_plain_sums(tmp_path):
    """Win rates, counts, both halves and the choice, added up by hand from the scores."""
    scores = random_scores()
    write_sweep(tmp_path, IDS, lambda alpha, id: scores[alpha][id])
    report = contents(read_folder(tmp_path))
    rows = table(report, "Table 1")
    assert [row["alpha"] for row in rows] == ["0", "0.3", "1"]
    for row, given in zip(rows, scores.values(), strict=True):
        values = list(given.values())
        assert row["win rate"].value == pytest.approx(mean(values))
        assert [row[n] for n in ("won", "tied", "lost")] == [values.count(v) for v in (1, 0.5, 0)]
        assert row["no verdict"] == 0
        assert row["model"] == "cpo, MixN"
    (table_1,) = [t for t in report.tables if t.title.startswith("Table 1")]
    assert "Judge, template: some-judge, instruction." in table_1.note
    assert "Against: reference." in table_1.note

    parts = halves(IDS)
    on = {h: {a: mean([given[id] for id in ids]) for a, given in scores.items()}
          for h, ids in parts.items()}  # fmt: skip
    best = max(sorted(on["A"]), key=on["A"].get)
    (row,) = table(report, "Best alpha")
    assert row["best alpha"] == f"{best:g}"
    assert row["half A, chose it"].value == pytest.approx(on["A"][best])
    assert row["half B, reported"].value == pytest.approx(on["B"][best])
    assert row["half B, reported"].prompts == len(parts["B"])
    if best != 1:
        assert row["minus MLE, half B"].value == pytest.approx(on["B"][best] - on["B"][1.0])
    assert table(report, "Table 2")[0]["negatives"] == "MixN"
    curve = table(report, "win rate against reference")
    for found, alpha in zip(curve, scores, strict=True):
        assert found["alpha"] == f"{alpha:g}"
        assert found["half A"].value == pytest.approx(on["A"][alpha])
        assert found["half B"].value == pytest.approx(on["B"][alpha])
        assert found["all prompts"].value == pytest.approx(mean(scores[alpha].values()))


def choice_of(folder, scores):
    write_sweep(folder, IDS, lambda alpha, id: scores[alpha][id])
    (curve,) = curves(read_folder(folder), QUANTITIES["win_rate"])
    return choose(curve)


def test_no_prompt_that_is_reported_helps_to_choose(tmp_path):
    """0.3 wins on half A, 0 wins by far on half B and over all: 0.3 is chosen, and B's figure of
    0.3 is reported. Changing what half B says changes no choice, and what A says no report."""
    parts = halves(IDS)
    a, b = set(parts["A"]), set(parts["B"])
    alternate = {id: float(i % 2) for i, id in enumerate(IDS)}
    scores = {
        0.0: {id: 1.0 if id in b else 0.0 for id in IDS},
        0.3: {id: (1.0 if i % 3 else 0.5) if id in a else 0.0
              for i, id in enumerate(IDS)},
        1.0: alternate,
    }  # fmt: skip
    assert mean(scores[0.0].values()) > mean(scores[0.3].values()), "all prompts would choose 0"
    found = choice_of(tmp_path, scores)
    assert found.alpha == 0.3
    assert found.reported[0.3].value == pytest.approx(mean([scores[0.3][id] for id in b]))
    assert found.reported[0.3].value < found.reported[0.0].value, "an honest report may be sad"

    for alpha in scores:  # half B turned around: the same choice by the same figures
        other = {x: {id: 1 - s if id in b and x == alpha else s for id, s in given.items()}
                 for x, given in scores.items()}  # fmt: skip
        again = choice_of(tmp_path, other)
        assert (again.alpha, again.chosen) == (0.3, found.chosen)
    other = {x: {id: 0.5 if id in a else s for id, s in given.items()}
             for x, given in scores.items()}  # fmt: skip
    assert choice_of(tmp_path, other).reported == found.reported


def test_equally_good_alphas_and_too_few_prompts(tmp_path):
    one = {id: float(i % 2) for i, id in enumerate(IDS)}
    assert choice_of(tmp_path, {0.0: one, 0.3: one, 1.0: one}).alpha == 0.0
    few = tmp_path / "few"
    write_sweep(few, ["r0", "r1"], lambda alpha, id: float(id == "r0"))
    report = contents(read_folder(few))
    assert not report.choices
    (curve,) = [each for each in report.tables if each.title.startswith("win rate against")]
    assert "Too few prompts to choose" in curve.note


def test_without_verdicts_alpha_is_chosen_by_repetition(tmp_path):
    """Of texts with 0, 1/3 and 2/3 repeated 4-grams, against truths without: the first."""
    plain, loops = "a b c d e f", "a b c d a b c d a b c d"  # 3 and 9 4-grams, 0 and 5 repeat
    for alpha, output in ((0.0, loops), (0.5, plain)):
        name = f"m@alpha={alpha:g}"
        texts = texts_of(name, IDS, lambda id, output=output: output)
        write_model(tmp_path, f"m-{alpha:g}", name, texts)
    report = contents(read_folder(tmp_path))
    (row,) = table(report, "Best alpha")
    assert row["best alpha"] == "0.5"
    assert row["half B, reported"].value == 0
    assert dict(report.facts)["alpha chosen by"] == "seq-rep-4 minus the truth's"
    curve = table(report, "seq-rep-4 minus the truth's")
    assert curve[0]["all prompts"].value == pytest.approx(5 / 9)
    assert any("no verdicts" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"--choose-by win_rate: .* has no verdicts"):
        contents(read_folder(tmp_path), "win_rate")


def test_alpha_by_the_distance_under_an_external_model(tmp_path):
    """Of a real model: the truths with one word more are nearer to the truths than their words
    over and over; on each half the distance is scipy's, of what `score` has kept."""
    external = ExternalModel(f"hf:{save_with_tokenizer(tmp_path / 'lm')}")
    results = tmp_path / "results"
    results.mkdir()
    truths = [answer for _, answer in records(24)]
    outputs = {0.0: [f"{t} {t}" for t in truths], 0.5: [f"{t} then" for t in truths]}
    paths = [
        write_texts(results / f"m-{alpha}.json", texts, generator=f"m@alpha={alpha}")
        for alpha, texts in outputs.items()
    ]
    write_scores(results / "scores.json", score_files(paths, external=external))
    report = contents(read_folder(results))
    (row,) = table(report, "Best alpha")
    assert dict(report.facts)["alpha chosen by"] == "distance of the external NLL to the truth's"

    parts = halves([str(i) for i in range(24)])
    cache = KeptLines(tmp_path / "fresh.jsonl", "a text", ["nats", "tokens", "cut"])
    pairs = [prompt for prompt, _ in records(24)]
    asked = [(f"{p}\n", t) for texts in (*outputs.values(), truths)
             for p, t in zip(pairs, texts, strict=True)]  # fmt: skip
    nll = [each.nats / each.tokens for each in external.likelihoods(asked, cache)]
    first, second, truth = nll[:24], nll[24:48], nll[48:]

    def distance(values, ids):
        at = [int(id) for id in ids]
        return wasserstein_distance([values[i] for i in at], [truth[i] for i in at])

    on_a = {"0": distance(first, parts["A"]), "0.5": distance(second, parts["A"])}
    best = min(on_a, key=on_a.get)
    assert row["best alpha"] == best
    assert row["half A, chose it"].value == pytest.approx(on_a[best])
    values = {"0": first, "0.5": second}[best]
    assert row["half B, reported"].value == pytest.approx(distance(values, parts["B"]))
    stored = json.loads((results / "scores.json").read_text())
    del stored["external"]["tokenizer"]  # as an earlier release wrote it
    (results / "scores.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"--choose-by nll_distance: .* has no scores under"):
        contents(read_folder(results), "nll_distance")


def test_mauve_is_a_table(tmp_path):
    results = write_model(tmp_path, "a", "a@alpha=0.5", ids=IDS)
    row = {"candidate": "elsewhere/a.json", "baseline": "reference", "generator": "a@alpha=0.5",
           "made": vars(results.made), "value": 0.875, "sd": 0.01, "values": [0.87, 0.88],
           "seeds": [25, 26], "buckets": 6, "texts": 60, "baseline_texts": 60}  # fmt: skip
    content = {"mauve": [row], "features": {"name": "lm"}, "tool": "megatron_cpo 0"}
    (tmp_path / "mauve.json").write_text(json.dumps(content))
    (found,) = table(contents(read_folder(tmp_path)), "Table 4")
    assert (found["model"], found["alpha"], found["MAUVE"], found["sd"]) == (
        "a",
        "0.5",
        0.875,
        0.01,
    )
    row["generator"] = "b"
    (tmp_path / "mauve.json").write_text(json.dumps(content))
    refused(tmp_path, "measure it again, megatron-cpo evaluate mauve")


def test_decodings_stand_side_by_side(tmp_path):
    sampled = replace(MADE, decoding="top-k 50")
    for place, (stem, made) in enumerate((("greedy", MADE), ("sampled", sampled))):
        results = write_model(tmp_path, stem, "cpo", made=made, ids=IDS)
        judge(results, lambda id, place=place: float(int(id[1:]) % (place + 2) == 0))
    (row,) = table(contents(read_folder(tmp_path)), "Table 3")
    assert row["model"] == "cpo"
    assert row[MADE.decoding].value == pytest.approx(0.5)
    assert row["top-k 50"].value == pytest.approx(1 / 3)


def test_another_model_as_baseline(tmp_path):
    mle = write_model(tmp_path, "mle", "mle", ids=IDS)
    texts = texts_of("cpo", IDS, lambda id: f"better {id}")
    cpo = write_model(tmp_path, "cpo-against-all", "cpo", texts)
    judge(cpo, lambda id: 1.0 if id < "r3" else 0.0, mle)
    (row,) = table(contents(read_folder(tmp_path)), "Table 1")
    assert row["win rate"].value == pytest.approx(mean([float(id < "r3") for id in IDS]))
    (found,) = read_folder(tmp_path).judged
    assert found.against == "mle"
    mle.path.unlink()
    assert any("a file of texts that it names is not here" in note
               for note in read_folder(tmp_path).notes)  # fmt: skip


# ---- what does not belong together


def refused(folder, match):
    with pytest.raises(ValueError, match=match):
        read_folder(folder)


def test_other_data_is_refused_with_both_shown(tmp_path):
    write_model(tmp_path, "a", "a", ids=IDS)
    write_model(tmp_path, "b", "b", ids=IDS, made=replace(MADE, data="sha256 9"))
    refused(tmp_path, r"a\.json and .*b\.json have other data: sha256 2 and sha256 9")
    other = replace(MADE, data="sha256 9", decoding="beam")
    write_model(tmp_path, "b", "b", ids=IDS, made=other)
    refused(tmp_path, r"a\.json and .*b\.json have other data: sha256 9 and sha256 2|"
            r"b\.json and .*a\.json have other data: sha256 9 and sha256 2")  # fmt: skip


def test_other_records_and_prompts_are_refused(tmp_path):
    write_model(tmp_path, "a", "a", ids=IDS)
    write_model(tmp_path, "b", "b", ids=IDS[1:])
    refused(tmp_path, "60 texts, .* 59")
    texts = texts_of("b", IDS)
    write_model(tmp_path, "b", "b", [replace(texts[0], instruction="ask"), *texts[1:]])
    refused(tmp_path, "other instructions of record 'r0': 'say r0' and 'ask'")
    write_model(tmp_path, "b", "a", ids=IDS)
    refused(tmp_path, r"are both of 'a', greedy, at most 64 tokens")
    (tmp_path / "b.json").write_text("[{")
    refused(tmp_path, r"b\.json: cannot be read as JSON")
    (tmp_path / "b.json").unlink()
    write_model(tmp_path, "b", "b", ids=IDS[1:], made=replace(MADE, decoding="beam"))
    refused(tmp_path, "59 prompts, .* 60|60 prompts, .* 59")


def test_verdicts_of_other_texts_are_refused(tmp_path):
    results = write_model(tmp_path, "a", "a", ids=IDS)
    judge(results, lambda id: float(id < "r3"))
    write_model(tmp_path, "a", "a", ids=IDS[:-1])
    refused(tmp_path, r"has 60 verdicts, .* 59 texts.*judge them again")
    texts = texts_of("a", IDS, lambda id: "" if id == "r5" else "new")
    write_model(tmp_path, "a", "a", texts)
    refused(tmp_path, "'r0' has other texts than were judged; judge them again")
    path = tmp_path / "a-against-reference.verdicts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    earlier = [{name: row[name] for name in row if name != "texts"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in earlier))
    refused(tmp_path, "'r5' was judged when it was judged, its texts are empty now")


def test_json_of_other_tools_is_left_out_and_said(tmp_path):
    write_model(tmp_path, "a", "a", ids=IDS)
    for content in ({"files": ["a"]}, {"files": [{}]}, {"mauve": [1]}, {"groups": {}}):
        (tmp_path / "package.json").write_text(json.dumps(content))
        assert "package.json: neither texts nor scores" in read_folder(tmp_path).notes


def test_texts_of_other_tools(tmp_path):
    """Counts that are none are refused by name; half a surrogate pair is no half file."""
    path = write_model(tmp_path, "a", "a", ids=IDS).path
    rows = json.loads(path.read_text())
    for name, value in (("tokens", [7]), ("tokens", "many"), ("sample", {}), ("sample", -1)):
        path.write_text(json.dumps([rows[0] | {name: value}, *rows[1:]]))
        with pytest.raises(ValueError, match=rf"a\.json: text 0 has a `{name}` that is no number"):
            read_folder(tmp_path)
    path.write_text(json.dumps([rows[0] | {"output": "so \ud83d"}, *rows[1:]]))
    write_report(tmp_path, tmp_path / "report.html")
    assert "so \N{REPLACEMENT CHARACTER}" in (tmp_path / "report.html").read_text("utf-8")


def test_a_judges_words_may_hold_any_separator(tmp_path):
    results = write_model(tmp_path, "a", "a", ids=IDS)
    separators = "One.\u2028Two.\u0085Three.\x0b\r\nA"
    games = [
        judged(id, sample, pair, (separators, "B"))
        for id, sample, pair in comparisons(results, results.truths())
    ]
    write_verdicts(tmp_path / "a-against-reference.verdicts.jsonl", games)
    (found,) = read_folder(tmp_path).judged
    assert found.pairs == games


def test_scores_are_read_and_stale_ones_refused(tmp_path):
    results = write_model(tmp_path, "a", "a", ids=IDS)
    figure = {"value": 0.25, "low": 0.2, "high": 0.3, "prompts": 60, "method": "x"}
    scores = {
        "files": [{"path": "elsewhere/a.json", "generator": "a",
                   "made": json.loads(results.path.read_text())[0] and vars(results.made),
                   "counts": {"texts": 60}, "figures": {"words": figure}}],
        "truth": {"figures": {"words": figure | {"value": 0.5}}},
        "definitions": {"words": {"label": "words", "definition": "of a text"}},
        "tool": "megatron_cpo 0",
    }  # fmt: skip
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    report = contents(read_folder(tmp_path))
    (row,) = table(report, "Without a judge")
    truth = Estimate(**figure | {"value": 0.5})
    assert row == {"figure": "words", "a": Estimate(**figure), "the truths": truth}
    assert "\n- words: of a text\n" in render_markdown(report)
    assert "<dt>words</dt><dd>of a text</dd>" in render_page(report, read_folder(tmp_path), 1)
    scores["files"][0]["digest"] = results.digest
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert contents(read_folder(tmp_path)).tables == report.tables
    write_model(tmp_path, "a", "a", texts_of("a", IDS, lambda id: f"{id} anew"))
    refused(tmp_path, r"scores.json has figures of other texts than .*a.json has now: measure it")
    scores["files"][0]["made"] = vars(replace(results.made, checkpoint="old"))
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    refused(tmp_path, "measure it again, megatron-cpo evaluate score")


def test_scores_under_two_models_are_not_put_into_one_row(tmp_path):
    """The one of the file that comes last was shown of the texts that both have."""
    figure = {"value": 0.25, "low": 0.2, "high": 0.3, "prompts": 60, "method": "x"}
    for name, kind, digest in (("a", "external", "1"), ("b", "external", "2")):
        results = write_model(tmp_path, name, name, ids=IDS)
        row = {"path": f"{name}.json", "generator": name, "made": vars(results.made),
               "digest": results.digest, "counts": {}, "figures": {"nll": figure}}  # fmt: skip
        content = {"files": [row], kind: {"name": name, "digest": digest}, "tool": MADE.tool}
        (tmp_path / f"scores-{name}.json").write_text(json.dumps(content))
    refused(tmp_path, r"scores-a.json and .*scores-b.json asked other models by --external: .*'1'")
    path = tmp_path / "scores-b.json"
    path.write_text(path.read_text().replace('"2"', '"1"'))
    assert read_folder(tmp_path).scores.keys() == {"a.json", "b.json"}, "a name is not a model"


# ---- written


def test_markdown_is_plain_where_it_must_be(tmp_path):
    name = "m|`x`<script>[y](z)\n*"
    judge(write_model(tmp_path, "m", name, ids=IDS), lambda id: float(id < "r3"))
    text = render_markdown(contents(read_folder(tmp_path)))
    (row,) = [line for line in text.splitlines() if line.startswith(r"| m\|")]
    assert row.startswith(r"| m\|\`x\`\<script\>\[y\](z) \* | ")
    assert "<script>" not in text


def test_command_writes_everything(tmp_path):
    scores = random_scores()
    write_sweep(tmp_path / "results", IDS, lambda alpha, id: scores[alpha][id])
    out = tmp_path / "out"
    done = run_tool_here("evaluate.py", "report", tmp_path / "results", "--html", out / "r.html",
                    "--markdown", out / "r.md", "--figures", out / "figures")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "best alpha" in done.stdout
    assert re.search(r"^ +0\.3  0\.\d{3} \[", done.stdout, re.MULTILINE)
    assert sorted(path.name for path in out.rglob("*.*")) == [
        "figure-1.png", "figure-2.png", "r.html", "r.md"
    ]  # fmt: skip
    assert (out / "figures/figure-1.png").read_bytes().startswith(b"\x89PNG")
    assert "](<figures/figure-1.png>)" in (out / "r.md").read_text()
    first = (out / "r.html").read_bytes()
    write_report(tmp_path / "results", out / "r.html")
    assert (out / "r.html").read_bytes() == first


def test_help_and_refusals(tmp_path):
    done = run_tool("evaluate.py", "report", "--help")
    assert "chosen on one half of the prompts" in done.stdout
    assert_quick(done)
    done = run_tool_here("evaluate.py", "report", tmp_path / "nowhere", "--html", "x.html")
    assert_one_line_error(done, "evaluate.py")
    assert "no such folder" in done.stderr
    assert run_tool_here("evaluate.py", "report", tmp_path).returncode == 2
