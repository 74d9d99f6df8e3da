"""Architectures that exist on both sides, Megatron's and Hugging Face's.

A family is a module with `read_config` (a `config.json` to a `Model`), `write_config` (the way
back) and `moves` (where each value goes). Its tensors' names are in `formats/names.py`.
"""

from types import ModuleType
from typing import Any

from megatron_cpo.checkpoints.conversion.families import gpt2, llama
from megatron_cpo.checkpoints.conversion.families.model import Model

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama}
"""By `model_type` of a `config.json`."""


def model_of_config(config: dict[str, Any]) -> Model:
    """The model that a `config.json` describes.

    Raises:
        ValueError: no family has this architecture, or Megatron cannot run one of its settings.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"config.json has model_type {kind!r}; only {' and '.join(FAMILIES)} convert here. "
            "For others see docs/checkpoints.md on Megatron-Bridge"
        )
    if config.get("quantization_config"):
        raise ValueError(
            "config.json has a quantization_config; only plain weights convert (fp32, bf16, fp16)"
        )
    model: Model = FAMILIES[kind].read_config(config)
    return model
