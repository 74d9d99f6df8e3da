#!/usr/bin/env python
"""Convert a checkpoint between Hugging Face and Megatron: the GPT-2 and Llama families.

  python tools/convert_checkpoint.py --from hf --to megatron --input gpt2-xl --output runs/mle
  python tools/convert_checkpoint.py --from megatron --to hf --input runs/cpo --output hf_cpo

To Megatron: prints the flags that belong to the checkpoint (OUTPUT/megatron_flags.txt has them,
too) and keeps configuration and tokenizer in OUTPUT/hugging_face. Megatron loads it with --load
OUTPUT --finetune at any layout. To Hugging Face: any torch_dist checkpoint of these families,
whatever layout saved it; from_pretrained loads the result. Weights are copied bit for bit.
Checkpoints contain pickles: convert only those that you trust.
"""

import argparse
import json
import shlex
import sys
import warnings
from pathlib import Path

from megatron_cpo.files import end_cleanly


def main() -> None:
    """Convert as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    add("--tokenizer", metavar="FOLDER_OR_FILE",
        help="to hf: the run's tokenizer, if it is not found by the name that the run had "
        "for it")  # fmt: skip
    add("--vocab-size", type=int, metavar="V",
        help="to hf: the number of tokens, if neither that model nor the run says it")  # fmt: skip
    add("--dtype", choices=["fp32", "bf16", "fp16"],
        help="what to store the weights in (default: what they are stored in)")  # fmt: skip
    add("--verify", action="store_true",
        help="before the output appears, read a sample of every tensor back and "
        "compare it")  # fmt: skip
    add("--shard-gb", type=float, default=5, metavar="GB",
        help="begin another file after so many gigabytes (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    end_cleanly()

    from megatron_cpo.checkpoints.conversion.convert import convert  # torch: after --help
    from megatron_cpo.checkpoints.conversion.provenance import PROVENANCE
    from megatron_cpo.checkpoints.formats.beside import FLAGS

    warnings.showwarning = lambda message, *_: print(
        f"convert_checkpoint.py: {message}", file=sys.stderr
    )
    try:
        output = convert(
            args.input,
            args.output,
            from_format=args.source,
            to_format=args.target,
            iteration=args.iteration,
            like=args.like,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            dtype=args.dtype,
            verify=args.verify,
            shard_bytes=args.shard_gb * 1e9,
            progress=True,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint.py: {error}")
    if args.target == "megatron":
        path = Path(output, FLAGS)
        flags = path.read_text()
        load = shlex.join(["--load", str(output.absolute())])
        cat = f"$({shlex.join(['cat', str(path.absolute())])})"
        script = f"eval torchrun ... {cat}" if shlex.split(flags) != flags.split() else cat
        print(
            f"{output}: train from it with {load} --finetune and these flags; in a script {script}"
        )
        print("\n" + " \\\n".join(flags.splitlines()))
    else:
        made = json.loads(Path(output, PROVENANCE).read_text())
        print(f"{output}: load it with from_pretrained({str(output)!r})")
        named = made["tokenizer_of_run"]
        of_run = f" (the run called it {named})" if named and made["tokenizer"] != named else ""
        print(f"  configuration: {made['configuration']}")
        print(f"  tokenizer: {made['tokenizer'] or 'none'}{of_run}")
        print(f"  texts end at: {', '.join(map(str, made['ends'])) or 'not known'}")


if __name__ == "__main__":
    main()
