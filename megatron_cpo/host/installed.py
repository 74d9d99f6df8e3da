"""Which Megatron-Core is installed, told from its files: its import takes seconds."""

import importlib.util
import re
from pathlib import Path


def core_version() -> tuple[int, int] | None:
    """Major and minor version of what `import megatron.core` would find; None: there is none."""
    found = importlib.util.find_spec("megatron")
    folders = found.submodule_search_locations if found else None
    for folder in folders or ():  # of a checkout and a wheel the first counts
        path = Path(folder) / "core" / "package_info.py"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            numbers = [re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR")]
            if all(numbers):
                major, minor = (int(number[1]) for number in numbers if number)
                return major, minor
    return None
