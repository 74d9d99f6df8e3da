"""Which of a Hugging Face model's tensors are weights, by names that do not depend on who saved it.

The hub has GPT-2 as a base model, without the prefix that `save_pretrained` of the whole model
writes, and with the causal masks that old versions saved; Llamas may have tables of frequencies.
"""

import re
from collections.abc import Mapping

from megatron_cpo.checkpoints.formats.stored import StoredTensor

_PREFIXES = {"gpt2": "transformer.", "llama": "model."}
"""Of all tensors but the head, by model type."""
_ANY_PREFIX = ("transformer.", "model.", "gpt_neox.")
_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|(cos|sin)_cached)|(attn|attention|self_attention)\.masked_bias)"
)
_MASK = re.compile(r"(.*\.)?(attn|attention|self_attention)\.bias")
_HEADS = ("lm_head.", "embed_out.", "score.", "classifier.")
_EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
_OUTPUTS = ("lm_head.weight", "embed_out.weight")


def weight_names(kind: str | None, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The names of the weights among some tensors, by the name that all their models share.

    Args:
        kind: `model_type` of the `config.json`. For GPT-2 and Llama shared names are those that
            transformers writes today; for others the prefix of the base model is left out.
    """
    found: dict[str, str] = {}
    clashes = set()
    for name, tensor in tensors.items():
        if is_buffer(name, tensor):
            continue
        shared = _shared_name(kind, name)
        if shared in found:
            clashes.add(shared)
        found[shared if shared not in found else name] = name
    for shared in clashes:  # two tensors that only a prefix tells apart: it means something here
        name = found.pop(shared)
        found[name] = name
    return found


def is_buffer(name: str, tensor: StoredTensor) -> bool:
    """Whether it is a mask or a table that the code makes anew."""
    mask = _MASK.fullmatch(name) and len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1)
    return bool(mask or _BUFFERS.fullmatch(name))


def _shared_name(kind: str | None, name: str) -> str:
    if name.startswith(_HEADS):
        return name
    if kind in _PREFIXES:
        prefix = _PREFIXES[kind]
        return name if name.startswith(prefix) else prefix + name
    return next((name.removeprefix(p) for p in _ANY_PREFIX if name.startswith(p)), name)


def embedding_and_head(names: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The shared names of the token embedding and of the output layer, where they are stored."""
    embedding = next((name for name in names if name.endswith(_EMBEDDINGS)), None)
    head = next((name for name in names if name in _OUTPUTS), None)
    return embedding, head
