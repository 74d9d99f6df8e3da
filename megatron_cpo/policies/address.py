"""Where an endpoint is and how one gets in: its address, its key, and what of them may be seen.

A key, a password and a query (some hosts want their key there) are sent and never shown: messages,
logs, tables of flags and stores name an address by `shown`, and what a server says is passed
through `Address.hide` first, for some of them repeat the key that they refuse.
"""

import base64
import os
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable in which every client of such servers looks for the key."""
VERSION = re.compile(r"v\d+\w*")
"""The last part of an address that is complete, such as /v1."""
METHODS = re.compile(r"/(chat/completions|completions|models)$")
"""What people copy along with an address."""


class ShownAddress(str):
    """The value of a flag that may be an address: printed and formatted without its password."""

    __slots__ = ()

    def __str__(self) -> str:
        return shown(self)

    __repr__ = __str__


def is_address(which: str) -> bool:
    """Whether a value is an address, and not a path or a name."""
    return which.lower().startswith(("http://", "https://"))


def shown(url: str) -> str:
    """An address without user, password, query and fragment; other texts as they are."""
    if not is_address(url):
        return url[:]
    scheme, _, rest = re.sub(r"[?#].*", "", url, flags=re.DOTALL).partition("://")
    host = rest.partition("/")[0]
    if "@" in rest and ("@" in host or not re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", host)):
        rest = rest.rpartition("@")[2]  # a password may have a slash of its own
    return f"{scheme}://{rest}"


@dataclass(frozen=True)
class Address:
    """Where to ask, and the header that lets us in."""

    shown: str
    bases: tuple[str, ...]
    """What the paths of requests are put behind: as given, and if no version is in it with /v1."""
    query: str = field(repr=False)
    """For behind the path: empty, or from the question mark on."""
    authorization: str | None = field(repr=False)
    """Of the header of that name."""
    asks_by: str
    """What lets us in, in words: `the key in OPENAI_API_KEY`; empty: nothing does."""
    key_hint: str
    """What to do if nothing or the wrong thing does."""
    secrets: tuple[str, ...] = field(repr=False)

    @classmethod
    def read(cls, url: str, flag: str, key_flag: str, key_variable: str | None) -> "Address":
        """The address that a flag gives, with the key of the environment.

        Args:
            url: up to the version or without it; a user and a password may stand in it.
            flag, key_flag: as messages call them.
            key_variable: the environment variable that has the key; None: `KEY_VARIABLE`, if set.

        Raises:
            ValueError: it is no address, there is no such variable, or the key cannot be sent.
        """
        url = url[:].strip()
        name = shown(url)
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port  # a wrong port raises
        except ValueError:
            host = None
        if not host or re.search(r"[\s\x00-\x1f]", name):
            raise ValueError(
                f"{flag} {' '.join(name.split())}: is no address; give one such as http://localhost:8000/v1"
            )
        variable = key_variable or KEY_VARIABLE
        hint = f"set the environment variable {variable} to it, or name another one with {key_flag}"
        authorization, asks_by = None, ""
        if parts.username is not None or parts.password is not None:
            if key_variable:
                raise ValueError(
                    f"{flag} {name}: has a user in the address and a key by {key_flag}; a "
                    "request can carry one of them: leave the other out"
                )
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
            authorization, asks_by = f"Basic {encoded}", "the user and password of the address"
            hint = f"write them as {parts.scheme}://USER:PASSWORD@{name.partition('://')[2]}"
            secrets = [encoded, password, parts.password or "", quote(password)]
        else:
            secrets = [key := _key(variable, f"{flag} {name}", key_flag, bool(key_variable))]
            if key:
                authorization, asks_by = f"Bearer {key}", f"the key in {variable}"
        path = METHODS.sub("", parts.path.rstrip("/"))
        base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        complete = VERSION.fullmatch(path.rpartition("/")[2])
        return cls(
            shown=name,
            bases=(base,) if complete else (base, f"{base}/v1"),
            query=f"?{parts.query}" if parts.query else "",
            authorization=authorization,
            asks_by=asks_by,
            key_hint=hint,
            secrets=tuple(sorted({s for s in (*secrets, parts.query) if s}, key=len)[::-1]),
        )

    def hide(self, text: str) -> str:
        """A text of others on one line, without control characters, and without what is secret."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _key(variable: str, what: str, key_flag: str, needed: bool) -> str:
    """The key of a variable; empty if it is not set and need not be.

    Raises:
        ValueError: it is needed and not there, or cannot stand in a header. The variable is not
            named: who mistook the flag gave the key itself.
    """
    key = os.environ.get(variable, "").strip()
    if needed and not key:
        raise ValueError(
            f"{what}: the environment variable that {key_flag} names is not set, or empty; give "
            "the name of the variable that holds the key, and not the key"
        )
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ValueError(
            f"{what}: the key that {key_flag} names (default: {KEY_VARIABLE}) has white space or "
            "other characters in it that cannot be sent; put the key alone into the variable"
        )
    return key
