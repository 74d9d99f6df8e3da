"""The flags that say where records come from and how they become pairs, shared by all tools."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_cpo.records.lines import check_file
from megatron_cpo.records.shapes import DEFAULT_TEMPLATE, SHAPES, check_template


@dataclass(frozen=True)
class Source:
    """Where records come from and how they become pairs; flags of every tool that reads them."""

    inputs: tuple[str, ...]
    """JSON Lines files, or prefixes of Megatron indexed datasets (late pretraining)."""
    shape: str = "auto"
    """`--format`: a key of `shapes.SHAPES`, or `auto`."""
    template: str = DEFAULT_TEMPLATE
    """`--prompt-template` of instruction records; see `shapes.fill_template`."""
    prefix_fraction: float = 0.15
    """Share of the tokens of a whole text that is its prefix, in (0, 1)."""
    max_length: int | None = None
    """Most tokens of prefix + continuation, EOD included. Longer records are skipped and counted;
    longer texts, and documents of an indexed dataset, are cut into pieces. None: no limit."""
    control_tokens: str = "text"
    """What `<|im_end|>` and the like are in strings of records: `text`, or `parse`, for strings
    that a chat template wrote already."""
    on_bad_record: str = "skip"
    """`skip` counts bad records, `refuse` stops at the first."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError(
                "--input is missing: give JSON Lines (.jsonl, .jsonl.gz) or the prefix of a "
                "Megatron indexed dataset"
            )
        if self.shape not in ("auto", *SHAPES):
            raise ValueError(
                f"--format {self.shape}: unknown; give one of auto, {', '.join(SHAPES)}"
            )
        if self.on_bad_record not in ("skip", "refuse"):
            raise ValueError(f"--on-bad-record {self.on_bad_record}: give skip or refuse")
        if self.control_tokens not in ("text", "parse"):
            raise ValueError(f"--control-tokens {self.control_tokens}: give text or parse")
        if not 0 < self.prefix_fraction < 1:
            raise ValueError(
                f"--prefix-fraction {self.prefix_fraction}: needs a number between 0 and 1, such "
                "as 0.15 for a prefix of the first 15% of the tokens"
            )
        if self.max_length is not None and self.max_length < 3:
            raise ValueError(
                f"--max-length {self.max_length}: needs at least 3 tokens, one each for prefix, "
                "continuation and end of document"
            )
        check_template(self.template)

    def describe(self) -> list[dict[str, str]]:
        """Base name and sha256 of every input file, for manifests; independent of its folder.

        Raises:
            ValueError: one is not there.
        """
        paths = chain.from_iterable(
            (p + ".bin", p + ".idx") if (p := indexed_prefix(path)) else (path,)
            for path in self.inputs
        )
        return [{"name": Path(path).name, "sha256": _sha256(path)} for path in paths]

    def stored_bytes(self) -> int:
        """Bytes of all records as they lie on disk, packed or not."""
        paths = (p + ".bin" if (p := indexed_prefix(path)) else path for path in self.inputs)
        return sum(Path(path).stat().st_size for path in paths)


def indexed_prefix(path: str) -> str | None:
    """The prefix of the Megatron indexed dataset that a path names, or None if it names none."""
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    return prefix if Path(prefix + ".idx").is_file() and Path(prefix + ".bin").is_file() else None


def _sha256(path: str) -> str:
    check_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


INPUT_HELP = """\
--input takes JSON Lines (.jsonl or .jsonl.gz) with one of these sets of fields in each line:
  prompt + completion      optionally rejected, a string or a list
  chosen + rejected        strings or lists of messages, with or without prompt (TRL, UltraFeedback)
                           or NeMo's chosen_response + rejected_response, context + completions
  instruction + response   and context (Dolly), or input and output (Alpaca); see --prompt-template
  messages                 [{role, content} ...] and perhaps tools; the last assistant turn is the
                           continuation, as the tokenizer's chat template writes it
  text                     the first --prefix-fraction of its tokens is the prefix
or the prefix of a Megatron indexed dataset (late pretraining), split like text.
"""


def answer_help(
    description: str | None, add_arguments: Callable[[argparse.ArgumentParser], object]
) -> None:
    """If --help was asked for, print it and exit: without the seconds that Megatron's parser takes.

    Args:
        description: the tool's docstring.
        add_arguments: adds the tool's own flags.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser = argparse.ArgumentParser(
            description=f"{description}\n{INPUT_HELP}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(parser)
        parser.parse_args()


def add_source_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of `Source`, in one group."""
    add = parser.add_argument_group("records").add_argument
    add("--input", nargs="+", default=[], metavar="PATH", help="files to read; see above")
    add("--format", default="auto", choices=["auto", *SHAPES],
        help="shape of the records; auto looks at the keys of each (default: auto)")  # fmt: skip
    add("--prompt-template", default=DEFAULT_TEMPLATE.replace("\n", "\\n"), metavar="TEXT",
        help="prefix of instruction records: {name} is replaced by that field, a line that names "
        "an empty field is left out, \\n starts a new line (default: '%(default)s')")  # fmt: skip
    add("--prefix-fraction", type=float, default=0.15, metavar="F",
        help="share of a text's tokens that is its prefix (default: 0.15)")  # fmt: skip
    add("--max-length", type=int, metavar="N",
        help="most tokens of prefix + candidate; longer records are skipped and counted, longer "
        "texts and documents are cut (default: --max-position-embeddings, or 1024)")  # fmt: skip
    add("--control-tokens", default="text", choices=["text", "parse"],
        help="control tokens spelt in a string, such as <|im_end|>, stay text, or, where a chat "
        "template wrote the strings already, are what they name (default: text)")  # fmt: skip
    add("--on-bad-record", default="skip", choices=["skip", "refuse"],
        help="skip and count bad records, or stop at the first (default: skip)")  # fmt: skip
    return parser


def source_from_args(args: argparse.Namespace) -> Source:
    """The `Source` that parsed flags describe; Megatron's may be among them.

    Raises:
        ValueError: a flag is out of range.
    """
    positions = getattr(args, "max_position_embeddings", None)
    if args.max_length is not None and positions and args.max_length > positions:
        raise ValueError(
            f"--max-length {args.max_length}: the model has --max-position-embeddings {positions}; "
            "give at most that"
        )
    return Source(
        inputs=tuple(args.input),
        shape=args.format,
        template=args.prompt_template.replace("\\n", "\n"),
        prefix_fraction=args.prefix_fraction,
        max_length=args.max_length if args.max_length is not None else positions or 1024,
        control_tokens=args.control_tokens,
        on_bad_record=args.on_bad_record,
    )
