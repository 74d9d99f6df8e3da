"""Do the build and a policy mean the same by a token id?"""

from pathlib import Path
from typing import Any

from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.spelling import vocabulary
from megatron_cpo.records.tokenizing import PROBE


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
    ours = f"--tokenizer-model has {tokenizer.vocab_size}"
    advice = "build with the model's own tokenizer"
    if rows < tokenizer.vocab_size:
        raise ValueError(f"{flag}: {rows} tokens in its vocabulary, {ours}; {advice}")
    theirs = _load(path)
    if theirs is None:
        return
    if len(theirs) != tokenizer.vocab_size:
        raise ValueError(f"{flag}: its tokenizer has {len(theirs)} tokens, {ours}; {advice}")
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


def check_checkpoint(load: str, step: int | None, tokenizer: Any) -> None:
    """Refuse a Megatron checkpoint whose vocabulary has not as many tokens as the build's.

    A torch_dist checkpoint says how many rows its vocabulary has and how they were padded, and,
    for tokenizers without a file, the number of tokens. Others say nothing we could compare.

    Raises:
        ValueError: they differ; shows both values.
    """
    from megatron_cpo.checkpoints.formats.opening import open_checkpoint

    try:
        checkpoint = open_checkpoint(Path(load), step)
    except ValueError:  # another format: Megatron's own loader knows it, or says why not
        return
    size = tokenizer.vocab_size
    fewest, most = checkpoint.padding or (0, size)
    known = checkpoint.vocabulary
    if "vocab_size" in known and not any(isinstance(value, Path) for value in known.values()):
        fewest = most = known["vocab_size"]
    if not fewest <= size <= most:
        raise ValueError(
            f"--load {load}: its vocabulary has {most} tokens"
            f"{f', {most - fewest} of them perhaps padding' if fewest < most else ''}, the build's "
            f"tokenizer {size}; build with the model's own tokenizer"
        )


def _load(path: str) -> Any:
    """The tokenizer in a model's folder, or None if there is none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((Path(path) / name).is_file() for name in names):
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
