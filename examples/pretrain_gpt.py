#!/usr/bin/env python
"""Train with CPO where Megatron is the megatron-core wheel, which has no pretrain_gpt.py.

The reference by plain MLE, then CPO from it on the groups of `megatron-cpo build --load`:

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --num-layers 4 ... \\
        --data-path runs/text --save runs/mle
    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --num-layers 4 ... \\
        --cpo-aux-loss --cpo-k 12 --cpo-data-path runs/groups --load runs/mle --finetune \\
        --hidden-dropout 0 --save runs/cpo

`torchrun ... -m megatron_cpo.pretrain_gpt` is the same where there is no checkout. A training
script of your own needs two lines, before it imports Megatron:

    from megatron_cpo import install
    install()
"""

from megatron_cpo.pretrain_gpt import main

if __name__ == "__main__":
    main()
