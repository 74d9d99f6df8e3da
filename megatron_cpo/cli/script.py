"""Running a Megatron training script with the `--cpo-*` flags installed."""

import runpy
import sys
from pathlib import Path

from megatron_cpo.cli.errors import fail


def run_script(argv: list[str]) -> None:
    """Install the flags, then run the script `argv[0]` as `python SCRIPT` would.

    Raises:
        SystemExit: there is no such script.
    """
    script = Path(argv[0])
    if not script.is_file():
        fail(f"megatron-cpo: {script}: no such script; megatron-cpo --help says how to start one")
    # As python does: what lies beside the script comes first, such as a checkout's own megatron.
    sys.path.insert(0, str(script.resolve().parent))
    from megatron_cpo import install

    install()
    sys.argv = argv
    runpy.run_path(str(script), run_name="__main__")
