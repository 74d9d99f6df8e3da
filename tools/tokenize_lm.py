#!/usr/bin/env python
"""`megatron-cpo tokenize` from a checkout; see `--help`."""

from megatron_cpo.cli import run_verb

if __name__ == "__main__":
    run_verb("tokenize", "tokenize_lm.py")
