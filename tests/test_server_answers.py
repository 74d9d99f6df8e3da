"""What a server policy asks of a server, and makes of its answers: a scripted server, real HTTP."""

import json
import logging
import re
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest

from megatron_cpo.building.blocks import Recipe, make_block
from megatron_cpo.groups.packed import pack_groups
from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_policy import policy_samplers
from megatron_cpo.negatives.from_records import group_rng
from megatron_cpo.negatives.ranking import unranked
from megatron_cpo.policies import endpoint as endpoint_module
from megatron_cpo.policies.dialects import context_in, is_about_length
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.policies.policy import NotDrawn, Sampling
from megatron_cpo.policies.server import ServerPolicy
from tests import scripted_server
from tests.commands import run_tool_here
from tests.policies import EOD
from tests.scripted_server import CONTEXT, KEY, scripted
from tests.texts import ListedPairs, ToyTokenizer, dolly_tokenizer, write_jsonl

SAMPLING = Sampling(temperature=0.7, top_k=20, top_p=0.9)
EVERYTHING = Sampling(top_k=0)


class Numbers(ToyTokenizer):
    """Its texts are numbers; `12 7` is two tokens."""

    def detokenize(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def port():
    with scripted() as (port, _):
        yield port


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.001)


def opened(port, case, sampling=SAMPLING, model=None):
    return ServerPolicy(Endpoint(f"http://127.0.0.1:{port}/{case}"), Numbers(), sampling, model)


def draw(policy, *lengths, limit=8, count=3, sampling=SAMPLING):
    """Samples of prefixes of such lengths."""
    prefixes = [np.arange(1, n + 1, dtype=np.int32) % EOD for n in lengths]
    rngs = [group_rng(1, i, "an") for i in range(len(lengths))]
    drawn = policy.sample(prefixes, [limit] * len(lengths), count, rngs, sampling)
    return [[c.tolist() for c in found] for found in drawn]


def expected(length, most, place=0, count=3):
    """What the scripted server draws, cut to `most` tokens; those that were cut have no EOD."""
    prompt = [i % EOD for i in range(1, length + 1)]
    seed = int(group_rng(1, place, "an").integers(2**31, size=count)[0])
    drawn = scripted_server.samples(prompt, seed, count, most)
    return [[*(i for i in ids if i != EOD), *([EOD] if EOD in ids else [])] for ids in drawn]


def notes(port, case):
    return httpx.get(f"http://127.0.0.1:{port}/notes/{case}").json()


# ---- what is asked


def test_every_field_that_changes_what_is_drawn_is_in_the_request(port):
    """Left out, a server takes it from the model's generation_config.json or its command line."""
    policy = opened(port, "fields")
    assert draw(policy, 3) == [expected(3, 7)]
    assert notes(port, "fields")["body"] == {
        "model": "tiny", "prompt": [1, 2, 3], "max_tokens": 7, "n": 3,
        "seed": int(group_rng(1, 0, "an").integers(2**31, size=3)[0]),
        "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.0,
        "repetition_penalty": 1.0, "repeat_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "stop": [], "stop_token_ids": [EOD], "ignore_eos": False, "return_token_ids": True,
    }  # fmt: skip
    draw(opened(port, "fields", EVERYTHING), 3, sampling=EVERYTHING)
    assert notes(port, "fields")["body"]["top_k"] == -1


@pytest.mark.parametrize(
    ("case", "sampling", "dialect", "without", "warned"),
    [
        ("rare", SAMPLING, "token ids", ["repeat_penalty"], ""),
        ("picky", EVERYTHING, "token ids", "all", "does not take frequency_penalty, ignore_eos"),
        ("mute", EVERYTHING, "token ids", "all", "stop, stop_token_ids, top_k, so its own values"),
        ("strict", EVERYTHING, "token ids", "all and n, seed", "does not take frequency_penalty"),
    ],
)
def test_servers_that_refuse_fields(port, caplog, case, sampling, dialect, without, warned):
    """They are asked without those, told apart once, and said so once; n goes: one sample each."""
    pins = [
        "frequency_penalty", "ignore_eos", "min_p", "presence_penalty", "repeat_penalty",
        "repetition_penalty", "return_token_ids", "stop", "stop_token_ids", "top_k",
    ]  # fmt: skip
    whole = {"all": pins, "all and n, seed": sorted([*pins, "n", "seed"])}
    without = whole.get(without, without) if isinstance(without, str) else without
    policy = opened(port, case, sampling)
    assert policy.identity == {
        "backend": "server", "name": "tiny", "dialect": dialect, "without": without,
    }  # fmt: skip
    assert [len(found) for found in draw(policy, 3, 4, sampling=sampling)] == [3, 3]
    assert not set(notes(port, case)["body"]) & set(without)
    assert len(caplog.records) == bool(warned)
    assert warned in caplog.text


def test_a_server_that_needs_top_k_left_out(port):
    said = r"understands none of our requests \(token ids: HTTP 400 Unknown fields: .*top_k.*; "
    with pytest.raises(ValueError, match=said + r"without top-k \(--top-k 0, not 20\) more serv"):
        opened(port, "picky")


def test_a_server_that_gives_one_sample_a_request(port):
    """It says so at the first that asks for more; from then on each is asked for on its own."""
    policy = opened(port, "one-each")
    seeds = group_rng(1, 0, "an").integers(2**31, size=3).tolist()
    alone = [scripted_server.samples([1, 2, 3], seed, 1, 7)[0] for seed in seeds]
    assert draw(policy, 3) == [alone]
    before = notes(port, "one-each")["asked"]
    assert before == 2 + 1 + 3
    draw(policy, 3, 4)
    assert notes(port, "one-each")["asked"] == before + 6


def test_a_build_with_a_key(port, tmp_path, monkeypatch):
    """As a user runs it: the key is in each request, and in nothing that is printed or written.

    Of three records one has a prefix that is longer than the server's context, and the others leave
    fewer tokens of it than --max-new-tokens.
    """
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    dolly_tokenizer(tmp_path)
    records = [{"prompt": "1" * n, "completion": "Yes."} for n in (2, 25, 99)]
    write_jsonl(tmp_path / "r.jsonl", *records)
    done = run_tool_here(
        "build_negatives.py", "--input", tmp_path / "r.jsonl", "--output-prefix", tmp_path / "g",
        "--policy", f"http://127.0.0.1:{port}/key", "--negatives", "an=2",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model",
        tmp_path / "tokenizer.model",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^dropped: prefix too long for the policy +1$", done.stdout, re.MULTILINE)
    assert re.search(r"^drawn shorter: server's context of 40 tokens +2$", done.stdout, re.M)
    manifest = json.loads((tmp_path / "g.json").read_text())
    assert (manifest["groups"], manifest["dropped"]) == (2, {"prefix too long for the policy": 1})
    assert f"Bearer {KEY}" in notes(port, "key")["keys"]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 7
    for content in (*written, done.stdout.encode(), done.stderr.encode()):
        assert KEY.encode() not in content


# ---- models


@pytest.mark.parametrize(
    ("case", "model", "match"),
    [
        ("two", None, r"serves tiny, large; choose one with --policy-model NAME"),
        ("empty", None, r"serves no model it can name"),
        ("hub", None, r"serves m0, m1, .*, m19 and 80 more; choose one with --policy-model NAME"),
        ("unlisted", None, r"has nothing at .*if it cannot list its models, name one"),
        ("odd-list", None, r"list of models has another shape; if it cannot list its models"),
        ("odd-object", None, r"list of models has another shape"),
        ("forbidden-list", None, r"does not allow this .*; if it cannot list its models"),
        ("no-model", "huge", r"does not know the model huge \(The model `huge` does not exist.\); "
         r"it serves tiny: choose one with --policy-model"),
        ("no-model", "tiny", r"does not know the model tiny \(The model `tiny` does not exist.\)$"),
        ("key", None, r"wants a key, and none was sent"),
        ("key", "tiny", r"wants a key, and none was sent"),
        ("open-list", None, r"wants a key, and none was sent"),
        ("chat-only", "tiny", r"has nothing at /chat-only/v1/completions \(HTTP 404"),
        ("page", None, r"answers with a web page"),
    ],
)  # fmt: skip
def test_models_that_are_not_served(port, case, model, match):
    with pytest.raises(ValueError, match=match) as raised:
        opened(port, case, model=model)
    assert str(raised.value).startswith(f"--policy http://127.0.0.1:{port}/{case}: ")
    assert "--top-k" not in str(raised.value)


@pytest.mark.parametrize("case", ["unlisted", "odd-list", "odd-object", "forbidden-list", "empty"])
def test_a_named_model_needs_no_list(port, case):
    assert opened(port, case, model="hub/tiny").identity["name"] == "tiny"


# ---- the context


@pytest.mark.parametrize(
    ("case", "model"),
    [("limited", None), ("limited-text", None), ("adapter", "lora"), ("vllm", None),
     ("vllm-old", None), ("sglang", None), ("llama", None)],
)  # fmt: skip
def test_long_prefixes_are_drawn_shorter_or_not_at_all(port, case, model, caplog):
    """Of 40 tokens: from the list, or from the first refusal. 38 + 1 + EOD is the longest."""
    policy = opened(port, case, model=model)
    drawn = draw(policy, 3, 30, 36, 38, 39, 40, 60)
    assert drawn[:4] == [expected(n, most, i) for i, (n, most) in
                         enumerate([(3, 7), (30, 7), (36, 3), (38, 1)])]  # fmt: skip
    assert drawn[4:] == [[], [], []]
    assert policy.take_counts() == {"drawn shorter: server's context of 40 tokens": 2}
    assert not policy.take_counts()
    assert not caplog.records


@pytest.mark.parametrize("case", ["unlimited", "zero", "two"])
def test_no_context_is_known(port, case):
    policy = opened(port, case, model="tiny")
    assert draw(policy, 60) == [expected(60, 7)]
    assert not policy.take_counts()


def test_a_server_that_does_not_say_how_much_it_reads(port, caplog):
    """What it finds too long is left out, and said once, with what it said and the flags."""
    policy = opened(port, "wordless")
    drawn = draw(policy, 3, 50, 60, 4)
    assert [len(found) for found in drawn] == [3, 0, 0, 3]
    assert len(caplog.records) == 1
    for part in (
        f"http://127.0.0.1:{port}/wordless",
        "HTTP 422: Input is too long for this model",
        "0 tokens with 7 new",  # 50 or 60, whichever comes first
        "--max-length",
        "--max-new-tokens",
    ):
        assert part in caplog.text


def test_a_refusal_of_another_kind_names_the_record(port):
    policy = opened(port, "riddle")
    said = (
        rf"--policy http://127.0.0.1:{port}/riddle: HTTP 400: computer says no, asked for a prefix "
        r"of 3 tokens with 7 new ones; make records fit with --max-length"
    )
    with pytest.raises(NotDrawn, match=said):
        draw(policy, 3)
    with pytest.raises(ValueError, match=f"^record [89] in use: {said}"):
        block(policy, range(7, 9), lengths=[3] * 9)


class Prefixes(ListedPairs):
    """Pairs whose prefixes have such lengths."""

    def __init__(self, lengths):
        super().__init__(*[[5, EOD]] * len(lengths))
        self._lengths = lengths

    def prefix(self, index):
        return np.arange(1, self._lengths[index] + 1, dtype=np.int32) % EOD


def block(policy, records, lengths):
    samplers = policy_samplers(policy, Sampling(max_new_tokens=8))
    answers = Answers(Prefixes(lengths))
    recipe = Recipe(answers, {"an": 3}, 1, EOD, None, samplers, unranked, None)
    return make_block(records, recipe)


def test_records_that_cannot_be_read_have_no_group(port):
    """One in the middle of a block, and a block that has nothing else."""
    lengths = [3, CONTEXT, 4, CONTEXT, CONTEXT + 9]
    policy = opened(port, "limited")
    groups = block(policy, range(3), lengths)
    assert [len(group.prefix) for group in groups] == [3, 4]
    assert [len(group.candidates) for group in groups] == [4, 4]
    packed = pack_groups(block(policy, range(3, 5), lengths), 100)
    assert (len(packed.tokens), len(packed.sequences), packed.totals.groups) == (0, 0, 0)


@pytest.mark.parametrize(
    ("said", "context"),
    [
        (scripted_server.VLLM_LONG.format(context=4096, prompt=4090, asked=32, total=4122), 4096),
        (scripted_server.VLLM_OLD.format(context=300, prompt=290, asked=32, total=322), 300),
        ("The input (310 tokens) is longer than the model's context length (300 tokens).", 300),
        (scripted_server.LLAMA_LONG.format(total=310, context=300), 300),
        ("`inputs` tokens + `max_new_tokens` must be <= 1,024. Given: 1,020 and 32", 1024),
        ("exceeds max_model_len (2048)", 2048),
        ("the request exceeds the available context size. try increasing it", None),
        ("Please reduce the length of the prompt; maximum is 300 tokens", None),
        ("prompt is too long", None),
    ],
)
def test_the_words_of_servers(said, context):
    assert is_about_length(said)
    assert context_in(said) == context


@pytest.mark.parametrize("said", ["n must be 1", "Unknown fields: min_p", "bad seed", "no"])
def test_other_words(said):
    assert not is_about_length(said)
    assert context_in(said) is None


# ---- odd answers


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("list", r"answered a request for 3 samples with none \(null\)"),
        ("dict", r"answered a request for 3 samples with none \(\{\"text\": \"4\"\}\)"),
        ("null", r"answered a request for 3 samples with none"),
        ("none", r"answered a request for 3 samples with none \(\[\]\); see the server's log"),
        ("null-choice", r"neither a text nor a list of token ids \(null\)"),
        ("null-text", r"neither a text nor a list of token ids \(\{\"text\": null"),
        ("no-text", r"neither a text nor a list of token ids \(\{\"index\": 0\}\)"),
        ("strings", r"neither a text nor a list of token ids"),
        ("floats", r"neither a text nor a list of token ids"),
        ("beyond", r"the token id 100, and the build's tokenizer has ids from 0 to 99; build with "
         r"the tokenizer of the server's model \(tiny\)"),
        ("negative", r"answers with the token id -1"),
        ("aborted", r"broke a sample off \(finish_reason abort\)"),
        ("error-inside", r"HTTP 400: upstream is down"),
        ("array", r"JSON of another shape"),
        ("late-page", r"answers with a web page \(HTTP 200: 502 Bad Gateway\)"),
    ],
)  # fmt: skip
def test_odd_answers_are_named(port, case, match):
    policy = opened(port, case)
    with pytest.raises(ValueError, match=match) as raised:
        draw(policy, 3, 4, 5)
    assert str(raised.value).startswith(f"--policy http://127.0.0.1:{port}/{case}: ")


def test_answers_that_are_read_anyway(port):
    """Texts for want of ids; what lies behind EOD or the limit, and samples too many, are cut."""
    assert draw(opened(port, "text"), 3, limit=3) == [[[4, 5]] * 3]  # cut
    assert draw(opened(port, "null-ids"), 3) == [[[7, EOD]] * 3]
    ended = [ids if ids[-1] == EOD else [*ids, EOD] for ids in expected(3, 7)]
    assert draw(opened(port, "sloppy"), 3) == [ended]


def test_a_limit_of_one_needs_no_request(port):
    policy = opened(port, "one")
    before = notes(port, "one")["asked"]
    assert draw(policy, 3, limit=1) == [[[EOD]] * 3]
    assert notes(port, "one")["asked"] == before


# ---- failures


def test_a_server_that_is_started_again(monkeypatch):
    """It dies in the middle of a block of 20 and comes back at the same address."""
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.2)
    with scripted() as (port, process):
        policy = opened(port, "die")
        command = [sys.executable, scripted_server.__file__, str(port)]
        again = []

        def restart():
            process.wait()
            again.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

        helper = threading.Thread(target=restart)
        helper.start()
        try:
            monkeypatch.setattr(policy._endpoint, "in_flight", 2)
            drawn = draw(policy, *range(1, 21))
        finally:
            helper.join()
            again[0].kill()
            again[0].wait()
    assert drawn == [expected(n, 7, n - 1) for n in range(1, 21)]
    assert policy.take_counts().total() >= 1


def test_a_server_that_goes_away(caplog):
    """Refused connections are tried again too, then said."""
    with scripted() as (port, process):
        policy = opened(port, "v1")
        process.kill()
        process.wait()
        with pytest.raises(
            ValueError, match=r"8 requests failed in a row, the last one with Connect"
        ):
            draw(policy, 3)
    assert policy.take_counts() == {"asked again: ConnectError": 7}


def test_nothing_is_logged_a_request(port, caplog):
    caplog.set_level(logging.INFO)
    draw(opened(port, "quiet"), *range(1, 30))
    assert not caplog.records
