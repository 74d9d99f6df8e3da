"""The slow twin of a training step: padded rows through Megatron's own model, plain torch.

One process, no tree, no packing: each candidate is a row of its own, logits are whole, and every
loss is written out group by group from the papers' formulas. It starts from the checkpoint that the
run starts from and keeps its gradients as `tests.parity.measure` does.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.stores import VOCAB_SIZE
from megatron_cpo.groups.store import Group
from megatron_cpo.training.config import CPOConfig, add_cpo_args, cpo_config


def padded_step(argv: list[str], groups: list[Group], settings: CPOConfig, folder: str) -> dict:
    """On a rank: losses of one global batch of `groups`; gradients to `folder`.

    Args:
        argv: flags of a run with `--load`; its own `--cpo-*` flags do not matter here.
        settings: `CPOConfig`.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from megatron_cpo.host.loading import load_model, score_args, start_megatron
    from megatron_cpo.training.install import install

    install()
    sys.argv = ["padded", *without_cpo(argv)]
    args = score_args()
    start_megatron()
    [model] = unwrap_model(load_model(args, lambda chunks: chunks))
    contrast, supervised = [], []
    for group in groups:
        losses, nll = group_terms(model, group, settings)
        contrast.append(losses)
        supervised.append(nll)
    cpo, mle = average(contrast, supervised, groups, settings)
    (settings.weight * cpo + settings.mle_weight * mle).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad.detach().float()
    Path(folder).mkdir()
    dist_checkpointing.save({"model0": model.sharded_state_dict()}, folder)
    tokens = sum(len(group.candidates[0]) for group in groups)
    return {"cpo loss": float(cpo), "lm loss": float(torch.stack(supervised).sum() / tokens)}


def settings_of(flags: Sequence[str]) -> CPOConfig:
    """The configuration of a command line."""
    parser = add_cpo_args(argparse.ArgumentParser(allow_abbrev=False))
    config = cpo_config(parser.parse_known_args(list(flags))[0])
    assert config is not None
    return config


def without_cpo(argv: Sequence[str]) -> list[str]:
    """Flags without the `--cpo-*` ones and their values."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.startswith("--cpo-")
        if not skip:
            kept.append(word)
    return kept


def token_logps(model: Any, prefix: Any, inputs: list[Any], labels: list[Any]) -> list[Tensor]:
    """log pi(label | prefix, inputs before it) of each row, [t] each; padded to the longest."""
    size, p = len(prefix) + max(map(len, inputs)), len(prefix)
    tokens = torch.zeros(len(inputs), size, dtype=torch.long)
    for row, continuation in zip(tokens, inputs, strict=True):
        row[:p] = torch.from_numpy(prefix)
        row[p : p + len(continuation)] = torch.from_numpy(continuation)
    masked = torch.ones(size, size, dtype=torch.bool).triu(1)[None, None]
    logits = model(tokens, torch.arange(size).expand_as(tokens), masked)[..., : VOCAB_SIZE + 1]
    logps = torch.log_softmax(logits.float(), dim=-1)
    return [
        logps[k, p - 1 : p - 1 + len(wanted)].gather(1, torch.from_numpy(wanted).long()[:, None])[
            :, 0
        ]
        for k, wanted in enumerate(labels)
    ]


def group_terms(model: Any, group: Group, settings: Any) -> tuple[Tensor, Tensor]:
    """The objective's loss of a group, and -log pi(y_1 | x)."""
    if settings.objective == "pss":
        labels = [group.candidates[0]] * len(group.candidates)
        gold = token_logps(model, group.prefix, group.candidates, labels)
        return -torch.cat(gold).sum(), -gold[0].sum()
    by_token = token_logps(model, group.prefix, group.candidates, group.candidates)
    ratios = []
    for logps, reference in zip(by_token, group.reference_logps.tolist(), strict=True):
        ratio = logps.sum() - reference
        ratios.append(ratio / len(logps) if settings.length_normalise else ratio)
    if ratios[0] < 0:
        ratios[0] = ratios[0] * (1 + settings.dpop_lambda)
    scores, n = settings.beta * torch.stack(ratios), len(ratios) - 1
    if settings.objective == "nce":
        is_true = torch.sigmoid(scores - torch.tensor(float(n)).log())
        loss = -is_true[0].log() - (1 - is_true[1:]).log().sum()
    else:
        order = group.ranks.argsort().tolist() if settings.objective == "ranked" else [0]
        remaining, loss = list(range(n + 1)), torch.zeros(())
        for k in order:
            loss = loss - (scores[k].exp() / scores[remaining].exp().sum()).log()
            remaining.remove(k)
    return loss, -by_token[0].sum()


def average(
    contrast: list[Tensor], supervised: list[Tensor], groups: list[Group], settings: Any
) -> tuple[Tensor, Tensor]:
    """Both terms of the loss over a global batch."""
    tokens = sum(len(group.candidates[0]) for group in groups)
    over = len(groups) if settings.mle_average == "group" else tokens
    if settings.objective == "pss":
        copies = sum(len(candidate) for group in groups for candidate in group.candidates)
        return torch.stack(contrast).sum() / copies, torch.stack(supervised).sum() / over
    return torch.stack(contrast).mean(), torch.stack(supervised).sum() / over
