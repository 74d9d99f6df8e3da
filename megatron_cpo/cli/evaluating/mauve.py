"""MAUVE: how much alike the distributions of a model's texts and of people's are.

  megatron-cpo evaluate mauve --candidate results/cpo.json
  megatron-cpo evaluate mauve --candidate results/*.json --features hf:gpt2-large --seeds 10

Both sets of texts become features and fall into clusters by k-means; MAUVE (arXiv:2102.01454) is 1
where they fall alike. It is computed by the package mauve-text with its defaults, for several seeds
of k-means, whose mean and standard deviation are shown: the noise of clustering, not that of the
texts. Compare only figures of one model of features and of like numbers of texts. k-means runs on
the CPU (faiss). The result is printed, and written to mauve.json beside the first file.
Needs the extra [eval], and for --features minilm also [rank].
"""

import os
from functools import partial
from pathlib import Path

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.quiet import hidden_chatter, say


def main() -> None:
    """Compare as the command line says."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--candidate", required=True, nargs="+", type=Path, metavar="FILE",
        help="texts of the same records, a file a model, decoded alike")  # fmt: skip
    add("--baseline", default="reference", metavar="FILE",
        help="texts of another model, or `reference`: the records' own continuations (default: "
        "%(default)s)")  # fmt: skip
    add("--features", default="minilm", metavar="MODEL",
        help="hf:PATH, a Hugging Face causal LM; minilm, the sentence embeddings that a package "
        "carries; or another model of sentence-transformers (default: %(default)s)")  # fmt: skip
    add("--pool", default="last", choices=["last", "mean"],
        help="of a causal LM, the last hidden state of the last token, as in the paper, or the "
        "mean over tokens (default: %(default)s)")  # fmt: skip
    add("--batch", type=int, default=16, metavar="N",
        help="most texts that a causal LM works on at a time (default: %(default)s)")  # fmt: skip
    add("--seeds", type=int, default=5, metavar="N",
        help="clusterings (default: %(default)s)")  # fmt: skip
    add("--few", action="store_true", help="accept fewer than 100 texts")
    add(
        "--output",
        type=output_path,
        metavar="FILE",
        help="(default: mauve.json beside the first file)",
    )
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # weights load in a second

    with hidden_chatter():
        from megatron_cpo.evaluation.mauve_score import (
            describe_mauve,
            mauve_files,
            open_features,
            write_mauve,
        )
        from megatron_cpo.evaluation.scores import check_output

        output = args.output or args.candidate[0].with_name("mauve.json")
        check_output(output)
        features = partial(open_features, args.features, args.pool, args.batch)
        found, model = mauve_files(args.candidate, features, args.baseline, args.seeds, args.few)
        write_mauve(output, found, model)
        say(f"{describe_mauve(found, model)}\n\nwritten: {output}")
