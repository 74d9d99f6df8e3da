"""The trained model that ships with the project: its story, in transformers and in Megatron."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.ranks import ROOT, run_ranks
from tests.conversions import (
    assert_same_model,
    flags_of,
    load_megatron,
    to_hugging_face,
    to_megatron,
)

BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
"""What its authors' documentation has it write from the token 1."""
LENGTH = 72


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stories") / "hf"
    runpy.run_path(str(ROOT / "examples" / "stories260k.py"))["write_folder"](output)
    return output


def greedy(logits: Any) -> list[int]:
    """Its story from the token that separates stories, without a cache."""
    tokens = torch.tensor([[1]])
    with torch.no_grad():
        while tokens.shape[1] < LENGTH:
            following = logits(tokens)[0, -1, :512].argmax()
            tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
    return tokens[0, 1:].tolist()


def megatron_story(load: str, flags: list[str]) -> list[int]:
    """On a rank."""
    model = load_megatron(load, flags)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = torch.ones(1, 1, length, length).triu(1).bool()
        return model(tokens, torch.arange(length)[None], mask)

    return greedy(logits)


def test_its_story_on_both_sides(folder: Path, tmp_path: Path) -> None:
    """In transformers, in Megatron, and in transformers after the way back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 512 and tokenizer.eos_token_id == 1
    there = to_megatron(folder, tmp_path / "there")
    back = to_hugging_face(there, tmp_path / "back")
    assert_same_model(folder, back)
    [found] = run_ranks(megatron_story, 1, str(there), flags_of(there))
    assert tokenizer.decode(found).strip().startswith(BEGINNING)
    for path in (folder, back):
        loaded = AutoModelForCausalLM.from_pretrained(path).eval()
        assert greedy(lambda tokens, loaded=loaded: loaded(tokens).logits) == found


def test_its_tokenizer_gives_texts_back(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (BEGINNING, 'Zoë said: "1,000 €?"\nNo.'):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).strip() == text
