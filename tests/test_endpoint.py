"""An endpoint: addresses, keys, what answers mean, and when a request is repeated. Real sockets."""

import asyncio
import base64
import email.utils
import logging
import pickle
import re
import subprocess
import time

import httpx
import pytest

from megatron_cpo.policies import endpoint as endpoint_module
from megatron_cpo.policies.address import Address, ShownAddress
from megatron_cpo.policies.answers import Exhausted, Refused, retry_after
from megatron_cpo.policies.endpoint import Endpoint
from tests.scripted_server import KEY, USER, scripted

BODY = {"model": "tiny", "prompt": [1, 2], "max_tokens": 4, "seed": 3, "n": 1}
VARIABLES = (
    "OPENAI_API_KEY",
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
)


@pytest.fixture(scope="module")
def port():
    with scripted() as (port, _):
        yield port


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*VARIABLES, "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 0.02)


def post(endpoint, times=1, body=BODY):
    """The answers to the same request, all at once."""

    async def posted():
        async with endpoint:
            return await asyncio.gather(*(endpoint.post("completions", body) for _ in range(times)))

    return asyncio.run(posted())


def models(endpoint):
    async def listed():
        async with endpoint:
            return await endpoint.models()

    return asyncio.run(listed())


# ---- addresses


@pytest.mark.parametrize(
    ("url", "shown", "bases"),
    [
        ("http://h:8000/v1", "http://h:8000/v1", ["http://h:8000/v1"]),
        (" http://h:8000/v1\n", "http://h:8000/v1", ["http://h:8000/v1"]),
        ("http://h:8000/v1/", "http://h:8000/v1/", ["http://h:8000/v1"]),
        ("http://h:8000", "http://h:8000", ["http://h:8000", "http://h:8000/v1"]),
        ("http://h/", "http://h/", ["http://h", "http://h/v1"]),
        ("http://h/v1/completions", "http://h/v1/completions", ["http://h/v1"]),
        ("http://h/v1/chat/completions/", "http://h/v1/chat/completions/", ["http://h/v1"]),
        ("http://h/v1/models", "http://h/v1/models", ["http://h/v1"]),
        ("http://h/api/v3beta", "http://h/api/v3beta", ["http://h/api/v3beta"]),
        ("http://h/vllm", "http://h/vllm", ["http://h/vllm", "http://h/vllm/v1"]),
        ("HTTPS://H/v1", "HTTPS://H/v1", ["https://H/v1"]),
        ("http://[::1]:80/v1", "http://[::1]:80/v1", ["http://[::1]:80/v1"]),
        ("http://h/v1?key=abc#x", "http://h/v1", ["http://h/v1"]),
        ("http://h/@cf/v1", "http://h/@cf/v1", ["http://h/@cf/v1"]),
        ("http://ann:p%40ss@h:1/v1", "http://h:1/v1", ["http://h:1/v1"]),
        ("http://:secret@h/v1", "http://h/v1", ["http://h/v1"]),
    ],
)
def test_addresses(url, shown, bases):
    address = Address.read(url, "--policy", "--policy-key-env", None)
    assert (address.shown, list(address.bases)) == (shown, bases)
    assert str(ShownAddress(url)).strip() == f"{ShownAddress(url)}".strip() == shown
    assert repr(ShownAddress(url)) == str(ShownAddress(url))
    for secret in ("p%40ss", "p@ss", "secret", "abc"):
        assert secret not in repr(address)


@pytest.mark.parametrize(
    "url",
    ["http://", "http://h:port/v1", "http:///v1", "http://h:99999/v1", "http://[::1/v1",
     "http:// h/v1", "http://h\n/v1", "http://ann:pass/word@h/v1"],
)  # fmt: skip
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match=r"^--policy http:\S*.* is no address; give one") as raised:
        Address.read(url, "--policy", "--policy-key-env", None)
    assert "pass" not in str(raised.value)


def test_other_values_of_the_flag_are_shown_as_they_are():
    assert str(ShownAddress("hf:a@b/c?d")) == "hf:a@b/c?d"
    assert str(pickle.loads(pickle.dumps(ShownAddress("http://a:b@h")))) == "http://h"


@pytest.mark.parametrize(
    "path", ["", "/", "/v1", "/v1/", "/v1/completions", "/sub", "/sub/v1/?a=b"]
)
def test_the_version_may_be_left_out(port, path):
    endpoint = Endpoint(f"http://127.0.0.1:{port}{path}")
    assert [model["id"] for model in models(endpoint)] == ["tiny"]
    [answer] = post(endpoint)
    assert answer["choices"][0]["text"] == "4 5"


# ---- keys


def test_the_key_of_the_environment_is_sent(port, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    endpoint = Endpoint(f"http://127.0.0.1:{port}/key/v1")
    assert models(endpoint) and post(endpoint)
    monkeypatch.setenv("OPENAI_API_KEY", "of-somebody-else")
    monkeypatch.setenv("MY_KEY", KEY)
    assert post(Endpoint(f"http://127.0.0.1:{port}/key/v1", key_variable="MY_KEY"))


def test_user_and_password_of_the_address_are_sent(port, monkeypatch):
    """Rather than the key, which may be another server's; percent-encoded as they have to be."""
    monkeypatch.setenv("OPENAI_API_KEY", "of-somebody-else")
    url = f"http://{USER}:p%40ss%3Aw%2Frd@127.0.0.1:{port}/basic/v1"
    assert post(Endpoint(url))
    with pytest.raises(
        ValueError, match=r"has a user in the address and a key by --policy-key-env"
    ):
        Endpoint(url, key_variable="OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("key", "variable", "match"),
    [
        (None, "MISSING_ONE", r"the variable that holds the key, and not the key"),
        (None, "sk-mistaken-for-a-name", r"that --policy-key-env names is not set, or empty"),
        ("  ", "OPENAI_API_KEY", r"is not set, or empty"),
        ("two words", None, r"has white space or other characters"),
        ("sch\u00fcssel-geheim", None, r"other characters in it that cannot be sent"),
    ],
)
def test_keys_that_cannot_be_sent(monkeypatch, key, variable, match):
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=match) as raised:
        Endpoint("http://127.0.0.1:9/v1", key_variable=variable)
    for secret in ("sk-mistaken", "two words", "geheim"):
        assert secret not in str(raised.value)


@pytest.mark.parametrize(
    ("case", "key", "match"),
    [
        ("key", None, r"wants a key, and none was sent \(HTTP 401: .*set .* OPENAI_API_KEY to it"),
        ("key", "sk-wrong-one", r"does not take the key in OPENAI_API_KEY \(HTTP 401"),
        ("basic", "user:pass@", r"does not take the user and password of the address"),
        (
            "forbidden",
            None,
            r"does not allow this \(HTTP 403: Country not supported\); if it wants",
        ),
        ("forbidden", "sk-wrong-one", r"not allow this with the key in OPENAI_API_KEY \(HTTP 403"),
    ],
)
def test_refused_keys_are_said_and_not_shown(port, monkeypatch, case, key, match):
    """The server repeats what it was given; `user:pass@` is in the address, others are keys."""
    user = key if key and key.endswith("@") else ""
    if key and not user:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(Refused, match=match) as raised:
        post(Endpoint(f"http://{user}127.0.0.1:{port}/{case}/v1"))
    said = f"{raised.value} {raised.value.detail}"
    for secret in ("sk-wrong-one", "pass@", base64.b64encode(b"user:pass").decode()):
        assert secret not in said
    assert "start the server" not in said
    assert pickle.loads(pickle.dumps(raised.value)).status == raised.value.status


# ---- what answers mean


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("chat-only", r"has nothing at /chat-only/v1/completions \(HTTP 404: Not Found\); give"),
        ("get-only", r"has nothing at .* \(HTTP 405: Method Not Allowed\); give the address"),
        ("gone", r"has nothing at .* \(HTTP 501: not implemented\)"),
        (
            "page",
            r"answers with a web page \(HTTP 200: Chat UI\); give the address of the server's",
        ),
        ("moved", r"sends us on to https://else.where/v1/completions \(HTTP 308"),
        ("no-model", r"HTTP 404: The model `tiny` does not exist"),
        ("quota", r"HTTP 429: You exceeded your current quota"),
        ("riddle", r"HTTP 400: computer says no"),
        ("error-inside", r"HTTP 400: upstream is down"),
        ("array", r"answers with JSON of another shape \(HTTP 200: \[1, 2\]\)"),
        ("late-page", r"a web page \(HTTP 200: 502 Bad Gateway\)"),
    ],
)
def test_refusals_are_not_repeated(port, case, match):
    endpoint = Endpoint(f"http://127.0.0.1:{port}/{case}/v1")
    with pytest.raises(Refused, match=match) as raised:
        post(endpoint)
    assert str(raised.value).startswith(f"--policy http://127.0.0.1:{port}/{case}/v1: ")
    assert KEY not in str(raised.value)
    assert not endpoint.retries


@pytest.mark.parametrize("case", ["odd-list", "odd-object", "unlisted", "page"])
def test_lists_of_another_shape(port, case):
    with pytest.raises(Refused):
        models(Endpoint(f"http://127.0.0.1:{port}/{case}"))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("hour", "HTTP 429"), ("century", "HTTP 503"), ("page-502", "HTTP 502"),
        ("inside-429", "HTTP 429"), ("hang-up", "RemoteProtocolError"),
        ("cut-off", "RemoteProtocolError"), ("half", "an answer that is no JSON"),
        ("timeout", "ReadTimeout"),
    ],
)  # fmt: skip
def test_failures_are_repeated_and_counted(port, monkeypatch, case, reason):
    """However long the server asks to wait: what is longer than a minute is capped."""
    monkeypatch.setattr(endpoint_module, "TIMEOUT", 2 if case == "timeout" else 60)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/{case}/v1")
    for _ in range(3):  # the third comes to grief
        assert post(endpoint)[0]["choices"]
    assert endpoint.retries == {reason: 1}


def test_a_server_that_is_busy_for_ever_is_given_up(port):
    endpoint = Endpoint(f"http://127.0.0.1:{port}/busy/v1")
    said = (
        r"8 requests failed in a row.*HTTP 429: slow down \(it asks to wait 7,200 s\); see the ser"
    )
    with pytest.raises(Exhausted, match=said):
        post(endpoint)
    assert endpoint.retries == {"HTTP 429": 7}


def test_what_broke_is_on_one_line(port):
    with pytest.raises(Exhausted, match=r"the last one with HTTP 502: 502 Bad Gateway;"):
        post(Endpoint(f"http://127.0.0.1:{port}/broken/v1"))


def test_a_rate_limit_that_serves_others_is_a_queue(port):
    """One request at a time is served, so some of 64 are turned away more than 8 times."""
    endpoint = Endpoint(f"http://127.0.0.1:{port}/queue/v1", in_flight=32)
    assert len(post(endpoint, 64)) == 64
    assert endpoint.retries["HTTP 429"] > 8


def test_the_server_says_when_to_come_back(port, monkeypatch):
    """For 0.35 s it refuses; our own delays would be over by then, and 7 more requests made."""
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 60)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/patient/v1")
    opening = BODY | {"max_tokens": 1, "seed": 0}
    post(endpoint, body=opening)
    post(endpoint, body=opening)
    post(endpoint)
    assert endpoint.retries == {"HTTP 429": 1}


def test_only_so_many_are_in_flight(port):
    endpoint = Endpoint(f"http://127.0.0.1:{port}/slow/v1", in_flight=3)
    assert len(post(endpoint, 20)) == 20
    notes = httpx.get(f"http://127.0.0.1:{port}/notes/slow").json()
    assert (notes["asked"], notes["most"]) == (20, 3)


def seconds(**headers):
    return retry_after(httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None), ({"retry_after": "7"}, 7.0), ({"retry_after": "0.5"}, 0.5),
        ({"retry_after": "0"}, 0.0), ({"retry_after": "-3"}, 0.0), ({"retry_after": "1e9"}, 1e9),
        ({"retry_after_ms": "250", "retry_after": "7"}, 0.25), ({"retry_after": "soon"}, None),
        ({"retry_after_ms": "soon", "retry_after": "7"}, 7.0), ({"retry_after": "nan"}, None),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry_after": "Wed, 21 Oct 2015"}, None), ({"retry_after": ""}, None),
    ],
)  # fmt: skip
def test_retry_after(headers, expected):
    assert seconds(**headers) == expected


def test_retry_after_a_date():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < seconds(retry_after=date) <= 100


# ---- what is not reached


def test_nothing_answers(monkeypatch):
    """Said at once at first contact; a proxy of the environment is named, without its password."""
    with pytest.raises(
        Refused, match=r"nothing answers there \(ConnectError: .*\); start the server"
    ):
        post(Endpoint("http://127.0.0.1:9/v1"))
    monkeypatch.setenv("http_proxy", "http://joe:pr0xy@127.0.0.1:9")
    with pytest.raises(Refused, match=r"through the proxy 127.0.0.1:9, from the env") as raised:
        post(Endpoint("http://10.0.0.1/v1"))
    assert "pr0xy" not in str(raised.value)


def test_proxies_of_the_environment(port, monkeypatch):
    """The scripted server as a proxy: it finds no such path, and so names itself."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(Refused, match=r"HTTP 40[45]|answers with"):
        post(Endpoint("http://10.0.0.1/v1"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert post(Endpoint(f"http://127.0.0.1:{port}/v1"))
    for proxy in ("foo://joe:pr0xy@h", "http://joe:pr0xy@h:port", "socks5://joe:pr0xy@h"):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(ValueError, match=r"proxy and certificate variables") as raised:
            post(Endpoint(f"http://127.0.0.1:{port}/v1"))
        assert "pr0xy" not in str(raised.value)


def test_certificates(port, tmp_path, monkeypatch):
    pem = tmp_path / "self.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
             "/CN=scripted", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pem,
             "-out", tmp_path / "cert.pem"], check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate")
    pem.write_text(pem.read_text() + (tmp_path / "cert.pem").read_text())
    with scripted(0, pem) as (secure, _):
        with pytest.raises(
            Refused, match=r"its certificate is not trusted here \(self.signed cert"
        ):
            post(Endpoint(f"https://127.0.0.1:{secure}/v1"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert post(Endpoint(f"https://127.0.0.1:{secure}/v1"))
    with pytest.raises(Refused, match=r"does not speak https .*; try http://"):
        post(Endpoint(f"https://127.0.0.1:{port}/v1"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match=r"certificate variables of this environment \(FileNot"):
        post(Endpoint("https://127.0.0.1:9/v1"))


# ---- the log


def test_one_line_a_minute_and_none_a_request(port, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/log/v1")
    post(endpoint, 50)
    assert not caplog.records
    endpoint._told -= endpoint_module.TELL_SECONDS
    post(endpoint, 50)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert re.search(r"/log/v1: 51 requests answered in \d+ s$", caplog.text, re.MULTILINE)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/busy/v1")
    endpoint._told -= endpoint_module.TELL_SECONDS
    with pytest.raises(Exhausted):
        post(endpoint)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert re.search(r" 0 requests answered in \d+ s, asked again: HTTP 429 1$", caplog.text, re.M)
