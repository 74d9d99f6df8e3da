"""Tokenizers: training one on records, and what tells two apart."""

import contextlib
import hashlib
import json
from typing import Any

from megatron_cpo.records.spelling import library_name, vocabulary

# Two BPE tokenizers may share a vocabulary and differ in merges: only encoding tells them apart.
PROBE = "The naïve café's 1,024 tokens:\n\tdef f(x):  return x != 0  # 漢字 🙂 unbelievably"


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What decides the ids a tokenizer gives; JSON-able; two are equal when the ids mean the same.

    Independent of the path it was read from, and of the padding of the vocabulary to the
    tensor-parallel size. `sha256` is over the vocabulary, in the order of ids, and over the ids of
    a fixed text, which tells apart two BPE models that differ in their merges only.
    """
    digest = hashlib.sha256()
    for index, token in sorted(vocabulary(tokenizer).items()):
        digest.update(json.dumps([index, str(token)]).encode() + b"\n")
    with contextlib.suppress(
        ValueError
    ):  # NullTokenizer reads numbers only; its size is all it has
        digest.update(json.dumps([int(i) for i in tokenizer.tokenize(PROBE)]).encode())
    return {
        "library": library_name(tokenizer),
        "vocab_size": int(tokenizer.vocab_size),
        "eod": int(tokenizer.eod),
        "sha256": digest.hexdigest(),
    }
