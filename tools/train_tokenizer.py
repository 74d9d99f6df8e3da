#!/usr/bin/env python
"""`megatron-cpo train-tokenizer` from a checkout; see `--help`."""

from megatron_cpo.cli import run_verb

if __name__ == "__main__":
    run_verb("train-tokenizer", "train_tokenizer.py")
