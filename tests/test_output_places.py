"""What a command writes that is no store lies on this machine: another address is refused first."""

import os

import pytest

from megatron_cpo.storage import copies
from tests.commands import run_command

PLACE = "s3://bucket/runs/x"


@pytest.mark.parametrize(
    "words",
    [
        "tokenize --input a --output-prefix",
        "train-tokenizer --input a --output",
        "convert --from hf --to megatron --input a --output",
        "merge --mle a --cpo b --alpha 0.5 --output",
        "merge --diff a b --picture",
        "inspect a --html",
        "summarize --log a --png",
        "run a.yaml --output",
        "evaluate generate --data a --policy hf:a --output",
        "evaluate score --candidate a --output",
        "evaluate score --groups a --policy hf:b --output",
        "evaluate score --groups a --load b --output",
        "evaluate mauve --candidate a --output",
        "evaluate sweep --mle a --cpo b --data c --output",
        "evaluate report a --html",
        "evaluate report a --markdown",
        "evaluate report a --figures",
    ],
)
def test_an_output_in_object_storage_is_refused(words, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    flag = words.split()[-1]
    for place in (PLACE, PLACE.replace("s3", "msc")):
        assert run_command(monkeypatch, *words.split(), place) == 2
        said = f"error: argument {flag}: {place}: only stores of groups are written to object"
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_copies_of_objects_are_not_kept_in_object_storage(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{PLACE}: only stores of groups"):
        copies.keep_in(PLACE)
    assert copies.VARIABLE not in os.environ
