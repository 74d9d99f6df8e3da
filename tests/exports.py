"""Checkpoints of runs from scratch, and tokenizers of each kind: what tests of export share."""

import base64
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from harness.ranks import ROOT
from megatron_cpo.checkpoints.conversion import convert as conversion
from tests.conversions import to_megatron

VOCAB = 420
WIDTH = 16


def texts() -> list[str]:
    """Some ten thousand words of Dolly's records."""
    lines = (ROOT / "examples/data/dolly-400.jsonl").read_text(encoding="utf-8").splitlines()[:80]
    return [text for line in lines for text in json.loads(line).values() if text]


def train_sentencepiece(prefix: Path, **options: Any) -> Path:
    """A SentencePiece model of some `VOCAB` pieces; returns its file."""
    from sentencepiece import SentencePieceTrainer

    plain: dict[str, Any] = {"vocab_size": VOCAB, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in texts()),
        model_prefix=str(prefix),
        num_threads=1,
        **plain | options,
    )
    return prefix.with_name(f"{prefix.name}.model")


def train_byte_level(special: tuple[str, ...] = ("<|endoftext|>",)) -> Any:
    """A byte-level BPE tokenizer; the special tokens have the last ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def save_byte_level(folder: Path, special: tuple[str, ...], **settings: Any) -> Path:
    """The same as a tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_byte_level(special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    return folder


def write_ranks(path: Path) -> int:
    """A vocabulary of Megatron's TikTokenizer; returns how many ranks it has."""
    words = sorted({word for text in texts() for word in text.split()}, key=len)
    grown = {f" {word[:size]}".encode() for word in words[:400] for size in range(1, len(word) + 1)}
    ranks = [bytes([b]) for b in range(256)]
    ranks += sorted(grown - set(ranks), key=lambda token: (len(token), token))
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(ranks)
    ]
    path.write_text(json.dumps(entries))
    return len(ranks)


def ending_model(folder: Path, size: int, end: int, before: int) -> Path:
    """A Llama that answers every token with `before`, and `before` with `end`.

    Its layers add nothing; the embedding's first number asks for `before`, the second for `end`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[before, :2] = torch.tensor([0.0, 1.0])
        model.lm_head.weight[before, 0] = 5
        model.lm_head.weight[end, 1] = 5
    model.save_pretrained(folder)
    return folder


def from_scratch(model: Path, output: Path, **arguments: Any) -> Path:
    """The model as the checkpoint of a run with these arguments for its tokenizer."""
    with mock.patch.object(conversion, "_tokenizer_arguments", return_value=arguments):
        to_megatron(model, output)
    shutil.rmtree(output / "hugging_face")
    return output


def sentencepiece_run(model: Path, output: Path, named: str) -> Path:
    """The checkpoint of a run that called its tokenizer so."""
    named_so = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": named}
    return from_scratch(model, output, **named_so)


def settings(folder: Path, name: str = "generation_config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield
