"""Tokenizers of every kind that Megatron builds, small, trained on the example data."""

import base64
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.texts import DOLLY

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    """Texts to train on, whole, with code and other scripts."""
    records = [json.loads(line) for line in Path(DOLLY).read_text(encoding="utf-8").splitlines()]
    texts = [f"{r['instruction']}\n{r['context']}\n{r['response']}" for r in records[:120]]
    return [
        *texts,
        "Q: Why? x = [1, 2]\n\tdef f(x):  return [1]\n[1, [12]] 漢字かな 🙂 naïve café" * 3,
    ]


def built(kind: str, model: Path | str | None, **options: Any) -> Any:
    """What Megatron builds for `--tokenizer-type KIND --tokenizer-model MODEL`."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = {
        "tokenizer_type": kind, "tokenizer_model": None if model is None else str(model),
        "chat_template": None, "special_tokens": None, "metadata_path": None,
        "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
        "tokenizer_sentencepiece_legacy": False, "tokenizer_hf_no_use_fast": False,
        "tokenizer_hf_no_include_special_tokens": False, "trust_remote_code": False,
        "vocab_file": None, "merge_file": None, "vocab_size": None, "tiktoken_pattern": None,
        "tiktoken_num_special_tokens": 1000, "pad_vocab_size": False,
    }  # fmt: skip
    return build_tokenizer(SimpleNamespace(**(args | options)))


def sentencepiece(folder: Path, model_type: str = "unigram", **options: Any) -> Any:
    """A SentencePiece model of 600 pieces; as `train_tokenizer.py` trains it, but for options."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(corpus()), "model_writer": model, "vocab_size": 700,
            "model_type": model_type, "byte_fallback": True, "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity", "user_defined_symbols": ["\n"],
            "num_threads": 1, "minloglevel": 2, "character_coverage": 0.995,
        } | options
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def byte_level(all_bytes: bool = True, **options: Any) -> Any:
    """A byte-level BPE of `tokenizers`, 800 tokens, its control tokens the last three."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    trainer = trainers.BpeTrainer(vocab_size=797, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus(), trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return made


def metaspace(scheme: str) -> Any:
    """A BPE that writes spaces as `▁` and puts one first, as Llama's in transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    content = json.loads(made.to_str())  # bytes are tokens of the model, and no control tokens
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(content))


def hugging_face(
    folder: Path, made: Any, eos: str = "<|endoftext|>", bos: str | None = None, **options: Any
) -> Any:
    """A tokenizer of `tokenizers` in a folder, as Megatron opens it."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token=bos)
    fast.save_pretrained(str(folder))
    return built("HuggingFaceTokenizer", folder, **options)


def with_bos(made: Any, bos: str) -> Any:
    """The same, putting a BOS before every text."""
    from tokenizers import processors

    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made


def tiktoken(folder: Path) -> Any:
    """Bytes and some words behind 1000 special tokens, as Megatron wants it."""
    words = b" the| of|.\n|:\n|?\n|\n\n|[1|[12| [|th|he|in|an|on|er| a|the|  |is|it| is| it".split(
        b"|"
    )
    pairs = [a + b for a in (b"e", b"t", b"a", b" ") for b in (b"r", b"n", b"s", b"o")]
    tokens = [*(bytes([i]) for i in range(256)), *dict.fromkeys([*words, *pairs])]
    model = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": ""}
        for i, t in enumerate(tokens)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.json").write_text(json.dumps(model))
    return built("TikTokenizer", folder / "tiktoken.json", vocab_size=1000 + len(tokens))


def gpt2(folder: Path) -> Any:
    """Megatron's GPT2BPETokenizer over a vocabulary and merges.

    It asks for the model `gpt2` beside them, which is a folder here and not on a hub.
    """
    from transformers import GPT2Tokenizer

    (folder / "gpt2").mkdir(parents=True)
    files = byte_level().model.save(str(folder))
    vocabulary = json.loads(Path(files[0]).read_text())
    Path(files[0]).write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}))
    GPT2Tokenizer(*files).save_pretrained(str(folder / "gpt2"))
    (folder / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with contextlib.chdir(folder):
        return built("GPT2BPETokenizer", None, vocab_file=files[0], merge_file=files[1])


KINDS: dict[str, Callable[[Path], Any]] = {
    "SentencePiece": lambda f: built("SentencePieceTokenizer", sentencepiece(f)),
    "SentencePiece, no dummy prefix": lambda f: built(
        "SentencePieceTokenizer", sentencepiece(f, add_dummy_prefix=False)
    ),
    "SentencePiece BPE": lambda f: built("SentencePieceTokenizer", sentencepiece(f, "bpe")),
    "SentencePiece, no piece for a line break": lambda f: built(
        "Llama2Tokenizer", sentencepiece(f, user_defined_symbols=[])
    ),
    "byte-level BPE": lambda f: hugging_face(f, byte_level()),
    "byte-level BPE, bytes missing": lambda f: hugging_face(f, byte_level(all_bytes=False)),
    "byte-level BPE, space first": lambda f: hugging_face(f, byte_level(add_prefix_space=True)),
    "byte-level BPE, BOS": lambda f: hugging_face(f, with_bos(byte_level(), "<|im_start|>")),
    "byte-level BPE, no frame": lambda f: hugging_face(
        f, with_bos(byte_level(), "<|im_start|>"), tokenizer_hf_no_include_special_tokens=True
    ),
    "byte-level BPE without a word rule": lambda f: hugging_face(f, byte_level(use_regex=False)),
    "Metaspace, first": lambda f: hugging_face(f, with_bos(metaspace("first"), "<s>"), "</s>"),
    "Metaspace, always": lambda f: hugging_face(f, metaspace("always"), "</s>"),
    "Metaspace, never": lambda f: hugging_face(f, metaspace("never"), "</s>"),
    "tiktoken": tiktoken,
    "GPT2BPE": gpt2,
}
"""By name: from a folder to what Megatron builds."""  # fmt: skip


def legacy_sentencepiece(folder: Path) -> Any:
    """SentencePiece in a wrapper of Megatron's that looks for control tokens in every text."""
    names = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    options = {"tokenizer_sentencepiece_legacy": True, "special_tokens": names}
    return built("SentencePieceTokenizer", sentencepiece(folder), **options)
