"""A recipe's stages as a bash script, or as jobs of Slurm."""

import shlex
from pathlib import Path

from megatron_cpo.recipes.stages import Stage

HEAD = (
    "#!/usr/bin/env bash",
    "# shellcheck disable=SC2046  # $(cat megatron_flags.txt): each word is a flag",
    "set -euo pipefail",
)


def script(plan: list[Stage], folder: Path) -> str:
    """A script that makes the same files in an empty folder, and stops at the first failure."""
    folder = folder.absolute()
    lines = [*HEAD, _places(plan, folder)]
    for stage in plan:
        log = shlex.quote(str(folder / "logs" / f"{stage.name}.log"))
        lines += ["", f"echo {shlex.quote(stage.name)}", f"{stage.line} >{log} 2>&1"]
    return "\n".join(lines) + "\n"


def slurm(plan: list[Stage], folder: Path) -> dict[str, str]:
    """Jobs of a stage each, and `submit.sh`, which submits them with what they depend on.

    Its arguments go to every sbatch: `bash submit.sh --gpus-per-node=8 --time=4:00:00`.

    Returns:
        Contents by the name of the file.
    """
    folder = folder.absolute()
    files, submit = {}, [*HEAD, "declare -A job", _places(plan, folder)]
    for stage in plan:
        log = shlex.quote(str(folder / "logs" / f"{stage.name}.log"))
        options = f"#SBATCH --job-name={stage.name} --nodes=1 --ntasks=1 --output={log}"
        files[f"{stage.name}.sbatch"] = "\n".join([HEAD[0], options, *HEAD[1:], stage.line]) + "\n"
        path = shlex.quote(str(folder / "slurm" / f"{stage.name}.sbatch"))
        after = "".join(f":${{job[{name}]%%;*}}" for name in stage.needs)
        depends = f'--kill-on-invalid-dep=yes --dependency="afterok{after}" ' if after else ""
        submit.append(f'job[{stage.name}]=$(sbatch --parsable "$@" {depends}{path})')
    submit.append('echo "submitted ${#job[@]} jobs"')
    return files | {"submit.sh": "\n".join(submit) + "\n"}


def _places(plan: list[Stage], folder: Path) -> str:
    outputs = (path.parent for stage in plan for path in stage.outputs)
    return f"mkdir -p {shlex.join(sorted({str(p) for p in outputs} | {str(folder / 'logs')}))}"
