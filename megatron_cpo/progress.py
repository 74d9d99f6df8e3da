"""Progress bars."""

import os
from typing import Any

from tqdm import tqdm


def progress(
    items: Any, what: str, unit: str, total: int | None = None, scale: bool = False
) -> Any:
    """A progress bar on the first rank's terminal, with rate and time left; none in a log file.

    Args:
        scale: write large numbers as 1.2k, 3.4M.
    """
    hidden = None if os.environ.get("RANK", "0") == "0" else True
    return tqdm(
        items, what, total, unit=f" {unit}", unit_scale=scale, disable=hidden, dynamic_ncols=True
    )
