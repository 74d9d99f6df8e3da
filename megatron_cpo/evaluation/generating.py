"""Generating the texts of a model for the records of a file: what `evaluate generate` does.

Work goes in blocks of records, as a build's: shared by processes and ranks, finished blocks kept in
OUTPUT.generate until all are there, then put together as a file of texts (`results.py`). The same
command gives the same bytes however it is spread and however often it was killed.

A record's `id` is a digest of its prompt and its own continuation, white space around them apart,
so the files of two models agree on it, and files of other records do not.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpo import __version__
from megatron_cpo.evaluation.decoding import (
    Decoding,
    Prompt,
    check_decoding,
    continue_prompts,
)
from megatron_cpo.evaluation.generated import Generated, Speed, describe_model, reading
from megatron_cpo.evaluation.results import Made, Text, read_results, write_results
from megatron_cpo.host.waiting import leave_together
from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_records import context_of
from megatron_cpo.policies.policy import Policy
from megatron_cpo.progress import progress
from megatron_cpo.records.chats import template_digest
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.pair_files import PairReader, write_pairs_resumed
from megatron_cpo.records.source import Source
from megatron_cpo.records.speller import Speller
from megatron_cpo.records.tokenizing import tokenizer_identity
from megatron_cpo.work.executors import run_stage, take_gpu
from megatron_cpo.work.folder import WorkFolder, explained
from megatron_cpo.work.job import BLOCK_RECORDS, Run, block_records, blocks_of

STAGE = "texts"


@dataclass(frozen=True)
class GenerateConfig:
    """What decides the bytes of a file of texts, beside the model."""

    source: Source
    output: Path
    decoding: Decoding
    generator: str | None = None
    """The model's name in the file. None: that of its folder."""
    limit: int | None = None
    """The first so many records. None: all."""
    block: int = BLOCK_RECORDS
    """Records that are finished at a time."""

    def __post_init__(self) -> None:
        for flag, value in (("--limit", self.limit), ("--block-records", self.block)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: needs at least 1")

    def data(self) -> str:
        """Digest of the records and of how they become prompts, whatever the tokenizer."""
        source = self.source
        shape = [source.shape, source.template, source.prefix_fraction, source.control_tokens,
                 source.names, self.limit]  # fmt: skip
        files = [entry["sha256"] for entry in source.describe()]
        return hashlib.sha256(json.dumps([files, shape]).encode()).hexdigest()[:16]


class Generator:
    """Finishes blocks of texts; a `work.job.Job`.

    Args:
        tokenizer: Megatron's, of the model.
        open_policy: loads the model; called once a process.
        writer: False on a rank that only helps to run the model.

    Raises:
        ValueError: the model cannot decode so.
    """

    has_model = True

    def __init__(
        self,
        config: GenerateConfig,
        tokenizer: Any,
        open_policy: Callable[[], Policy],
        writer: bool = True,
    ) -> None:
        self.config, self.arguments = config, (config, tokenizer, open_policy)
        self.size, self._writer = config.block, writer
        self._tokenizer, self.encoder = tokenizer, Encoder(tokenizer)
        take_gpu()
        self.policy = open_policy()
        check_decoding(config.decoding, self.policy)
        identity = self.policy.identity
        self.generator = config.generator or str(identity["name"])
        self.made = Made(
            checkpoint=describe_model(identity),
            decoding=str(config.decoding),
            data=config.data(),
            tool=f"megatron_cpo {__version__}",
            reading=reading(config.source.max_length, self.policy.ends, tokenizer),
        )
        command = {
            "generator": self.generator,
            "policy": identity,
            "ends": sorted(self.policy.ends),
            "decoding": asdict(config.decoding),
            "data": self.made.data,
            "tokenizer": tokenizer_identity(tokenizer),
            "chat_template": (template := template_digest(tokenizer)),
            "max_length": config.source.max_length,
            "block_records": config.block,
        }
        earlier = {"chat_template": template}  # they did not say; believed
        self.work = WorkFolder(
            str(config.output), "generate", command, earlier, flag="--output", suffix=".json"
        )

    @property
    def forks(self) -> bool:
        """Whether forked processes may do it: not on a GPU, and as the policy says."""
        return not torch.cuda.is_available() and self.policy.forks

    def open(self) -> None:
        """Open the records that `prepare` has tokenised."""
        pairs = PairReader(str(self.work.path / "pairs" / "pairs"))
        self._answers, self._speller = Answers(pairs), Speller(self.encoder)
        self.records = min(len(pairs), self.config.limit or len(pairs))

    def prepare(self, folder: Path) -> None:
        """Tokenise the records into a folder."""
        source = self.config.source
        with progress(None, "tokenise", "B", source.stored_bytes()) as bar:
            write_pairs_resumed(source, self._tokenizer, 0, folder, bar.update)

    def work_of(self, stage: str) -> Callable[[int], None]:
        """The function that finishes a block."""

        def work(block: int) -> None:
            with explained(self.work.path):
                start = time.monotonic()
                rows = self._rows(block)
                if self._writer:
                    content = {"seconds": time.monotonic() - start, "rows": rows}
                    path = self.work.block_path(stage, block)
                    self.work.write(path, json.dumps(content).encode())

        return work

    def _rows(self, block: int) -> list[dict[str, Any]]:
        eod, prompts, fixed = self.encoder.eod, [], []
        for index in block_records(block, self.size, self.records):
            context = context_of(index, self._answers, eod, None)
            prompt = self._speller.prompt(context.prefix)
            truth = self._speller.text(context.body)
            id = hashlib.sha256(f"{prompt.rstrip()}\0{truth.strip()}".encode()).hexdigest()[:16]
            prompts.append(Prompt(id, context.prefix, context.stop))
            fixed.append({"id": id, "instruction": prompt, "truth": truth})
        rows = []
        drawn = continue_prompts(self.policy, prompts, self.config.decoding)
        for record, texts in zip(fixed, drawn, strict=True):
            for sample, text in enumerate(texts):
                row = {"output": self._speller.text(text.body), "tokens": text.tokens}
                finish = "stop" if text.ended else "length"
                rows.append({**record, **row, "sample": sample, "finish": finish})
        return rows


def generate(
    config: GenerateConfig,
    tokenizer: Any,
    open_policy: Callable[[], Policy],
    run: Run | None = None,
) -> Generated | None:
    """Generate this run's share of the texts; put the file together once all are there.

    Args:
        tokenizer: Megatron's, of the model.
        open_policy: loads the model.

    Returns:
        The file, on the process that finished it, or on all if it was there already; else None.

    Raises:
        ValueError: an input or the model is not usable, or the output belongs to other settings.
        OSError: the disk is full; what is finished is kept.
    """
    run = run or Run()
    job = Generator(config, tokenizer, open_policy, run.writer)
    with explained(job.work.path):
        with leave_together():  # they see the same blocks finished
            there = _prepare(job) if run.writer else None
        if not job.work.path.exists():
            return there
        try:
            job.open()
            tell = Speed(partial(job.work.block_path, STAGE))
            run_stage(job, STAGE, run, "generate", "records", tell=tell)
        except FileNotFoundError:  # the others have finished meanwhile
            if not config.output.exists():
                raise
        return _put_together(job) if run.writer else None


def _prepare(job: Generator) -> Generated | None:
    with job.work.locked():
        if job.config.output.exists():
            found = read_results(job.config.output)
            job.work.remove()
            earlier = found.made.reading
            if job.made.reading.startswith(earlier):  # files did not say it all once, or nothing
                earlier = job.made.reading
            ours = replace(job.made, tool=found.made.tool)
            if replace(found.made, reading=earlier) != ours or found.generator != job.generator:
                raise ValueError(
                    f"--output {job.config.output}: it holds texts of {found.generator}, "
                    f"{found.made}; this command would write those of {job.generator}, {ours}; "
                    "remove it, or give another --output"
                )
            return Generated(found.path, found.texts, {}, 0)
        job.work.claim()
        try:
            job.work.make_folder("pairs", job.prepare, resumes=True)
        except ValueError:
            job.work.remove()
            raise
    return None


def _put_together(job: Generator) -> Generated | None:
    work, output = job.work, job.config.output
    with work.locked():
        if not (work.path / "pairs").exists():  # another share was the last, and wrote it
            work.remove()
            return None
        if work.missing(STAGE, range(blocks_of(job))):
            return None
        texts, seconds, seen = [], 0.0, Counter[str]()
        for block in range(blocks_of(job)):
            path = work.block_path(STAGE, block)
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise work.damaged(path, error) from error
            seconds += content["seconds"]
            for row in content["rows"]:
                # A record that is there twice is two prompts; so are its texts.
                seen[f"{row['id']} {row['sample']}"] += 1
                if (again := seen[f"{row['id']} {row['sample']}"]) > 1:
                    row["id"] += f"-{again}"
                texts.append(Text(generator=job.generator, **row))
        dropped = json.loads((work.path / "pairs" / "dropped.json").read_text(encoding="utf-8"))
        write_results(output, texts, job.made)
        work.remove()
    return Generated(output, texts, dropped["counts"], max(seconds, 1e-9))
