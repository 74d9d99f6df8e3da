"""The two things `megatron-cpo inspect` does: print a store, write its page."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_cpo.files import make_folder, refuse_inputs, write_whole
from megatron_cpo.groups.endings import Endings, endings_of
from megatron_cpo.groups.store import FILES, GroupReader, read_manifest
from megatron_cpo.inspection.facts import IDS
from megatron_cpo.inspection.page import render_page
from megatron_cpo.inspection.statistics import measure
from megatron_cpo.inspection.terminal import print_group, print_summary
from megatron_cpo.inspection.text import TokenText
from megatron_cpo.inspection.tokenizer import store_tokenizer
from megatron_cpo.inspection.view import view_group
from megatron_cpo.progress import progress


def print_store(
    path_prefix: str, groups: list[int], args: argparse.Namespace, console: Console | None = None
) -> None:
    """Print the groups asked for; none asked for: a summary of the store and its first group.

    Args:
        path_prefix: the store's PREFIX.
        args: the flags of `tokenizer.add_tokenizer_arguments`.

    Raises:
        ValueError: it is not a store, has no such group, or the tokenizer is another one.
    """
    reader, text, endings = _open(path_prefix, groups, args)
    console = console or Console(highlight=False)
    if not groups:
        found = measure(reader, endings, _progress)
        print_summary(console, Path(path_prefix).name, reader.manifest, found)
    if not text.has_text:
        console.print(Text(IDS, "dim"))
    for index in groups or [0]:
        print_group(console, view_group(index, reader[index], endings), text)


def write_page(
    path_prefix: str, html: str | Path, most: int, groups: list[int], args: argparse.Namespace
) -> str:
    """Write the page of a store; returns what to tell people.

    Args:
        html: the file to write.
        most: groups in the page; at least the ones asked for.
        groups: the ones asked for, first in the page.

    Raises:
        ValueError: as `print_store`, or `most` is not positive.
    """
    if most < 1:
        raise ValueError(f"--html-groups {most}: needs at least 1")
    refuse_inputs("--html", html, (f"{path_prefix}{each}" for each in (*FILES, ".json")))
    reader, text, endings = _open(path_prefix, groups, args)
    spaced = np.linspace(0, len(reader) - 1, min(most, len(reader))).astype(int).tolist()
    chosen = list(dict.fromkeys([*groups, *spaced]))[: max(most, len(groups))]
    found = measure(reader, endings, _progress)
    views = [view_group(index, reader[index], endings) for index in chosen]
    page = render_page(Path(path_prefix).name, reader.manifest, found, views, text)
    content = page.encode()
    make_folder(Path(html).parent)
    write_whole(Path(html), content)
    return f"{html}: {len(chosen):,} of {len(reader):,} groups, {len(content) / 1e6:.1f} MB"


def _open(
    path_prefix: str, groups: list[int], args: argparse.Namespace
) -> tuple[GroupReader, TokenText, Endings]:
    """The store, its text, and how it ends; what is refused without Megatron is so at once."""
    manifest = read_manifest(path_prefix)
    for group in groups:
        if not 0 <= group < manifest["groups"]:
            raise ValueError(
                f"--group {group}: {path_prefix} has groups 0 to {manifest['groups'] - 1}"
            )
    tokenizer = store_tokenizer(manifest, args)
    reader = GroupReader(path_prefix)
    return reader, TokenText(tokenizer), endings_of(manifest)


def _progress(groups: range) -> Any:
    """A progress bar, nothing over a small store."""
    return progress(groups, "read", "groups", passing=True)
