"""TRL's DPOTrainer on given pairs, one training step for each line on stdin; JSON lines on stdout.

Started by `benchmarks.trl` in an environment of its own (`scripts/peer_env.sh trl`); it knows
nothing of this project. `python trl_dpo.py JOB.json`, with in JOB.json

    pairs                    [[prompt ids, chosen ids, rejected ids], ...], batch x steps of them
    batch                    pairs of a step
    layers, hidden, heads    of a GPT-2 with random weights
    vocab, positions         its rows of token and position embeddings
    beta, threads, folder    of the loss, of torch, for what the trainer writes

prints {"ready": ...} once the references are precomputed, and then for each line it reads
{"seconds": ..., "tokens": ..., "padded": ...}: forward, backward, clipping and AdamW. Fetching and
collating the batch is not in it.
"""

import json
import os
import sys
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models


class Pairs(trl.DPOTrainer):
    """Trains on token ids as they are."""

    sizes = (0, 0)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs["attention_mask"]
        Pairs.sizes = int(mask.sum()), mask.numel()
        return super().training_step(model, inputs, *args, **kwargs)


class OnDemand(transformers.TrainerCallback):
    """Waits for a line before each step and answers with its time."""

    def __init__(self, answers: Any) -> None:
        self.answers, self.start = answers, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not sys.stdin.readline():
            sys.exit()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - self.start
        tokens, padded = Pairs.sizes
        answer(self.answers, {"seconds": took, "tokens": tokens, "padded": padded})


def answer(answers: Any, content: dict[str, Any]) -> None:
    print(json.dumps(content), file=answers, flush=True)


def main() -> None:
    """Precompute the references, then train a step for each line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = Dataset.from_list([dict(zip(names, pair, strict=True)) for pair in job["pairs"]])
    end = {"eos_token": "</s>", "bos_token": "</s>", "pad_token": "</s>"}
    words = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    trainer = Pairs(
        model=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=job["layers"],
                n_embd=job["hidden"],
                n_head=job["heads"],
                vocab_size=job["vocab"],
                n_positions=job["positions"],
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
        args=trl.DPOConfig(
            output_dir=job["folder"],
            per_device_train_batch_size=job["batch"],
            max_steps=len(job["pairs"]) // job["batch"],
            beta=job["beta"],
            max_length=None,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,  # TRL's default computes the model again: slower
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=10**6,
        ),
        train_dataset=pairs,
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **end),
        callbacks=[OnDemand(answers)],
    )
    answer(answers, {"ready": f"TRL {trl.__version__}, transformers {transformers.__version__}"})
    trainer.train()


if __name__ == "__main__":
    main()
