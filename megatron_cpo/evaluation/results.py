"""Files of generated texts, in the shape that AlpacaEval reads and writes.

A JSON list with one object a text. `instruction`, `output` and `generator` are AlpacaEval's; the
others are ours, plain strings and numbers, so that its reader (pandas) takes them along:

    id           the record, the same in the files of all models
    sample       number of the sample of that record, from 0
    truth        the record's own continuation
    finish       "stop": the model ended it; "length": it hit the limit and is no finished text
    tokens       number of generated tokens, the end token included
    checkpoint, decoding, data, tool, reading      what made the file: see `Made`

A file of another tool needs the first three only; its instructions then are its ids.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_cpo.files import encodable, make_folder, write_json
from megatron_cpo.kept import digest


@dataclass(frozen=True)
class Made:
    """What made a file of texts; empty strings for a file of another tool."""

    checkpoint: str = ""
    """Name and digest of the model."""
    decoding: str = ""
    """Such as `greedy, at most 256 tokens`."""
    data: str = ""
    """Digest of the records."""
    tool: str = ""
    """This package and its version."""
    reading: str = ""
    """What else decides the texts: the longest record, the end tokens, the tokenizer and its chat
    template."""


@dataclass(frozen=True)
class Text:
    """One generated text."""

    id: str
    instruction: str
    output: str
    generator: str
    sample: int = 0
    truth: str | None = None
    finish: str = ""
    tokens: int | None = None


@dataclass(frozen=True)
class Results:
    """A file of texts."""

    path: Path
    texts: list[Text]
    made: Made

    @property
    def generator(self) -> str:
        """The model's name, which is that of the first text."""
        return self.texts[0].generator

    @cached_property
    def digest(self) -> str:
        """Of the texts themselves: prompts, outputs and truths, by record and sample."""
        texts = sorted((t.id, t.sample, t.instruction, t.output, t.truth or "") for t in self.texts)
        return digest(texts)[:16]

    def truths(self) -> "Results":
        """The records' own continuations in the place of the texts, to compare with.

        Raises:
            ValueError: a text has none.
        """
        if missing := [text.id for text in self.texts if text.truth is None]:
            raise ValueError(
                f"{self.path}: {len(missing)} texts have no `truth`, the first is {missing[0]!r}; "
                "only files made by `evaluate generate` can be compared with the reference answers"
            )
        texts = [
            Text(t.id, t.instruction, str(t.truth), "reference", t.sample, t.truth, "stop")
            for t in self.texts
        ]
        return Results(self.path, texts, Made(data=self.made.data))


def write_results(path: Path, texts: Iterable[Text], made: Made) -> None:
    """Write a file of texts; it appears whole or not at all."""
    common = asdict(made)
    make_folder(path.parent)
    write_json(path, [{**asdict(text), **common} for text in texts])


def read_results(path: Path) -> Results:
    """Read a file of texts, ours or AlpacaEval's.

    Raises:
        ValueError: it is not there or no such file, two texts are of one record and sample, or its
            lines were made by different models, settings or data.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a JSON list of texts ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: needs a JSON list of objects, one a text, and at least one")
    texts, made = [], []
    for place, row in enumerate(rows):
        texts.append(_text(path, place, row))
        made.append(Made(*(encodable(str(row.get(field.name, ""))) for field in fields(Made))))
    seen: set[tuple[str, int]] = set()
    for text in texts:
        if (text.id, text.sample) in seen:
            raise ValueError(
                f"{path}: {text.id[:80]!r} is there twice; give each text the `id` of its record, "
                "and several samples of a record the numbers `sample` 0, 1, ..."
            )
        seen.add((text.id, text.sample))
    for other, text in zip(made, texts, strict=True):
        if other != made[0] or text.generator != texts[0].generator:
            raise ValueError(
                f"{path}: texts of several makers: {texts[0].generator} {made[0]} and "
                f"{text.generator} {other}; keep a file for each"
            )
    return Results(path, texts, made[0])


def _text(path: Path, place: int, row: dict[str, Any]) -> Text:
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{path}: text {place} has no string `{name}`: {row.get(name)!r}")
    truth = row.get("truth")
    return Text(
        id=encodable(str(row.get("id", row["instruction"]))),
        instruction=encodable(row["instruction"]),
        output=encodable(row["output"]),
        generator=encodable(str(row.get("generator", path.stem))),
        sample=_number(path, place, row, "sample") or 0,
        truth=None if truth is None else encodable(str(truth)),
        finish=encodable(str(row.get("finish", ""))),
        tokens=_number(path, place, row, "tokens"),
    )


def _number(path: Path, place: int, row: dict[str, Any], name: str) -> int | None:
    """A count of a text; None where it has none."""
    value = row.get(name)
    if value in (None, ""):
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if not 0 <= number < 2**53:
        raise ValueError(
            f"{path}: text {place} has a `{name}` that is no number of at least 0: "
            f"{str(value)[:80]!r}; it is a count in our files, so leave it out or rename it"
        )
    return number


def check_comparable(results: Sequence[Results], decoding: bool = True) -> None:
    """Refuse to compare texts of other records, or decoded otherwise.

    What a file does not say, one of another tool for instance, is not held against it.

    Args:
        decoding: whether they have to be decoded alike, too.

    Raises:
        ValueError: they differ; shows both files and both values.
    """
    first = results[0]
    for other in results[1:]:
        for name in ("data", *(("decoding",) if decoding else ())):
            ours, theirs = getattr(first.made, name), getattr(other.made, name)
            if ours and theirs and ours != theirs:
                raise ValueError(
                    f"{first.path} and {other.path} have other {name}: {ours} and {theirs}; "
                    "compare files that were generated from the same records with the same decoding"
                )
        ids = [{(text.id, text.sample) for text in side.texts} for side in (first, other)]
        if ids[0] != ids[1]:
            odd = sorted(ids[0] ^ ids[1])[0]
            where = first.path if odd in ids[0] else other.path
            raise ValueError(
                f"{first.path} has {len(ids[0])} texts, {other.path} {len(ids[1])}, and "
                f"{len(ids[0] & ids[1])} are of the same record and sample; {odd[0][:80]!r} is in "
                f"{where} alone: generate both from the same records"
            )
