"""Putting a store into object storage: its files, and last the manifest, without which it is none.

A reader that comes meanwhile finds no manifest; one that came before has the old one, and refuses
objects that are not those of it. Killed, the same call begins anew.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cpo.groups.store import FILES, check_sizes, is_there, read_manifest
from megatron_cpo.progress import progress
from megatron_cpo.storage import remote
from megatron_cpo.storage.blocks import BLOCKS, block_digests


def publish(path_prefix: str, url: str, replace: bool = False) -> bool:
    """Copy a store of this machine to object storage.

    Args:
        path_prefix: the store's PREFIX.
        url: the PREFIX that it gets, `s3://BUCKET/NAME` or `msc://PROFILE/NAME`.
        replace: what is there is overwritten, another store or damaged objects of this one.

    Returns:
        False if this store was there already, whole by its sizes; what lacks an object, or a part
        of one, is made whole.

    Raises:
        ValueError: no store here, or damaged; another one there; or the addresses are of no use.
        OSError: the connection stays lost, or the server refuses.
    """
    if remote.is_remote(path_prefix) or not remote.is_remote(url):
        raise ValueError(
            f"publish {path_prefix} {url}: needs the PREFIX of a store on this machine, and then "
            "an address in object storage, such as s3://BUCKET/runs/groups"
        )
    manifest = read_manifest(path_prefix)
    check_sizes(path_prefix, manifest)
    if not replace and is_there(url):
        there = read_manifest(url)
        if _without_blocks(there) != _without_blocks(manifest):
            raise ValueError(
                f"{url}: another store is there, of {_tokens(there)} and {there['groups']} groups; "
                f"{path_prefix} is of {_tokens(manifest)} and {manifest['groups']}: give another "
                "address, or --replace"
            )
        if _is_whole(url, there):
            return False
    put({suffix: Path(path_prefix + suffix) for suffix in FILES}, manifest, url)
    return True


def put(files: Mapping[str, Path], manifest: Mapping[str, Any], url: str) -> None:
    """Upload files of a store under the PREFIX `url`, the manifest last.

    Args:
        files: by suffix; what is left out is there already.
        manifest: has their sizes and digests, and those of all others.

    Raises:
        ValueError: a file is not what the manifest says.
        OSError: as `publish`.
    """
    described = dict(manifest["files"])
    blocks = b""
    for suffix, path in files.items():
        if suffix != ".bin":
            found = remote.sha256(str(path))
        else:
            found, blocks, described[BLOCKS] = block_digests(path)
        if found != described[suffix]["sha256"]:
            raise ValueError(
                f"{path}: sha256 {found}, its manifest says {described[suffix]['sha256']}: the "
                "file was changed or damaged; rebuild it"
            )
    remote.remove(url + ".json")
    for suffix in progress(list(files), "upload", "files"):
        remote.upload(files[suffix], url + suffix)
    if blocks:
        remote.write(blocks, url + BLOCKS)
    sealed = {**manifest, "files": described}
    check_sizes(url, sealed)
    text = json.dumps(sealed, indent=2, sort_keys=True, allow_nan=False) + "\n"
    remote.write(text.encode(), url + ".json")


def _is_whole(url: str, manifest: dict[str, Any]) -> bool:
    """Whether all objects of a store are there and as long as its manifest says."""
    files = manifest["files"].items()
    return all(remote.size(url + suffix) == facts["bytes"] for suffix, facts in files)


def _without_blocks(manifest: dict[str, Any]) -> dict[str, Any]:
    files = {suffix: facts for suffix, facts in manifest["files"].items() if suffix != BLOCKS}
    return {**manifest, "files": files}


def _tokens(manifest: dict[str, Any]) -> str:
    return f"tokens {manifest['files']['.bin']['sha256'][:12]}"
