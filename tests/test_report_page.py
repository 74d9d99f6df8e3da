"""The page of a report: hostile texts stay text, and a thousand prompts open quickly."""

import json
import re
import time
from dataclasses import replace

import pytest

from megatron_cpo.evaluation.reporting.contents import contents
from megatron_cpo.evaluation.reporting.folder import read_folder
from megatron_cpo.evaluation.reporting.page import render_page
from megatron_cpo.evaluation.reporting.report import write_report
from tests.pages import Page, check_policy
from tests.results_folders import judge, texts_of, write_model

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt; \"quoted\" 'single' "
    "<!-- \x1b[31mred a\u202eb \tc\r\n\0 שלום 🙂👩‍👩‍👧 漢字"
)
IDS = [f"r{i}" for i in range(8)]


def page_of(folder, most=1000):
    found = read_folder(folder)
    raw = render_page(contents(found), found, most)
    return raw, Page(raw)


def hostile_folder(folder):
    """Every string that a file can hold is hostile: prompts, texts, truths, names, decoding."""
    for alpha in ("0", "1"):
        name = f"{HOSTILE}@alpha={alpha}"
        texts = [
            replace(text, instruction=HOSTILE + text.id, truth=HOSTILE, id=HOSTILE + text.id)
            for text in texts_of(name, IDS, lambda id: HOSTILE + id)
        ]
        results = write_model(folder, f"m{alpha}", name, texts)
        judge(results, lambda id: float("r3" in id))
    return folder


def test_hostile_texts_stay_texts(tmp_path):
    raw, page = page_of(hostile_folder(tmp_path / "<img src=y>"))
    assert page.tags["script"] == 2, "our data and our script, none of a text"
    assert "img" not in page.tags
    assert not set("\x1b\u202e\0") & set(raw)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    urls = [v for name, v in page.attributes if name in ("href", "src")]
    assert all(url.startswith("#") for url in urls), "nothing is fetched"
    assert "<img src=y>" in page.text
    data = json.loads(page.scripts[0])
    shown = HOSTILE.replace("\x1b", "␛").replace("\u202e", "⟨U+202E⟩").replace("\0", "␀")
    shown = shown.replace("\r", "␍")
    assert data["groups"][0]["texts"][0]["output"] == shown
    assert data["groups"][0]["texts"][1]["output"] == shown + "r0"
    assert data["groups"][0]["prompt"] == shown + "r0"
    assert data["groups"][3]["texts"][1]["scores"] == [[0, 1.0]]
    check_policy(raw, page)


def test_script_finds_what_it_asks_for(tmp_path):
    """Every element that the script looks up by id, and every choice of a menu, is there."""
    write_model(tmp_path, "a", "a", ids=IDS)
    _, page = page_of(tmp_path)
    script = page.scripts[1]
    ids = {value for name, value in page.attributes if name == "id"}
    asked = set(re.findall(r'(?:\$|getElementById)\("(\w+)"\)', script))
    assert len(asked) >= 5
    assert asked <= ids
    for name, used in (("WHICH", 6), ("SORT", 5)):
        table = script.split(f"const {name} = {{")[1].split("};")[0]
        keys = re.findall(r"^  (\w+):", table, re.MULTILINE)
        assert len(keys) == used
        assert set(keys) <= {value for name, value in page.attributes if name == "value"}


def test_a_thousand_prompts(tmp_path):
    """3 models, 1,000 prompts of some 130 words each: a page of about its texts' size, in seconds;
    with `most` fewer of them, evenly spaced, and the numbers are still of all."""
    ids = [f"r{i}" for i in range(1000)]
    words = " ".join(f"word{i}" for i in range(128))
    for name in ("a", "b", "c"):
        write_model(tmp_path, name, name, texts_of(name, ids, lambda id: f"{words} {id}"))
    started = time.monotonic()
    raw, page = page_of(tmp_path)
    assert time.monotonic() - started < 30
    data = json.loads(page.scripts[0])
    assert len(data["groups"]) == 1000
    assert len(raw) < 1.5 * 3 * 1000 * len(words)
    assert raw.count(words) == 3000, "each text once"
    _, page = page_of(tmp_path, most=5)
    few = json.loads(page.scripts[0])
    assert [group["index"] for group in few["groups"]] == [0, 249, 499, 749, 999]
    assert "5 of 1,000 prompts are in this page" in page.text


def test_curves_of_training(tmp_path):
    """The loss of every batch of a log, and what it begins at; a run without CPO has none."""
    hostile_folder(tmp_path / "results")
    log, plain = tmp_path / "train-<img src=z>.log", tmp_path / "mle.log"
    plain.write_text(" iteration       10/      60 | lm loss: 7.0E+00 |\n")
    log.write_text(
        "step-0 gate: CPO loss 1.609 (at theta = ref it must be 1.609, within 0.001): ok\n"
        + "".join(f"[cpo] iteration {at}: cpo_loss={2 - at / 4:.6e}\n" for at in (1, 2, 4))
    )
    write_report(tmp_path / "results", tmp_path / "r.html", title="a <b>run</b>", logs=[log, plain])
    page = Page((tmp_path / "r.html").read_text())
    assert page.tags["img"] == 0 and "a <b>run</b>" in page.text
    assert page.text.count("Training: ") == 1 and "Training: <img src=z>" in page.text
    assert "Dashed: 1.609" in page.text
    assert f"{plain}: no CPO loss in a [cpo] line of it" in page.text
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any("1.750 at iteration 1, 1.000 at 4" in label for label in labels)
    (line,) = re.findall(r'"curve" d="M([^L"]+L[^L"]+L[^L"]+)"', (tmp_path / "r.html").read_text())
    heights = [float(point.split()[1]) for point in line.split("L")]
    assert heights[2] - heights[1] == pytest.approx(2 * (heights[1] - heights[0]), abs=0.2)
    with pytest.raises(ValueError, match=r"^--log .*nowhere: no such file; give those"):
        write_report(tmp_path / "results", tmp_path / "r.html", logs=[tmp_path / "nowhere"])
    for flag, outputs in (("--html", (log, None)), ("--markdown", (None, log))):
        with pytest.raises(ValueError, match=f"{flag} .*: it is read, and would be written over"):
            write_report(tmp_path / "results", *outputs, logs=[log])
