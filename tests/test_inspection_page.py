"""The page and the terminal show texts that would do harm; and the tool."""

import io
import json
import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from harness.ranks import ROOT
from harness.stores import VOCAB_SIZE, write_store
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.inspection.page import LONGEST_RUN, render_page
from megatron_cpo.inspection.show import print_store, write_page
from megatron_cpo.inspection.statistics import measure
from megatron_cpo.inspection.text import TokenText, visible
from megatron_cpo.inspection.view import view_group
from megatron_cpo.records.encoder import Encoder
from tests.commands import assert_quick, run_tool
from tests.inspecting import flags, group_of, write_groups
from tests.pages import Page, check_policy
from tests.texts import dolly_tokenizer

NAME = "inspect_negatives.py"
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt; \"quoted\" 'single' "
    "<!-- [bold red]markup[/] \x1b[31mred\x1b]0;title\x07 a\u202eb \tc  d\r\n\0 "
    "שלום عربي 🙂👩‍👩‍👧 漢字"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inspection")


@pytest.fixture(scope="module")
def sentencepiece(folder):
    return dolly_tokenizer(folder)


@pytest.fixture(scope="module")
def hostile(folder, sentencepiece):
    """A store whose every text is hostile: y_1, an edit, a cut, another text; and a long prefix."""
    encoder = Encoder(sentencepiece)
    prefix = encoder.prefix(HOSTILE)
    truth = [*encoder.continuation(HOSTILE * 2), encoder.eod]
    edit = [*truth[:5], *encoder.continuation("<b>")[-2:], *truth[7:]]
    other = [*encoder.continuation("<i>unrelated"), encoder.eod]
    group = group_of(
        prefix, truth, edit, [*truth[:9], encoder.eod], other, [], kinds="gt mn tn bn an"
    )
    scored = replace(group, reference_logps=np.array([-9, -5, -3, -20, -2], dtype=np.float32))
    long = replace(group, prefix=np.resize(group.prefix, 10_000))
    store = write_groups(folder / "a<b>&'c", [scored, long, group], sentencepiece)
    return store, flags("--tokenizer-model", folder / "tokenizer.model")


def test_page_holds_hostile_records_as_text(hostile, tmp_path):
    store, args = hostile
    html = tmp_path / "new" / "report.html"
    said = write_page(store, str(html), 100, [], args)
    assert said.startswith(f"{html}: 3 of 3 groups, ")
    raw = html.read_text(encoding="utf-8")
    page = Page(raw)
    assert page.tags["script"] == 2, "our data and our script, none of a record"
    assert "img" not in page.tags
    assert not set("\x1b\u202e\0") & set(raw)
    assert page.tags["title"] == 1
    assert "a<b>&'c" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    urls = [v for name, v in page.attributes if name in ("href", "src")]
    assert all(url.startswith("#") for url in urls), "nothing is fetched"

    data = json.loads(page.scripts[0])
    first, long, unscored = data["groups"]
    shown = " " + visible(HOSTILE.replace("▁", " "))
    assert "".join(first["prefix"]) == shown
    truth = first["candidates"][0]
    assert [s["mark"] for s in truth["spans"]] == ["same", "cut", "same", "eod"]
    assert truth["spans"][1]["by"] == [2]
    edit = first["candidates"][1]
    assert {"same", "changed", "eod"} == {s["mark"] for s in edit["spans"]}
    assert first["candidates"][4]["tokens"] == 0
    assert first["candidates"][4]["logp"] == -2
    assert first["place"] == 3
    assert unscored["place"] is None
    assert unscored["candidates"][0]["logp"] is None
    left_out = [cell for cell in long["prefix"] if isinstance(cell, int)]
    assert left_out == [10_000 - LONGEST_RUN]


MARKUP = ("</script><script>alert(1)</script>", "<!--", "]]>", "<img src=x onerror=alert(1)>",
          "&lt;", "\u2028", "</style>")  # fmt: skip


def test_tokens_that_are_markup(tmp_path):
    """As a vocabulary trained on web pages may have them; and a manifest that somebody wrote."""
    text = TokenText(SimpleNamespace(inv_vocab=dict(enumerate(MARKUP))))
    group = group_of([0, 1, 2, 3, 4, 5, 6], [0, 7], [3, 7])
    found = measure(GroupReader(write_groups(tmp_path / "s", [group])), ((7,),))
    manifest = {"groups": 1, "k": 2, "ranker": "<script>", "dropped": {"<img src=y>": 1}}
    raw = render_page("<img src=z>", manifest, found, [view_group(0, group, ((7,),))], text)
    page = Page(raw)
    assert page.tags["script"] == 2
    assert "img" not in page.tags
    for markup in ("alert(1)</script>", "<!--", "<img", "&lt;", "]]>"):
        assert markup not in raw.split('id="data">')[1].split("</script>")[0]
    (group,) = json.loads(page.scripts[0])["groups"]
    assert group["prefix"] == [*MARKUP[:5], "⟨U+2028⟩", MARKUP[6]]
    assert {"<img src=z>", "<script>", "1 <img src=y>"} <= set(page.pieces)


def test_page_allows_only_its_own_script(hostile, tmp_path):
    store, args = hostile
    write_page(store, str(tmp_path / "x.html"), 1, [], args)
    raw = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(raw)
    check_policy(raw, page)


def test_script_finds_what_it_asks_for(hostile, tmp_path):
    """Every element that the script looks up by id, and every choice of a menu, is there."""
    store, args = hostile
    write_page(store, str(tmp_path / "x.html"), 1, [], args)
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    script = page.scripts[1]
    ids = {value for name, value in page.attributes if name == "id"}
    asked = set(re.findall(r'(?:\$|getElementById)\("(\w+)"\)', script))
    assert len(asked) >= 8
    assert asked <= ids
    for name, used in (("WHICH", 4), ("SORT", 5)):
        table = script.split(f"const {name} = {{")[1].split("};")[0]
        keys = re.findall(r"^  (\w+):", table, re.MULTILINE)
        assert len(keys) == used
        assert set(keys) <= {value for name, value in page.attributes if name == "value"}


def test_the_page_does_not_take_the_place_of_the_store(hostile, tmp_path):
    store, args = hostile
    for suffix in (".json", ".values.bin"):
        before = Path(store + suffix).read_bytes()
        with pytest.raises(ValueError, match=f"--html .*{suffix}: it is read, and would be"):
            write_page(store, store + suffix, 1, [], args)
        assert Path(store + suffix).read_bytes() == before


def test_page_of_a_large_store_is_a_sample(tmp_path):
    store = write_store(tmp_path / "s", 50, 5, scored=True)
    html = tmp_path / "s.html"
    assert " 5 of 50 groups" in write_page(store, str(html), 5, [7, 3], flags())
    groups = json.loads(Page(html.read_text(encoding="utf-8")).scripts[0])["groups"]
    assert [group["index"] for group in groups] == [7, 3, 0, 12, 24]
    text = Page(html.read_text(encoding="utf-8")).text
    assert "5 of 50 groups are in this page" in text
    assert "Token ids are shown" in text
    assert text.count("Reference log-prob") == 2
    first = html.read_bytes()
    write_page(store, str(html), 5, [7, 3], flags())
    assert html.read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["s.html", *(f"s{s}" for s in (".bin", ".idx", ".values.bin", ".values.idx", ".json"))]
    )


def test_page_of_an_unscored_store_and_of_single_candidates(tmp_path):
    store = write_groups(tmp_path / "one", [group_of([1, 2], [3, VOCAB_SIZE])] * 3)
    write_page(store, str(tmp_path / "one.html"), 100, [], flags())
    page = Page((tmp_path / "one.html").read_text(encoding="utf-8"))
    assert "No reference log-probs yet" in page.text
    assert "Reference log-prob" not in page.text.replace("No reference", "")
    assert "all 3 groups" in page.text


# ---- the terminal


def recorded(store, groups, args, **options):
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False, **options)
    print_store(store, groups, args, console)
    return console


def test_terminal_shows_hostile_records_as_text(hostile):
    store, args = hostile
    options = {"force_terminal": True, "color_system": "standard"}
    plain = recorded(store, [], args, **options).export_text()
    assert "groups      3 of K = 5" in plain
    assert "[bold red]markup[/]" in plain.replace("\n", "")
    assert "␛[31mred" in plain.replace("\n", "")
    assert "⟨U+202E⟩" in plain
    assert "\x1b" not in plain
    assert "no, 0" not in plain
    assert "(empty)" in plain
    assert "✂2" in plain
    styled = recorded(store, [1], args, **options).export_text(styles=True)
    escapes = {part.split("m")[0] for part in styled.split("\x1b[")[1:]}
    assert {"2", "1;37;45"} <= escapes, "shared is dim, changed is marked"
    assert "… 9,600 tokens …" in styled.replace("\n", " ")


def test_terminal_without_colours_marks_changes_in_brackets(tmp_path):
    group = group_of([50], [1, 2, 3, 4, VOCAB_SIZE], [1, 2, 30, 4, VOCAB_SIZE], kinds="gt mn")
    store = write_groups(tmp_path / "s", [group])
    plain = recorded(store, [], flags(), color_system=None).export_text()
    assert "1 2 ⟦30⟧ 4 ∎" in plain
    assert "mn   rank 1  similarity 0.500  not scored  5 tokens, 2 of them shared" in plain
    assert "K rows a group, padded      12  1.7 times the trees" in plain
    assert "token trees" in plain
    assert "No reference log-probs yet" in plain
    assert "Token ids are shown" in plain


# ---- the tool


def test_help_and_refusals_do_not_wait_for_megatron(hostile, tmp_path):
    store, _ = hostile
    for given, code, match in [
        (["--help"], 0, "one self-contained page"),
        ([tmp_path / "nowhere"], 1, "nowhere.json: no manifest there"),
        ([store, "--group", 3], 1, "--group 3: "),
        ([store, "--group", 3], 1, "has groups 0 to 2"),
        ([store, "--html", tmp_path / "x.html", "--html-groups", 0], 1, "0: needs at least 1"),
    ]:
        done = run_tool(NAME, *given)
        assert done.returncode == code
        assert match in done.stdout + done.stderr
        assert_quick(done)
        assert "Traceback" not in done.stderr


def test_tool(hostile, folder, tmp_path, monkeypatch, capsys):
    """Prints groups, of Megatron's training imports nothing; and writes the page."""
    store, _ = hostile
    tokenizer = ["--tokenizer-model", str(folder / "tokenizer.model")]
    done = run_tool(NAME, store, "--group", 2, 0, *tokenizer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("group 2") < done.stdout.index("group 0")
    assert "megatron.training" not in done.imported
    assert "not installed" not in done.stderr, "Megatron's remarks on optional packages"

    def here(html):
        tool = str(ROOT / "tools" / NAME)
        monkeypatch.setattr(sys, "argv", [tool, store, "--html", str(html), *tokenizer])
        runpy.run_path(tool, run_name="__main__")

    html = tmp_path / "report.html"
    here(html)
    assert capsys.readouterr().out.startswith(f"{html}: 3 of 3 groups")
    with pytest.raises(SystemExit, match="1"):
        here(html / "below a file")
    assert re.match(r"inspect_negatives\.py: .*report\.html", capsys.readouterr().err)
