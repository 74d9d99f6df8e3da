"""What token ids mean, whichever files of a tokenizer say it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpo.checkpoints.tokens import (
    Vocabulary,
    difference,
    vocabulary_of_files,
    vocabulary_of_folder,
)
from tests.texts import DOLLY

VOCAB = {"a": 0, "b": 1, "ab": 2}
ADDED = {"id": 3, "content": "<|x|>", "special": True}
FAST = {"model": {"type": "BPE", "vocab": VOCAB, "merges": ["a b"]}, "added_tokens": [ADDED]}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
CONFIG = {"added_tokens_decoder": {"3": {"content": "<|x|>"}}}
Files = dict[str, Any]

SAME: list[tuple[Files, Files]] = [
    ({"tokenizer.json": FAST}, {"tokenizer.json": FAST}),
    ({"tokenizer.json": FAST}, {}),
    ({"tokenizer.json": FAST}, {"chat_template.jinja": "{{ messages }}"}),
    ({"tokenizer.json": FAST},
     {"vocab.json": VOCAB, "merges.txt": "#version: 0.2\na b\n", "tokenizer_config.json": CONFIG}),
    ({"tokenizer.json": FAST},
     {"vocab.json": VOCAB, "merges.txt": "a b", "added_tokens.json": {"<|x|>": 3}}),
    ({"tokenizer.json": FAST},
     {"tokenizer.json": FAST | {"added_tokens": []}, "tokenizer_config.json": CONFIG}),
    ({"tokenizer.json": FAST},
     {"tokenizer.json": FAST | {"model": FAST["model"] | {"merges": [["a", "b"]]}}}),
    ({"tokenizer.json": FAST}, {"tokenizer.json": FAST | {"version": "2.0", "truncation": None}}),
    ({"tokenizer.json": FAST | {"added_tokens": [ADDED | {"special": False}]}},
     {"tokenizer.json": FAST}),
    ({"vocab.txt": "a\nb\n"}, {"vocab.txt": "a\nb"}),
    ({"tekken.json": "1"}, {"tekken.json": "1"}),
]  # fmt: skip
OTHER: list[tuple[Files, Files, str]] = [
    ({"tokenizer.json": FAST}, {"tokenizer.json": FAST | {"added_tokens": []}},
     r"id 3 is '<\|x\|>' in A and no token in B"),
    ({"tokenizer.json": FAST},
     {"vocab.json": VOCAB, "added_tokens.json": {"<|y|>": 3}}, r"id 3 is '<\|x\|>' in A and '<\|y"),
    ({"tokenizer.json": FAST},
     {"vocab.json": {"b": 0, "a": 1, "ab": 2}}, "id 0 is 'a' in A and 'b' in B"),
    ({"vocab.json": {"{": 0}}, {"vocab.json": {"}": 0}}, "id 0 is '{' in A and '}' in B"),
    ({"tokenizer.json": FAST},
     {"tokenizer.json": FAST | {"model": FAST["model"] | {"merges": ["b a"]}}},
     "tokenizer.json differs from line 0 on: 'a b' in A and 'b a' in B"),
    ({"tokenizer.json": FAST | {"added_tokens": []}},
     {"vocab.json": VOCAB, "merges.txt": "a b\nb a"},
     "merges.txt differs from line 1 on: at its end in A and 'b a' in B"),
    ({"tokenizer.json": UNIGRAM},
     {"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -3]]}}},
     "tokenizer.json differs from line 1 on: 'b -2.0' in A and 'b -3' in B"),
    ({"tekken.json": "1"}, {"tekken.json": "2"}, "tekken.json is another file in A than in B"),
    ({"tokenizer.model": "tiktoken"}, {"tokenizer.model": "other"}, "tokenizer.model is another"),
]  # fmt: skip


def write(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return folder


def found(tmp_path: Path, one: Files, other: Files) -> str | None:
    pair = [
        vocabulary_of_folder(write(tmp_path / name, files))
        for name, files in (("A", one), ("B", other))
    ]
    text = difference(*pair)
    return text and text.format("A", "B")


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_tokens(one: Files, other: Files, tmp_path: Path) -> None:
    assert found(tmp_path, one, other) is None


@pytest.mark.parametrize(("one", "other", "message"), OTHER)
def test_other_tokens(one: Files, other: Files, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(found(tmp_path, one, other))


def test_sentencepiece_by_its_pieces(tmp_path: Path) -> None:
    """Not by its bytes, which say where it was trained; `tokenizer.json` may have the same."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    models, text = [], tmp_path / "text"
    text.write_text("".join(Path(DOLLY).read_text().splitlines(True)[:40]))
    for name, size in (("first", 300), ("again", 300), ("larger", 310)):
        prefix = tmp_path / name
        SentencePieceTrainer.train(
            input=str(text), model_prefix=str(prefix), vocab_size=size, minloglevel=2
        )
        models.append(Path(f"{prefix}.model"))
    assert models[0].read_bytes() != models[1].read_bytes()
    ours, again, larger = map(vocabulary_of_files, models)
    assert difference(ours, again) is None
    assert str(difference(ours, larger)).startswith("id ")
    model = SentencePieceProcessor(model_file=str(models[0]))
    vocab = [[model.id_to_piece(i), 0.0] for i in range(300)]
    fast = vocabulary_of_folder(
        write(tmp_path / "hf", {"tokenizer.json": {"model": {"vocab": vocab}}})
    )
    assert difference(ours, fast) is None


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """Then the names that a run had have to do."""
    gone = (
        Vocabulary(source="HuggingFaceTokenizer tok"),
        Vocabulary(source="HuggingFaceTokenizer x"),
    )
    assert difference(gone[0], gone[0]) is None
    assert "tok in {} and HuggingFaceTokenizer x in {}, and not all" in str(difference(*gone))
    here = vocabulary_of_folder(write(tmp_path / "A", {"tokenizer.json": FAST}))
    here.source = "HuggingFaceTokenizer y"
    there = vocabulary_of_folder(write(tmp_path / "B", {"tokenizer.json": FAST}))
    there.source = "GPT2BPETokenizer vocab.json merges.txt"
    assert difference(here, there) is None
    assert difference(here, Vocabulary()) is None
    assert "not all of their files" in str(difference(here, gone[0]))
