"""Tiny causal LMs with random weights, sharp enough that sampling from them is no coin toss."""

from pathlib import Path
from typing import Any

from harness.ranks import run_pretrain
from harness.stores import TOKENIZER_FLAGS, write_store

VOCAB = 100  # of `texts.ToyTokenizer`; its EOD is 99
GPT_FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.3 --seed 7 --seq-length 128"
).split() + TOKENIZER_FLAGS
"""Of a Megatron GPT of four layers under the null tokenizer, for `train_megatron`."""
LLAMA_FLAGS = (
    "--position-embedding-type rope --group-query-attention --num-query-groups 2 "
    "--normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights"
).split()
"""What makes it a Llama."""


def save_hugging_face(folder: Path, kind: str = "llama", rows: int = VOCAB, seed: int = 0) -> str:
    """Write a two-layer Llama (grouped-query attention), GPT-2 or Gemma 2; returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

    shape = {
        "vocab_size": rows,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    config: Any
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=rows,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
        )
    elif kind == "gemma2":  # caps its logits, and every other layer has a sliding window
        config = Gemma2Config(**shape, head_dim=8, sliding_window=8, final_logit_softcapping=3.0)
    else:
        config = LlamaConfig(**shape, tie_word_embeddings=False)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return str(folder)


def train_megatron(folder: Path, flags: list[str]) -> str:
    """One step of Megatron's loop from the random weights of a model's flags; what to --load."""
    store = write_store(folder / "groups", 8, 3)
    train = (
        "--micro-batch-size 1 --global-batch-size 1 --lr 1e-4 --train-iters 1 --eval-iters 0 "
        f"--eval-interval 9 --split 1,0,0 --ckpt-format torch_dist --save {folder}/model "
        f"--save-interval 1 --cpo-aux-loss --cpo-k 3 --cpo-no-warmup --cpo-data-path {store}"
    )
    run_pretrain([*flags, *train.split()], 1)
    return f"{folder}/model"


def write_tokenizer(folder, tokenizer, change=None, eos="</s>"):
    """The Megatron tokenizer's pieces as a Hugging Face tokenizer in a model's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sentencepiece = tokenizer._tokenizer.tokenizer
    pieces = [
        (sentencepiece.id_to_piece(i), sentencepiece.get_score(i))
        for i in range(tokenizer.vocab_size)
    ]
    if change:
        pieces[change] = ("changed", pieces[change][1])
    whole = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token=eos, unk_token="<unk>"
    ).save_pretrained(folder)
