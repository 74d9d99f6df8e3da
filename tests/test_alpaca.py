"""Files of texts and the real alpaca_eval, in an environment of its own.

scripts/peer_env.sh alpaca_eval      # makes it; without it the test is skipped
"""

import subprocess
from pathlib import Path

import pytest

from harness.ranks import ROOT
from megatron_cpo.evaluation.results import Made, Text, read_results, write_results

PYTHON = ROOT / ".venv-peer-alpaca_eval" / "bin" / "python"
READ = """
import sys
from alpaca_eval.utils import load_or_convert_to_dataframe
frame = load_or_convert_to_dataframe(sys.argv[1])
print(len(frame), *frame.columns)
frame[["instruction", "output", "generator"]].to_json(sys.argv[2], orient="records")
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="scripts/peer_env.sh alpaca_eval makes it")
def test_alpaca_eval_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    texts = [
        Text(f"{i:016x}", f"Say {i} – ☃\n", f' "{i}"\t', "cpo@alpha=0.3", 0, f"{i}", "stop", 3)
        for i in range(5)
    ]
    write_results(ours, texts, Made("cpo 0123", "greedy, at most 9 tokens", "77", "megatron_cpo"))
    done = subprocess.run(
        [PYTHON, "-c", READ, ours, theirs], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    count, *columns = done.stdout.split()
    assert count == "5" and {"instruction", "output", "generator", "truth", "id"} <= set(columns)
    found = read_results(theirs)
    for text, again in zip(texts, found.texts, strict=True):
        assert (again.instruction, again.output) == (text.instruction, text.output)
        assert again.generator == text.generator and again.id == text.instruction
