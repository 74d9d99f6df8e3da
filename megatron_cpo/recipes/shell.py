"""A recipe's stages as a bash script."""

import shlex
from pathlib import Path

from megatron_cpo.recipes.stages import Stage


def script(plan: list[Stage], folder: Path) -> str:
    """A script that makes the same files in an empty folder, and stops at the first failure."""
    folder = folder.absolute()
    outputs = (path.parent for stage in plan for path in stage.outputs)
    places = sorted({str(path) for path in outputs} | {str(folder / "logs")})
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"mkdir -p {shlex.join(places)}"]
    for stage in plan:
        log = shlex.quote(str(folder / "logs" / f"{stage.name}.log"))
        lines += ["", f"echo {shlex.quote(stage.name)}", f"{stage.line} >{log} 2>&1"]
    return "\n".join(lines) + "\n"
