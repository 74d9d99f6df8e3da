"""Fields by the names that the data has: --prompt-field and its like."""

import argparse

import pytest

from megatron_cpo.records.chats import Chat
from megatron_cpo.records.columns import NAMES, Columns
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.lines import Unreadable
from megatron_cpo.records.reading import parse_record, read_records
from megatron_cpo.records.shapes import DEFAULT_TEMPLATE
from megatron_cpo.records.source import Source, add_source_arguments, source_from_args
from tests.texts import write_jsonl

RECORD = {
    "question": "q",
    "meta": {
        "answers": ["first", "second"],
        "bad.one": "b",
        "chat": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "m"}],
    },
    "a.b": "dotted",
    "text": "whole",
    "messages": [{"role": "assistant", "content": "m"}],
    "prompt": "p",
    "completion": "c",
    "chosen": "ch",
    "rejected": "r",
    "context": "con",
    "nothing": None,
    "conversations": [{"from": "gpt", "value": "s"}],
    "chosen_response": "nemo",
    "rejected_response": "worse",
    "completions": [{"rank": 0}],
    "output": "o",
}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, ("p", "ch", ("r",))),
        ({"prompt": "question"}, ("q", "ch", ("r",))),
        ({"prompt": "question", "completion": "a.b"}, ("q", "dotted", ("r",))),
        ({"prompt": "question", "chosen": "text"}, ("q", "whole", ("r",))),
        ({"prompt": "question", "chosen": "text", "rejected": "meta.bad.one"},
         ("q", "whole", ("b",))),
        ({"completion": "meta.answers.1"}, ("p", "second", ("r",))),
        ({"rejected": "meta.bad.one"}, ("p", "ch", ("b",))),
        ({"completion": "prompt", "prompt": "completion"}, ("c", "p", ("r",))),
        ({"text": "question"}, (None, "q", ())),
        ({"messages": "meta.chat"}, ("user: u\nassistant: ", "m", ("r",))),
        ({"instruction": "question", "response": "text"},
         ("Instruction: q\nContext: con\nResponse:\n", "whole", ("r",))),
        ({"instruction": "question", "context": "a.b", "response": "chosen"},
         ("Instruction: q\nContext: dotted\nResponse:\n", "ch", ("r",))),
        ({"instruction": "question", "chosen": "text"},
         ("Instruction: q\nContext: con\nResponse:\n", "whole", ("r",))),
    ],
)  # fmt: skip
def test_what_is_named_wins(names, expected):
    """Over other shapes, and over other names for the same, of a record that has them all."""
    fields = Columns(tuple(names.items())).of(RECORD)
    record = parse_record(fields, "auto", DEFAULT_TEMPLATE, Chat())
    assert (record.prefix, record.continuation, record.rejected) == expected
    assert "nothing" not in fields
    assert fields["question"] == "q"  # a template may name it


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ({"context": "notes"}, {"instruction": "q", "notes": "n", "output": "a"}),
        ({"instruction": "ask"}, {"ask": "q", "input": "n", "output": "a"}),
        ({"rejected": "bad"}, {"instruction": "q", "input": "n", "output": "a", "bad": "b"}),
    ],
)
def test_the_other_fields_may_have_their_usual_names(names, fields):
    found = Columns(tuple(names.items())).of({**fields, "text": "whole"})
    record = parse_record(found, "auto", DEFAULT_TEMPLATE, Chat())
    assert (record.prefix, record.continuation) == (
        "Instruction: q\nContext: n\nResponse:\n", "a",
    )  # fmt: skip
    assert record.rejected == (("b",) if "bad" in fields else ())


def test_tools_may_be_named_beside_sharegpt_conversations():
    fields = {"conversations": [{"from": "gpt", "value": "a"}], "functions": "[]"}
    assert Columns((("tools", "functions"),)).of(fields) == {**fields, "tools": "[]"}


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
