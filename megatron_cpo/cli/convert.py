"""Convert a checkpoint between Hugging Face and Megatron: the GPT-2 and Llama families.

  megatron-cpo convert --from hf --to megatron --input gpt2-xl --output runs/mle
  megatron-cpo convert --from megatron --to hf --input runs/cpo --output hf_cpo

To Megatron: prints the flags that belong to the checkpoint (OUTPUT/megatron_flags.txt has them,
too) and keeps configuration and tokenizer in OUTPUT/hugging_face. Megatron loads it with --load
OUTPUT --finetune at any layout. To Hugging Face: any torch_dist checkpoint of these families,
whatever layout saved it; from_pretrained loads the result. Weights are copied bit for bit.
Checkpoints contain pickles: convert only those that you trust.
"""

import json
from pathlib import Path

from megatron_cpo.cli.parsing import Parser
from megatron_cpo.files import end_cleanly


def main() -> None:
    """Convert as the command line says."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--from", required=True, choices=["hf", "megatron"], dest="source", help="what it is")
    add("--to", required=True, choices=["hf", "megatron"], dest="target", help="what it becomes")
    add("--input", required=True, metavar="FOLDER",
        help="a Hugging Face model with safetensors, or Megatron's --save folder")  # fmt: skip
    add("--output", required=True, metavar="FOLDER",
        help="a new folder; it appears when it is complete")  # fmt: skip
    add("--iteration", type=int, metavar="N",
        help="Megatron's iteration to read (default: the latest)")  # fmt: skip
    add("--like", metavar="FOLDER",
        help="to hf: take configuration and tokenizer from this model (default: the one that the "
        "checkpoint was converted from, else they are made from Megatron's arguments)")  # fmt: skip
    add("--vocab-size", type=int, metavar="V",
        help="to hf: the number of tokens, if neither that model nor the run says it")  # fmt: skip
    add("--shard-gb", type=float, default=5, metavar="GB",
        help="begin another file after so many gigabytes (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    end_cleanly()

    from megatron_cpo.checkpoints.conversion.convert import (  # torch: after --help
        FLAGS,
        PROVENANCE,
        convert,
    )

    output = convert(
        args.input,
        args.output,
        from_format=args.source,
        to_format=args.target,
        iteration=args.iteration,
        like=args.like,
        vocab_size=args.vocab_size,
        shard_bytes=args.shard_gb * 1e9,
        progress=True,
    )
    if args.target == "megatron":
        print(f"{output}: train from it with --load {output} --finetune and these flags\n")
        print(" \\\n".join(Path(output, FLAGS).read_text().splitlines()))
    else:
        origin = json.loads(Path(output, PROVENANCE).read_text())["configuration"]
        print(f"{output}: load it with from_pretrained({str(output)!r}); configuration: {origin}")
