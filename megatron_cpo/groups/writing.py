"""Writing a group store aside and putting it into place; a kill at any moment loses nothing.

What is written lies in a folder of this process (`files.aside`). Once its manifest is there the new
store is decided: moving the files into place can be cut short, and `finish_publishing` takes it up
again. Several processes may do so at once with the same store: each has read the manifest before it
touches anything, moves what is still to be moved, and writes the manifest last. A store in object
storage is written aside on this machine, and then `publishing` sends it.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import aside, asides, sync, write_json, write_whole
from megatron_cpo.groups.finite import model_name, require_finite
from megatron_cpo.groups.indexed import IndexedWriter, store_dtype
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.lengths import Lengths
from megatron_cpo.groups.packed import Packed, Totals, pack_groups
from megatron_cpo.groups.publishing import put
from megatron_cpo.groups.store import (
    FILES,
    FORMAT_VERSION,
    VALUE_ROWS,
    Group,
    GroupReader,
    check_sizes,
)
from megatron_cpo.storage import copies, remote

MANIFEST = "store.json"
"""Name aside. A folder that has it is sealed: the store in it is decided."""


class GroupWriter:
    """Writes a store aside and makes it visible all at once in `close()`.

    Args:
        path_prefix: the store's PREFIX.
        manifest: what the caller knows (tokenizer, mix, seed, source, drops ...); JSON-able.
            The writer adds `format_version`, `groups`, `k`, `kinds`, token counts, `statistics` and
            the checksums of the files.
        vocab_size: decides the stored integer type, as Megatron's own preprocessing does.
    """

    def __init__(self, path_prefix: str, manifest: dict[str, Any], vocab_size: int) -> None:
        self._prefix, self._manifest = path_prefix, dict(manifest)
        self.dtype, self._vocab_size = store_dtype(vocab_size), vocab_size
        self._writing = _fresh_folder(path_prefix)
        self._tokens = IndexedWriter(f"{self._writing}/store", self.dtype)
        self._values = IndexedWriter(f"{self._writing}/store.values", np.float32)
        self.totals, self._candidate_lengths = Totals(), Lengths()

    def add(self, group: Group) -> None:
        """Append one group.

        Raises:
            ValueError: as `pack_groups`.
        """
        self.append(pack_groups([group], self._vocab_size, self.totals.groups))

    def append(self, packed: Packed) -> None:
        """Append packed groups."""
        self._tokens.add(packed.tokens, packed.lengths, packed.sequences)
        rows = np.full(len(packed.sequences), len(VALUE_ROWS), dtype=np.int32)
        self._values.add(packed.values, packed.value_lengths, rows)
        self.totals.add(packed.totals)
        self._candidate_lengths.add(packed)

    def close(self, **manifest: Any) -> None:
        """Finish the files and put them into place, the manifest last.

        Args:
            manifest: what the caller knows only now.

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
        manifest = {"format_version": FORMAT_VERSION, **self._manifest, **manifest}
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
            "candidate_tokens": self._candidate_lengths.describe(),
            "ended_share": {kind: n / totals.kinds[kind] for kind, n in totals.ended.items()},
            "cut": totals.cut,
        }
        if manifest["reference"] is not None:
            logps = _means(totals.reference_logp, totals.kinds)
            manifest["statistics"]["mean_reference_logp"] = logps
        _seal(self._writing, manifest, FILES)
        _publish(self._writing, self._prefix)

    def abort(self) -> None:
        """Remove what was written aside; what stood under PREFIX before stays as it was.

        Once it is sealed it is left to `finish_publishing`.
        """
        if not (self._writing / MANIFEST).exists():
            shutil.rmtree(self._writing, ignore_errors=True)


def write_reference_logps(
    path_prefix: str, reference_logps: Iterable[NDArray[np.float32]], reference: dict[str, Any]
) -> None:
    """Replace the reference log-probs of a store, and name the reference in its manifest.

    Args:
        reference_logps: per group [K], nats, summed.
        reference: identity of the checkpoint they were scored under; JSON-able.

    Raises:
        ValueError: another number of groups, or of log-probs of a group, or one that is not finite;
            the store stays as it was.
    """
    reader = GroupReader(path_prefix)
    writing = _fresh_folder(path_prefix)
    writer = IndexedWriter(f"{writing}/store.values", np.float32)
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
            require_finite(logps, f"group {index}", "log-prob", model_name(reference))
            rows = [group.kinds, group.similarities, group.ranks, logps]
            rows.append(np.array([tokens[index], queries[index]]))
            writer.add(np.concatenate(rows), [len(row) for row in rows])
            for kind, logp in zip(group.kinds, logps.tolist(), strict=True):
                sums[KINDS[kind]] += logp
        if scored != len(reader):
            raise ValueError(f"{path_prefix}: {len(reader)} groups, {scored} were scored")
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    writer.close()
    manifest = {**reader.manifest, "reference": reference}
    manifest["statistics"] = {
        **manifest.get("statistics", {}),
        "mean_reference_logp": _means(sums, manifest["kinds"]),
    }
    _seal(writing, manifest, (".values.bin", ".values.idx"))
    _publish(writing, path_prefix)


def finish_publishing(path_prefix: str, alone: bool = False) -> bool:
    """Move a sealed store into place, manifest last; whether there was one.

    Between the first rename and the last a reader finds no manifest, never files of two stores.

    Args:
        alone: no other process can be writing this store, so what is not sealed was left by one
            that was killed, and is removed.

    Raises:
        ValueError: a file is not what the sealed manifest says; it is removed aside.
    """
    found = False
    for folder in asides(Path(copies.beside(path_prefix))):
        if (folder / MANIFEST).is_file():
            _publish(folder, path_prefix)
            found = True
        elif alone:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def _publish(writing: Path, path_prefix: str) -> None:
    """Move a sealed store into place and remove its folder; others may do the same meanwhile."""
    try:
        content = (writing / MANIFEST).read_bytes()
    except FileNotFoundError:  # another has just finished it
        return
    if remote.is_remote(path_prefix):
        files = {suffix: writing / f"store{suffix}" for suffix in FILES}
        try:
            put({s: p for s, p in files.items() if p.exists()}, json.loads(content), path_prefix)
        except ValueError:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        shutil.rmtree(writing, ignore_errors=True)
        return
    manifest = Path(path_prefix + ".json")
    before = manifest.read_bytes() if manifest.exists() else None
    if before not in (None, content):
        manifest.unlink(missing_ok=True)
    for suffix in FILES:
        with suppress(FileNotFoundError):  # the same as before, or moved already
            os.replace(writing / f"store{suffix}", path_prefix + suffix)
    sync(manifest.parent)
    try:
        check_sizes(path_prefix, json.loads(content))
    except ValueError:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    try:
        write_whole(writing / "copy.json", content)  # in there, so that a kill leaves it in there
        os.replace(writing / "copy.json", manifest)
    except FileNotFoundError:  # another has just removed the folder
        write_whole(manifest, content)
    sync(manifest.parent)
    shutil.rmtree(writing, ignore_errors=True)


def _fresh_folder(path_prefix: str) -> Path:
    writing = aside(Path(copies.beside(path_prefix)))
    if writing.exists():  # of a writer of this process that was neither closed nor aborted
        shutil.rmtree(writing)
    writing.mkdir(parents=True)
    return writing


def _seal(writing: Path, manifest: dict[str, Any], suffixes: Iterable[str]) -> None:
    """Describe the files aside, which are on the disk, in a manifest beside them."""
    manifest["files"] = dict(manifest.get("files", {}))
    for suffix in suffixes:
        path = writing / f"store{suffix}"
        manifest["files"][suffix] = {
            "bytes": path.stat().st_size,
            "sha256": remote.sha256(str(path)),
        }
    write_json(writing / MANIFEST, manifest)


def _means(sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    return {kind: total / counts[kind] for kind, total in sums.items()}
