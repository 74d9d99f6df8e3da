#!/usr/bin/env python
"""`megatron-cpo publish` from a checkout; see `--help`."""

from megatron_cpo.cli import run_verb

if __name__ == "__main__":
    run_verb("publish", "publish_negatives.py")
