"""How many texts MAUVE needs, and whether records can have so many: before there is any text."""

from pathlib import Path

from megatron_cpo.records.dropped import BadRecord
from megatron_cpo.records.inputs import read_fields
from megatron_cpo.records.lines import Unreadable
from megatron_cpo.records.shapes import detect_shape
from megatron_cpo.records.source import Source

ENOUGH, LEAST = 100, 10
"""Texts on either side: without and with `few`."""
_WHY = "MAUVE compares histograms with a cluster for each 10 texts"


def check_size(path: Path, texts: int, few: bool) -> None:
    """Refuse a file of texts that is too small.

    Args:
        texts: on the smaller side.
        few: accept fewer than `ENOUGH`.

    Raises:
        ValueError: there are too few.
    """
    if texts >= (LEAST if few else ENOUGH):
        return
    least, remedy = (
        (LEAST, "") if few else (ENOUGH, ", or give --few to see a figure that is noise")
    )
    raise ValueError(
        f"{path}: {texts} texts on the smaller side; {_WHY}, and its own loader takes 2,000 or "
        f"more: needs at least {least}; generate more{remedy}"
    )


def check_records(source: Source, limit: int | None) -> None:
    """Refuse records of which there cannot be enough texts; bad ones are counted like good ones.

    Args:
        limit: the first so many are used; None: all.

    Raises:
        ValueError: there are too few, or a file cannot be read.
    """
    if limit is not None and limit < ENOUGH:
        raise ValueError(
            f"limit {limit}: {_WHY}, and needs at least {ENOUGH}; raise the limit, or leave mauve "
            "out"
        )
    most = most_records(source)
    if most < ENOUGH:
        raise ValueError(
            f"{', '.join(source.inputs)}: {most} records at most; {_WHY}, and needs at least "
            f"{ENOUGH}; give more records, or leave mauve out"
        )


def most_records(source: Source) -> int:
    """No more records than these are in files, whatever the tokenizer; no count beyond `ENOUGH`."""
    found = 0
    for _, stored in read_fields(source.inputs, lambda lines, read: None, 0):
        fields = stored if isinstance(stored, Unreadable) else source.columns.of(stored)
        if isinstance(fields, Unreadable):
            continue
        try:
            shape = detect_shape(fields) if source.shape == "auto" else source.shape
        except BadRecord:
            continue
        found += 1
        if shape == "text" and source.max_length:  # cut into pieces; a token has a byte or more
            found += len(str(fields.get("text")).encode(errors="replace")) // source.max_length
        if found >= ENOUGH:
            break
    return found
