"""Generated texts: the tokens of transformers, the distribution of the model, and files that do
not depend on who made them or how often it was killed."""

import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.ranks import ROOT
from megatron_cpo.evaluation.decoding import Decoding, Prompt, continue_prompts
from megatron_cpo.evaluation.generating import GenerateConfig, generate
from megatron_cpo.evaluation.results import read_results
from megatron_cpo.inspection.tokenizer import folder_tokenizer
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
from tests.commands import run_command
from tests.generated import MOST, by_transformers, prompts, save_records
from tests.scored_texts import records, save_with_tokenizer

KINDS = ["llama", "gpt2"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save_with_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_with_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_records(tmp_path_factory.mktemp("data") / "records.jsonl")


def policy_of(folder, batch=64):
    return HuggingFacePolicy(folder, folder_tokenizer("the model", folder), batch)


def whole(continuation, ends):
    """Its tokens, but for which of the ends it was."""
    return [*continuation.body.tolist(), *(["end"] if continuation.ended else [])]


def greedy(batch, folder, most=MOST):
    decoding = Decoding("greedy", Sampling(max_new_tokens=most))
    return continue_prompts(policy_of(folder, batch), prompts(), decoding)


def often(texts):
    """The token that comes most: random weights hardly ever give the EOD."""
    return Counter(t for [y] in texts for t in y.body.tolist()).most_common(1)[0][0]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_greedy_equals_transformers(folder, batch):
    policy = policy_of(folder, batch)
    policy.ends = policy.ends | {often(greedy(64, folder))}
    decoding = Decoding("greedy", Sampling(max_new_tokens=MOST))
    found = continue_prompts(policy, prompts(), decoding)
    expected = by_transformers(policy, policy.ends | {0}, num_beams=1)
    ended = 0
    for [ours], theirs in zip(found, expected, strict=True):
        stopped = theirs[-1] in policy.ends | {0}
        assert whole(ours, policy.ends) == [*theirs[: len(theirs) - stopped], *["end"] * stopped]
        assert ours.tokens == len(theirs)
        ended += stopped
    assert 10 < ended < 90


def test_beam_search_is_that_of_transformers(folder):
    """Whatever the folder's own generation settings say."""
    policy = policy_of(folder)
    ends = policy.ends | {0}
    expected = by_transformers(policy, ends, num_beams=3)
    policy._model.generation_config.repetition_penalty = 3.0
    decoding = Decoding("beam", Sampling(max_new_tokens=MOST), beams=3)
    for [ours], theirs in zip(continue_prompts(policy, prompts(), decoding), expected, strict=True):
        assert [*ours.body.tolist()] == theirs[: len(theirs) - (theirs[-1] in ends)]


def test_samples_have_the_models_distribution(folder):
    """Chi-square of first and second tokens against softmax over the top 8: with a cache or not."""
    from scipy import stats

    policy, n = policy_of(folder, 4096), 4000
    policy.ends = frozenset({-5})  # any token may come first
    prompt = Prompt("7", prompts(9)[8].prefix, -5)
    decoding = Decoding("sample", Sampling(top_k=8, max_new_tokens=2), samples=n)
    [texts] = continue_prompts(policy, [prompt], decoding)
    first = Counter(int(y.body[0]) for y in texts)
    common = first.most_common(1)[0][0]
    second = Counter(int(y.body[1]) for y in texts if y.body[0] == common)
    for drawn, before in ((first, []), (second, [common])):
        ids = torch.tensor([[*prompt.prefix.tolist(), *before]])
        with torch.no_grad():
            logits = policy._model(input_ids=ids).logits[0, -1].double()
        top = logits.topk(8)
        expected = dict(zip(top.indices.tolist(), torch.softmax(top.values, 0), strict=True))
        assert set(drawn) <= set(expected)
        kept = [t for t, p in expected.items() if p * drawn.total() >= 5]
        rest = drawn.total() - sum(drawn[t] for t in kept)
        counts = [*(drawn[t] for t in kept), rest]
        shares = [float(expected[t]) for t in kept]
        wanted = [drawn.total() * p for p in [*shares, 1 - sum(shares)]]
        if wanted[-1] < 5:  # too few for the test: they go to the last one that is kept
            counts[-2:], wanted[-2:] = [sum(counts[-2:])], [sum(wanted[-2:])]
        assert stats.chisquare(counts, wanted).pvalue > 0.001


def test_a_text_ends_as_its_own_record_does(folder):
    """A chat's end of turn beside a record that ends in EOD: neither stops the other's text."""
    policy, decoding = policy_of(folder), Decoding("greedy", Sampling(max_new_tokens=MOST))
    end = often(greedy(64, folder))
    mixed = [replace(p, stop=end if i % 3 else 0) for i, p in enumerate(prompts())]
    found = continue_prompts(policy, mixed, decoding)
    alone = [continue_prompts(policy, [p], decoding)[0] for p in mixed]
    for [ours], [theirs], prompt in zip(found, alone, mixed, strict=True):
        assert (ours.body.tolist(), ours.ended) == (theirs.body.tolist(), theirs.ended)
        assert prompt.stop not in ours.body
    assert any(end in y.body for [y] in found) and any(y.ended for [y] in found)


def config_of(data, output, how="sample", **more):
    decoding = Decoding(how, Sampling(top_k=10, max_new_tokens=MOST), samples=2)
    return GenerateConfig(Source((str(data),), max_length=64), output, decoding, block=4, **more)


def made(folder, config, run=None):
    tokenizer = folder_tokenizer("the model", folder)
    return generate(config, tokenizer, lambda: HuggingFacePolicy(folder, tokenizer), run)


def test_the_file(llama, data, tmp_path):
    config = config_of(data, tmp_path / "a.json", generator="ours")
    found = made(llama, config)
    results = read_results(config.output)
    assert results.texts == found.texts and len(results.texts) == 44
    assert {t.generator for t in results.texts} == {"ours"}
    assert results.made.decoding == (
        "sampled, top-k 10, temperature 1, seed 1234, 2 a prompt, at most 12 tokens"
    )
    for text, (prompt, truth) in zip(results.texts[::2], [*records(21, 6)] * 2, strict=False):
        assert text.instruction == prompt
        assert text.instruction + text.truth == prompt + truth or text.truth.strip() == truth
    for text in results.texts:
        assert 1 <= text.tokens <= MOST and (text.finish == "stop" or text.tokens == MOST)
    again = results.texts[42]
    assert again.id == results.texts[0].id + "-2" and again.output == results.texts[0].output
    assert len({t.output for t in results.texts}) > 30
    assert not list(tmp_path.glob("*.generate"))
    assert made(llama, config).seconds == 0  # nothing to do
    with pytest.raises(ValueError, match=r"a.json: it holds texts .*top-k 10.* seed 1234"):
        made(llama, config_of(data, tmp_path / "a.json", limit=3))
    shorter = replace(config, source=replace(config.source, max_length=30))
    with pytest.raises(ValueError, match=r"at most 64 tokens.* at most 30 tokens.*remove it"):
        made(llama, shorter)  # some records are left out
    tokenizer = folder_tokenizer("the model", llama)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"chat template none.* chat template [0-9a-f]{16}"):
        generate(config, tokenizer, lambda: HuggingFacePolicy(llama, tokenizer))
    content = config.output.read_text().replace(", chat template none", "")
    config.output.write_text(content)  # by an earlier release, which is believed
    assert generate(config, tokenizer, lambda: HuggingFacePolicy(llama, tokenizer)).seconds == 0


def test_any_split_and_any_kill_give_the_same_bytes(llama, data, tmp_path):
    whole_file, parts, resumed = (config_of(data, tmp_path / f"{n}.json") for n in "abc")
    made(llama, whole_file, Run(workers=1))
    assert made(llama, parts, Run(workers=1, share=1, shares=3)) is None
    folder = Path(f"{parts.output}.generate") / "texts"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(before) == ["00000001.json", "00000004.json"]
    assert made(llama, parts, Run(workers=1, share=2, shares=3)) is None
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before.items() <= kept.items()
    assert made(llama, parts, Run(workers=2)) is not None
    assert parts.output.read_bytes() == whole_file.output.read_bytes()
    made(llama, resumed, Run(share=0, shares=2))
    other = replace(resumed, decoding=Decoding("greedy", Sampling(max_new_tokens=MOST)))
    with pytest.raises(ValueError, match=r"--output .*c.json: .* unfinished work with decoding"):
        made(llama, other, Run(share=1, shares=2))


COMMAND = [
    "evaluate", "generate", "--decode", "sample", "--max-length", "64",
    "--max-new-tokens", str(MOST), "--block-records", "1",
]  # fmt: skip


def test_the_command_killed_and_run_again(llama, data, tmp_path, monkeypatch, capsys):
    flags = [*COMMAND, "--policy", f"hf:{llama}", "--data", str(data), "--workers", "1"]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_cpo", *flags, "--output", second], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        texts = Path(f"{second}.generate") / "texts"
        while process.poll() is None and not (texts.is_dir() and any(texts.glob("*.json"))):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert run_command(monkeypatch, *flags, "--output", str(second)) == 0
    assert f"{second}: 22 texts of {Path(llama).name}, " in capsys.readouterr().out
    assert run_command(monkeypatch, *flags, "--output", str(first)) == 0
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--decode": "beams"}, "--decode beams: unknown; give one of greedy, sample, beam"),
        ({"--samples": "2", "--decode": "greedy"}, "--samples 2: greedy gives one text"),
        ({"--decode": "beam", "--beams": "1"}, "--beams 1: needs at least 2"),
        ({"--limit": "0"}, "--limit 0"),
        ({"--policy": None}, "no model: give --policy hf:PATH"),
        ({"--policy": "hf:/nowhere"}, "/nowhere"),
        ({"--data": "/nowhere.jsonl"}, "--input /nowhere.jsonl"),
        ({"--policy": None, "--load": "/nowhere"}, "no tokenizer: give .*--tokenizer-type"),
        ({"--max-length": "100"}, "--max-length 100: the policy .* reads at most 64"),
    ],
)
def test_bad_input(llama, data, tmp_path, change, message, monkeypatch, capsys):
    import re

    from megatron_cpo import cli, quiet

    monkeypatch.setattr(quiet, "verbose", False)
    flags = {
        "--policy": f"hf:{llama}", "--data": str(data), "--output": str(tmp_path / "o.json"),
        "--max-length": "64",
    } | change  # fmt: skip
    words = [word for name, value in flags.items() if value for word in (name, value)]
    monkeypatch.setattr(sys, "argv", ["megatron-cpo", "evaluate", "generate", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, said[-1]) and not (tmp_path / "o.json").exists()


def test_no_record_and_no_checkpoint(llama, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    output = tmp_path / "o.json"
    rest = ["--data", str(empty), "--output", str(output), "--max-length", "64"]
    words = ["evaluate", "generate", *rest]
    assert run_command(monkeypatch, *words, "--policy", f"hf:{llama}") == 1
    assert "no usable record" in capsys.readouterr().err.splitlines()[-1]
    assert run_command(monkeypatch, *words, "--load", llama) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--load {llama}: a Hugging Face model; give --policy hf:{llama}" in said
    assert not output.exists() and not list(tmp_path.glob("*.generate"))


def test_beam_search_of_a_server_is_refused():
    from megatron_cpo.evaluation.decoding import check_decoding

    with pytest.raises(ValueError, match=r"--decode beam: .* convert --from megatron --to hf"):
        check_decoding(Decoding("beam"), object())
