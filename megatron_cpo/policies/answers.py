"""What the answer of an HTTP server means: JSON that was asked for, a failure, or a refusal."""

import email.utils
import json
import re
import ssl
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import httpx

from megatron_cpo.policies.address import Address, shown

AGAIN = {408, 409, 425, 429}
"""Statuses below 500 after which a request is repeated."""
FOR_GOOD = {501, 505, 511}
"""Statuses from 500 on after which it is not."""
BAD_REQUEST = (400, 413, 422)
"""Statuses of requests that the server will not understand the next time either."""
BY_PROXIES = {403, 407, 502, 503, 504}
"""Statuses that may be a proxy's."""
QUOTA = re.compile(r"insufficient_quota|billing|exceeded your current quota", re.IGNORECASE)
"""429, but waiting does not help."""


class Refused(ValueError):
    """A request that is not answered, however often it is sent.

    Args:
        message: for the user.
        status: HTTP's; 0: there was no answer.
        detail: what the server said of it.
        absent: there is nothing behind the address that knows such requests.
    """

    def __init__(
        self, message: str, status: int = 0, detail: str = "", absent: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.detail, self.absent = status, detail, absent

    @property
    def said(self) -> str:
        """Status and detail, short."""
        return f"HTTP {self.status} {self.detail[:300]}".rstrip()


class Failed(Exception):
    """A request that may be answered the next time.

    Args:
        reason: to count by.
        text: with more of it, for the user.
        status: HTTP's; 0: there was no answer.
        wait: seconds that the server asks us to wait.
    """

    def __init__(
        self, reason: str, text: str = "", status: int = 0, wait: float | None = None
    ) -> None:
        super().__init__(text or reason)
        self.reason, self.status, self.wait = reason, status, wait

    @property
    def busy(self) -> bool:
        """Whether the server serves others first."""
        return self.status in (429, 503)


class Exhausted(ValueError):
    """A request that has failed too often; status and detail are those of the last time."""

    def __init__(self, message: str, status: int = 0, detail: str = "") -> None:
        super().__init__(message)
        self.status, self.detail = status, detail

    @property
    def said(self) -> str:
        """How often, and what the last failure was."""
        return self.detail


def read_answer(response: httpx.Response, name: str, address: Address) -> dict[str, Any]:
    """The JSON object of an answer.

    Args:
        name: of the endpoint, for the beginning of messages.

    Raises:
        Failed: the server is busy or failing, or the answer is cut off.
        Refused: it refuses, is another kind of server, or its JSON has another shape.
    """
    status, value = response.status_code, _json(response)
    if isinstance(value, dict) and 200 <= status < 300:
        if not value.get("error"):
            return value
        code = value["error"].get("code") if isinstance(value["error"], dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 400
    detail = address.hide(_detail(value, response))
    found = f"HTTP {status}{f': {detail[:300]}' if detail else ''}"
    if status in BY_PROXIES:
        found += _by_proxy(str(response.url))
    if status in AGAIN or (status >= 500 and status not in FOR_GOOD):
        if not (status == 429 and QUOTA.search(response.text)):
            wait = retry_after(response.headers)
            asked = f" (it asks to wait {wait:,.0f} s)" if wait and wait > 1 else ""
            raise Failed(f"HTTP {status}", found + asked, status, wait)
    elif 200 <= status < 300 and value is None and not _is_page(response):
        raise Failed(
            "an answer that is no JSON", f"an answer that is no JSON ({detail[:300]})", status
        )
    raise Refused(
        f"{name}: {_refusal(status, found, response, address)}",
        status,
        detail,
        absent=(200 <= status < 300 and value is None)
        or (status in (404, 405, 501) and "model" not in detail.lower()),
    )


def _refusal(status: int, said: str, response: httpx.Response, address: Address) -> str:
    """What a status means here, and what to do."""
    if 200 <= status < 300:
        what = "a web page" if _is_page(response) else "JSON of another shape"
        return f"answers with {what} ({said}); give the address of the server's API, up to /v1"
    if status == 401:
        if address.asks_by:
            return f"does not take {address.asks_by} ({said}); {address.key_hint}"
        return f"wants a key, and none was sent ({said}); {address.key_hint}"
    if status == 403:
        if address.asks_by:
            return f"does not allow this with {address.asks_by} ({said})"
        return f"does not allow this ({said}); if it wants a key, {address.key_hint}"
    if status == 407:
        return (
            f"the proxy wants a user and a password ({said}); give them in the variable that names "
            "it, as http://USER:PASSWORD@HOST:PORT, or go without it by NO_PROXY"
        )
    if status in (404, 405, 501):
        path = response.url.path
        return (
            f"has nothing at {path} ({said}); give the address of an OpenAI-compatible server up "
            "to /v1, such as http://localhost:8000/v1"
        )
    if 300 <= status < 400:
        where = address.hide(shown(response.headers.get("location", "")))
        return f"sends us on to {where or 'nowhere'} ({said}); give the address where it is"
    return said


def no_answer(error: Exception, name: str, address: Address, url: str, reached: bool) -> Exception:
    """`Failed` or `Refused`, by the reason why a request to a URL has no answer.

    Args:
        reached: there was an answer to another one.
    """
    text, by_proxy = address.hide(said(error)), _by_proxy(url)
    tls = _caused_by(error, ssl.SSLError)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return Refused(
            f"{name}: its certificate is not trusted here ({tls.verify_message}); name "
            "the file of the authority that signed it, or of itself, in the environment "
            f"variable SSL_CERT_FILE{by_proxy}"
        )
    if tls is not None and not reached:
        return Refused(f"{name}: does not speak https ({text}); try http://{by_proxy}")
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return Refused(f"{name}: cannot be asked ({text})")
    if isinstance(error, httpx.ProxyError) and text.partition(": ")[2][:2] == "40":
        return Refused(f"{name}: cannot be reached ({text}){by_proxy}")
    unreached = httpx.ConnectError | httpx.ConnectTimeout | httpx.ReadTimeout
    if not reached and isinstance(error, unreached):
        return Refused(
            f"{name}: nothing answers there ({text}){by_proxy}; start the server first, "
            "and give its address up to /v1, such as http://localhost:8000/v1"
        )
    if isinstance(error, httpx.ReadTimeout):
        text += ": no answer in time; ask for less at a time, or for shorter texts"
    return Failed(type(error).__name__, text + by_proxy)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks us to wait, 0 or more; None if it does not say, or not so.

    `Retry-After` has seconds or a date; `Retry-After-Ms` is what some hosts send beside it.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = unit * float(headers.get(name, ""))
        except ValueError:
            continue
        return max(seconds, 0.0) if seconds == seconds else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(date.timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


def said(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}".rstrip(": ")


def _by_proxy(url: str) -> str:
    """Through which proxy of the environment requests to a URL go, to be appended; or empty."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    where = proxy.rpartition("@")[2].rpartition("://")[2].rstrip("/")
    return f" (through the proxy {where}, from the environment)"


def _caused_by(error: BaseException | None, kind: type[ssl.SSLError]) -> ssl.SSLError | None:
    """The error of a kind among the causes of another."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _json(response: httpx.Response) -> Any:
    """The value of a body; None if it is none."""
    try:
        return response.json()
    except ValueError:
        return None


def _is_page(response: httpx.Response) -> bool:
    kind = response.headers.get("content-type", "")
    return "html" in kind or response.text.lstrip()[:1] == "<"


def _detail(value: Any, response: httpx.Response) -> str:
    """What a server says of an error, in the places where servers say it."""
    found = value
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    if isinstance(found, str):
        return found
    if value is not None:
        return json.dumps(found)
    title = re.search(r"<title>(.*?)</title>", response.text, re.IGNORECASE | re.DOTALL)
    return title.group(1) if title else response.text[:1000]
