"""Texts without a judge: likelihoods against plain transformers, the file, and what is refused."""

import functools
import json
import random
import shutil

import numpy as np
import pytest
import torch

from megatron_cpo.evaluation import scores
from megatron_cpo.evaluation.external import ExternalModel
from megatron_cpo.evaluation.results import read_results
from megatron_cpo.evaluation.scores import describe, is_report, score_files, write_scores
from megatron_cpo.evaluation.statistics import mean, paired_difference
from megatron_cpo.evaluation.text_metrics import repetition, self_bleu
from tests.commands import run_command, run_python
from tests.scored_texts import records, save_with_tokenizer, write_texts

TEXTS = 24


def shuffled(seed):
    """The answers with their words in another order."""
    rng = random.Random(seed)
    return [" ".join(rng.sample(words := a.split(), len(words))) for _, a in records(TEXTS)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def external(request, tmp_path_factory):
    return save_with_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def files(tmp_path):
    """Two models' texts: words in another order, and the same ending in circles."""
    outputs = shuffled(0)
    return [
        write_texts(tmp_path / "one.json", outputs),
        write_texts(tmp_path / "two.json", [f"{text} so so so so so so" for text in outputs]),
    ]


@functools.cache
def load(folder):
    """By transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    return AutoTokenizer.from_pretrained(folder), model


def slow_nll(folder, prompt, text):
    """Nats and tokens of one text, by one forward of transformers, without any code of ours.

    Tokens that end within the prompt, white space at its end apart, are the prompt's.
    """
    tokenizer, model = load(folder)
    encoded = tokenizer(prompt + text, return_offsets_mapping=True, add_special_tokens=False)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    cut = sum(end <= len(prompt.rstrip()) for _, end in spans)
    read = ids[:65]  # 64 positions; the last token is not read, only predicted
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([read[:64]])).logits[0]
    logps = torch.log_softmax(logits, -1)[:-1] if len(read) < 65 else torch.log_softmax(logits, -1)
    wanted = torch.tensor(read[1:])
    chosen = logps.gather(1, wanted[:, None])[cut - 1 :, 0]
    return -float(chosen.sum()), len(read) - cut, len(ids) > 65


def test_likelihoods_equal_plain_transformers(external, files, tmp_path):
    """Batches of seven, of several lengths, some of them cut at what the model reads; and of
    prompts that end in white space, or in the middle of a word."""
    texts = [(t.instruction, t.output) for t in read_results(files[1]).texts]
    texts += [("Once upon a ti", "me there was a fox."), ("Question: \n\n", "  Yes.")]
    cache = scores.KeptLines(tmp_path / "c.jsonl", "a text", ["nats", "tokens", "cut"])
    found = ExternalModel(f"hf:{external}", batch=7).likelihoods(texts, cache)
    assert 0 < sum(each.cut for each in found) < len(found)
    for text, each in zip(texts, found, strict=True):
        nats, tokens, cut = slow_nll(external, *text)
        assert (each.tokens, each.cut) == (tokens, cut)
        assert each.nats == pytest.approx(nats, rel=1e-5)


def test_figures_equal_their_twins(external, files):
    """Means over texts, of their own tokens, and the paired difference of two files."""
    found = score_files(files, external=ExternalModel(f"hf:{external}"))
    one = found.files[0]
    assert one.counts == {"texts": TEXTS, "empty": 0, "unread": 0, "cut": one.counts["cut"]}
    nll = {}
    for scored in found.files:
        texts = scored.results.texts
        likely = [slow_nll(external, t.instruction, t.output) for t in texts]
        true = [slow_nll(external, t.instruction, t.truth) for t in texts]
        nll[scored.results.generator], truth = (
            np.array([nats / tokens for nats, tokens, _ in side]) for side in (likely, true)
        )
        for name, values in (("nll", nll[scored.results.generator]), ("nll_truth", truth)):
            estimate, expected = scored.figures[name].estimate(), mean(values)
            assert estimate.value == pytest.approx(expected.value, rel=1e-5)
            assert estimate.high == pytest.approx(expected.high, rel=1e-5)
        gap = np.abs(np.sort(nll[scored.results.generator]) - np.sort(truth)).mean()
        assert scored.figures["nll_distance"].estimate().value == pytest.approx(gap, rel=1e-4)
        seq_rep = np.mean([repetition(t.output) for t in texts])
        assert scored.figures["seq_rep_4"].estimate().value == pytest.approx(seq_rep)
        bleu = np.mean(self_bleu([t.output for t in sorted(texts, key=lambda t: t.id)], 20))
        assert scored.figures["self_bleu"].estimate().value == pytest.approx(bleu)
    assert found.truth.figures["nll"].estimate() == one.figures["nll_truth"].estimate()
    [difference] = [each.difference for each in found.compared if each.figure == "nll"]
    expected = paired_difference(nll["two"], nll["one"])
    assert difference.estimate.value == pytest.approx(expected.estimate.value, rel=1e-4)
    apart = [scored.figures["nll"].estimate() for scored in found.files]
    width = difference.estimate.high - difference.estimate.low
    assert width < np.hypot(*(each.high - each.low for each in apart))


def test_the_file(external, files, tmp_path):
    """Everything a report needs, and a rerun that asks the model nothing."""
    model = ExternalModel(f"hf:{external}")
    path = tmp_path / "out" / "scores.json"
    first = score_files(files, external=model)
    write_scores(path, first)
    content = json.loads(path.read_text())
    assert [f["path"] for f in content["files"]] == list(map(str, files))
    assert content["files"][0]["made"]["data"] == "sha256 77"
    figures = content["files"][0]["figures"]
    assert list(figures["nll"]) == ["high", "low", "method", "prompts", "value"]
    assert figures["ended"]["value"] == 0.75
    assert figures["hit_limit"]["value"] == 0.25
    assert content["external"] == model.identity
    assert figures.keys() == content["definitions"].keys()
    for each in content["differences"]:
        assert (each["candidate"], each["baseline"]) == (str(files[1]), str(files[0]))
        assert each["low"] <= each["value"] <= each["high"]
    assert {"nll", "nll_distance", "seq_rep_4", "distinct_4", "words"} <= {
        each["figure"] for each in content["differences"]
    }
    again = ExternalModel(f"hf:{external}")
    write_scores(tmp_path / "again.json", score_files(files, external=again))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert "_model" not in vars(again)
    assert is_report(path)
    assert not is_report(files[0])
    assert describe(first).count("\n") > 20


def test_another_tokenizer_is_asked_anew(external, files, tmp_path):
    """What was kept is of the weights and of the tokenizer's files."""
    copy = shutil.copytree(external, tmp_path / "copy")
    before = ExternalModel(f"hf:{copy}").identity
    assert before | {"name": ""} == ExternalModel(f"hf:{external}").identity | {"name": ""}
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("quickly", "QUICKLY").replace("the", "thE"))
    assert ExternalModel(f"hf:{copy}").identity["tokenizer"] != before["tokenizer"]


def test_against_the_truth(files):
    """Shuffled answers have as many words; the one in circles repeats more than people do."""
    found = score_files(files, baseline="reference")
    by = {(c.candidate, c.figure): c.difference.estimate for c in found.compared}
    assert by[str(files[1]), "seq_rep_4"].low > 0
    assert by[str(files[0]), "words"].value == pytest.approx(0, abs=2)
    assert {c.baseline for c in found.compared} == {"reference"}
    other = score_files(files[:1], baseline=str(files[1]))
    assert {(c.candidate, c.baseline) for c in other.compared} == {(str(files[0]), str(files[1]))}
    spelt = files[1].parent / ".." / files[1].parent.name / files[1].name
    again = score_files(files, baseline=str(spelt))
    assert len(again.files) == 2, "the same file, whose difference to itself says nothing"
    assert {(c.candidate, c.baseline) for c in again.compared} == {(str(files[0]), str(files[1]))}


def test_empty_texts_are_counted_and_not_read(external, tmp_path):
    outputs = shuffled(0)
    outputs[3], outputs[7] = "", " \n"
    path = write_texts(tmp_path / "some.json", outputs)
    found = score_files([path], external=ExternalModel(f"hf:{external}")).files[0]
    assert found.counts["empty"] == 2
    assert found.counts["unread"] == 0
    assert found.figures["empty"].estimate().value == pytest.approx(2 / TEXTS)
    assert found.figures["nll"].estimate().prompts == TEXTS - 2


def test_similarity(files, tmp_path):
    """The truths themselves are at 1, other answers' below; as the model asked directly."""
    pytest.importorskip("sentence_transformers")
    from megatron_cpo.negatives.embeddings import TextEmbedder

    truths = [answer for _, answer in records(TEXTS)]
    same = write_texts(tmp_path / "same.json", truths)
    other = write_texts(tmp_path / "other.json", truths[1:] + truths[:1])
    found = score_files([same, other], similarity="minilm").files
    assert found[0].figures["similarity"].estimate().value == pytest.approx(1.0)
    vectors = TextEmbedder("minilm", "--similarity").model.encode(truths, normalize_embeddings=True)
    expected = (vectors * np.roll(vectors, -1, axis=0)).sum(1).mean()
    value = found[1].figures["similarity"].estimate().value
    assert value == pytest.approx(float(expected), abs=1e-4)
    assert value < 0.6


def test_bad_input(files, tmp_path, external):
    """Each with its message."""
    other_data = write_texts(tmp_path / "data.json", shuffled(0), data="sha256 88")
    with pytest.raises(ValueError, match="other data: sha256 77 and sha256 88"):
        score_files([files[0], other_data])
    beams = write_texts(tmp_path / "beams.json", shuffled(0), decoding="beam search of 4")
    with pytest.raises(ValueError, match=r"other decoding: top-k 50.* and beam search of 4"):
        score_files([files[0], beams])
    fewer = write_texts(tmp_path / "fewer.json", shuffled(0)[:-1])
    with pytest.raises(ValueError, match=r"24 texts, .* 23, and 23 are of the same record"):
        score_files([files[0], fewer])
    empty = write_texts(tmp_path / "empty.json", ["yes"] + [""] * (TEXTS - 1))
    with pytest.raises(ValueError, match=r"empty.json: 23 of its 24 texts are empty"):
        score_files([empty])
    one = write_texts(tmp_path / "one-prompt.json", ["yes"])
    with pytest.raises(ValueError, match=r"one-prompt.json: texts of one prompt"):
        score_files([one])
    with pytest.raises(ValueError, match="hf:nowhere: there is no such folder"):
        ExternalModel("hf:nowhere")
    with pytest.raises(ValueError, match="--external gpt2: needs hf:PATH"):
        ExternalModel("gpt2")
    bare = shutil.copytree(external, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ValueError, match=r"--external hf:.*bare: its tokenizer cannot be read"):
        score_files(files, external=ExternalModel(f"hf:{bare}"))
    rows = json.loads(files[0].read_text())
    for row in rows:
        del row["truth"]
    files[0].write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="24 texts have no `truth`"):
        score_files(files[:1], baseline="reference")
    report = files[0].with_name("scores.json")
    scores.check_output(report)
    report.write_text(json.dumps({"files": [], "tool": scores.TOOL}))
    with pytest.raises(ValueError, match=r"scores\.json: needs a JSON list"):
        score_files([*files, report], baseline=str(report))
    found = score_files(files[:1], external=ExternalModel(f"hf:{external}"))
    assert found.truth is None
    assert "nll_gap" not in found.files[0].figures


@pytest.mark.parametrize("subject", ["score", "mauve"])
def test_a_report_is_not_written_over_texts(files, monkeypatch, capsys, subject):
    before = files[1].read_text()
    words = ["evaluate", subject, "--candidate", *files, "--output", files[1]]
    assert run_command(monkeypatch, *map(str, words)) == 1
    said = capsys.readouterr().err
    assert f"--output {files[1]}: it is there, and no report of this command; give" in said
    assert files[1].read_text() == before


def test_weights_that_are_not_finite_are_refused(files, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_with_tokenizer(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="a log-prob of nan; weights"):
        score_files(files, external=ExternalModel(f"hf:{folder}"))


def test_the_command(files, tmp_path, monkeypatch, capsys):
    """The reports among results/*.json are left out, so that the same command may be given twice;
    one line for a mistake."""
    command = ["-m", "megatron_cpo", "evaluate", "score", "--candidate"]
    done = run_python(*command, *sorted(tmp_path.glob("*.json")))
    assert done.returncode == 0, done.stderr
    assert "seq-rep-4" in done.stdout
    assert "two minus one" in done.stdout
    before = (tmp_path / "scores.json").read_bytes()
    words = [*map(str, files), str(tmp_path / "scores.json")]
    assert run_command(monkeypatch, "evaluate", "score", "--candidate", *words) == 0
    said = capsys.readouterr().out
    assert f"left out, being no texts: {tmp_path / 'scores.json'}" in said
    assert (tmp_path / "scores.json").read_bytes() == before
    nowhere = str(tmp_path / "nowhere.json")
    assert run_command(monkeypatch, "evaluate", "score", "--candidate", nowhere) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nowhere.json: cannot be read" in error
