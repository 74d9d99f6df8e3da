"""A completions server as a policy: real servers in processes of their own, on loopback."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.ranks import ROOT
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.groups.store import FILES
from megatron_cpo.negatives.from_policy import policy_samplers
from megatron_cpo.negatives.from_records import check_kinds, group_rng
from megatron_cpo.policies import endpoint as endpoint_module
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.policies.flags import policy_from_args
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.policies.server import ServerPolicy, _ended
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
from tests.faults import stand_still_once
from tests.policies import policy_arguments
from tests.texts import ToyTokenizer, dolly_tokenizer, write_jsonl
from tests.tiny_models import save_hugging_face, write_tokenizer

SAMPLING = Sampling(top_k=20, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tokenizer = dolly_tokenizer(folder)
    save_hugging_face(folder / "model", rows=tokenizer.vocab_size)
    write_tokenizer(folder / "model", tokenizer)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    command = [sys.executable, "-m", "tests.completions_server", folder / "model"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True
    ) as process:
        port = process.stdout.readline().strip()
        yield f"http://127.0.0.1:{port}/v1"
        process.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.001)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def opened(url, tokenizer, sampling=SAMPLING, model=None, in_flight=32):
    return ServerPolicy(Endpoint(url, in_flight=in_flight), tokenizer, sampling, model)


def prefixes(tokenizer):
    texts = ["Tell me about trees.", "Why?", "Name three rivers in Europe and one in Asia.", "Hm"]
    return [np.array(tokenizer.tokenize(text), dtype=np.int32) for text in texts]


def draw(policy, tokenizer, limits=(12, 1, 2, 9), count=3, sampling=SAMPLING):
    rngs = [group_rng(1, i, "an") for i in range(4)]
    drawn = policy.sample(prefixes(tokenizer), limits, count, rngs, sampling)
    return [[c.tolist() for c in found] for found in drawn]


def expected(folder, tokenizer, limits=(12, 1, 2, 9), count=3):
    """What the model behind the server samples with the seeds that the server is given."""
    policy = HuggingFacePolicy(str(folder / "model"), tokenizer)
    seeds = [int(group_rng(1, i, "an").integers(2**31, size=count)[0]) for i in range(4)]
    rngs = [np.random.default_rng(seed) for seed in seeds]
    drawn = policy.sample(prefixes(tokenizer), limits, count, rngs, SAMPLING)
    return [[c.tolist() for c in found] for found in drawn]


def test_token_ids_are_used_as_they_are(folder, url):
    """Ids in and out: the model's own samples, cut to the limits, EOD last; twice the same."""
    tokenizer = dolly_tokenizer(folder)
    policy = opened(url, tokenizer)
    assert policy.identity == {"backend": "server", "name": "tiny", "dialect": "token ids"}
    assert draw(policy, tokenizer) == expected(folder, tokenizer) == draw(policy, tokenizer)
    assert not policy.take_counts()


def test_a_server_of_texts(folder, url):
    """OpenAI's fields alone: answers are encoded again, within the limits, EOD last if they end."""
    tokenizer = dolly_tokenizer(folder)
    everything = Sampling(top_k=0)
    policy = opened(url, tokenizer, everything, "plain")
    assert policy.identity["dialect"] == "text"
    limits = (12, 1, 2, 9)
    drawn = draw(policy, tokenizer, limits, sampling=everything)
    for limit, found in zip(limits, drawn, strict=True):
        assert len(found) == 3
        for tokens in found:
            assert len(tokens) <= limit
            # This server does not say why it stopped.
            assert (tokens[-1] == tokenizer.eod) != (len(tokens) == limit - 1)


@pytest.mark.parametrize(
    ("ids", "reason", "expected"),
    [
        ([1, 2], "stop", [1, 2, 99]),
        ([1, 2, 99], "stop", [1, 2, 99]),
        ([1, 2, 98, 4], "stop", [1, 2, 98]),
        ([1, 2], "length", [1, 2]),  # its context was full, or more was drawn than is left
        ([1, 2, 3, 4], "length", [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5], "length", [1, 2, 3, 4]),
        ([1, 2, 3, 99], "length", [1, 2, 3, 99]),
        ([1, 2], None, [1, 2, 99]),
        ([1, 2, 3, 4], None, [1, 2, 3, 4]),
        ([], "stop", [99]),
        ([], "length", []),
    ],
)
def test_a_sample_that_was_cut_has_no_end(ids, reason, expected):
    """Of at most 4 tokens; 98 and 99 end it."""
    choice = {} if reason is None else {"finish_reason": reason}
    assert _ended(ids, choice, 4, {98, 99}, 99).tolist() == expected


def test_errors_half_the_time_are_tried_again_and_counted(folder, url):
    tokenizer = dolly_tokenizer(folder)
    policy = opened(url, tokenizer, model="half")
    assert draw(policy, tokenizer) == expected(folder, tokenizer)
    counts = policy.take_counts()
    assert set(counts) == {"asked again: HTTP 500", "asked again: HTTP 429"}
    assert counts.total() >= 4  # three records and the first question


def test_a_server_that_only_fails_is_given_up(folder, url):
    tokenizer = dolly_tokenizer(folder)
    with pytest.raises(ValueError, match=r"8 requests failed in a row, the last .* HTTP (500|429)"):
        opened(url, tokenizer, model="down")


def test_what_is_no_server(folder, url):
    tokenizer = dolly_tokenizer(folder)
    for address, match in [
        ("http://127.0.0.1:9/v1", r"nothing answers there \(ConnectError.*start the server"),
        (url.removesuffix("/v1") + "/v2", r"serves tiny, half; choose one with --policy-model"),
    ]:
        with pytest.raises(ValueError, match=match):
            policy_from_args(policy_arguments("--policy", address), tokenizer)


def test_httpx_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    for name in ("endpoint", "answers", "dialects", "server"):
        monkeypatch.delitem(sys.modules, f"megatron_cpo.policies.{name}", raising=False)
    args = policy_arguments("--policy", "http://ann:secret@127.0.0.1:9/v1")
    said = r"^--policy http://127.0.0.1:9/v1: needs the package httpx: pip install '\.\[server\]'"
    with pytest.raises(ValueError, match=said):
        policy_from_args(args, ToyTokenizer())


def test_flags_of_a_server(folder, url):
    """They reach the endpoint; a password is not in what is printed of the flags."""
    whole = url.replace("://", "://ann:secret@")
    flags = policy_arguments("--policy", whole, "--policy-batch", 7, "--top-k", 20)
    assert "secret" not in f"{flags} {flags.policy}"
    policy = policy_from_args(flags, dolly_tokenizer(folder))
    assert policy._endpoint.address.authorization == "Basic YW5uOnNlY3JldA=="
    assert policy._endpoint.in_flight == 7
    flags = policy_arguments("--policy", url, "--policy-key-env", "NOT_SET_ANYWHERE")
    with pytest.raises(ValueError, match=r"variable that --policy-key-env names is not set"):
        policy_from_args(flags, dolly_tokenizer(folder))


def test_a_server_that_knows_no_top_k(folder, url):
    with pytest.raises(ValueError, match=r"understands none .* 422 .* \(--top-k 0, not 20\)"):
        opened(url, dolly_tokenizer(folder), model="plain")


def test_a_server_with_another_tokenizer(url, monkeypatch):
    monkeypatch.setattr(ToyTokenizer, "detokenize", lambda _, ids: "a", raising=False)
    for model, sampling in [("tiny", SAMPLING), ("plain", Sampling(top_k=0))]:
        with pytest.raises(ValueError, match=r"counts \d+ tokens in a test text, the build's"):
            opened(url, ToyTokenizer(), sampling, model)


def test_a_server_gives_samples_alone(folder, url):
    policy = opened(url, dolly_tokenizer(folder))
    samplers = policy_samplers(policy)
    check_kinds({"an": 3}, samplers)
    with pytest.raises(ValueError, match=r"mn=5: drawn .* \(a server gives an alone\)"):
        check_kinds({"mn": 5}, samplers)
    for call in (policy.replacements, policy.embed, policy.logps):
        with pytest.raises(ValueError, match=r"gives no distributions, so .* hf:PATH"):
            call([], [])


def test_transformers_serve(folder, tmp_path):
    """The server of the installed transformers: text, one sample a request, and no list.

    Its samples are the model's own, whatever the generation_config.json beside the weights says:
    those of `generate` here, without that file, by the seeds that the server is given.
    """
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers serve needs it")
    shutil.copytree(folder / "model", tmp_path / "model")
    own = {"repetition_penalty": 9.0, "min_p": 0.9, "typical_p": 0.1, "no_repeat_ngram_size": 1,
           "epsilon_cutoff": 0.05, "min_new_tokens": 30, "top_k": 1, "top_p": 0.1}  # fmt: skip
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(tmp_path / "model")
    code = "from transformers.cli.transformers import main; main()"
    flags = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    tokenizer = dolly_tokenizer(folder)
    with subprocess.Popen(
        [sys.executable, "-c", code, *flags], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _wait(port, process)
            with pytest.raises(ValueError, match=r"list its models, name one with --policy-model"):
                opened(f"http://127.0.0.1:{port}/v1", tokenizer)
            policy = opened(f"http://127.0.0.1:{port}", tokenizer, model=model, in_flight=1)
            assert policy.identity["dialect"] == "transformers"
            drawn = draw(policy, tokenizer)
        finally:
            process.kill()
    assert drawn == _generated(folder / "model", tokenizer)
    assert len({tuple(tokens) for tokens in drawn[0]}) == 3


def _generated(model, tokenizer, limits=(12, 1, 2, 9), count=3):
    """The samples of `draw` by `generate`, as text and encoded again; EOD last if they end."""
    network = AutoModelForCausalLM.from_pretrained(model)
    eod = tokenizer.eod
    words, encoder = AutoTokenizer.from_pretrained(model), Encoder(tokenizer)
    found = []
    for place, (prefix, limit) in enumerate(zip(prefixes(tokenizer), limits, strict=True)):
        found.append([])
        for seed in group_rng(1, place, "an").integers(2**31, size=count).tolist():
            ids, end = [], [eod]
            if limit > 1:
                torch.manual_seed(seed)
                whole = network.generate(
                    torch.tensor([prefix.tolist()]), do_sample=True, top_k=20, top_p=1.0,
                    max_new_tokens=limit - 1, eos_token_id=eod, pad_token_id=eod,
                )  # fmt: skip
                text = words.decode(whole[0, len(prefix) :], skip_special_tokens=True)
                ids, end = encoder.after(prefix, text), end if whole[0, -1] == eod else []
            found[-1].append([*ids[: limit - 1], *end])
    return found


def _wait(port, process):
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(re.sub(r"\n+", "\n", process.stderr.read())[-2000:])
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError("transformers serve did not come up")


def build_config(folder, records=40):
    path = folder / "r.jsonl"
    if not path.exists():
        texts = [{"prompt": f"Name {i} rivers.", "completion": f"No. {i}"} for i in range(records)]
        write_jsonl(path, *texts)
    return BuildConfig(
        Source((str(path),)), str(folder / "out" / "groups"), negatives="an=3", block_records=4
    )


def build(folder, url, model, config, workers=1):
    tokenizer = dolly_tokenizer(folder)
    use = PolicyUse(lambda: opened(url, tokenizer, model=model), SAMPLING)
    return build_groups(config, tokenizer, use, Run(workers=workers))


def asked(url, model):
    return httpx.get(f"{url}/asked").json().get(model, 0)


def files_of(config):
    folder = Path(config.output_prefix).parent
    assert sorted(os.listdir(folder)) == sorted(f"groups{s}" for s in (*FILES, ".json"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_build_asks_for_the_rest_alone(folder, url, tmp_path):
    """SIGKILL half way: the server keeps its seeds, so the bytes are those of one build."""
    opening = 2  # requests that find out what the server understands
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = (build_config(tmp_path / name) for name in ("whole", "killed"))
    before = asked(url, "tiny")
    build(folder, url, "tiny", whole)
    assert asked(url, "tiny") - before == opening + 40
    blocks = Path(killed.output_prefix + ".build") / "groups"
    fork = multiprocessing.get_context("fork")
    reached = fork.Event()

    def build_three():
        stand_still_once(lambda: len(list(blocks.glob("*.npz"))) == 3, reached.set)
        build(folder, url, "tiny", killed)

    process = fork.Process(target=build_three)
    process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = asked(url, "tiny")
    build(folder, url, "tiny", killed)
    assert asked(url, "tiny") - before == opening + 4 * (10 - 3)
    assert files_of(killed) == files_of(whole)


@pytest.mark.parametrize("workers", [1, 3])
def test_retries_of_all_workers_are_in_the_report(folder, url, tmp_path, workers):
    """As many as the server gave errors, in opening it as well, and in a run that was cut short."""
    config = build_config(tmp_path)
    before = asked(url, "fourth")
    tokenizer = dolly_tokenizer(folder)
    use = PolicyUse(lambda: opened(url, tokenizer, model="fourth"), SAMPLING)
    assert build_groups(config, tokenizer, use, Run(share=1, shares=2, workers=workers)) is None
    report = build(folder, url, "fourth", config, workers)
    after = asked(url, "fourth")
    errors = sum(number % 4 == 0 for number in range(before, after))
    assert errors > 12
    assert sum(report.counts.values()) == errors
    row = rf"asked again: HTTP 500 +{report.counts['asked again: HTTP 500']}$"
    assert re.search(row, str(report), re.MULTILINE)
    files_of(config)
