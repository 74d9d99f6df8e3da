"""Do the build and a policy mean the same by a token id?"""

from pathlib import Path
from typing import Any

from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.spelling import vocabulary
from megatron_cpo.records.tokenizing import PROBE
from megatron_cpo.records.vocabulary import describe_size, vocabulary_size


def check_tokenizer(flag: str, path: str, rows: int, tokenizer: Any) -> None:
    """Refuse a model whose tokens are not those of the build.

    Compared are the size of the vocabulary and, where the model's folder has a tokenizer, the end
    of sequence, every token by its id, and the ids of a fixed text (two BPE models may differ in
    their merges only).

    Args:
        flag: how the user named the model.
        path: the model's folder.
        rows: vocabulary rows of the model, those that only pad it included.
        tokenizer: Megatron's, of the build.

    Raises:
        ValueError: they differ; shows both values.
    """
    size, ours = vocabulary_size(tokenizer), f"--tokenizer-model has {describe_size(tokenizer)}"
    advice = "build with the model's own tokenizer"
    if rows < size:
        raise ValueError(f"{flag}: {rows} rows in its vocabulary, {ours}; {advice}")
    theirs = _load(path)
    if theirs is None:
        return
    if vocabulary_size(theirs) != size:
        raise ValueError(f"{flag}: its tokenizer has {describe_size(theirs)}, {ours}; {advice}")
    if theirs.eos_token_id != tokenizer.eod:
        raise ValueError(
            f"{flag}: its end of sequence is id {theirs.eos_token_id} "
            f"({theirs.eos_token!r}), that of --tokenizer-model is id {tokenizer.eod}; {advice}"
        )
    by_id = {index: token for token, index in theirs.get_vocab().items()}
    for index, token in sorted(vocabulary(tokenizer).items()):
        if index in by_id and str(token) != by_id[index]:
            raise ValueError(
                f"{flag}: id {index} is {by_id[index]!r} in its tokenizer and {str(token)!r} in "
                f"--tokenizer-model; {advice}"
            )
    try:
        expected = Encoder(tokenizer).continuation(PROBE)
    except ValueError:  # NullTokenizer reads numbers only
        return
    found = theirs(PROBE, add_special_tokens=False)["input_ids"]
    if found != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
        raise ValueError(
            f"{flag}: encodes a test text otherwise than --tokenizer-model, from token {at} on: "
            f"{found[at : at + 5]} and {expected[at : at + 5]}; {advice}"
        )


def has_tokenizer(path: str) -> bool:
    """Whether a model's folder has a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return any((Path(path) / name).is_file() for name in names)


def _load(path: str) -> Any:
    """The tokenizer in a model's folder, or None if there is none."""
    from transformers import AutoTokenizer

    if not has_tokenizer(path):
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
