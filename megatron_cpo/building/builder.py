"""What one process needs to finish blocks: models, tokenised records, a work folder."""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cpo.building.blocks import Recipe, count_ended, in_blocks, make_block, pack_to_bytes
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.building.written import open_written
from megatron_cpo.groups.endings import Endings, longest_first
from megatron_cpo.groups.finite import model_name
from megatron_cpo.groups.packed import pack_groups
from megatron_cpo.negatives.answers import PEERS, Answers, Ending, endings_of, peers_of
from megatron_cpo.negatives.embeddings import (
    Embedder,
    PolicyEmbedder,
    SentenceEmbedder,
    TruthEmbeddings,
    embedding_similarity,
)
from megatron_cpo.negatives.from_policy import BlockSampler, policy_samplers
from megatron_cpo.negatives.from_records import NEGATIVES, check_kinds
from megatron_cpo.negatives.ranking import BlockSimilarity, lexical, lexical_weights, unranked
from megatron_cpo.policies.writer import KIND
from megatron_cpo.records.border import CONTRACT, EACH_SIDE
from megatron_cpo.records.chats import template_digest
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.pair_files import PairReader
from megatron_cpo.records.tokenizing import tokenizer_identity
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.tree import Ints
from megatron_cpo.work.executors import take_gpu
from megatron_cpo.work.folder import WorkFolder, explained
from megatron_cpo.work.job import block_records

EARLIER = {"border": EACH_SIDE, "control_tokens": "parse"}
"""What builds of releases that did not say so did."""


class Builder:
    """Finishes blocks of a build.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`.
        use: the policy; opened here if the build has a use for it.
        writer: False on a rank that only helps to run the policy.
        merge_only: no block will be built, so no server of `written` is asked or needed.

    Raises:
        ValueError: a kind or a ranker needs what is not there.
    """

    def __init__(
        self,
        config: BuildConfig,
        tokenizer: Any,
        use: PolicyUse | None,
        writer: bool = True,
        merge_only: bool = False,
    ) -> None:
        self.config, self.tokenizer, self._use, self._writer = config, tokenizer, use, writer
        self.arguments = (config, tokenizer, use)
        self.size = config.block_records
        self.eod = Encoder(tokenizer).eod
        self._vocab_size = vocabulary_size(tokenizer)
        self._samplers: dict[str, BlockSampler] = {
            kind: in_blocks(sampler) for kind, sampler in NEGATIVES.items()
        }
        self.policy = None
        if use is not None and (use.score or config.needs_policy):
            take_gpu()
            self.policy = use.open()
            self._samplers |= policy_samplers(
                self.policy, use.sampling, use.mask_share, use.replace_share
            )
        self._written = None if merge_only else open_written(config, tokenizer)
        if self._written is not None:
            self._samplers[KIND] = self._written
        drawn = {k: n for k, n in config.mix.items() if not (merge_only and k == KIND)}
        check_kinds(drawn, self._samplers)
        self.embedder = self._open_embedder()
        command = self._command()
        believed = {name: command[name] for name in ("order", "chat_template")}
        earlier = {**EARLIER, **believed}  # they did not say
        self.work = WorkFolder(config.output_prefix, "build", command, earlier)

    @property
    def has_model(self) -> bool:
        """Whether work is a model's."""
        return self.policy is not None or self.embedder is not None

    @property
    def forks(self) -> bool:
        """Whether forked processes may do it: not on a GPU, and as the policy says."""
        on_gpu = self.has_model and torch.cuda.is_available()
        asks = self._written is not None  # in parallel by itself
        return not on_gpu and not asks and (self.policy is None or self.policy.forks)

    @property
    def scores(self) -> bool:
        """Whether blocks carry reference log-probs."""
        return self._use is not None and self._use.score

    @property
    def stages(self) -> list[str]:
        """Names of the stages: their blocks are independent of each other."""
        return ["truths", "groups"] if isinstance(self.embedder, SentenceEmbedder) else ["groups"]

    def prepare(self, folder: Path) -> None:
        """Compute what all blocks need to know of all records, into a folder."""
        pairs = PairReader(str(self.work.path / "pairs" / "pairs"))
        # np.save hides a full disk.
        (folder / "peers").write_bytes(peers_of(pairs.borders).tobytes())
        if self.config.ranker == "lexical":
            weights = lexical_weights(pairs, self._ends(endings_of(pairs)))
            (folder / "weights").write_bytes(weights.tobytes())

    def open(self) -> None:
        """Open what `prepare` and the tokeniser left in the work folder."""
        config = self.config
        pairs = PairReader(str(self.work.path / "pairs" / "pairs"))
        self.endings = endings_of(pairs)
        if self.embedder is not None:
            self.embedder.ends = self._ends(self.endings)
        peers = np.asarray(np.memmap(self.work.path / "shared" / "peers", PEERS, "r"))
        self._answers = Answers(pairs, Encoder(self.tokenizer), peers)
        self._truths: TruthEmbeddings | None = None
        if "truths" in self.stages and self._writer:
            assert self.embedder is not None
            self._truths = TruthEmbeddings(
                pairs,
                self.embedder,
                self.size,
                lambda block: self.work.block_path("truths", block),
                self._write_arrays,
            )
        self._recipe = Recipe(
            answers=self._answers,
            mix=config.mix,
            seed=config.seed,
            eod=self.eod,
            max_length=config.source.max_length,
            samplers=self._samplers,
            similarity=self._similarity(),
            score=self.policy.logps if self.policy and self.scores else None,
            ranker=model_name(self.embedder.identity) if self.embedder else self.config.ranker,
            scorer=model_name(self.policy.identity) if self.policy else "the reference",
        )
        self.records = len(pairs)
        self._keep_counts()  # of opening the policy, before forks take the counts along

    def work_of(self, stage: str) -> Callable[[int], None]:
        """The function that finishes a block of a stage."""
        finish = {"truths": self._finish_truths, "groups": self._finish_groups}[stage]

        def work(block: int) -> None:
            with explained(self.work.path):
                try:
                    finish(block)
                finally:
                    self._keep_counts()

        return work

    def describe_endings(self) -> list[dict[str, Any]]:
        """How y_1 end, for the manifest: last token ids, what they spell, in how many records."""
        encoder = Encoder(self.tokenizer)
        return [
            {
                "ids": list(ending.ids),
                "text": (encoder.spelled(np.array(ending.ids)) or b"").decode(errors="replace"),
                "records": ending.records,
            }
            for ending in self.endings
        ]

    def counts(self) -> Counter[str]:
        """What servers made us count in all processes of all runs of this build, by line."""
        total: Counter[str] = Counter()
        for path in (self.work.path / "counts").glob("*.json"):
            total.update(json.loads(path.read_text(encoding="utf-8")))
        return total

    def _keep_counts(self) -> None:
        """Put the counts of this process into the work folder, where those of all are."""
        take = getattr(self.policy, "take_counts", Counter)  # a server's alone counts
        counts: Counter[str] = take()
        if self._written is not None:
            counts += self._written.take_counts()
        if counts:
            path = self.work.path / "counts" / f"{uuid.uuid4().hex}.json"
            self.work.write(path, json.dumps(counts).encode())

    def _finish_truths(self, block: int) -> None:
        if self._truths is not None:
            self._truths.compute(block)

    def _finish_groups(self, block: int) -> None:
        records = block_records(block, self.size, self.records)
        groups = make_block(records, self._recipe)
        if self._writer:
            packed = pack_groups(groups, self._vocab_size, records.start)
            cut = {name: n for name, n in self._recipe.cut.items() if n}
            packed.totals.cut = cut
            packed.totals.ended = count_ended(groups, self._all_endings(), cut)
            packed.totals.left_out = dict(self._recipe.left_out)
            packed.totals.notes = dict(self._answers.notes)
            self._answers.notes.clear()
            self.work.write(self.work.block_path("groups", block), pack_to_bytes(packed))

    def _ends(self, endings: Sequence[Ending]) -> Ints:
        """The tokens that decoding stops at, which are no text."""
        return np.array(sorted({self.eod, *(e.stop for e in endings)}), dtype=np.int32)

    def _all_endings(self) -> Endings:
        """What a candidate may end in: as some y_1, in EOD, or where the policy stops."""
        single = {self.eod, *(self.policy.ends if self.policy else ())}
        return longest_first([*(e.ids for e in self.endings), *((token,) for token in single)])

    def _write_arrays(self, path: Path, arrays: dict[str, NDArray[Any]]) -> None:
        buffer = BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        self.work.write(path, buffer.getvalue())

    def _open_embedder(self) -> Embedder | None:
        name = self.config.ranker
        if name in ("lexical", "none"):
            return None
        if name == "policy":
            if self.policy is None:
                raise ValueError(
                    "--rank policy needs a policy: give --policy hf:PATH, or --load CHECKPOINT "
                    "and its model flags"
                )
            return PolicyEmbedder(self.policy, self.eod)
        take_gpu()
        return SentenceEmbedder(name, self.tokenizer)

    def _similarity(self) -> BlockSimilarity:
        if self.config.ranker == "none":
            return unranked
        if self.config.ranker == "lexical":
            weights = np.asarray(np.memmap(self.work.path / "shared" / "weights", np.float64, "r"))
            return lexical(weights, self._ends(self.endings))
        assert self.embedder is not None
        if isinstance(self.embedder, SentenceEmbedder) and not self._writer:
            return unranked  # nobody sees what this rank would compute
        return embedding_similarity(self.embedder, self._truths)

    def _command(self) -> dict[str, Any]:
        """All that decides the store's content; no path, no date."""
        config, source, use = self.config, self.config.source, self._use
        command = {
            "tokenizer": tokenizer_identity(self.tokenizer),
            "eod": self.eod,
            "chat_template": template_digest(self.tokenizer),
            "source": source.describe(),
            "format": source.shape,
            "fields": dict(source.names) or None,
            "prompt_template": source.template,
            "prefix_fraction": source.prefix_fraction,
            "max_length": source.max_length,
            "border": CONTRACT,
            "control_tokens": source.control_tokens,
            "negatives": config.mix,
            "order": list(config.mix),  # of candidates; objects of JSON have none
            "seed": config.seed,
            "epoch": 0,
            "ranker": config.ranker if self.embedder is None else self.embedder.identity["name"],
            "embedder": self.embedder.identity if self.embedder else None,
            "block_records": config.block_records,
            "score": self.scores,
            "policy": self.policy.identity if self.policy else None,
        }
        if config.writer is not None:
            command["writer"] = config.writer.identity
        if self.policy is not None and use is not None:
            command["sampling"] = asdict(use.sampling) if "an" in config.mix else None
            command["ends"] = sorted(self.policy.ends) if "an" in config.mix else None
            command["mask_share"] = use.mask_share if "mn" in config.mix else None
            command["replace_share"] = use.replace_share if "pss" in config.mix else None
        return command
