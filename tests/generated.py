"""What tests of generated texts share: prompts, what transformers says to them, and records."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cpo.evaluation.decoding import Prompt
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from tests.scored_texts import records

MOST = 12


def prompts(count: int = 100) -> list[Prompt]:
    """Of 1 to 30 random tokens."""
    rng = np.random.default_rng(4)
    return [
        Prompt(f"{i:016x}", rng.integers(4, 1000, 1 + i % 30).astype(np.int32), 0)
        for i in range(count)
    ]


def by_transformers(
    policy: HuggingFacePolicy, ends: Collection[int], **how: Any
) -> list[list[int]]:
    """What `generate` adds to each prompt, one at a time."""
    found = []
    for prompt in prompts():
        ids = torch.from_numpy(prompt.prefix.astype(np.int64))[None]
        output = policy._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MOST,
            eos_token_id=sorted(ends), pad_token_id=0, **how,
        )  # fmt: skip
        found.append(output[0, len(prompt.prefix) :].tolist())
    return found


def save_records(path: Path) -> Path:
    """21 short ones of Dolly, the first of them twice."""
    rows = [{"prompt": x, "completion": y} for x, y in records(21, longest=6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path
