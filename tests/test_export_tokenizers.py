"""The tokenizer of an exported model gives the run's ids, whichever kind Megatron's was."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cpo.checkpoints.conversion.tokenizers.choosing import READERS
from megatron_cpo.checkpoints.conversion.tokenizers.tokenizer import PROBES, Tokenizer, load, settle
from tests.exports import (
    VOCAB,
    save_byte_level,
    texts,
    train_byte_level,
    train_sentencepiece,
    write_ranks,
)

CONTROL = ["<s>a</s>", "<unk>", "</s></s> <s>", "<0x41>", "<mine>b"]
"""Texts that spell control pieces."""
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "Unigram": {},
    "Unigram, ours": IDENTITY | {"byte_fallback": True, "user_defined_symbols": ["\n"]},
    "Unigram without dummy prefix": IDENTITY
    | {"byte_fallback": True, "add_dummy_prefix": False, "control_symbols": ["<mine>"]},
    "Unigram, symbols in each other": {"byte_fallback": True}
    | {"user_defined_symbols": ["字", "漢字", "<|im_start|>"]},
    "Unigram, lower case": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
    "Unigram that keeps spaces": {"remove_extra_whitespaces": False},
    "Unigram over spaces": {"split_by_whitespace": False},
    "Unigram with other control pieces": {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
    | {"pad_piece": "[P]", "unk_piece": "[U]", "bos_piece": "[B]", "eos_piece": "[E]"},
    "BPE": {"model_type": "bpe"},
    "BPE like Llama's": IDENTITY | {"model_type": "bpe", "byte_fallback": True},
    "BPE with symbols": IDENTITY
    | {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False}
    | {"user_defined_symbols": ["<|im_start|>", "漢字"], "control_symbols": ["<mine>"]},
    "characters": {"model_type": "char"},
}
NO_COUNTERPART = {
    "words": ({"model_type": "word"}, "its pieces are whole words"),
    "white space behind words": ({"treat_whitespace_as_suffix": True}, "end in their white space"),
}


def exported(
    folder: Path, kind: str, paths: list[Path], family: str = "llama", **args: Any
) -> tuple[Tokenizer, Any]:
    """The run's tokenizer, and what transformers reads in an exported model's folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = READERS[kind](paths, {"tokenizer_type": kind, **args})
    tokenizer.write(folder)
    with warnings.catch_warnings(action="error"):
        settle(folder, tokenizer, args.get("chat_template"))
    return tokenizer, load(folder)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    """The ids of SentencePiece itself, for texts and, if asked, for what spells control pieces."""
    from sentencepiece import SentencePieceProcessor

    path = train_sentencepiece(tmp_path / "sp", **SENTENCEPIECE[name])
    family = "gpt2" if "BPE" in name else "llama"
    tokenizer, found = exported(tmp_path / "out", "SentencePieceTokenizer", [path], family)
    run = SentencePieceProcessor(model_file=str(path))
    for text in [*texts()[:40], *PROBES, "", "漢字漢<|im_start|>x\n", "\r\n\t"]:
        assert found(text)["input_ids"] == run.encode(text), text
    for text in CONTROL:
        assert found(text, split_special_tokens=True)["input_ids"] == run.encode(text), text
    text = "hello world, this is it"
    assert found.decode(run.encode(text)) == run.decode(run.encode(text))
    assert (tokenizer.eod, tokenizer.bos) == (run.eos_id(), run.bos_id())
    assert (found.eos_token_id, found.bos_token_id) == (run.eos_id(), run.bos_id())
    assert found.pad_token_id == (run.pad_id() if run.pad_id() >= 0 else run.eos_id())
    assert len(found) == tokenizer.size == run.get_piece_size()
    assert (tmp_path / "out" / "tokenizer.model").exists() == name.startswith("BPE")


@pytest.mark.parametrize("name", NO_COUNTERPART)
def test_sentencepiece_that_transformers_has_not(name: str, tmp_path: Path) -> None:
    """A name at which nobody looks, and a word why."""
    options, reason = NO_COUNTERPART[name]
    path = train_sentencepiece(tmp_path / "sp", **options)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.warns(UserWarning, match=f"no tokenizer with the same ids .*{reason}"):
        READERS["SentencePieceTokenizer"]([path], {}).write(out)
    assert [found.name for found in out.iterdir()] == ["sentencepiece.model"]


def test_sentencepiece_with_more_than_its_model(tmp_path: Path) -> None:
    """Special tokens of the run, which SentencePiece knows nothing of."""
    path = train_sentencepiece(tmp_path / "sp")
    args = {"special_tokens": ["<a>", "<b>"], "tokenizer_sentencepiece_legacy": True}
    tokenizer = READERS["Llama2Tokenizer"]([path], args)
    with pytest.warns(UserWarning, match="the run adds special tokens"):
        tokenizer.write(tmp_path)
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="text is no SentencePiece model"):
        READERS["SentencePieceTokenizer"]([tmp_path / "text"], {})


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken(pattern: str, tmp_path: Path) -> None:
    """The ids of Megatron's own, control tokens in a text included: it reads them as such."""
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    path = tmp_path / "ranks.json"
    size = write_ranks(path) + 20
    run = TikTokenTokenizer(str(path), num_special_tokens=20, pattern=pattern, vocab_size=size)
    args = {"tiktoken_pattern": pattern, "vocab_size": size, "tiktoken_num_special_tokens": 20}
    tokenizer, found = exported(tmp_path / "out", "TikTokenizer", [path], **args)
    for text in [*texts()[:40], *PROBES, *CONTROL, "<SPECIAL_12>x"]:
        ids = run.text_to_ids(text)
        assert found(text)["input_ids"] == ids, text
        assert found.decode(ids) == run.ids_to_text(ids)
    assert tokenizer.size == len(found) == size
    ends = (tokenizer.eod, found.eos_token_id, found.pad_token_id, found.bos_token_id)
    assert ends == (run.eod, run.eod, run.pad_id, run.bos_id) == (2, 2, 4, 1)
    with pytest.raises(ValueError, match="is no vocabulary of the run's TikTokenizer"):
        READERS["TikTokenizer"]([path], args | {"vocab_size": size + 1})


@pytest.mark.parametrize("listed", [True, False])
def test_gpt2_files(listed: bool, tmp_path: Path) -> None:
    """From vocabulary and merges; an end that is not listed gets the next id, as in Megatron."""
    trained = train_byte_level(("<|endoftext|>",) if listed else ())
    files = [Path(file) for file in trained.model.save(str(tmp_path))]
    ids = json.loads(files[0].read_text())
    if listed:
        ids["<|endoftext|>"] = len(ids)
        files[0].write_text(json.dumps(ids))
    end = len(ids) - 1 if listed else len(ids)
    tokenizer, found = exported(tmp_path / "out", "GPT2BPETokenizer", files, "gpt2")
    for text in [*texts()[:40], *PROBES]:
        assert found(text)["input_ids"] == trained.encode(text).ids
    assert tokenizer.eod == found.eos_token_id == found.pad_token_id == end
    assert tokenizer.size == len(found) == end + 1
    files[0].write_text("[1]")
    with pytest.raises(ValueError, match="is no vocabulary of GPT-2"):
        READERS["GPT2BPETokenizer"](files, {})


def _without_class(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


FOLDERS: dict[str, Callable[[Path], None]] = {
    "as saved": lambda folder: None,
    "without a class": _without_class,
    "the file of tokenizers alone": lambda folder: (folder / "tokenizer_config.json").unlink(),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folders_of_transformers(name: str, family: str, tmp_path: Path) -> None:
    """Byte-level BPE stays that in a Llama's folder, whose own class would make it another."""
    special = ("<|endoftext|>", "<|im_end|>")
    folder = save_byte_level(tmp_path / "hf", special, eos_token="<|im_end|>")
    FOLDERS[name](folder)
    run = load(folder)
    tokenizer, found = exported(tmp_path / "out", "HuggingFaceTokenizer", [folder], family)
    for text in [*texts()[:40], *PROBES, "a<|im_end|>b"]:
        assert found(text)["input_ids"] == run(text)["input_ids"]
    assert tokenizer.eod == run.eos_token_id == found.eos_token_id
    assert found.pad_token_id == found.eos_token_id
    assert tokenizer.size == len(run) == len(found) == VOCAB


def test_folder_and_what_the_run_did_to_it(tmp_path: Path) -> None:
    """Tokens that its flags add, its chat template, and what cannot be written."""
    folder = save_byte_level(tmp_path / "hf", ("<e>", "<p>"), eos_token="<e>", pad_token="<p>")
    (folder / "chat_template.jinja").write_text("old")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("with tools")
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    kinds = "HuggingFaceTokenizer", [folder]
    _, found = exported(tmp_path / "one", *kinds)
    assert found.chat_template == {"default": "old", "tools": "with tools"}
    shutil.rmtree(folder / "additional_chat_templates")
    tokenizer, found = exported(
        tmp_path / "two", *kinds, chat_template=template, special_tokens=["<new>", "<p>"]
    )
    assert found.apply_chat_template(chat, tokenize=False) == "[hi]"
    assert found.convert_tokens_to_ids("<new>") == VOCAB == tokenizer.size - 1 == len(found) - 1
    assert tokenizer.pad == found.pad_token_id == found.convert_tokens_to_ids("<p>")
    with pytest.warns(UserWarning, match="add_special_tokens=False"):
        READERS[kinds[0]](kinds[1], {"tokenizer_hf_no_include_special_tokens": True})
    sft = {"tokenizer_type": "SFTTokenizer", "sft_tokenizer_prompt_format": "nemotron-h-aligned"}
    with pytest.warns(UserWarning, match="prompt-format nemotron-h-aligned; the output has"):
        READERS["SFTTokenizer"]([folder], sft)


def test_tokenizer_that_became_another(tmp_path: Path) -> None:
    """What is written is read again, and said not to be the run's."""
    run = save_byte_level(tmp_path / "hf", ("<e>",), eos_token="<e>")
    other = save_byte_level(tmp_path / "other", ("<e>", "<f>"), eos_token="<e>")
    (other / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = READERS["HuggingFaceTokenizer"]([run], {})
    with pytest.warns(UserWarning, match=r"it is not .*hf: its end of a text is id \d+, the run's"):
        settle(other, tokenizer, None)
    (run / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="transformers cannot read the tokenizer in"):
        READERS["HuggingFaceTokenizer"]([run], {})
