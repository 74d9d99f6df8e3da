"""Files of texts: AlpacaEval's shape, and what cannot be compared."""

import json
import subprocess

import pytest

from harness.ranks import ROOT
from megatron_cpo.evaluation.results import (
    Made,
    Text,
    check_comparable,
    read_results,
    write_results,
)

MADE = Made("cpo (12ab)", "greedy, at most 64 tokens", "sha256 77", "megatron_cpo 0.1.0")


def texts(generator="cpo", ids="ab"):
    return [Text(i, f"ask {i}", f"say {i}", generator, 0, f"true {i}", "stop", 3) for i in ids]


def test_round_trip(tmp_path):
    path = tmp_path / "out" / "cpo.json"
    write_results(path, texts(), MADE)
    found = read_results(path)
    assert (found.texts, found.made, found.generator) == (texts(), MADE, "cpo")
    rows = json.loads(path.read_text())
    assert [set(row) >= {"instruction", "output", "generator"} for row in rows] == [True, True]
    assert all(isinstance(value, (str, int)) for row in rows for value in row.values())
    assert [text.output for text in found.truths().texts] == ["true a", "true b"]


def test_alpaca_eval_file(tmp_path):
    """Three fields are enough; the instruction is the id."""
    path = tmp_path / "gpt4.json"
    path.write_text(json.dumps([{"dataset": "d", "instruction": "hi", "output": "yo"}]))
    found = read_results(path)
    assert (found.texts[0].id, found.generator, found.made) == ("hi", "gpt4", Made())
    with pytest.raises(ValueError, match="no `truth`"):
        found.truths()


BY_ALPACA_EVAL = """
import json, sys
from alpaca_eval.utils import load_or_convert_to_dataframe
frame = load_or_convert_to_dataframe(sys.argv[1])
frame.to_json(sys.argv[2], orient="records", indent=2)
print(json.dumps(frame[["instruction", "output", "generator"]].to_dict("records")))
"""


def test_alpaca_evals_own_reader(tmp_path):
    """The package reads our file, and what it writes of it we read as the same texts."""
    python = ROOT / ".venv-peer-alpaca_eval/bin/python"
    if not python.exists():
        pytest.skip("alpaca_eval has an environment of its own: scripts/peer_env.sh alpaca_eval")
    odd = ["", " 12", "1e5", "null", 'two\nlines, a "quote" \u2028', "naïve 漢字 🙂", "<script>"]
    ours = [
        Text(f"{i:016x}", f"ask {i}", output, "cpo@alpha=0.3", 0, "true", "length", i)
        for i, output in enumerate(odd)
    ]
    path, again = tmp_path / "ours.json", tmp_path / "again.json"
    write_results(path, ours, MADE)
    command = [python, "-W", "ignore", "-c", BY_ALPACA_EVAL, path, again]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [{n: getattr(t, n) for n in ("instruction", "output", "generator")} for t in ours]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    found = read_results(again)
    assert [t.output for t in found.texts] == odd
    assert (found.made, found.generator) == (MADE, "cpo@alpha=0.3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "at least one"),
        ('{"a": 1}', "JSON list"),
        ('[{"instruction": "x"}]', "no string `output`"),
        ('[{"instruction": "x", "output": "1"}, {"instruction": "x", "output": "2"}]', "twice"),
        (
            '[{"instruction": "x", "output": "1", "generator": "p"},'
            ' {"instruction": "y", "output": "2", "generator": "q"}]',
            "several makers: p .* and q",
        ),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(path)


@pytest.mark.parametrize(
    ("other", "ids", "message"),
    [
        (Made("x", MADE.decoding, "sha256 88"), "ab", "other data: sha256 77 and sha256 88"),
        (Made("x", "top-k 50", MADE.data), "ab", "other decoding: greedy.* and top-k 50"),
        (MADE, "ac", "'b' is in .*one.json alone"),
    ],
)
def test_what_cannot_be_compared(tmp_path, other, ids, message):
    write_results(tmp_path / "one.json", texts(), MADE)
    write_results(tmp_path / "two.json", texts(ids=ids), other)
    pair = [read_results(tmp_path / f"{name}.json") for name in ("one", "two")]
    with pytest.raises(ValueError, match=message):
        check_comparable(pair)
    check_comparable([pair[0], pair[0].truths()])
