"""The border between prompt and answer, with every kind of tokenizer that Megatron builds.

The contract: prefix + y_1 are the tokenizer's tokens of the whole text; the prefix ends at the last
border of tokens at or before the end of the prompt without the white space there; all candidates
of a record have the same prefix, and another record's answer is encoded behind it as its own is.
"""

import json

import numpy as np
import pytest

from megatron_cpo.negatives.answers import Answers
from megatron_cpo.records.border import AS_IS
from megatron_cpo.records.dropped import BadRecord, Dropped
from megatron_cpo.records.encoder import REWRITTEN, Encoder
from megatron_cpo.records.pair_files import write_lm_dataset
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.source import Source
from tests.texts import write_jsonl, write_pairs
from tests.tokenizer_kinds import KINDS, built, legacy_sentencepiece, sentencepiece

TEXTS = [
    ("The capital of France is ", "Paris."),
    ("Is it so?", " Yes, it is."),
    ("Is it so?", "  Two  spaces "),
    ("x = [", "1, 2]"),  # `[1` is a token of some
    ("x = [", "12]"),
    ("One\n", "Two three."),
    ("Why?\n", "So  it 漢字."),  # `?\n` is a token of some
    ("Q: 🙂  \n\n", "\n A"),
    ("漢字", "かな"),
    ("def f(x):\n\t", "return  [x]\n"),
    ("The ca", "pital of France"),  # in the middle of a word
    ("Tell me:\n", "the rest"),
]
_made = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("border")


@pytest.fixture(params=KINDS)
def tokenizer(request, folder):
    if request.param not in _made:
        _made[request.param] = KINDS[request.param](folder / str(len(_made)))
    return _made[request.param]


def expected_cut(tokenizer, ids, known):
    """Tokens of the longest prefix whose text is one of the known text's; by decoding them all."""
    best = 0
    for n in range(1, len(ids) + 1):
        text = tokenizer.detokenize(ids[:n])  # perhaps behind a space that it puts before a text
        if known.startswith((text, text.removeprefix(" "))):
            best = n
    return best


@pytest.mark.parametrize(("prompt", "answer"), TEXTS)
def test_a_pair_is_the_whole_text_cut_where_the_prompt_ends(tokenizer, prompt, answer):
    encoder = Encoder(tokenizer)
    whole = encoder.prefix(prompt + answer)
    pair = encoder.pair(prompt, answer)
    assert [*pair.prefix, *pair.continuation] == [*whole, encoder.eod]
    body = encoder.unframed(whole)
    cut = expected_cut(tokenizer, body, prompt.rstrip())
    assert encoder.unframed(pair.prefix.tolist()) == body[:cut]
    assert tokenizer.detokenize(body).removeprefix(" ") == prompt + answer
    assert pair.notes == ()


def test_another_record_s_answer_is_encoded_behind_this_one_s_prefix(tokenizer, folder):
    """As the whole text would be: this record's white space, and then the other's answer.

    Where the tokenizer would then end the prefix otherwise, nothing is given.
    """
    encoder = Encoder(tokenizer)
    path = str(folder / f"pairs-{id(tokenizer)}")
    pairs = write_pairs((encoder.pair(*texts) for texts in TEXTS), path, 10_000)
    answers, refused = Answers(pairs, encoder), 0
    for index, (prompt, own) in enumerate(TEXTS):
        lead = (prompt + own)[: len(prompt + own) - len(own.lstrip())]
        prefix = pairs.prefix(index).tolist()
        for other, (_, answer) in enumerate(TEXTS):
            whole = [*encoder.prefix(lead + answer.lstrip()), encoder.eod]
            found = answers.behind(index, other)
            if whole[: len(prefix)] == prefix:
                assert found.tolist() == whole[len(prefix) :], (prompt, answer)
            else:
                assert found is None, (prompt, answer)
                refused += 1
    assert refused <= 4


def test_answers_behind_prompts_of_one_form_are_taken_as_they_are(tokenizer, folder):
    """No encoding: that is what most data is like, and what a build's speed rests on."""
    encoder = Encoder(tokenizer)
    if tokenizer is _made.get("byte-level BPE without a word rule"):
        pytest.skip("its tokens hold the end of the prompt, and that is another one each time")
    for border in (" ", "\n"):
        texts = [(f"Say {i}:{border}", f"The number {i}.") for i in range(4)]
        path = str(folder / f"like-{id(tokenizer)}-{ord(border)}")
        pairs = write_pairs((encoder.pair(*text) for text in texts), path, 10_000)
        plain, encoding = Answers(pairs), Answers(pairs, encoder)
        for index, other in ((0, 1), (2, 3)):
            found = encoding.behind(index, other)
            assert found.tolist() == plain.behind(index, other).tolist()
            assert found.tolist() == pairs.continuation(other).tolist()
        assert len(set(pairs.borders["like"].tolist())) == 1


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("x = [", ["foo]", "1, 2]", "12]"]),  # some hold `[1` in a token, so the border is before
        ("x = [", ["12]", "foo]"]),
        ("Is it so?", [" Yes", " No", "\nNo"]),
        ("Why?\n", ["Because", "\n\nNo."]),
    ],
)
def test_rejected_answers_share_the_prefix(tokenizer, prompt, answers):
    encoder = Encoder(tokenizer)
    pair = encoder.pair(prompt, *answers)
    for answer, tokens in zip(answers, [pair.continuation, *pair.rejected], strict=True):
        assert [*pair.prefix, *tokens] == [*encoder.prefix(prompt + answer), encoder.eod]
    rest = encoder.prefix(prompt)[len(pair.prefix) :]
    assert len(rest) <= 4, "no further to the left than a word"


@pytest.mark.parametrize("name", [*KINDS, "legacy"])
def test_control_tokens_in_a_text_stay_text(folder, name):
    """EOD is put behind it, and BOS before it; none comes out of what a record spells."""
    tokenizer = {**KINDS, "legacy": legacy_sentencepiece}[name](folder / f"control {name}")
    encoder = Encoder(tokenizer)
    spelled = [*encoder.control.by_text][:9]
    assert spelled
    for prompt, answer in (("What is {}?", " An {} b {} c"), ("What is{}", "{}An")):
        texts = [text.replace("{}", " ".join(spelled)) for text in (prompt, answer)]
        pair = encoder.pair(*texts)
        body = encoder.unframed([*pair.prefix.tolist(), *pair.continuation.tolist()[:-1]])
        assert encoder.control.ids.isdisjoint(body)
        assert pair.continuation[-1] == encoder.eod
        note, *rest = pair.notes
        assert note.removesuffix(" written in a text, kept as text") in spelled
        if name == "byte-level BPE, bytes missing":  # it cannot spell `<`
            assert rest == [REWRITTEN]
        else:
            assert encoder.spelled(np.array(body)).decode().removeprefix(" ") == "".join(texts)


def test_numbers_are_tokens_of_the_null_tokenizer():
    """It splits at spaces, so the space between prompt and answer has to be there."""
    encoder = Encoder(built("NullTokenizer", None, vocab_size=64))
    pair = encoder.pair("1 2 ", "3 4", "5")
    assert pair.prefix.tolist() == [1, 2]
    assert [c.tolist() for c in (pair.continuation, *pair.rejected)] == [[3, 4, 63], [5, 63]]
    assert (pair.notes, pair.border.kind) == ((), AS_IS)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": []},
        {"remove_extra_whitespaces": True},
    ],
)
def test_a_text_that_the_tokenizer_rewrites_is_said(folder, tmp_path, options):
    """Its tokens are still those of the whole text, at one border; it is counted, and kept."""
    path = sentencepiece(tmp_path / "model", **options)
    tokenizer = built("SentencePieceTokenizer", path)
    records = [
        {"prompt": "Say  ①:\n", "completion": "The  number."},
        {"prompt": "Say it: ", "completion": "The number."},
    ]
    source, dropped = Source((write_jsonl(tmp_path / "r.jsonl", *records),)), Dropped()
    changed, kept = read_pairs(source, tokenizer, dropped)
    assert dropped.notes == {REWRITTEN: 1}
    assert dropped.first[REWRITTEN].endswith("r.jsonl:1")
    for pair, record in zip((changed, kept), records, strict=True):
        whole = tokenizer.tokenize(record["prompt"] + record["completion"])
        assert [*pair.prefix, *pair.continuation] == [*whole, tokenizer.eod]
        ends = tokenizer.tokenize(record["prompt"].rstrip())
        assert pair.prefix.tolist() == ends


def test_a_prompt_without_a_token_of_its_own_is_refused(folder):
    """Nothing of it is left before the border where its one token holds some of the answer."""
    encoder = Encoder(KINDS["byte-level BPE"](folder / "refused"))
    assert len(encoder.prefix("in")) == 1
    with pytest.raises(BadRecord, match="no tokens in the prefix or in a continuation"):
        encoder.pair("i", "n")
    assert encoder.pair("漢", "字").prefix.tolist() == encoder.prefix("漢")


def test_mle_sees_the_tokens_that_the_groups_compare(folder, tmp_path):
    """One document a record, whatever the border and the rejected answers."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = KINDS["SentencePiece"](folder / "mle")
    records = [{"prompt": p, "completion": a, "rejected": " no"} for p, a in TEXTS]
    source = Source((write_jsonl(tmp_path / "r.jsonl", *records),))
    write_lm_dataset(source, tokenizer, str(tmp_path / "lm"))
    documents = IndexedDataset(str(tmp_path / "lm"))
    pairs = read_pairs(source, tokenizer, Dropped(), rejected=1)
    for record, document, pair in zip(records, documents, pairs, strict=True):
        whole = tokenizer.tokenize(record["prompt"] + record["completion"])
        assert document.tolist() == [*whole, tokenizer.eod]
        assert np.concatenate([pair.prefix, pair.continuation]).tolist() == document.tolist()


def test_a_build_says_which_contract_it_follows_and_refuses_the_other(folder, tmp_path):
    """An unfinished build of an earlier release, whose manifest has no such entry."""
    from megatron_cpo.building.build import build_groups
    from megatron_cpo.building.config import BuildConfig

    tokenizer = KINDS["SentencePiece"](folder / "contract")
    path = write_jsonl(
        tmp_path / "r.jsonl", *({"prompt": f"{i}: ", "completion": "a b c"} for i in range(4))
    )
    config = BuildConfig(Source((path,)), str(tmp_path / "g"), negatives="tn=1")
    report = build_groups(config, tokenizer)
    assert report.manifest["border"] == "whole-text"
    old = {**report.manifest}
    del old["border"]
    (tmp_path / "g.json").write_text(json.dumps(old))
    match = r'built by an earlier release with border "each side alone", this command has "whole'
    with pytest.raises(ValueError, match=match):
        build_groups(config, tokenizer)
    (tmp_path / "g.json").unlink()
    (tmp_path / "g.build").mkdir()
    (tmp_path / "g.build" / "command.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"g\.build holds unfinished work by an earlier rel"):
        build_groups(config, tokenizer)
