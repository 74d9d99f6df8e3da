#!/usr/bin/env python
"""Build a store of groups: each record's prefix, true continuation and K - 1 negatives.

  python tools/build_negatives.py --input examples/data/dolly-400.jsonl \\
      --output-prefix runs/groups --negatives bn=3,tn=8 \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/tokenizer.model

Some negatives are drawn from a policy: a Hugging Face model (--policy hf:PATH), a completions
server (--policy http://...) or the Megatron checkpoint of --load. Ranking by sentence embeddings
needs the extra: pip install 'megatron-cpo[rank]', then --rank minilm.

Reference log-probs: with --load CKPT and the model's flags the groups are scored under that
checkpoint, at any layout; --score does it under --policy hf:, --score-only does it later:

  torchrun --nproc-per-node 2 tools/build_negatives.py --score-only --output-prefix runs/groups \\
      --load runs/mle --tensor-model-parallel-size 2 --num-layers 4 ... --seq-length 1024

--seq-length is then the length of a row of groups, as in training.

Killed, or out of disk? The same command goes on where it was: finished blocks are kept in
PREFIX.build until the store is whole. The same command always writes the same bytes, whatever the
number of --workers, ranks and shards and whoever executes them; but an negatives from a server may
differ from run to run, and a model may round otherwise on other hardware. Another command over the
same output is refused.
--shard 0/8 .. 7/8 spread the work over machines that share a file system, torchrun over ranks,
--executor ray over a cluster (pip install 'megatron-cpo[ray]'). Megatron's own flags are understood
too: --tokenizer-*, --seed, --max-position-embeddings.
"""

import logging
import os
import sys

from megatron_cpo.building.flags import (
    add_build_arguments,
    config_from_args,
    policy_use_from_args,
    run_from_args,
    uses_megatron,
)
from megatron_cpo.records.source import answer_help


def main() -> None:
    """Build this rank's share of the store; with --load, score it on all ranks."""
    answer_help(__doc__, add_build_arguments)

    from megatron_cpo import install

    install()
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args

    from megatron_cpo.building.build import build_groups
    from megatron_cpo.building.report import BuildReport
    from megatron_cpo.host.loading import score_args
    from megatron_cpo.scoring.under_megatron import score_groups
    from megatron_cpo.scoring.under_policy import rescore

    args = parse_args(add_build_arguments)
    # It tells of every file that it opens.
    logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)
    try:
        tokenizer = build_tokenizer(args)
        model = None
        if args.score_only:
            use, report = policy_use_from_args(args, tokenizer), None
            if use is not None and not args.load:
                report = rescore(args.output_prefix, tokenizer, use, run_from_args(args))
        else:
            config = config_from_args(args)
            use = policy_use_from_args(args, tokenizer, config)
            report = build_groups(config, tokenizer, use, run_from_args(args, config))
            if use is not None and uses_megatron(args, config):
                model = use.open().chunks
        if args.load and not args.shard:
            score_groups(args.output_prefix, score_args(add_build_arguments), model)
            first = int(os.environ.get("RANK", "0")) == 0
            report = BuildReport.read(args.output_prefix) if first else None
        if report is not None:
            print(report, flush=True)
            if args.load and args.shard:
                print("not scored: no shard has the whole store; run --score-only with this --load")
    except (ValueError, OSError) as error:
        sys.exit(f"build_negatives.py: {error}")


if __name__ == "__main__":
    main()
