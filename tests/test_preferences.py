"""Preference data as the field writes it: y_1 is the chosen answer, `given` the rejected ones."""

import pytest

from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.reading import read_records
from megatron_cpo.records.record import EMPTY_ANSWER, Record
from tests.texts import write_jsonl


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


PLAIN = Record("user: q\nassistant: ", "good", ("bad",))
"""What each of the shapes with messages says; the tokenizer has no chat template here."""
FORMS = {
    "TRL, strings": (
        {"prompt": "q", "chosen": "good", "rejected": "bad"}, Record("q", "good", ("bad",)),
    ),
    "TRL, strings, several": (
        {"prompt": "q", "chosen": "good", "rejected": ["bad", "worse"]},
        Record("q", "good", ("bad", "worse")),
    ),
    "TRL, implicit prompt, strings": (
        {"chosen": "Q: one? A: It is 1.", "rejected": "Q: one? A: No."},
        Record("Q: one? A: ", "It is 1.", ("No.",)),
    ),
    "TRL, implicit prompt, within a word": (
        {"chosen": "Q: one? It is", "rejected": "Q: one? Is it"},
        Record("Q: one? ", "It is", ("Is it",)),
    ),
    "TRL, implicit prompt, one goes on": (
        {"chosen": "Q: one? Yes", "rejected": "Q: one? Yes, but no"},
        Record("Q: one? ", "Yes", ("Yes, but no",)),
    ),
    "TRL, implicit prompt, next word": (
        {"chosen": "Q: one?\nYes", "rejected": "Q: one? No"}, Record("Q: one?", "\nYes", (" No",)),
    ),
    "TRL, explicit prompt": (
        {"prompt": [u("q")], "chosen": [a("good")], "rejected": [a("bad")]}, PLAIN,
    ),
    "TRL, implicit prompt": (
        {"chosen": [u("q"), a("good")], "rejected": [u("q"), a("bad")]}, PLAIN,
    ),
    "prompt repeated in the conversations": (
        {"prompt": [u("q")], "chosen": [u("q"), a("good")], "rejected": [u("q"), a("bad")]}, PLAIN,
    ),
    "UltraFeedback": (
        {"prompt": "q", "messages": [u("q"), a("good")], "chosen": [u("q"), a("good")],
         "rejected": [u("q"), a("bad")], "score_chosen": 8.0}, PLAIN,
    ),
    "string prompt, messages": (
        {"prompt": "q", "chosen": [a("good")], "rejected": [a("bad")]}, PLAIN,
    ),
    "several rejected conversations": (
        {"chosen": [u("q"), a("good")], "rejected": [[u("q"), a("bad")], [u("q"), a("worse")]]},
        Record("user: q\nassistant: ", "good", ("bad", "worse")),
    ),
    "NeMo-Aligner": (
        {"prompt": "q", "chosen_response": "good", "rejected_response": "bad", "chosen_reward": 1},
        Record("q", "good", ("bad",)),
    ),
    "NeMo RL": (
        {"context": [u("q")], "completions": [{"rank": 1, "completion": [a("bad")]},
                                             {"rank": 0, "completion": [a("good")]}]}, PLAIN,
    ),
    "NeMo RL, equally good ones are no negatives": (
        {"context": "q", "completions": [{"rank": 2, "completion": "worse"},
         {"rank": 0, "completion": "good"}, {"rank": 0, "completion": "good as well"},
         {"rank": 1, "completion": "bad"}]}, Record("q", "good", ("bad", "worse")),
    ),
    "LLaMA-Factory, conversations": (
        {"conversations": [{"from": "human", "value": "q"}],
         "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}}, PLAIN,
    ),
    "LLaMA-Factory, conversations with a system's": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}],
         "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        Record("system: s\nuser: q\nassistant: ", "good", ("bad",)),
    ),
    "Anthropic's parts of a system's message": (
        {"system": [{"type": "text", "text": "s"}], "messages": [u("q"), a("good")]},
        Record("system: s\nuser: q\nassistant: ", "good"),
    ),
    "a system's message that is there": (
        {"system": "t", "messages": [{"role": "system", "content": "s"}, u("q"), a("good")]},
        Record("system: s\nuser: q\nassistant: ", "good"),
    ),
    "an empty one": ({"system": " ", "messages": [u("q"), a("good")], "rejected": "bad"}, PLAIN),
    "LLaMA-Factory, instructions": (
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        Record("Instruction: q\nResponse:\n", "good", ("bad",)),
    ),
    "conversational prompt and completion": (
        {"prompt": [u("q")], "completion": [a("good")]}, Record("user: q\nassistant: ", "good"),
    ),
    "prompt and completion of messages": (
        {"prompt": [u("q")], "completion": [a("good")], "rejected": [[a("bad")], "worse"]},
        Record("user: q\nassistant: ", "good", ("bad", "worse")),
    ),
    "a chat": (
        {"messages": [u("q"), a("good")], "rejected": [u("q"), a("bad")]}, PLAIN,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}],
         "rejected": "bad"}, PLAIN,
    ),
    "an instruction with its answer": (
        {"instruction": "q", "output": "good", "rejected": ["bad", "worse"]},
        Record("Instruction: q\nResponse:\n", "good", ("bad", "worse")),
    ),
    "labelled true": ({"prompt": "q", "completion": "good", "label": True}, Record("q", "good")),
    "nothing rejected": ({"prompt": "q", "chosen": "good", "rejected": None}, Record("q", "good")),
}  # fmt: skip


def read(tmp_path, fields):
    dropped = Dropped()
    path = write_jsonl(tmp_path / "r.jsonl", fields, {"prompt": "p", "completion": "c"})
    *found, last = read_records([path], dropped)
    assert last == Record("p", "c")
    return found, dropped


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_read(tmp_path, name):
    fields, expected = FORMS[name]
    found, dropped = read(tmp_path, fields)
    assert found == [expected]
    assert (dropped.counts, dropped.notes) == ({}, {})


@pytest.mark.parametrize(
    ("rejected", "kept"),
    [
        ([u("q"), a(" ")], ()),
        ([[u("q"), a("")], [u("q"), a("bad")]], ("bad",)),
        ([[u("q"), a("bad")], [u("q"), {"role": "assistant", "content": None}]], ("bad",)),
    ],
)
def test_an_empty_rejected_answer_costs_that_answer(tmp_path, rejected, kept):
    [record], dropped = read(tmp_path, {"chosen": [u("q"), a("good")], "rejected": rejected})
    assert (record.continuation, record.rejected) == ("good", kept)
    assert (dropped.counts, dropped.notes) == ({}, {EMPTY_ANSWER: 1})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chosen": "One.", "rejected": "Two."}, "chosen and rejected without a prompt have no"),
        ({"chosen": "The one.", "rejected": ""}, "chosen and rejected without a prompt, and one"),
        (
            {"question": "q", "chosen": "The one.", "rejected": "The two."},
            "chosen and rejected are strings without a prompt, beside 'question': name it prompt",
        ),
        (
            {"chosen": [u("q"), a("1")], "rejected": [u("r"), a("2")]},
            "conversations of chosen and rejected have no message in common: no prompt",
        ),
        (
            {"chosen": [u("q"), a("1"), u("r"), a("2")],
             "rejected": [u("q"), a("3"), u("r"), a("4")]},
            "chosen and rejected differ in more than the last answer",
        ),
        ({"prompt": [u("q")], "chosen": [], "rejected": [a("2")]}, "field 'chosen' is not a list"),
        ({"chosen": [u("q"), a(" ")], "rejected": [u("q"), a("2")]}, "empty continuation"),
        ({"prompt": 3, "chosen": "1", "rejected": "2"}, "field 'prompt' is not a string"),
        ({"context": [u("q")], "completions": [{"rank": 0, "completion": "1"}]}, "field 'completi"),
        ({"context": [u("q")], "completions": ["1", "2"]}, "field 'completions' is not a list of"),
        ({"prompt": "q", "completion": "bad", "label": False}, "a completion labelled false is no"),
        ({"messages": [u("q"), a("bad")], "label": False}, "a completion labelled false is no"),
        ({"instruction": "q", "output": "bad", "kto_tag": False}, "a completion labelled false is"),
    ],
)  # fmt: skip
def test_what_is_no_preference_is_said(tmp_path, fields, reason):
    found, dropped = read(tmp_path, fields)
    assert found == []
    [counted] = dropped.counts
    assert counted.startswith(reason)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"question": "q", "chosen": "1", "rejected": "2"}, "name that field with --prompt-field"),
        ({"chosen": "One.", "rejected": "Two."}, "give the prompt in a field of its own"),
        ({"chosen": [u("q"), a("1")], "rejected": [u("r"), a("2")]}, "give the prompt in a field"),
        (
            {"chosen": [u("q"), a("1"), u("r"), a("2")],
             "rejected": [u("q"), a("3"), u("r"), a("4")]},
            "give pairs of which nothing but the last answer differs",
        ),
        ({"prompt": "q", "chosen": "1", "rejected": 2}, "give text there, .* --rejected-field"),
        ({"messages": [u("q"), a("1")], "tools": [{}]}, "use a tokenizer that has one, or give it"),
        ({"messages": [u([{"type": "image_url"}]), a("1")]}, "leave such messages out: .* read$"),
    ],
)  # fmt: skip
def test_what_helps_is_advised(tmp_path, fields, remedy):
    """Not to give rejected answers, where they are there, nor to write a chat as a chat."""
    path = write_jsonl(tmp_path / "r.jsonl", fields)
    with pytest.raises(ValueError, match=rf"no usable record \(dropped: 1 .*\); {remedy}"):
        list(read_records([path], Dropped()))
