"""Which instruct model writes rejected answers (`written`), how it is asked, and its flags.

The question is that of the CPO paper's DPO baseline (arXiv:2502.16433, appendix A.4).
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpo.files import on_this_machine
from megatron_cpo.policies.address import KEY_VARIABLE, ShownAddress

KIND = "written"
FLAG, KEY_FLAG, LIMIT_FLAG = "--writer", "--writer-key-env", "--writer-max-tokens"
LABEL = "Not helpful response:"
"""What an answer follows; some models write it once more."""


def question(instruction: str, response: str) -> str:
    """What a writer is asked."""
    return (
        "Given the ground truth instruction and response, can you generate a not helpful "
        f"response?\n\nInstruction:\n{instruction}\n\nResponse:\n{response}\n\n{LABEL}"
    )


@dataclass(frozen=True)
class Writer:
    """A model behind one or more OpenAI-compatible servers."""

    urls: tuple[str, ...]
    """Servers that share the work; all have the model."""
    model: str
    """Its name there."""
    key_variable: str | None = None
    """Environment variable of the key; None: OPENAI_API_KEY if it is set."""
    in_flight: int = 16
    """Most requests at a time, at each server."""
    tries: int = 4
    """Most times that one answer is asked for, until it can be used."""
    max_tokens: int = 512
    """Most tokens of an answer, in the writer's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More fields of a request; None leaves one out that is there otherwise."""
    answers: str | None = None
    """Folder where answers are kept, which builds may share. None: PREFIX-written."""

    def __post_init__(self) -> None:
        if not self.model:
            raise _unnamed()
        for flag, value in (
            (f"{FLAG}-in-flight", self.in_flight),
            (f"{FLAG}-tries", self.tries),
            (LIMIT_FLAG, self.max_tokens),
        ):
            if value < 1:
                raise ValueError(f"{flag} {value}: needs at least 1")
        if self.answers:
            on_this_machine(Path(self.answers))

    def check_named(self) -> None:
        """Refuse a writer without a server, who can only be told apart from others.

        Raises:
            ValueError: there is none.
        """
        if not self.urls:
            raise _unnamed()

    def body(self, instruction: str, response: str, seed: int) -> dict[str, Any]:
        """The request for an answer."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question(instruction, response)}],
            "temperature": 1.0,
            "max_tokens": self.max_tokens,
            "seed": seed,
            **self.options,
        }
        return {name: value for name, value in body.items() if value is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, for the manifest; no address, no folder."""
        return {
            "name": self.model.rstrip("/").rpartition("/")[2],
            "question": question("{instruction}", "{response}"),
            "max_tokens": self.max_tokens,
            "options": dict(self.options),
            "tries": self.tries,
        }


def _unnamed() -> ValueError:
    return ValueError(
        f"{FLAG} and {FLAG}-model are needed: the address of an OpenAI-compatible server, "
        "such as http://localhost:8000/v1, and its name of an instruct model"
    )


def add_writer_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of `Writer`, in one group."""
    add = parser.add_argument_group("writer of --negatives written=N").add_argument
    add(FLAG, nargs="+", type=ShownAddress, metavar="URL",
        help="OpenAI-compatible servers of an instruct model, such as http://localhost:8000/v1; "
        "several share the work")  # fmt: skip
    add("--writer-model", metavar="NAME", help="the servers' name of the model")
    add(KEY_FLAG, metavar="NAME",
        help="the environment variable that holds the servers' key, which is nowhere printed or "
        f"stored (default: {KEY_VARIABLE}, if it is set)")  # fmt: skip
    add("--writer-in-flight", type=int, default=Writer.in_flight, metavar="N",
        help="most requests at a time, at each server (default: %(default)s)")  # fmt: skip
    add("--writer-tries", type=int, default=Writer.tries, metavar="N",
        help="times that an answer is asked for which is empty or the truth, before its record is "
        "left out (default: %(default)s)")  # fmt: skip
    add(LIMIT_FLAG, type=int, default=Writer.max_tokens, metavar="N",
        help="most tokens of an answer, in the writer's own (default: %(default)s)")  # fmt: skip
    add("--writer-options", default="{}", metavar="JSON",
        help="more fields of each request, or other values; null leaves one out (default: "
        "temperature 1, max_tokens, and a seed)")  # fmt: skip
    add("--writer-answers", metavar="FOLDER",
        help="where answers are kept, so that none is paid twice; builds may share it (default: "
        "PREFIX-written)")  # fmt: skip
    return parser


def writer_from_args(args: argparse.Namespace) -> Writer | None:
    """The writer that the flags name; None if they name none.

    Raises:
        ValueError: a flag is missing or out of range.
    """
    if args.writer is None and args.writer_model is None:
        return None
    try:
        options = json.loads(args.writer_options)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(
            f"--writer-options {args.writer_options}: is no JSON object; give one such as "
            "'{\"temperature\": 0.7}'"
        )
    writer = Writer(
        urls=tuple(args.writer or ()),
        model=args.writer_model or "",
        key_variable=args.writer_key_env,
        in_flight=args.writer_in_flight,
        tries=args.writer_tries,
        max_tokens=args.writer_max_tokens,
        options=options,
        answers=args.writer_answers,
    )
    if not args.merge:  # blocks that are there need the model's name alone, to be known again
        writer.check_named()
    return writer
