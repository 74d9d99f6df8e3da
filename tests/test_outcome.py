"""What a run says at its end: a gain only where the paired interval has one."""

import json
import random
import re
from dataclasses import replace

import pytest

from megatron_cpo.evaluation.results import Text, read_results
from megatron_cpo.evaluation.summary import describe, read_log
from megatron_cpo.recipes.outcome import NO_GAIN, loss_line, outcome
from megatron_cpo.recipes.stages import Stage
from tests.results_folders import MADE, write_model

IDS = [f"prompt {number}" for number in range(60)]


def text(share, chance):
    """40 words; a sentence comes again and again with this chance."""
    parts = []
    for _ in range(10):
        fresh = " ".join(f"w{chance.randrange(10**6)}" for _ in range(4))
        parts.append("the cat sat down" if chance.random() < share else fresh)
    return " ".join(parts)


def log(*losses):
    said = ["  cpo_k ........................................... 5",
            "  lr_warmup_iters ................................. 1"]  # fmt: skip
    said += [f" [cpo] iteration {n}: cpo_loss={loss:.6e}" for n, loss in enumerate(losses, 1)]
    return "\n".join(said)


@pytest.fixture
def said(tmp_path):
    def run(reference, trained, truth):
        (tmp_path / "logs").mkdir()
        (tmp_path / "results").mkdir()
        (tmp_path / "logs" / "train-cpo.log").write_text(log(1.609, 1.5, 0.9))
        for name, share, seed in (("reference", reference, 1), ("cpo@alpha=0.0", trained, 2),
                                  ("cpo@alpha=0.5", trained, 3)):  # fmt: skip
            chance, fixed = random.Random(seed), random.Random(0)
            texts = [
                Text(id, f"say {id}", text(share, chance), name, 0, text(truth, fixed), "stop", 4)
                for id in IDS
            ]
            write_model(tmp_path / "results", name, name, texts)
        return outcome([Stage("train-cpo", "true")], tmp_path)

    return run


@pytest.mark.parametrize(
    ("reference", "trained", "truth", "word"),
    [
        (0.8, 0.2, 0.2, ": a gain"),
        (0.2, 0.8, 0.2, ": a LOSS"),
        (0.5, 0.5, 0.2, NO_GAIN),
        (0.7, 0.3, 0.5, NO_GAIN),  # from one side of the truths to the other, as far away
        (0.9, 0.1, 0.5, ": a gain"),  # to the other side, and nearer
        (0.2, 0.6, 0.9, ": a gain"),  # people repeat themselves more
    ],
)
def test_a_gain_only_where_the_interval_has_one(said, reference, trained, truth, word):
    found = said(reference, trained, truth)
    lines = [line for line in found.splitlines() if "paired difference" in line]
    assert len(lines) == 1 and word in lines[0]
    assert found.count("Prompt: ") == 3 and "report.html" in found
    assert "cpo: CPO loss 1.609 at iteration 1, 0.900 at 3" in found


def test_every_variant_and_way_to_decode_is_told_apart(said, tmp_path):
    """One with a sweep of its own alphas does not hide the others; tables name their decoding."""
    said(0.5, 0.5, 0.2)
    figure = {"value": 0.25, "low": 0.2, "high": 0.3, "prompts": 60, "method": "x"}
    results = tmp_path / "results"
    (results / "reference.json").unlink()
    for decoding in (MADE.decoding, "sampled"):
        made = replace(MADE, decoding=decoding)
        files = [write_model(results, f"{name}-{decoding[:4]}", name, made=made, ids=IDS)
                 for name in ("reference", "other@alpha=0.0")]  # fmt: skip
        if made == MADE:
            files += [read_results(path) for path in results.glob("cpo*.json")]
        rows = [{"path": str(each.path), "generator": each.generator, "made": vars(made),
                 "figures": {"words": figure}} for each in files]  # fmt: skip
        content = {"files": rows, "tool": MADE.tool}
        (results / f"scores-{decoding[:4]}.json").write_text(json.dumps(content))
    (tmp_path / "logs" / "build-a.log").write_text("warning: 66% were cut\n")
    found = outcome([Stage("build-a", "true"), Stage("train-cpo", "true")], tmp_path)
    assert "\nWarnings\n  build-a: 66% were cut\n" in found
    first, second = found.partition("before (reference) and after")[2].split("Without a judge")[1:]
    assert first.startswith(f": {MADE.decoding}\n") and second.startswith(": sampled\n")
    assert re.search(r"figure +reference +cpo@alpha=0\.\d +other@alpha=0.0\n", first)


def test_a_loss_above_that_of_the_reference_is_said():
    assert loss_line(read_log(log(1.609, 1.65, 0.9).splitlines())).endswith("warm-up is 1.650")
    assert "UNSTABLE" in loss_line(read_log(log(1.609, 1.7, 0.9).splitlines()))
    assert "UNSTABLE" in loss_line(read_log([*log(1.609, 1.0).splitlines(),
                                             " [cpo] iteration 3: cpo_loss=nan"]))  # fmt: skip
    assert "UNSTABLE" not in loss_line(read_log(log(1.8, 1.0).splitlines()))
    plain = " [cpo] iteration 1: lm_loss=2.000000e+00 groups_per_row=0.000000e+00"
    late = read_log([*log().splitlines(), plain, " [cpo] iteration 2: cpo_loss=1.500000e+00"])
    assert loss_line(late).startswith("CPO loss 1.500 at iteration 2, 1.500 at 2")
    assert re.search(r"CPO loss +nan +nan +1.500 +1.500", describe(late))
