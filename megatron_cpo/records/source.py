"""The flags that say where records come from and how they become pairs, shared by all tools."""

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_cpo.files import refuse_inputs
from megatron_cpo.records.columns import NAMES, Columns
from megatron_cpo.records.inputs import expand, files_of, indexed_prefix
from megatron_cpo.records.opening import WANTED, check_file
from megatron_cpo.records.shapes import DEFAULT_TEMPLATE, SHAPES, check_template


@dataclass(frozen=True)
class Source:
    """Where records come from and how they become pairs; flags of every tool that reads them."""

    inputs: tuple[str, ...]
    """Files, folders and patterns, see `inputs.py`, or prefixes of Megatron indexed datasets (late
    pretraining)."""
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
    names: tuple[tuple[str, str], ...] = ()
    """`--prompt-field` and its like: (our name, the data's) of fields."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError(f"--input is missing: {WANTED}")
        object.__setattr__(self, "inputs", expand(self.inputs))
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
        Columns(self.names)

    @property
    def columns(self) -> Columns:
        """The data's names for the fields."""
        return Columns(self.names)

    def describe(self) -> list[dict[str, str]]:
        """Base name and sha256 of every input file, for manifests; independent of its folder.

        Raises:
            ValueError: one is not there.
        """
        return [
            {"name": os.path.relpath(file, Path(path).parent), "sha256": _sha256(file)}
            for path in self.inputs
            for file in _stored(path, (".bin", ".idx"))
        ]

    def refuse_output(self, flag: str, *files: str) -> None:
        """Refuse to write what would take the place of an input.

        Args:
            flag: names the output in the message.
            files: that would be written.

        Raises:
            ValueError: one of them is read.
        """
        read = [file for path in self.inputs for file in _stored(path, (".bin", ".idx"))]
        for file in files:
            refuse_inputs(flag, file, read)

    def stored_bytes(self) -> int:
        """Bytes of all records as they lie on disk, packed or not."""
        files = chain.from_iterable(_stored(path, (".bin",)) for path in self.inputs)
        return sum(Path(file).stat().st_size for file in files)


def _stored(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files of an input; of an indexed dataset those with these suffixes."""
    prefix = indexed_prefix(path)
    return [prefix + suffix for suffix in suffixes] if prefix else files_of(path)


def _sha256(path: str) -> str:
    check_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


INPUT_HELP = """\
--input takes JSON Lines or a JSON array, plain or packed (.gz .bz2 .xz .zst), Parquet and Arrow
files, folders of datasets' save_to_disk, and patterns of these, with one of these sets of fields:
  prompt + completion      strings, or lists of messages
  chosen + rejected        strings or lists of messages, with or without prompt (TRL, UltraFeedback)
                           or NeMo's chosen_response + rejected_response, context + completions
  instruction + response   and context (Dolly), or input and output (Alpaca); see --prompt-template
  messages                 [{role, content} ...] and perhaps tools; the last assistant turn is the
                           continuation, as the tokenizer's chat template writes it
  text                     the first --prefix-fraction of its tokens is the prefix
All but text may have rejected answers beside: a string, a list of messages, or a list of these.
--input also takes the prefix of a Megatron indexed dataset (late pretraining), split like text.
Fields of other names: --prompt-field and its like. Tables and .zst need the extra [data].
"""


def add_source_arguments(
    parser: argparse.ArgumentParser, also: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add the flags of `Source`, in one group.

    Args:
        also: other names of `--input`.
    """
    add = parser.add_argument_group("records").add_argument
    add(*also, "--input", dest="input", nargs="+", default=[], metavar="PATH",
        help="what to read; see above")  # fmt: skip
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
    for name in NAMES:
        add(f"--{name}-field", metavar="NAME", help=f"what the data calls {name}; a.b is b in a")
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
        names=tuple((n, given) for n in NAMES if (given := getattr(args, f"{n}_field", None))),
    )
