"""Records: every shape, every way to be bad, and the template."""

import gzip

import pytest

from megatron_cpo.records.dropped import BadRecord, Dropped
from megatron_cpo.records.reading import read_records
from megatron_cpo.records.record import EMPTY_ANSWER, Record
from megatron_cpo.records.shapes import DEFAULT_TEMPLATE, check_template, fill_template
from tests.texts import write_jsonl

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
    {"role": "user", "content": "never answered"},
]


def read(tmp_path, *records, refuse=False, **options):
    dropped = Dropped(refuse=refuse)
    path = write_jsonl(tmp_path / "r.jsonl", *records)
    return list(read_records([path], dropped, **options)), dropped


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Record("p", "c")),
        ({"prompt": "p", "completion": "c", "rejected": "r"}, Record("p", "c", ("r",))),
        ({"prompt": "p", "completion": "c", "rejected": ["r", "s"]}, Record("p", "c", ("r", "s"))),
        ({"prompt": "p", "completion": "c", "rejected": None}, Record("p", "c")),
        ({"prompt": "p", "completion": "c", "rejected": ""}, Record("p", "c")),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Record("p", "c", ("r",))),
        (
            {"instruction": "i", "context": "c", "response": "r", "category": "x"},
            Record("Instruction: i\nContext: c\nResponse:\n", "r"),
        ),
        (
            {"instruction": "i", "context": "", "response": "r"},
            Record("Instruction: i\nResponse:\n", "r"),
        ),
        ({"instruction": "i", "response": "r"}, Record("Instruction: i\nResponse:\n", "r")),
        (
            {"instruction": "i", "input": "c", "output": "r", "text": "all of it"},
            Record("Instruction: i\nContext: c\nResponse:\n", "r"),
        ),
        ({"text": "t", "url": "u"}, Record(None, "t")),
        (
            {"messages": CHAT},
            Record(
                "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Bye\nassistant: ", "See you"
            ),
        ),
    ],
)
def test_shapes_are_detected(tmp_path, fields, expected):
    records, dropped = read(tmp_path, fields)
    assert records == [expected]
    assert records[0].source == f"{tmp_path}/r.jsonl:1"
    assert not dropped.counts


def test_shape_can_be_forced(tmp_path):
    fields = {"messages": CHAT, "text": "t"}
    assert read(tmp_path, fields, shape="text")[0] == [Record(None, "t")]


@pytest.mark.parametrize("rejected", [["", "r"], ["r", " \n"]])
def test_an_empty_rejected_answer_costs_that_answer(tmp_path, rejected):
    """And not the record; it is counted."""
    for name in ("completion", "chosen"):
        records, dropped = read(tmp_path, {"prompt": "p", name: "c", "rejected": rejected})
        assert records == [Record("p", "c", ("r",), notes=(EMPTY_ANSWER,))]
        assert (dropped.counts, dropped.notes) == ({}, {EMPTY_ANSWER: 1})
        assert dropped.first[EMPTY_ANSWER].endswith("r.jsonl:1")


BAD = [
    (b"\xff\xfe", "not UTF-8"),
    (b'{"text": "\\ud800"}', "not UTF-8"),
    (b'{"text": ', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (["text"], "not a JSON object"),
    ({"content": "x"}, "no prompt"),
    ({"prompt": "p"}, "no prompt"),
    ({"prompt": 3, "completion": "c"}, "field 'prompt' is not a string"),
    ({"prompt": "p", "completion": None}, "no prompt"),
    ({"prompt": "p", "completion": " \n"}, "empty continuation"),
    ({"prompt": " ", "completion": "c"}, "empty prefix"),
    ({"prompt": "p", "completion": "c", "rejected": 5}, "field 'rejected' is neither"),
    ({"prompt": "p", "completion": "c", "rejected": [5]}, "field 'rejected' is neither"),
    ({"prompt": "p", "completion": "c", "label": False}, "a completion labelled false"),
    ({"instruction": "", "context": "c", "response": "r"}, "empty prefix"),
    ({"instruction": "i", "context": 1, "response": "r"}, "field 'context' is not a string"),
    ({"text": ""}, "empty continuation"),
    ({"messages": "hi"}, "field 'messages' is not a list of messages"),
    ({"messages": ["hi"]}, "field 'messages' is not a list of messages"),
    ({"messages": [{"role": "user"}]}, "field 'messages' has a message without a role or a text"),
    ({"messages": [{"from": ["a"], "value": "b"}]}, "field 'messages' has a message without a"),
    ({"messages": CHAT[:2]}, "no assistant turn"),
    ({"messages": CHAT[2:3]}, "empty prefix"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_bad_records_are_skipped_or_refused(tmp_path, bad, reason):
    good = {"prompt": "p", "completion": "c"}
    records, dropped = read(tmp_path, good, bad, bad, good)
    assert len(records) == 2
    ((name, count),) = dropped.counts.items()
    assert name.startswith(reason)
    assert count == 2
    assert dropped.first[name].endswith("r.jsonl:2")
    assert dropped.describe() == f"2 {name} (first: {tmp_path}/r.jsonl:2)"
    with pytest.raises(ValueError, match=rf"r\.jsonl:2: {reason}.*--on-bad-record skip"):
        read(tmp_path, good, bad, refuse=True)


def test_forced_shape_names_the_missing_field(tmp_path):
    with pytest.raises(ValueError, match=r"r.jsonl:1: missing field 'prompt'"):
        read(tmp_path, {"text": "t", "completion": "c"}, shape="prompt", refuse=True)
    for fields in ({"prompt": "p", "completion": "c"}, {"chosen_response": "c"}):
        with pytest.raises(ValueError, match=r"r.jsonl:1: no chosen and rejected answers"):
            read(tmp_path, fields, shape="preference", refuse=True)


def test_blank_lines_marks_and_gzip(tmp_path):
    """A byte order mark and blank lines are no records, yet lines keep their numbers."""
    content = b'\xef\xbb\xbf\n{"text": "a"}\r\n\n{"text": "b"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        records = list(read_records([str(tmp_path / name)], Dropped()))
        assert [r.continuation for r in records] == ["a", "b"]
        assert [r.source.rpartition(":")[2] for r in records] == ["2", "4"]


def test_files_follow_each_other_and_stream(tmp_path):
    """The first record is there before the second file is opened: nothing is read ahead."""
    first = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    records = read_records([first, str(tmp_path / "missing.jsonl")], Dropped())
    assert next(records).continuation == "a"
    with pytest.raises(ValueError, match=r"--input .*missing\.jsonl: no such file; give JSON"):
        next(records)


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([], r"dropped: none\); give data: there is no record in it"),
        ([b"1", b"x", b"y"], r"1 not a JSON object .*2 not JSON .*; each line must be a JSON obj"),
        (
            [b'{"a":1}', b'{"q":"\xff"}', b'{"q":"\xff"}'],
            r"; write the file anew as UTF-8, by iconv",
        ),
        ([{"q": "x", "a": "y"}], r"; a record needs .* with --prompt-field, .* first has q, a\)$"),
        ([{"rows": [{"text": "x"}]}], r"the first has rows, a list .*jq -c '\.rows\[\]' writes"),
        (
            [{"text": 3, "id": "x"}],
            r"'text' is not a string .*; give text there, .*has text, id\)$",
        ),
        ([{"messages": CHAT[:2]}], r"no assistant turn .*; a chat is a list of \{role, content\}"),
        ([{"text": " "}], r"1 empty continuation \(first: .*r\.jsonl:1\)\); see the first$"),
    ],
)
def test_no_usable_record(tmp_path, records, match):
    """What to do fits the reason for which most records were left out."""
    with pytest.raises(ValueError, match=match) as error:
        read(tmp_path, *records)
    assert "--max-length" not in str(error.value)


def test_of_many_inputs_a_few_are_named(tmp_path):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", {"text": ""}) for i in range(9)]
    with pytest.raises(
        ValueError, match=r"2\.jsonl and 6 more: no usable record .dropped: 9 empty"
    ):
        list(read_records(paths, Dropped()))


def test_template():
    """{name} is replaced, a line that names an empty field goes, other braces stay."""
    fields = {"a": "1", "b": "", "c": "{a}"}
    assert fill_template("{a}-{a}\n{b}: {a}\nx{} {c}", fields) == "1-1\nx{} {a}"
    with pytest.raises(BadRecord, match=r"missing field 'd'"):
        fill_template("{d}", fields)
    check_template(DEFAULT_TEMPLATE)
    with pytest.raises(ValueError, match=r"--prompt-template 'Answer: \{\}' names no field"):
        check_template("Answer: {}")


@pytest.mark.parametrize("context", [["c", "d"], {"title": "t"}])
def test_a_context_that_is_no_text_need_not_be_named(tmp_path, context):
    """A template without {context} takes the record; what is asked is the instruction alone."""
    fields = {"instruction": "i", "context": context, "response": "r"}
    records, _ = read(tmp_path, fields, template="Q: {instruction}\n")
    assert records == [Record("Q: i\n", "r")]
    assert records[0].texts == ("i", "r")
    with pytest.raises(ValueError, match=r"1 field 'context' is not a string"):
        read(tmp_path, fields)


def test_a_line_of_50_mb_is_counted_and_never_held(tmp_path):
    """As of a file that is one JSON array; what follows it is read. Plain and packed."""
    import gzip
    import tracemalloc

    path = tmp_path / "r.jsonl"
    good = b'{"prompt": "a", "completion": "b"}\n'
    path.write_bytes(good + b'{"text": "' + b"word " * 10_000_000 + b'"}\n' + good + b"x" * 100)
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    for source in (str(path), str(packed)):
        dropped = Dropped()
        tracemalloc.start()
        records = list(read_records([source], dropped))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [record.source for record in records] == [f"{source}:1", f"{source}:3"]
        assert dropped.counts == {"line longer than 32 MiB": 1, "not JSON": 1}
        assert dropped.first["line longer than 32 MiB"] == f"{source}:2"
        assert peak < 80 << 20
        with pytest.raises(ValueError, match=r":2: line longer than 32 MiB; correct this record"):
            list(read_records([source], Dropped(refuse=True)))


def test_a_line_may_be_as_long_as_the_limit(tmp_path, monkeypatch):
    from megatron_cpo.records import lines

    line = b'{"text": "abc"}'
    monkeypatch.setattr(lines, "LONGEST_LINE", len(line))
    path = tmp_path / "r.jsonl"
    path.write_bytes(line + b"\n" + line + b" \n" + line)
    dropped = Dropped()
    assert len(list(read_records([str(path)], dropped))) == 2
    assert sum(dropped.counts.values()) == 1


def test_earlier_turns_of_an_instruction_are_not_left_off(tmp_path):
    """A list without any is of no matter, and so is a text of that name."""
    fields = {"instruction": "And 2?", "output": "2"}
    kept = [{**fields, "history": value} for value in ([], None, "of Rome")]
    path = write_jsonl(tmp_path / "r.jsonl", *kept, {**fields, "history": [["1?", "1"]]})
    dropped = Dropped()
    assert len(list(read_records([path], dropped))) == 3
    [reason] = dropped.counts
    assert reason.startswith("earlier turns in 'history'")
