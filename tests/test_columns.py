"""Fields by the names that the data has: --prompt-field and its like."""

import argparse

import pytest

from megatron_cpo.records.columns import NAMES, Columns
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.lines import Unreadable
from megatron_cpo.records.reading import read_records
from megatron_cpo.records.source import Source, add_source_arguments, source_from_args
from tests.texts import write_jsonl

RECORD = {
    "question": "q",
    "meta": {"answers": ["first", "second"], "bad.one": "b"},
    "a.b": "dotted",
    "text": "whole",
    "messages": [{"role": "assistant", "content": "m"}],
    "prompt": "p",
    "completion": "c",
    "chosen": "ch",
    "rejected": "r",
    "context": "con",
    "nothing": None,
}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Other shapes, and another name for the same, give way to what was named.
        ({"prompt": "question"}, {"prompt": "q", "completion": "c", "chosen": "ch"}),
        ({"prompt": "question", "completion": "a.b"}, {"prompt": "q", "completion": "dotted"}),
        ({"prompt": "question", "chosen": "text"}, {"prompt": "q", "chosen": "whole"}),
        ({"completion": "meta.answers.1"}, {"prompt": "p", "completion": "second"}),
        ({"rejected": "meta.bad.one"},
         {"rejected": "b", "completion": "c", "chosen": "ch", "messages": RECORD["messages"]}),
        ({"completion": "prompt", "prompt": "completion"}, {"prompt": "c", "completion": "p"}),
        ({"text": "question"}, {"text": "q"}),
        ({"messages": "meta.answers"}, {"messages": ["first", "second"], "chosen": "ch"}),
        ({"instruction": "question", "response": "text"},
         {"instruction": "q", "response": "whole"}),
        ({"instruction": "question", "context": "a.b", "response": "chosen"},
         {"instruction": "q", "context": "dotted", "response": "ch"}),
    ],
)  # fmt: skip
def test_names_of_the_data(names, expected):
    """Of the names that decide a shape, those are left that belong to it."""
    found = Columns(tuple(names.items())).of(RECORD)
    decisive = {"messages", "completion", "chosen", "response", "output", "text"}
    shown = {
        name: found.get(name) for name in [*found, *expected] if name in decisive | expected.keys()
    }
    assert shown == expected
    assert "nothing" not in found
    assert found["question"] == "q"  # a template may name it


@pytest.mark.parametrize(
    "path", ["questio", "meta.answers.2", "meta.answers.x", "question.x", "nothing"]
)
def test_a_field_that_is_not_there(path):
    found = Columns((("prompt", path),)).of(RECORD)
    assert isinstance(found, Unreadable)
    assert found == f"no field {path!r}, as --prompt-field says"
    assert isinstance(Columns((("rejected", path),)).of(RECORD), dict)  # a record may have none


def test_without_names_records_are_as_they_are_but_for_null():
    assert Columns().of(RECORD) == {k: v for k, v in RECORD.items() if k != "nothing"}


def test_names_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"--text-field a, --messages-field b: of no one shape"):
        Source(("x",), names=(("text", "a"), ("messages", "b")))


def test_flags_name_fields(tmp_path):
    """GSM8K and its like; a typo is answered with the fields that there are."""
    parser = add_source_arguments(argparse.ArgumentParser())
    path = write_jsonl(tmp_path / "r.jsonl", *[{"question": "q", "answer": "a", "text": "t"}] * 3)

    def source(*flags):
        return source_from_args(parser.parse_args(["--input", path, *flags]))

    given = source("--prompt-field", "question", "--completion-field", "answer")
    assert given.names == (("prompt", "question"), ("completion", "answer"))
    records = list(read_records(given.inputs, Dropped(), columns=given.columns))
    assert [(r.prefix, r.continuation) for r in records] == [("q", "a")] * 3
    typo = source("--prompt-field", "qestion", "--completion-field", "answer")
    match = r"3 no field 'qestion', as --prompt-field says .*first has question, answer, text\)$"
    with pytest.raises(ValueError, match=match):
        list(read_records(typo.inputs, Dropped(), columns=typo.columns))
    everything = source(*(word for name in NAMES[:4] for word in (f"--{name}-field", "x")))
    assert [name for name, _ in everything.names] == list(NAMES[:4])
    assert source().names == ()
