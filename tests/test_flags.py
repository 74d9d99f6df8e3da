"""docs/flags.md against Megatron's own parser, and its tables against the code."""

import argparse
import re
from pathlib import Path

import pytest

from harness.ranks import ROOT
from megatron_cpo.checkpoints.arguments import run_differences, said_of
from megatron_cpo.host.compat import megatron_parser, parsed_flags
from megatron_cpo.training.config import add_cpo_args
from megatron_cpo.training.support import check_supported

PAGE = (ROOT / "docs" / "flags.md").read_text()
VERSIONS = "Flags of one version"
MODELS = [
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64",
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    "--position-embedding-type rope --swiglu --ffn-hidden-size 64 --disable-bias-linear",
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    "--num-experts 4 --moe-router-topk 2 --ffn-hidden-size 32",
]


def sections() -> dict[str, list[str]]:
    """Rows of the tables by heading."""
    found: dict[str, list[str]] = {}
    for part in PAGE.split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        rows = [line for line in text.splitlines() if line.startswith("|")]
        found[title] = rows[2:]
    return found


def spans(row: str) -> list[str]:
    """What stands in back quotes and begins with a flag."""
    return re.findall(r"`(--[^`]+)`", row)


def classified() -> dict[str, list[str]]:
    """By flag, the headings it stands under: in the first column of a table that has flags."""
    found: dict[str, list[str]] = {}
    for title, rows in sections().items():
        if title != VERSIONS:
            for row in rows:
                for words in next(filter(None, map(spans, row.split("|"))), []):
                    found.setdefault(words.split()[0], []).append(title)
    return found


def first_flags() -> set[str]:
    """The first name of each flag of the parser that is installed."""
    actions = megatron_parser()._actions
    return {action.option_strings[0] for action in actions if action.dest != "help"}


def test_every_flag_of_megatron_has_its_place() -> None:
    """One that is missing here is new: run it with CPO, or refuse it, and say so on the page."""
    assert sorted(first_flags() - classified().keys()) == []


def test_every_flag_has_one_place() -> None:
    assert {flag: titles for flag, titles in classified().items() if len(titles) > 1} == {}


def test_no_flag_is_made_up() -> None:
    """Those that the installed version lacks are those of the other one."""
    of_one = {flag for row in sections()[VERSIONS] for flag in spans(row)}
    assert of_one <= classified().keys()
    assert classified().keys() - first_flags() <= of_one


def cpo_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_cpo_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


REFUSED = [
    (words, title == "Refused when training, scoring and drawing")
    for title, rows in sections().items()
    if title.startswith("Refused when")
    for row in rows
    for words in spans(row)[:1]
]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return cpo_parser()


@pytest.mark.parametrize(("words", "always"), REFUSED)
def test_what_is_refused_is_refused(
    parser: argparse.ArgumentParser, words: str, always: bool
) -> None:
    if words.split()[0] not in first_flags():
        pytest.skip("of another version")
    args = parser.parse_args(["--cpo-aux-loss", "--cpo-data-path", "a", *words.split()])
    with pytest.raises(ValueError, match=r"^--cpo-aux-loss with .*: not supported: "):
        check_supported(args)
    if always:
        with pytest.raises(ValueError, match=r"^scoring with .*: not supported: "):
            check_supported(args, training=False)
    else:
        check_supported(args, training=False)


@pytest.mark.parametrize("row", sections()["Part of the model"])
def test_what_is_part_of_the_model_is_compared(row: str) -> None:
    """Some model is another one with it."""
    [words] = spans(row)
    if words.split()[0] not in first_flags():
        pytest.skip("of another version")
    changed = [(parsed_flags(m.split()), parsed_flags(f"{m} {words}".split())) for m in MODELS]
    assert any(run_differences(said_of(there), here) for there, here in changed)


@pytest.mark.parametrize("row", sections()["Works, tested"])
def test_what_is_tested_is_tested_there(row: str) -> None:
    text = Path(ROOT, row.split("|")[2].strip()).read_text()
    for flag in spans(row):
        assert re.search(re.escape(flag) + r"(?![a-z0-9-])", text), flag
