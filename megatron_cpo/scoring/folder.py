"""The folder PREFIX.score beside a store: log-probs of finished blocks of groups, until all are.

Only then is the store touched. Whoever scores, a policy block by block (`under_policy`) or Megatron
by rows (`under_megatron`), leaves its blocks here, so that one reference is never mixed with
another.
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.finite import require_finite
from megatron_cpo.groups.store import GroupReader, read_manifest
from megatron_cpo.groups.writing import finish_publishing, write_reference_logps
from megatron_cpo.records.tokenizing import tokenizer_identity
from megatron_cpo.work.folder import WorkFolder

STAGE = "logps"


class ScoreFolder(WorkFolder):
    """PREFIX.score of the store PREFIX."""

    def __init__(self, path_prefix: str) -> None:
        super().__init__(path_prefix, "score", {})
        self.reference: dict[str, Any] = {}
        """Identity of what scores, as the manifest will have it."""

    def check(self, tokenizer: Any) -> None:
        """Put a store into place that was being scored when it was killed, and look at it.

        Args:
            tokenizer: Megatron's; has to be the store's.

        Raises:
            ValueError: no store there, or it is of another tokenizer.
        """
        with self.locked():
            try:
                finish_publishing(self._prefix, self.is_alone)
                manifest = read_manifest(self._prefix)
            finally:
                if not (self.path / "command.json").exists():
                    self.remove()
        require_tokenizer(self._prefix, manifest, tokenizer)

    def is_scored(self, reference: dict[str, Any]) -> bool:
        """Whether the store has the log-probs of this reference."""
        return bool(read_manifest(self._prefix)["reference"] == _stored(reference))

    def is_done(self, reference: dict[str, Any]) -> bool:
        """`is_scored`; a folder of the same reference that could not be removed then is removed."""
        if not self.is_scored(reference):
            return False
        command = self.path / "command.json"
        if command.exists():
            theirs = json.loads(command.read_text(encoding="utf-8"))
            ours = {f"reference {name}": value for name, value in _stored(reference).items()}
            if all(theirs.get(name) == value for name, value in ours.items()):
                with self.locked():
                    self.remove()
        return True

    def begin(self, reference: dict[str, Any], **shape: Any) -> bool:
        """Make the folder this reference's; False if the store has its log-probs already.

        Args:
            reference: identity of what scores, JSON-able.
            shape: what else decides the bytes of a block.

        Raises:
            ValueError: another reference, or another shape, has begun to score this store.
        """
        self.reference = _stored(reference)
        with self.locked():
            if self.is_scored(reference):
                self.remove()
                return False
            files = read_manifest(self._prefix)["files"]
            self.command = {
                **{f"files {suffix}": files[suffix] for suffix in (".bin", ".idx")},
                **{f"reference {name}": value for name, value in self.reference.items()},
                **shape,
            }
            self.claim()
            return True

    def write_block(
        self, block: int, groups: range, logps: Sequence[NDArray[np.float32]], source: str
    ) -> None:
        """Keep the log-probs of a block's groups, [K] each; `source` is what they were scored by.

        Raises:
            ValueError: one is not finite.
        """
        for group, scores in zip(groups, logps, strict=True):
            require_finite(scores, f"group {group}", "log-prob", source)
        content = BytesIO()
        np.savez(content, allow_pickle=False, logps=np.concatenate(logps))
        self.write(self.block_path(STAGE, block), content.getvalue())

    def finish(self, blocks: Sequence[range]) -> list[int]:
        """Write the log-probs into the store if all are there, and remove the folder.

        Args:
            blocks: the groups of each block, consecutive.

        Returns:
            The blocks that are missing.

        Raises:
            ValueError: a block is damaged.
        """
        with self.locked():
            if not self.is_scored(self.reference):
                if missing := self.missing(STAGE, range(len(blocks))):
                    return missing
                try:
                    write_reference_logps(self._prefix, self._results(blocks), self.reference)
                except FileNotFoundError:  # without locks: another share finished meanwhile
                    if not self.is_scored(self.reference):
                        raise
            self.remove()  # or another share has finished while this one waited
            return []

    def _results(self, blocks: Sequence[range]) -> Iterator[NDArray[np.float32]]:
        counts = GroupReader(self._prefix).candidate_counts()
        for block, groups in enumerate(blocks):
            ends = np.cumsum(counts[groups.start : groups.stop])
            yield from np.split(self._read_block(block, int(ends[-1])), ends[:-1])

    def _read_block(self, block: int, expected: int) -> NDArray[np.float32]:
        path = self.block_path(STAGE, block)
        try:
            with np.load(path) as stored:
                logps: NDArray[np.float32] = stored["logps"]
            if len(logps) != expected:
                raise ValueError(f"{len(logps)} log-probs, not {expected}")
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
            raise self.damaged(path, error) from error
        return logps


def require_tokenizer(path_prefix: str, manifest: dict[str, Any], tokenizer: Any) -> None:
    """Raise ValueError for a store that was built with another tokenizer than Megatron's here."""
    ours, theirs = tokenizer_identity(tokenizer), manifest["tokenizer"]
    if theirs != ours:
        raise ValueError(
            f"{path_prefix}: built with the tokenizer {json.dumps(theirs)}, "
            f"--tokenizer-model is {json.dumps(ours)}: pass the one the store was built with"
        )


def require_positions(
    path_prefix: str, manifest: dict[str, Any], positions: int | None, whose: str
) -> None:
    """Raise ValueError for a store with longer sequences than a model reads.

    Args:
        positions: most tokens that it reads; None: no limit known.
        whose: begins the message, such as `--policy hf:PATH`.
    """
    longest = manifest["longest_sequence"] - 1  # the last one is not read
    if positions is not None and longest > positions:
        raise ValueError(
            f"{whose}: the longest prefix + candidate of {path_prefix} has {longest} tokens to "
            f"read, the model reads at most {positions}; build the store with --max-length "
            f"{positions}"
        )


def _stored(reference: dict[str, Any]) -> dict[str, Any]:
    """As a manifest has it: tuples are lists."""
    stored: dict[str, Any] = json.loads(json.dumps(reference))
    return stored
