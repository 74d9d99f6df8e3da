"""What token ids mean, read from a tokenizer's files: do two models mean the same by each?

The same vocabulary may lie in `tokenizer.json` here and in `vocab.json` or `tokenizer.model` there,
and tokens that were added to it in any of four files. What is compared is the token of every id,
and how a text is cut into them (merges, scores), not the files.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.folders import read_json

_OPAQUE = ("*.tiktoken", "tekken.json")
"""Files of which only the bytes are compared."""
KEPT = "tokenizer"
"""Within an iteration: the run's tokenizer. Newer Megatron keeps it there, and so does merging."""
_CALLED = {
    **dict.fromkeys(
        ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
        ("tokenizer.model",),
    ),
    "TikTokenizer": ("tokenizer.json",),
    "GPT2BPETokenizer": ("vocab.json", "merges.txt"),
}
"""What Megatron calls the files there, whatever the run had called them."""


@dataclass
class Vocabulary:
    """A tokenizer, as far as its files are known; nothing is, by default."""

    tokens: dict[int, str] = field(default_factory=dict)
    """By id, those that were added as well."""
    rules: dict[str, list[str]] = field(default_factory=dict)
    """How a text is cut, by the file that says it."""
    raw: dict[str, str] = field(default_factory=dict)
    """SHA-256 of files that are compared by their bytes."""
    source: str = ""
    """What is known of it where its files are not."""

    def add(self, tokens: dict[Any, Any]) -> None:
        """More tokens by id; those that are there already stay."""
        self.tokens = {int(index): str(token) for index, token in tokens.items()} | self.tokens


def vocabulary_of_folder(folder: Path) -> Vocabulary:
    """Of a Hugging Face model or tokenizer.

    Raises:
        ValueError: a file is damaged.
    """
    found = Vocabulary()
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"):
        if (path := folder / name).is_file():
            _add_file(found, path, name)
    for pattern in _OPAQUE:
        for path in sorted(folder.glob(pattern)):
            found.raw[path.name] = _sha256(path)
    if (path := folder / "added_tokens.json").is_file():
        found.add({index: token for token, index in read_json(path).items()})
    if (path := folder / "tokenizer_config.json").is_file():
        added = read_json(path).get("added_tokens_decoder") or {}
        found.add({index: token["content"] for index, token in added.items()})
    return found


def vocabulary_of_files(*paths: Path) -> Vocabulary:
    """Of a tokenizer's files, or its folder, as Megatron's arguments name them."""
    found = Vocabulary()
    for path in paths:
        if path.is_dir():
            return vocabulary_of_folder(path)
        kinds = {".json": "vocab.json", ".txt": "merges.txt"}
        _add_file(found, path, kinds.get(path.suffix, "tokenizer.model"))
    return found


def kept_files(iteration: Path, kind: str, named: Sequence[str | Path]) -> list[list[Path]]:
    """Where an iteration's folder may hold the files of its run's tokenizer.

    Args:
        kind: Megatron's `tokenizer_type`.
        named: the files by the run's arguments.

    Returns:
        As many paths as `named` each: under the names that the run had, which merging leaves, and
        under those that Megatron gives.
    """
    names = [tuple(Path(path).name for path in named)]
    if len(_CALLED.get(kind, ())) == len(named):
        names.append(_CALLED[kind])
    return [[iteration / KEPT / name for name in some] for some in names]


def difference(one: Vocabulary, other: Vocabulary) -> str | None:
    """What two vocabularies do not share, of what both have; None if that is the same.

    "{}" stands for the first, "{}" again for the other.
    """
    known = [bool(v.tokens or v.raw) for v in (one, other)]
    if not all(known) and one.source and other.source and one.source != other.source:
        return (
            f"the tokenizer is {_escaped(one.source)} in {{}} and {_escaped(other.source)} in {{}}"
            ", and not all of their files are where the runs had them, to compare what they hold"
        )
    if one.tokens and other.tokens and one.tokens != other.tokens:
        ids = sorted(one.tokens.keys() | other.tokens.keys())
        at = next(i for i in ids if one.tokens.get(i) != other.tokens.get(i))
        pair = [repr(v.tokens[at]) if at in v.tokens else "no token" for v in (one, other)]
        return f"id {at} is {_both(pair)}"
    for name, ours, theirs in _rules_of_both(one, other):
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
            pair = [repr(r[at]) if at < len(r) else "at its end" for r in (ours, theirs)]
            return f"{_escaped(name)} differs from line {at} on: {_both(pair)}"
    for name in one.raw.keys() & other.raw.keys():
        if one.raw[name] != other.raw[name]:
            return f"{_escaped(name)} is another file in {{}} than in {{}}"
    return None


def _rules_of_both(
    one: Vocabulary, other: Vocabulary
) -> Iterator[tuple[str, list[str], list[str]]]:
    """From files of one name; else merges, which are the same wherever they are written."""
    shared = one.rules.keys() & other.rules.keys()
    for name in sorted(shared):
        yield name, one.rules[name], other.rules[name]
    merges = ("tokenizer.json", "merges.txt")
    ours, theirs = (next((n for n in merges if n in v.rules), None) for v in (one, other))
    if not shared and ours and theirs:
        yield theirs, one.rules[ours], other.rules[theirs]


def _add_file(found: Vocabulary, path: Path, kind: str) -> None:
    if kind == "tokenizer.json":
        _add_fast(found, read_json(path))
    elif kind == "vocab.json":
        listed = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(listed, dict):
            found.add({index: token for token, index in listed.items()})
        else:  # Megatron's tiktoken: a list of ranks
            found.raw[kind] = _sha256(path)
    elif kind in ("merges.txt", "vocab.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if kind == "vocab.txt":
            found.add(dict(enumerate(lines)))
        else:
            found.rules[kind] = [n for n in lines if n and not n.startswith("#version")]
    else:
        _add_sentencepiece(found, path)


def _add_fast(found: Vocabulary, tokenizer: dict[str, Any]) -> None:
    model = tokenizer.get("model") or {}
    vocab = model.get("vocab") or {}
    found.add({token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []})
    if isinstance(vocab, dict):
        found.add({index: token for token, index in vocab.items()})
    else:  # Unigram: [token, score]
        found.add(dict(enumerate(token for token, _ in vocab)))
        found.rules["tokenizer.json"] = [f"{token} {score}" for token, score in vocab]
    if merges := model.get("merges"):  # "a b" or ["a", "b"], as the version likes
        joined = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        found.rules["tokenizer.json"] = joined


def _add_sentencepiece(found: Vocabulary, path: Path) -> None:
    try:
        from sentencepiece import SentencePieceProcessor

        model: Any = SentencePieceProcessor(model_file=str(path))
        size = model.get_piece_size()
    except (ImportError, RuntimeError, OSError):  # not here, or tiktoken's format
        found.raw["tokenizer.model"] = _sha256(path)
        return
    pieces = [model.id_to_piece(index) for index in range(size)]
    found.add(dict(enumerate(pieces)))
    found.rules["tokenizer.model"] = [f"{p} {model.get_score(i)}" for i, p in enumerate(pieces)]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _both(pair: list[str]) -> str:
    return " in {} and ".join(map(_escaped, pair)) + " in {}"


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
