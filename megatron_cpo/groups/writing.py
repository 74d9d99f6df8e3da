"""Writing a group store aside and putting it into place; a kill at any moment loses nothing.

What is written lies in the folder PREFIX.writing. Once its manifest is there the new store is
decided: moving the files into place can be cut short, and `finish_publishing` takes it up again.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import write_json
from megatron_cpo.groups.indexed import IndexedWriter, store_dtype
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.packed import Packed, Totals, pack_groups
from megatron_cpo.groups.store import FILES, FORMAT_VERSION, VALUE_ROWS, Group, GroupReader, sha256


class GroupWriter:
    """Writes a store aside and makes it visible all at once in `close()`.

    Args:
        path_prefix: the store's PREFIX. What an interrupted writer left aside is removed.
        manifest: what the caller knows (tokenizer, mix, seed, source, drops ...); JSON-able.
            The writer adds `format_version`, `groups`, `k`, `kinds`, token counts, `statistics` and
            the checksums of the files.
        vocab_size: decides the stored integer type, as Megatron's own preprocessing does.
    """

    def __init__(self, path_prefix: str, manifest: dict[str, Any], vocab_size: int) -> None:
        self._prefix, self._manifest = path_prefix, dict(manifest)
        self.dtype = store_dtype(vocab_size)
        aside = _fresh_folder(path_prefix)
        self._tokens = IndexedWriter(f"{aside}/store", self.dtype)
        self._values = IndexedWriter(f"{aside}/store.values", np.float32)
        self.totals = Totals()

    def add(self, group: Group) -> None:
        """Append one group.

        Raises:
            ValueError: as `pack_groups`.
        """
        self.append(pack_groups([group], self.dtype))

    def append(self, packed: Packed) -> None:
        """Append packed groups."""
        self._tokens.add(packed.tokens, packed.lengths, packed.sequences)
        rows = np.full(len(packed.sequences), len(VALUE_ROWS), dtype=np.int32)
        self._values.add(packed.values, packed.value_lengths, rows)
        self.totals.add(packed.totals)

    def close(self) -> None:
        """Finish the files and put them into place, the manifest last.

        Raises:
            ValueError: no group was added.
        """
        totals = self.totals
        if not totals.groups:
            self.abort()
            raise ValueError(
                f"{self._prefix}: no group to write; see the counts of dropped records"
            )
        self._tokens.close()
        self._values.close()
        manifest = {"format_version": FORMAT_VERSION, **self._manifest}
        for name in ("groups", "k", "kinds", "tree_tokens", "sequence_tokens", "longest_sequence"):
            manifest[name] = getattr(totals, name)
        manifest["notes"] = {**manifest.get("notes", {}), **totals.notes}
        manifest["reference"] = manifest.get("reference")
        manifest["statistics"] = {
            **{
                name: getattr(totals, name)
                for name in ("prefix_tokens", "truth_tokens", "negative_tokens", "padded_tokens")
            },
            "duplicates": totals.duplicates,
            "mean_similarity": _means(totals.similarity, totals.kinds),
        }
        if manifest["reference"] is not None:
            logps = _means(totals.reference_logp, totals.kinds)
            manifest["statistics"]["mean_reference_logp"] = logps
        _seal(self._prefix, manifest, FILES)
        finish_publishing(self._prefix)

    def abort(self) -> None:
        """Remove what was written aside; what stood under PREFIX before stays as it was."""
        _remove_aside(self._prefix)


def write_reference_logps(
    path_prefix: str, reference_logps: Iterable[NDArray[np.float32]], reference: dict[str, Any]
) -> None:
    """Replace the reference log-probs of a store, and name the reference in its manifest.

    Args:
        reference_logps: per group [K], nats, summed.
        reference: identity of the checkpoint they were scored under; JSON-able.

    Raises:
        ValueError: another number of groups, or of log-probs of a group; the store stays as it was.
    """
    reader = GroupReader(path_prefix)
    aside = _fresh_folder(path_prefix)
    writer = IndexedWriter(f"{aside}/store.values", np.float32)
    sums = dict.fromkeys(reader.manifest["kinds"], 0.0)
    tokens, queries = reader.tree_sizes()
    scored = 0
    try:
        for index, logps in enumerate(reference_logps):
            scored = index + 1
            if index >= len(reader):
                continue
            group = reader[index]
            if len(logps) != len(group.candidates):
                raise ValueError(
                    f"{path_prefix}: group {index} has {len(group.candidates)} candidates, "
                    f"{len(logps)} log-probs were given"
                )
            rows = [group.kinds, group.similarities, group.ranks, logps]
            rows.append(np.array([tokens[index], queries[index]]))
            writer.add(np.concatenate(rows), [len(row) for row in rows])
            for kind, logp in zip(group.kinds, logps.tolist(), strict=True):
                sums[KINDS[kind]] += logp
        if scored != len(reader):
            raise ValueError(f"{path_prefix}: {len(reader)} groups, {scored} were scored")
    except BaseException:
        _remove_aside(path_prefix)
        raise
    writer.close()
    manifest = {**reader.manifest, "reference": reference}
    manifest["statistics"] = {
        **manifest.get("statistics", {}),
        "mean_reference_logp": _means(sums, manifest["kinds"]),
    }
    _seal(path_prefix, manifest, (".values.bin", ".values.idx"))
    finish_publishing(path_prefix)


def finish_publishing(path_prefix: str) -> bool:
    """Move a sealed store into place, manifest last; whether there was one.

    Between the first rename and the last a reader finds no manifest, never files of two stores.
    """
    aside = Path(path_prefix + ".writing")
    if not (aside / "store.json").is_file():
        with contextlib.suppress(OSError):
            aside.rmdir()  # empty: everything was moved, and then it was killed
        return False
    Path(path_prefix + ".json").unlink(missing_ok=True)
    for suffix in (*FILES, ".json"):
        if (aside / f"store{suffix}").exists():
            os.replace(aside / f"store{suffix}", path_prefix + suffix)
    aside.rmdir()
    return True


def _fresh_folder(path_prefix: str) -> Path:
    _remove_aside(path_prefix)
    aside = Path(path_prefix + ".writing")
    aside.mkdir(parents=True)
    return aside


def _remove_aside(path_prefix: str) -> None:
    if Path(path_prefix + ".writing").exists():
        shutil.rmtree(path_prefix + ".writing")


def _seal(path_prefix: str, manifest: dict[str, Any], suffixes: Iterable[str]) -> None:
    """Flush the files aside to disk and describe them in a manifest beside them."""
    aside = Path(path_prefix + ".writing")
    manifest["files"] = dict(manifest.get("files", {}))
    for suffix in suffixes:
        path = aside / f"store{suffix}"
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        manifest["files"][suffix] = {"bytes": path.stat().st_size, "sha256": sha256(str(path))}
    write_json(aside / "store.json", manifest)


def _means(sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    return {kind: total / counts[kind] for kind, total in sums.items()}
