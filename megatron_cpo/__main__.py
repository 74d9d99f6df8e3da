"""`python -m megatron_cpo` is the command `megatron-cpo`, for `torchrun ... -m` above all.

`torchrun ... -m megatron_cpo SCRIPT.py <its flags> --cpo-aux-loss ...` runs a training script.
"""

from megatron_cpo.cli import main

if __name__ == "__main__":
    main()
