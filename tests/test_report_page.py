"""The page of a report: hostile texts stay text, and a thousand prompts open quickly."""

import json
import re
import time
from dataclasses import replace

from megatron_cpo.evaluation.reporting.contents import contents
from megatron_cpo.evaluation.reporting.folder import read_folder
from megatron_cpo.evaluation.reporting.page import render_page
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
