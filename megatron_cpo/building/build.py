"""Building a group store: tokenise the records, finish blocks, put the store together.

Blocks (`blocks.py`) are finished in a work folder beside the output (`work/folder.py`) by whatever
executes them (`work/executors.py`), in any number of processes, ranks and shards. Whoever finishes
last puts the store together, block after block. Started again after a kill, the same command goes
on where it was. Memory does not grow with the number of records, but for an index of 12 bytes each
where sentences are embedded.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

from megatron_cpo.building.blocks import unpack_from_file
from megatron_cpo.building.builder import Builder
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.building.report import BuildReport
from megatron_cpo.groups.packed import Totals
from megatron_cpo.groups.store import (
    FILES,
    check_sizes,
    is_there,
    read_manifest,
    refuse_documents,
)
from megatron_cpo.groups.writing import GroupWriter, finish_publishing
from megatron_cpo.host.waiting import leave_together
from megatron_cpo.negatives.from_records import check_batch_negatives
from megatron_cpo.policies.writer import KIND
from megatron_cpo.progress import progress
from megatron_cpo.records.pair_files import write_pairs_resumed
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.storage import remote
from megatron_cpo.work.executors import run_stage
from megatron_cpo.work.folder import explained
from megatron_cpo.work.job import Run, blocks_of

TITLES = {"truths": ("embed y_1", "texts"), "groups": ("build groups", "candidates")}
"""Of the progress bars, and what they count."""


def build_groups(
    config: BuildConfig, tokenizer: Any, use: PolicyUse | None = None, run: Run | None = None
) -> BuildReport | None:
    """Build this run's share of the store `config.output_prefix`, one group a usable record.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`.
        use: the policy, for kinds, rankings and references that need one.

    Returns:
        The report once the store is whole; None while blocks of other shares are missing.

    Raises:
        ValueError: a flag, an input or the tokenizer is not usable, or the output belongs to
            another command; the message says which.
        OSError: the disk is full; what is finished is kept.
    """
    run = run or Run()
    builder = Builder(config, tokenizer, use, run.writer, run.merge_only)
    work = builder.work
    with explained(work.path):
        with leave_together():  # they see the same blocks finished
            finished = _prepare(builder) if run.writer else None
        if not work.path.exists():
            return finished
        try:
            builder.open()
            if not run.merge_only:
                k = 1 + sum(config.mix.values())
                for stage in builder.stages:
                    each = k if stage == "groups" else 1
                    run_stage(builder, stage, run, *TITLES[stage], each)
        except FileNotFoundError:  # there was nothing to do here, and the others have finished
            if not is_there(config.output_prefix):
                raise
        return _put_together(builder, run) if run.writer else None


def _prepare(builder: Builder) -> BuildReport | None:
    """Tokenise the records, unless that is done; the report if the whole store is there."""
    config, work = builder.config, builder.work
    written = (config.output_prefix + suffix for suffix in (*FILES, ".json"))
    config.source.refuse_output("--output-prefix", *written)
    if not work.path.exists():  # what a store that is being put there has
        refuse_documents(config.output_prefix)
        if remote.is_remote(config.output_prefix) and not is_there(config.output_prefix):
            remote.check_writable(config.output_prefix)
    with work.locked():
        finish_publishing(config.output_prefix, work.is_alone)
        if is_there(config.output_prefix):
            # Alone it makes a store, and what else begins with PREFIX may be anybody's.
            first = f"remove {config.output_prefix}.json"
            try:
                manifest = read_manifest(config.output_prefix)
                check_sizes(config.output_prefix, manifest)
            except ValueError as error:  # "rebuild it", which this is
                if not (work.path / "command.json").exists():
                    work.remove()
                raise ValueError(f"{error}: {first} first, or give another PREFIX") from error
            try:
                work.refuse_other(manifest, "there is a store built", f"{first} to build anew")
            finally:
                work.remove()
            return BuildReport(manifest)
        work.claim()
        try:
            work.make_folder("pairs", lambda folder: _tokenise(builder, folder), resumes=True)
            work.make_folder("shared", builder.prepare)
        except ValueError:  # nothing was built yet, and nothing will be by this command
            work.remove()
            raise
    return None


def _tokenise(builder: Builder, folder: Path) -> None:
    source, mix = builder.config.source, builder.config.mix
    with progress(None, "tokenise", "B", source.stored_bytes()) as bar:
        pairs = write_pairs_resumed(
            source, builder.tokenizer, mix.get("given", 0), folder, bar.update,
            texts=KIND in mix,
        )  # fmt: skip
    check_batch_negatives(mix.get("bn", 0), len(pairs))


def _put_together(builder: Builder, run: Run) -> BuildReport | None:
    """Write the store if every block is there."""
    config, work = builder.config, builder.work
    with work.locked():
        if not (work.path / "pairs").exists():  # another share finished while this one waited
            work.remove()
            return BuildReport.read(config.output_prefix)
        blocks = blocks_of(builder)
        if missing := work.missing("groups", range(blocks)):
            if run.merge_only:
                raise ValueError(
                    f"--merge: {len(missing)} of {blocks} blocks in {work.path} are not "
                    f"finished, the first is {missing[0]}; run their shards to the end first"
                )
            return None
        dropped = json.loads((work.path / "pairs" / "dropped.json").read_text(encoding="utf-8"))
        reference = builder.policy.identity if builder.scores and builder.policy else None
        manifest = {
            **work.command,
            "notes": dropped["notes"],
            "endings": builder.describe_endings(),
            "reference": reference,
        }
        writer = GroupWriter(config.output_prefix, manifest, vocabulary_size(builder.tokenizer))
        try:
            for block in progress(range(blocks), "put together", "blocks"):
                writer.append(_read_block(builder, block))
            dropped["counts"] |= writer.totals.left_out
            _refuse_nothing(writer.totals)
            writer.close(dropped=dropped["counts"])
        except BaseException as error:
            writer.abort()
            # Without locks another share may have finished, and removed the blocks, meanwhile.
            gone = isinstance(error, FileNotFoundError)
            if not (gone and is_there(config.output_prefix)):
                raise
        counts = builder.counts()
        work.remove()
    return BuildReport.read(config.output_prefix, first_dropped=dropped["first"], counts=counts)


def _refuse_nothing(totals: Totals) -> None:
    """Raise ValueError if no record has a group."""
    if not totals.groups:
        why = ", ".join(f"{reason} {n:,}" for reason, n in totals.left_out.items())
        raise ValueError(
            f"no group to write: all records were left out ({why}); see the warnings, and give a "
            "policy with a longer context, a lower --max-length, or a writer that answers"
        )


def _read_block(builder: Builder, block: int) -> Any:
    path = builder.work.block_path("groups", block)
    try:
        return unpack_from_file(str(path))
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
        raise builder.work.damaged(path, error) from error
