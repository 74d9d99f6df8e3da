"""The trained model that ships with the project."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.ranks import ROOT, run_ranks
from tests.conversions import flags_of, hf_logits, load_megatron, to_megatron

BEGINNING = (
    " Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
"""What its authors' documentation has it write from the token 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("stories") / "hf"
    runpy.run_path(str(ROOT / "examples" / "stories260k.py"))["write_folder"](output)
    return output


def test_it_writes_what_its_authors_say(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (c.from_pretrained(folder) for c in (AutoTokenizer, AutoModelForCausalLM))
    assert len(tokenizer) == 512 and tokenizer.eos_token_id == 1
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=70, do_sample=False)[0, 1:]
    text = tokenizer.decode(ids)
    assert text.strip().startswith(BEGINNING.strip())
    again = tokenizer(BEGINNING, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(again).strip() == BEGINNING.strip()


def logits(folder, flags, tokens):
    """On one rank: of the converted model, without rows that pad its vocabulary."""
    chunk = load_megatron(folder, flags)
    at = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        return chunk(tokens, at, None)[..., :512].numpy()


def test_it_converts(folder, tmp_path):
    megatron = to_megatron(folder, tmp_path / "megatron")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 512, (1, 40)))
    [found] = run_ranks(logits, 1, str(megatron), flags_of(megatron), tokens)
    expected = hf_logits(Path(folder), tokens).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
