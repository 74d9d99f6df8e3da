"""Tokens as text, whatever tokenizer made them, and which tokenizer a store asks for."""

import argparse
import base64
import json
from pathlib import Path

import pytest

from harness.stores import null_tokenizer
from megatron_cpo.inspection.text import TokenText, visible
from megatron_cpo.inspection.tokenizer import add_tokenizer_arguments, store_tokenizer
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.tokenizing import tokenizer_identity
from tests.inspecting import flags
from tests.texts import DOLLY, dolly_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inspection")


@pytest.fixture(scope="module")
def sentencepiece(folder):
    return dolly_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(folder):
    """A byte-level BPE of 400 tokens in a Hugging Face folder, as `--tokenizer-model` names it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    lines = Path(DOLLY).read_text().splitlines()[:50]
    bpe.train_from_iterator(lines, vocab_size=400, special_tokens=["<|end of text|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end of text|>")
    fast.save_pretrained(str(folder / "bpe"))
    args = flags("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder / "bpe")
    return store_tokenizer({}, args)


@pytest.fixture(scope="module")
def tiktoken(folder):
    """The 256 bytes and two words, behind 1000 special tokens, as Megatron wants it."""
    tokens = [*(bytes([i]) for i in range(256)), b" two", b" \xe6\xbc"]
    model = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": ""}
        for i, t in enumerate(tokens)
    ]
    (folder / "tiktoken.json").write_text(json.dumps(model))
    given = ["--tokenizer-type", "TikTokenizer", "--vocab-size", 1000 + len(tokens)]
    return store_tokenizer({}, flags(*given, "--tokenizer-model", folder / "tiktoken.json"))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\nb", "a↵\nb"),
        ("a\tb\rc", "a⇥\tb␍c"),
        ("\x1b[31m\x00\x7f", "␛[31m␀␡"),
        ("a\u202eb\u200b\ufeff", "a⟨U+202E⟩b⟨U+200B⟩⟨U+FEFF⟩"),
        ("a\xa0b", "a⍽b"),
        ("👩‍👧 é שלום", "👩‍👧 é שלום"),
        ("\udce2\udc82", "⟨E2⟩⟨82⟩"),
    ],
)
def test_what_is_hidden_shows(raw, shown):
    assert visible(raw) == shown


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "tiktoken"])
def test_cells_spell_the_text(name, request):
    """Characters that several tokens spell are whole; cut in the middle they are bytes."""
    tokenizer = request.getfixturevalue(name)
    text = TokenText(tokenizer)
    words = "A naïve café,\n\n  two spaces 漢字 🙂 <s> ▁ Ġ <0x0A> שלום"
    ids = Encoder(tokenizer).prefix(words)
    shown = text.text(ids)
    if name == "sentencepiece":  # the model itself puts a space before, and ▁ is its space
        assert shown == " " + visible(words.replace("▁", " "))
    else:
        assert shown == visible(words)
    smile = Encoder(tokenizer).continuation("🙂")
    assert len(smile) > 3
    assert text.cells(smile[:-1])[-1].endswith("⟨F0⟩⟨9F⟩⟨99⟩")
    assert text.cells(smile)[-1].endswith("🙂")
    assert text.text(smile[-1:]) == "⟨82⟩"
    assert text.cells([10**6]) == ["⟨#1000000⟩"]
    assert text.cells([*smile[:-1], 10**6]) == [*text.cells(smile[:-1]), "⟨#1000000⟩"]


def test_token_ids_where_there_is_no_text():
    for tokenizer in (None, null_tokenizer()):
        text = TokenText(tokenizer)
        assert not text.has_text
        assert text.text([3, 1, 4]) == "3 1 4"


def test_flags_are_megatrons():
    """Same names, same destinations, same defaults; and every one that the builder reads."""
    from megatron.training.arguments import add_megatron_arguments

    theirs = {
        option: action
        for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions
        for option in action.option_strings
    }
    ours = [
        a for a in add_tokenizer_arguments(argparse.ArgumentParser())._actions if a.dest != "help"
    ]
    assert len(ours) > 10
    for action in ours:
        (option,) = action.option_strings
        assert (action.dest, action.default) == (theirs[option].dest, theirs[option].default)


def test_tokenizer_type_comes_from_the_store(folder, sentencepiece, byte_level):
    for tokenizer, model in ((sentencepiece, "tokenizer.model"), (byte_level, "bpe")):
        manifest = {"tokenizer": tokenizer_identity(tokenizer)}
        built = store_tokenizer(manifest, flags("--tokenizer-model", folder / model))
        assert tokenizer_identity(built) == manifest["tokenizer"]
    assert store_tokenizer(manifest, flags()) is None


def test_tokenizers_that_do_not_fit(folder, sentencepiece, byte_level, tmp_path):
    manifest = {"tokenizer": tokenizer_identity(sentencepiece)}
    args = flags("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder / "bpe")
    with pytest.raises(ValueError, match=r'bpe: another .* is .*"vocab_size": 1000.* not .* 400'):
        store_tokenizer(manifest, args)
    with pytest.raises(ValueError, match=r"SentencePieceTokenizer .*none: it cannot be read"):
        store_tokenizer(manifest, flags("--tokenizer-model", tmp_path / "none"))
    with pytest.raises(ValueError, match=r"library Strange, whose .* give its --tokenizer-type"):
        store_tokenizer({"tokenizer": {"library": "Strange"}}, flags("--tokenizer-model", "x"))
