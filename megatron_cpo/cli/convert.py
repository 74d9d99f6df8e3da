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
import shlex
from pathlib import Path

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.files import end_cleanly


def main() -> None:
    """Convert as the command line says."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--from", required=True, choices=["hf", "megatron"], dest="source", help="what it is")
    add("--to", required=True, choices=["hf", "megatron"], dest="target", help="what it becomes")
    add("--input", required=True, metavar="FOLDER",
        help="a Hugging Face model with safetensors, or Megatron's --save folder")  # fmt: skip
    add("--output", required=True, type=output_path, metavar="FOLDER",
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
    print(_how_to_train(output) if args.target == "megatron" else _what_was_made(output))


def _how_to_train(output: Path) -> str:
    """The flags that belong to a checkpoint, and how to hand them on."""
    from megatron_cpo.checkpoints.formats.beside import FLAGS

    path = Path(output, FLAGS)
    flags = path.read_text()
    load = shlex.join(["--load", str(output.absolute())])
    cat = f"$({shlex.join(['cat', str(path.absolute())])})"
    script = f"eval torchrun ... {cat}" if shlex.split(flags) != flags.split() else cat
    lines = " \\\n".join(flags.splitlines())
    return (
        f"{output}: train from it with {load} --finetune and these flags; in a script {script}"
        f"\n\n{lines}"
    )


def _what_was_made(output: Path) -> str:
    """Where configuration and tokenizer of a Hugging Face model come from."""
    from megatron_cpo.checkpoints.conversion.provenance import PROVENANCE

    made = json.loads(Path(output, PROVENANCE).read_text())
    named = made["tokenizer_of_run"]
    of_run = f" (the run called it {named})" if named and made["tokenizer"] != named else ""
    return (
        f"{output}: load it with from_pretrained({str(output)!r})\n"
        f"  configuration: {made['configuration']}\n"
        f"  tokenizer: {made['tokenizer'] or 'none'}{of_run}\n"
        f"  texts end at: {', '.join(map(str, made['ends'])) or 'not known'}"
    )
