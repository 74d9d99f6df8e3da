"""A recipe's stages as a bash script, or as jobs of Slurm."""

import shlex
from pathlib import Path

from megatron_cpo.recipes.runner import digests
from megatron_cpo.recipes.stages import Stage

HEAD = (
    "#!/usr/bin/env bash",
    "# shellcheck disable=SC2046  # $(cat megatron_flags.txt): each word is a flag",
    "set -euo pipefail",
)


def script(plan: list[Stage], folder: Path) -> str:
    """A script that makes the same files in an empty folder, and stops at the first failure."""
    folder = folder.resolve()
    lines = [*HEAD, _places(plan, folder)]
    for stage in plan:
        log = shlex.quote(str(folder / "logs" / f"{stage.name}.log"))
        lines += ["", f"echo {shlex.quote(stage.name)}", f"{stage.line} >{log} 2>&1"]
    return "\n".join(lines) + "\n"


def slurm(plan: list[Stage], folder: Path) -> dict[str, str]:
    """Jobs of a stage each, and `submit.sh`, which submits them with what they depend on.

    Its arguments go to every sbatch: `bash submit.sh --gpus-per-node=8 --time=4:00:00`. It may be
    submitted again: what is done as the recipe has it now is not done again, as in a run.

    Returns:
        Contents by the name of the file.
    """
    folder = folder.resolve()
    files, submit = {}, [*HEAD, "declare -A job", _places(plan, folder)]
    wanted = digests(plan)
    for stage in plan:
        log = shlex.quote(str(folder / "logs" / f"{stage.name}.log"))
        options = f"#SBATCH --job-name={stage.name} --nodes=1 --ntasks=1 --output={log}"
        steps = _once(stage, wanted[stage.name], folder / "slurm" / f"{stage.name}.state")
        files[f"{stage.name}.sbatch"] = "\n".join([HEAD[0], options, *HEAD[1:], *steps]) + "\n"
        path = shlex.quote(str(folder / "slurm" / f"{stage.name}.sbatch"))
        after = "".join(f":${{job[{name}]%%;*}}" for name in stage.needs)
        depends = f'--kill-on-invalid-dep=yes --dependency="afterok{after}" ' if after else ""
        submit.append(f'job[{stage.name}]=$(sbatch --parsable "$@" {depends}{path})')
    submit.append('echo "submitted ${#job[@]} jobs"')
    return files | {"submit.sh": "\n".join(submit) + "\n"}


def _once(stage: Stage, digest: str, file: Path) -> list[str]:
    """Lines that do a stage unless it is done, and go on with what was begun where it can be.

    Args:
        file: for the state, which is of a digest.
    """
    paths = [shlex.quote(str(path)) + "*" * path.name.endswith(".") for path in stage.outputs]
    there = "".join(f" && compgen -G {shlex.quote(path)} >/dev/null" for path in paths)
    kept = [shlex.quote(f"{path}.generate") for path in stage.outputs if path.suffix == ".json"]
    remove = f"rm -rf {' '.join([*paths, *kept])}"
    place = shlex.quote(str(file))
    return [
        f"state=$(cat {place} 2>/dev/null || true)",
        f'if [[ $state == "{digest} done" ]]{there}; then exit; fi',
        f'[[ $state == "{digest} begun" ]] || {remove}' if stage.resumes else remove,
        f'echo "{digest} begun" >{place}',
        stage.line,
        f'echo "{digest} done" >{place}',
    ]


def _places(plan: list[Stage], folder: Path) -> str:
    outputs = (path.parent for stage in plan for path in stage.outputs)
    return f"mkdir -p {shlex.join(sorted({str(p) for p in outputs} | {str(folder / 'logs')}))}"
