#!/usr/bin/env python
"""`megatron-cpo run` from a checkout; see `--help`."""

from megatron_cpo.cli import run_verb

if __name__ == "__main__":
    run_verb("run", "run.py")
