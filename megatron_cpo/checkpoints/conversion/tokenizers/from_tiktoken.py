"""Megatron's TikTokenizer, for transformers, id for id.

Its file is a JSON list of byte sequences in the order of their ranks. Megatron puts special tokens
before them, and has the patterns that cut a text; so it is asked, the one time that it is imported
for a conversion.
"""

from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.conversion.tokenizers.tokenizer import Tokenizer, save


def read(paths: list[Path], args: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a run with these arguments.

    Raises:
        ValueError: the file is no vocabulary of such a run.
    """
    [path] = paths
    megatron = _megatron_tokenizer(path, args)
    ids = {
        "unk_token": megatron.unk_id,
        "bos_token": megatron.bos_id,
        "eos_token": megatron.eos_id,
        "pad_token": megatron.pad_id,
    }
    special = {name: megatron.special_tokens[index] for name, index in ids.items()}
    return Tokenizer(
        str(path),
        megatron.vocab_size,
        megatron.eod,
        megatron.bos_id,
        megatron.pad_id,
        lambda folder: save(_fast_tokenizer(megatron), folder, special),
        megatron.text_to_ids,
    )


def _megatron_tokenizer(path: Path, args: dict[str, Any]) -> Any:
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    options = {
        "pattern": args.get("tiktoken_pattern"),
        "vocab_size": args.get("vocab_size"),
        "num_special_tokens": args.get("tiktoken_num_special_tokens"),
        "special_tokens": args.get("special_tokens"),
    }
    try:
        return TikTokenTokenizer(str(path), **{k: v for k, v in options.items() if v is not None})
    except (AssertionError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no vocabulary of the run's TikTokenizer ({error!r})"
        ) from error


def _fast_tokenizer(megatron: Any) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    ranks: dict[bytes, int] = megatron.token2id
    names = {token: _visible(token) for token in ranks}
    merges = sorted(
        (rank, ranks[token[:cut]], token, cut)
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    special = {token: index for index, token in enumerate(megatron.special_tokens)}
    model = models.BPE(
        vocab=special | {names[token]: rank for token, rank in ranks.items()},
        merges=[(names[token[:cut]], names[token[cut:]]) for _, _, token, cut in merges],
        ignore_merges=True,  # what is a token as it stands is not merged
    )
    tokenizer = FastTokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(megatron.tokenizer._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def _visible(token: bytes) -> str:
    """Bytes as `tokenizers` writes them: printable ones of Latin-1 as they are, others from 256."""
    return "".join(_CHARACTERS[byte] for byte in token)


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + place) for place, byte in enumerate(_OTHERS)
}
