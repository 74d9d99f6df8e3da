"""An exported model can be used at once: its texts end, its batches pad, and draws agree."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.ranks import run_ranks
from tests.conversions import flags_of, to_hugging_face, to_megatron
from tests.exports import (
    VOCAB,
    ending_model,
    from_scratch,
    sentencepiece_run,
    settings,
    silent,
    train_sentencepiece,
)

BEFORE = 300
"""The token that `ending_model` says before it ends."""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model whose EOD is 2."""
    return train_sentencepiece(tmp_path_factory.mktemp("pieces") / "sp", byte_fallback=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that answers `BEFORE` and 2."""
    return ending_model(tmp_path_factory.mktemp("model") / "hf", VOCAB, end=2, before=BEFORE)


# ---- what people do with it


def test_generation_ends(model: Path, pieces: Path, tmp_path: Path) -> None:
    """generate and pipeline stop at the run's EOD, alone and in a padded batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    there = sentencepiece_run(model, tmp_path / "there", str(pieces))
    with silent():
        out = to_hugging_face(there, tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(out)
        loaded = AutoModelForCausalLM.from_pretrained(out)
    texts = ["hello", "hello and a longer text"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for given in (tokenizer(texts[1], return_tensors="pt"), batch):
        found = loaded.generate(**given, max_new_tokens=9)[:, given["input_ids"].shape[1] :]
        assert found.tolist() == [[BEFORE, 2]] * len(found)
    said = pipeline("text-generation", model=str(out))(texts, batch_size=2, max_new_tokens=9)
    last = tokenizer.decode([*tokenizer("hello")["input_ids"], BEFORE])
    assert said[0] == [{"generated_text": last}]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    config = settings(out, "config.json")
    assert (config["eos_token_id"], config["bos_token_id"], config["vocab_size"]) == (2, 1, VOCAB)
    assert "pad_token_id" not in config  # what pads gets no gradient, and this is the end
    assert settings(out) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    made = settings(out, "convert.json")
    assert (made["tokenizer"], made["ends"]) == (str(pieces), [2])


def draw_on_both_sides(there: str, back: str, flags: list[str]) -> list[Any]:
    """On a rank: what the checkpoint and the exported model draw."""
    from megatron_cpo import install

    install()
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from megatron_cpo.host.loading import score_args
    from megatron_cpo.negatives.from_records import group_rng
    from megatron_cpo.policies.hugging_face import HuggingFacePolicy
    from megatron_cpo.policies.megatron import MegatronPolicy
    from megatron_cpo.policies.policy import Sampling

    run = "--micro-batch-size 1 --seq-length 64"
    sys.argv = ["draw", *run.split(), *flags, "--load", there]
    args = score_args()
    tokenizer = build_tokenizer(args)
    found = []
    for policy in (HuggingFacePolicy(back, tokenizer), MegatronPolicy.load(args, tokenizer)):
        prefixes = [np.array(tokenizer.tokenize(text), dtype=np.int32) for text in ("a", "b c")]
        rngs = [group_rng(1, index, "an") for index in range(2)]
        drawn = policy.sample(prefixes, [9, 9], 2, rngs, Sampling(top_k=1))
        found.append([[tokens.tolist() for tokens in group] for group in drawn])
    return found


def test_draws_end_where_the_exported_model_does(model: Path, pieces: Path, tmp_path: Path) -> None:
    """Of a model that was converted, and of what is exported from that again."""
    scratch = sentencepiece_run(model, tmp_path / "scratch", str(pieces))
    out = to_hugging_face(scratch, tmp_path / "out")
    there = to_megatron(out, tmp_path / "there")
    back = to_hugging_face(there, tmp_path / "back")
    [drawn] = run_ranks(draw_on_both_sides, 1, str(there), str(back), flags_of(there))
    assert drawn == [[[[BEFORE, 2]] * 2] * 2] * 2


def test_run_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    """NullTokenizer: its EOD is known, and that there is no tokenizer is said."""
    for more, end in (({}, VOCAB - 1), ({"null_tokenizer_eod_id": 7}, 7)):
        args = {"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB, **more}
        there = from_scratch(model, tmp_path / f"there{end}", **args)
        with pytest.warns(UserWarning, match=r"the run had none \(NullTokenizer\), so the output"):
            out = to_hugging_face(there, tmp_path / f"out{end}")
        assert settings(out) == {"eos_token_id": end, "pad_token_id": end}
        assert settings(out, "config.json")["eos_token_id"] == end


@pytest.mark.parametrize("kind", ["BertWordPieceCase", "MultimodalTokenizer", None])
def test_tokenizers_that_transformers_has_not(
    kind: str | None, model: Path, tmp_path: Path
) -> None:
    args = {"tokenizer_type": kind, "tokenizer_model": "x"} if kind else {}
    there = from_scratch(model, tmp_path / "there", **args)
    message = f"{kind or 'does not say which'}.* has none and says nowhere .* --tokenizer FOLDER"
    with pytest.warns(UserWarning, match=message):
        out = to_hugging_face(there, tmp_path / "out", vocab_size=VOCAB)
    assert settings(out) == {}
    assert settings(out, "config.json")["eos_token_id"] is None


def test_tokenizer_without_an_end(model: Path, tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "sp", eos_id=-1, bos_id=-1)
    there = sentencepiece_run(model, tmp_path / "there", str(path))
    with pytest.warns(UserWarning, match=r"sp.model has no end of text \(EOS\).*--tokenizer"):
        out = to_hugging_face(there, tmp_path / "out")
    assert settings(out) == {}
