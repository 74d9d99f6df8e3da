"""The page docs/inputs.md, row by row: what it says becomes of a record is what becomes of it."""

import json
import re
from pathlib import Path

import pytest

from harness.ranks import ROOT
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.source import Source
from tests.texts import dolly_tokenizer

PAGE = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")


def rows(section):
    """The cells of each row of a section's table."""
    body = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")][2:]
    assert lines
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("inputs"))


def becomes(tokenizer, path):
    """What the page would say of the one record in a file."""
    dropped = Dropped()
    source = Source((str(path),))
    rejected = int(bool(re.search("rejected|completions", path.read_text())))
    try:
        [pair] = read_pairs(source, tokenizer, dropped, rejected)
    except ValueError:
        [reason] = dropped.counts
        return f"refused: {reason}"
    whole = [*pair.prefix, *pair.continuation]
    if len(pair.prefix) == round(0.15 * (len(whole) - 1)):
        return "x the first 15% of the tokens, y_1 the rest"
    texts = [tokenizer.detokenize(pair.prefix.tolist())]
    for answer in (pair.continuation, *pair.rejected):
        assert answer[-1] == tokenizer.eod
        text = tokenizer.detokenize([*pair.prefix.tolist(), *answer[:-1].tolist()])
        assert text.startswith(texts[0])
        texts.append(text.removeprefix(texts[0]))
    shown = zip(("x", "y_1", "given"), texts, strict=False)
    return ", ".join(f"{name} `{text}`" for name, text in shown).replace("\n", "↵")


@pytest.mark.parametrize(("who", "example", "expected"), rows("Records"))
def test_records(tmp_path, tokenizer, who, example, expected):
    path = Path(tmp_path / "r.jsonl")
    record = json.loads(example.strip("`"))
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    found = becomes(tokenizer, path)
    assert found.startswith(expected) if expected.startswith("refused") else found == expected
