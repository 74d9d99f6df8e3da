"""Where objects are kept on this machine: whole files, by what is in them.

A file lies under the digest that its manifest has, and is compared with it before it lies there. So
it is the right one whoever has fetched it, for whichever store and run; what another version of a
store needs lies beside it. The folder may be removed at any time that no run uses it.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_cpo.files import make_folder, on_this_machine, one_process, whole_file
from megatron_cpo.progress import progress
from megatron_cpo.storage import remote

VARIABLE = "MEGATRON_CPO_OBJECTS"
"""Names the folder, in the environment, for commands without --object-storage-cache-path."""


def keep_in(folder: str | None) -> None:
    """From now on copies lie in a folder, Megatron's --object-storage-cache-path, if one is given.

    Processes that this one starts inherit it.

    Raises:
        ValueError: it is in object storage itself.
    """
    if folder is not None:
        on_this_machine(Path(folder))
        os.environ[VARIABLE] = os.path.abspath(folder)


def folder() -> Path:
    """Where copies lie: as `keep_in` was told, or in the user's cache."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megatron_cpo"


def beside(path_prefix: str) -> str:
    """A path of this machine, for what lies beside a store while it is made: PREFIX.build, say.

    Of a store in object storage it is in the folder of copies.
    """
    if not remote.is_remote(path_prefix):
        return path_prefix
    return str(folder() / "work" / quote(path_prefix, safe=""))


def kept(
    path_prefix: str, files: Mapping[str, Mapping[str, Any]], suffixes: Sequence[str], name: str
) -> Path:
    """Copies of some files of a store, whole and compared, in one folder, made if need be.

    Args:
        path_prefix: the store's.
        files: by suffix `bytes` and `sha256`, as its manifest has them.
        suffixes: which.
        name: before the digest in the folder's name; together with the files' own it decides
            which folder that is.

    Returns:
        The folder; in it they are `store` with their suffix.

    Raises:
        ValueError: an object is not what its manifest says.
        OSError: it cannot be had, or kept.
    """
    key = hashlib.sha256(" ".join(files[suffix]["sha256"] for suffix in suffixes).encode())
    target = folder() / f"{name}-{key.hexdigest()[:32]}"
    make_folder(target)
    for suffix in suffixes:
        path = target / f"store{suffix}"
        if not path.exists():
            # Of the ranks of a machine, one fetches it; without locks nothing is lost.
            with one_process(target / "flock"):
                if not path.exists():
                    _fetch(path_prefix + suffix, files[suffix], path)
    return target


def _fetch(url: str, expected: Mapping[str, Any], path: Path) -> None:
    digest, name = hashlib.sha256(), url.rpartition("/")[2]
    bar = progress(None, f"fetch {name}", "B", expected["bytes"], passing=True)
    with whole_file(path) as file, bar:
        for part in remote.parts(url, expected["bytes"]):
            digest.update(part)
            file.write(part)
            bar.update(len(part))
        if digest.hexdigest() != expected["sha256"]:
            raise ValueError(
                f"{url}: sha256 {digest.hexdigest()}, its manifest says {expected['sha256']}: it "
                "was changed or damaged; publish the store again with --replace"
            )
