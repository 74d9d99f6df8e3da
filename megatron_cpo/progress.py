"""Progress bars."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    items: Iterable[Any] | None,
    what: str,
    unit: str,
    total: int | None = None,
    *,
    passing: bool = False,
    hidden: bool = False,
) -> Any:
    """A bar with rate and time left, on the first rank's terminal; none in a log file.

    Args:
        items: what to go over; None: `update` is called.
        unit: of what is counted. Bytes, "B", are written as 1.2k, 3.4M.
        total: how many there will be, if `items` does not say.
        passing: of something that is usually over in a second; the bar comes later, and goes.
        hidden: no bar at all.
    """
    is_bytes = unit == "B"
    return tqdm(
        items,
        what,
        total,
        unit=unit if is_bytes else f" {unit}",
        unit_scale=is_bytes,
        disable=True if hidden or os.environ.get("RANK", "0") != "0" else None,
        dynamic_ncols=True,
        delay=1 if passing else 0,
        leave=not passing,
    )
