"""`torchrun -m megatron_cpo pretrain_gpt.py <its flags> --cpo-aux-loss ...` runs a host script."""

import runpy
import sys
from pathlib import Path

USAGE = """\
usage: torchrun ... -m megatron_cpo SCRIPT [flags of SCRIPT] [--cpo-aux-loss --cpo-... ]

Runs a Megatron training script (pretrain_gpt.py of a Megatron-LM checkout, or
examples/pretrain_gpt.py) with the --cpo-* flags added. Without --cpo-aux-loss it trains as it
always did. `-m megatron_cpo SCRIPT --help` lists all flags."""


def main() -> None:
    """Install the flags, then run the script as `python SCRIPT` would."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"megatron_cpo: {script}: no such script\n\n{USAGE}")
    # As python does: what lies beside the script comes first, such as a checkout's own megatron.
    sys.path.insert(0, str(script.resolve().parent))
    from megatron_cpo import install

    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
