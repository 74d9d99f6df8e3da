"""A completions server as a policy: real servers in processes of their own, on loopback."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from harness.ranks import ROOT
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.groups.store import FILES
from megatron_cpo.negatives.from_policy import policy_samplers
from megatron_cpo.negatives.from_records import check_kinds, group_rng
from megatron_cpo.policies import server as server_policy
from megatron_cpo.policies.flags import policy_from_args
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.policies.server import ServerPolicy
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
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
    monkeypatch.setattr(server_policy, "FIRST_DELAY", 0.001)


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
    policy = ServerPolicy(url, tokenizer, SAMPLING)
    assert policy.identity == {"backend": "server", "name": "tiny", "dialect": "token ids"}
    assert draw(policy, tokenizer) == expected(folder, tokenizer) == draw(policy, tokenizer)
    assert not policy.retries


def test_a_server_of_texts(folder, url):
    """OpenAI's fields alone: answers are encoded again, within the limits, EOD last."""
    tokenizer = dolly_tokenizer(folder)
    everything = Sampling(top_k=0)
    policy = ServerPolicy(url, tokenizer, everything, "plain")
    assert policy.identity["dialect"] == "text"
    limits = (12, 1, 2, 9)
    drawn = draw(policy, tokenizer, limits, sampling=everything)
    for limit, found in zip(limits, drawn, strict=True):
        assert len(found) == 3
        for tokens in found:
            assert len(tokens) <= limit
            assert tokens[-1] == tokenizer.eod


def test_errors_half_the_time_are_tried_again_and_counted(folder, url):
    tokenizer = dolly_tokenizer(folder)
    policy = ServerPolicy(url, tokenizer, SAMPLING, "half")
    assert draw(policy, tokenizer) == expected(folder, tokenizer)
    assert set(policy.retries) == {"HTTP 500", "HTTP 429"}
    assert policy.retries.total() >= 4  # three records and the first question


def test_a_server_that_only_fails_is_given_up(folder, url):
    tokenizer = dolly_tokenizer(folder)
    with pytest.raises(ValueError, match=r"8 requests failed in a row, the last .* HTTP (500|429)"):
        ServerPolicy(url, tokenizer, SAMPLING, "down")


def test_a_server_that_gives_no_samples(folder, url):
    """It would be asked for ever."""
    tokenizer = dolly_tokenizer(folder)
    policy = ServerPolicy(url, tokenizer, SAMPLING, "none")
    with pytest.raises(ValueError, match=r"answered a request for 3 samples with none"):
        draw(policy, tokenizer)


def test_a_server_that_goes_away(folder, url):
    """Refused connections are tried again too, then said."""
    tokenizer = dolly_tokenizer(folder)
    policy = ServerPolicy(url, tokenizer, SAMPLING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        policy._url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ValueError, match=r"failed in a row, the last one with ConnectError"):
            draw(policy, tokenizer)
    assert any("ConnectError" in reason for reason in policy.retries)


def test_what_is_no_server(folder, url):
    tokenizer = dolly_tokenizer(folder)
    for address, match in [
        ("http://127.0.0.1:9/v1", r"no list of models there \(ConnectError.*start the server"),
        (url.removesuffix("/v1") + "/v2", r"serves tiny, half; choose one with --policy-model"),
    ]:
        with pytest.raises(ValueError, match=match):
            policy_from_args(policy_arguments("--policy", address), tokenizer)


def test_httpx_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs the package httpx: .*whl\[server\]"):
        ServerPolicy("http://127.0.0.1:9/v1", ToyTokenizer(), SAMPLING)


def test_a_server_that_knows_no_top_k(folder, url):
    with pytest.raises(ValueError, match=r"understands none .* 422 .* \(--top-k 0, not 20\)"):
        ServerPolicy(url, dolly_tokenizer(folder), SAMPLING, "plain")


def test_a_server_with_another_tokenizer(url, monkeypatch):
    monkeypatch.setattr(ToyTokenizer, "detokenize", lambda _, ids: "a", raising=False)
    for model, sampling in [("tiny", SAMPLING), ("plain", Sampling(top_k=0))]:
        with pytest.raises(ValueError, match=r"counts \d+ tokens in a test text, the build's"):
            ServerPolicy(url, ToyTokenizer(), sampling, model)


def test_a_server_gives_samples_alone(folder, url):
    policy = ServerPolicy(url, dolly_tokenizer(folder), SAMPLING)
    samplers = policy_samplers(policy)
    check_kinds({"an": 3}, samplers)
    with pytest.raises(ValueError, match=r"mn=5: drawn .* \(a server gives an alone\)"):
        check_kinds({"mn": 5}, samplers)
    for call in (policy.replacements, policy.embed, policy.logps):
        with pytest.raises(ValueError, match=r"gives no distributions, so .* hf:PATH"):
            call([], [])


def test_transformers_serve(folder):
    """The server of the installed transformers: text, one sample a request, and no list."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers serve needs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(folder / "model")
    code = "from transformers.cli.transformers import main; main()"
    flags = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *flags], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _wait(port, process)
            tokenizer = dolly_tokenizer(folder)
            with pytest.raises(ValueError, match=r"--policy-model"):
                ServerPolicy(f"http://127.0.0.1:{port}/v1", tokenizer, SAMPLING)
            policy = ServerPolicy(
                f"http://127.0.0.1:{port}/v1", tokenizer, SAMPLING, model, concurrency=2
            )
            assert policy.identity["dialect"] == "transformers"
            drawn = draw(policy, tokenizer)
        finally:
            process.kill()
    assert [len(found) for found in drawn] == [3] * 4
    assert all(tokens[-1] == tokenizer.eod for found in drawn for tokens in found)
    assert len({tuple(tokens) for tokens in drawn[0]}) == 3


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
    use = PolicyUse(lambda: ServerPolicy(url, tokenizer, SAMPLING, model), SAMPLING)
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
    process = multiprocessing.get_context("fork").Process(
        target=build, args=(folder, url, "tiny", killed)
    )
    process.start()
    blocks = Path(killed.output_prefix + ".build") / "groups"
    while not blocks.is_dir() or len(list(blocks.glob("*.npz"))) < 3:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finished = len(list(blocks.glob("*.npz")))
    assert 3 <= finished < 10
    _let_it_finish(url)
    before = asked(url, "tiny")
    build(folder, url, "tiny", killed)
    assert asked(url, "tiny") - before == opening + 4 * (10 - finished)
    assert files_of(killed) == files_of(whole)


def _let_it_finish(url):
    """Until the server has answered what a killed client had asked."""
    counts = [-1, asked(url, "tiny")]
    while counts[-1] != counts[-2]:
        time.sleep(0.3)
        counts.append(asked(url, "tiny"))


@pytest.mark.parametrize("workers", [1, 3])
def test_retries_of_all_workers_are_in_the_report(folder, url, tmp_path, workers):
    """As many as the server gave errors, in opening it as well, and in a run that was cut short."""
    config = build_config(tmp_path)
    before = asked(url, "fourth")
    tokenizer = dolly_tokenizer(folder)
    use = PolicyUse(lambda: ServerPolicy(url, tokenizer, SAMPLING, "fourth"), SAMPLING)
    assert build_groups(config, tokenizer, use, Run(share=1, shares=2, workers=workers)) is None
    report = build(folder, url, "fourth", config, workers)
    after = asked(url, "fourth")
    errors = sum(number % 4 == 0 for number in range(before, after))
    assert errors > 12
    assert sum(report.retries.values()) == errors
    row = rf"asked again: HTTP 500 +{report.retries['HTTP 500']}$"
    assert re.search(row, str(report), re.MULTILINE)
    files_of(config)
