"""A recipe's stages: each is one command, what it reads and what it makes."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_cpo.recipes.schema import Optimization, Recipe, Variant

FLAGS = "megatron_flags.txt"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        line: for bash, run in any folder.
        inputs: files and folders from outside of the run.
        needs: names of stages before it.
        outputs: all that it makes; of a store, its prefix with a dot.
        resumes: the same command goes on where it was killed.
    """

    name: str
    line: str
    inputs: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    resumes: bool = False


def stages(recipe: Recipe, folder: Path) -> list[Stage]:
    """All stages of a recipe in an order in which they can run; paths are absolute."""
    return _Plan(recipe, folder.absolute()).all()


class _Plan:
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.found: dict[str, Stage] = {}
        layout = recipe.layout
        self.split = (
            f"--tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp} "
            f"--context-parallel-size {layout.cp}"
        )
        ranks = f"--nproc-per-node {layout.ranks}"
        self.verb = f"megatron-cpo {ranks}" if layout.ranks > 1 else "megatron-cpo"
        self.train = f"torchrun --standalone {ranks} -m megatron_cpo.pretrain_gpt"
        self.records = f"--max-length {recipe.data.max_length} {recipe.data.flags}".strip()
        self.flags = ""
        """Of the model, as bash puts them in."""
        self.results: list[Path] = []
        self.texts: list[str] = []
        self.rankings: list[str] = []

    def all(self) -> list[Stage]:
        reference, need = self._reference()
        self._generate("reference", "reference", reference, need)
        for name, variant in self.recipe.variants.items():
            for seed in variant.seeds:
                self._variant(name, variant, seed, reference, need)
        self._evaluate()
        return list(self.found.values())

    def _add(self, name: str, line: str, *outputs: Path, inputs: tuple[Path, ...] = (),
             needs: tuple[str, ...] = (), resumes: bool = False) -> str:  # fmt: skip
        line = " ".join(line.split())
        self.found.setdefault(name, Stage(name, line, inputs, needs, outputs, resumes))
        return name

    def _reference(self) -> tuple[Path, tuple[str, ...]]:
        recipe, model = self.recipe, self.recipe.model
        need: tuple[str, ...] = ()
        self.inputs: tuple[Path, ...] = (model,)
        if (model / "config.json").exists():
            model = self.folder / "model"
            line = f"megatron-cpo convert --from hf --to megatron --input {recipe.model}"
            name = self._add("convert", f"{line} --output {model}", model, inputs=(recipe.model,))
            need, self.inputs = (name,), ()
        elif not (model / FLAGS).exists():
            raise ValueError(
                f"model: {model} is no Hugging Face folder, and a Megatron checkpoint needs its "
                f"model and tokenizer flags beside it, in {model / FLAGS}"
            )
        self.flags = f"$(cat {model / FLAGS})"
        if recipe.mle is None:
            return model, need
        text, mle = self.folder / "text", self.folder / "mle"
        data = recipe.data
        line = f"megatron-cpo tokenize --input {data.train} --output-prefix {text} {self.records}"
        made = self._add("tokenize", f"{line} {self.flags}", Path(f"{text}."),
                         inputs=(data.train, *self.inputs), needs=need)  # fmt: skip
        settings = self._settings(recipe.mle, data.max_length, mle)
        line = (
            f"{self.train} {self.flags} --data-path {text} --split 100,0,0 --eval-iters 0 "
            f"--data-cache-path {self.folder / 'cache'} --load {model} --finetune {settings}"
        )
        name = self._add("mle", line, mle, inputs=self.inputs, needs=(*need, made))
        return mle, (*need, name)

    def _settings(self, how: Optimization, length: int, output: Path) -> str:
        return (
            f"--seq-length {length} --micro-batch-size 1 --global-batch-size {how.batch} "
            f"--train-iters {how.steps} --lr {how.lr!r} --lr-warmup-iters {how.warmup} "
            f"--lr-decay-style cosine --weight-decay {how.weight_decay!r} --log-interval 1 "
            f"{self.split} --save {output} --save-interval {how.steps} {how.flags}"
        )

    def _groups(self, part: str, tag: str, variant: Variant, model: Path,
                need: tuple[str, ...]) -> tuple[str, Path]:  # fmt: skip
        """Groups of a mix; variants, and seeds, that ask for the same share them."""
        records = getattr(self.recipe.data, part)
        line = (
            f"{self.verb} build --input {records} --negatives {variant.negatives} --k {variant.k} "
            f"{self.records} --load {model} {self.flags} {self.split} "
            f"--seq-length {self.recipe.row_length} {variant.build_flags}"
        )
        for stage in self.found.values():
            prefix = str(next(iter(stage.outputs))).removesuffix(".")
            if stage.line == " ".join(f"{line} --output-prefix {prefix}".split()):
                return stage.name, Path(prefix)
        output = self.folder / "groups" / f"{tag}-{part}"
        name = self._add(f"build-{tag}-{part}", f"{line} --output-prefix {output}",
                         Path(f"{output}."), inputs=(records, *self.inputs), needs=need,
                         resumes=True)  # fmt: skip
        return name, output

    def _variant(self, name: str, variant: Variant, seed: int, reference: Path,
                 need: tuple[str, ...]) -> None:  # fmt: skip
        own = f"{name}-s{seed}" if len(variant.seeds) > 1 else name
        model, before = reference, need
        for number in range(1, variant.rounds + 1):
            tag = f"{own}-r{number}" if number > 1 else own
            built, groups = self._groups("train", tag, variant, model, before)
            heldout, test = self._groups("test", tag, variant, model, before)
            output = self.folder / "cpo" / tag
            line = (
                f"{self.train} {self.flags} --cpo-aux-loss --cpo-data-path {groups} "
                f"--cpo-k {variant.k} --cpo-objective {variant.objective} "
                f"--cpo-beta {variant.beta!r} --cpo-mle-weight {variant.mle_weight!r} "
                f"--load {model} --finetune --eval-iters 0 --seed {seed} "
                f"{self._settings(variant, self.recipe.row_length, output)}"
            )
            trained = self._add(f"train-{tag}", line, output, inputs=self.inputs,
                                needs=(*before, built))  # fmt: skip
            model, before = output, (*need, trained)
        ranking = self.folder / "results" / f"ranking-{own}.json"
        line = f"{self.verb} evaluate score --groups {test} --load {model} {self.flags}"
        line += f" {self.split} --seq-length {self.recipe.row_length} --beta {variant.beta!r}"
        self.rankings.append(
            self._add(f"rank-{own}", f"{line} --output {ranking}", ranking, inputs=self.inputs,
                      needs=(*before, heldout))
        )  # fmt: skip
        for alpha in self.recipe.alphas:
            merged, from_ = model, before
            if alpha:
                merged = self.folder / "merged" / f"{own}-{alpha!r}"
                line = f"megatron-cpo merge --mle {reference} --cpo {model} --alpha {alpha!r}"
                made = self._add(f"merge-{own}-{alpha!r}", f"{line} --output {merged}", merged,
                                 inputs=self.inputs, needs=before)  # fmt: skip
                from_ = (*need, made)
            self._generate(f"{own}-{alpha!r}", f"{own}@alpha={alpha!r}", merged, from_)
        if self.recipe.export == "all":
            output = self.folder / "export" / own
            line = f"megatron-cpo convert --from megatron --to hf --input {model}"
            self._add(f"export-{own}", f"{line} --output {output}", output, needs=before)

    def _generate(self, tag: str, generator: str, model: Path, need: tuple[str, ...]) -> None:
        how = self.recipe.evaluate
        output = self.folder / "results" / f"{tag}.json"
        limit = f"--limit {how.limit}" if how.limit else ""
        line = (
            f"{self.verb} evaluate generate --data {self.recipe.data.test} --load {model} "
            f"{self.flags} {self.split} --seq-length {self.recipe.data.max_length} {self.records} "
            f"--decode {how.decode} {how.flags} "
            f"--max-new-tokens {how.max_new_tokens} {limit} --generator {shlex.quote(generator)} "
            f"--output {output}"
        )
        self.texts.append(
            self._add(f"generate-{tag}", line, output,
                      inputs=(self.recipe.data.test, *self.inputs), needs=need, resumes=True)
        )  # fmt: skip
        self.results.append(output)

    def _evaluate(self) -> None:
        how, results, made = self.recipe.evaluate, self.folder / "results", []
        files, texts = " ".join(map(str, self.results)), tuple(self.texts)
        external = f"--external {how.external}" if how.external else ""
        inputs = (Path(how.external.removeprefix("hf:")),) if how.external else ()
        output = results / "scores.json"
        line = f"megatron-cpo evaluate score --candidate {files} {external} --output {output}"
        made.append(self._add("score", line, output, inputs=inputs, needs=texts, resumes=True))
        if how.mauve:
            output = results / "mauve.json"
            line = f"megatron-cpo evaluate mauve --candidate {files} --output {output}"
            made.append(self._add("mauve", line, output, needs=texts))
        if how.judge:
            for path, text in zip(self.results[1:], texts[1:], strict=True):
                line = (
                    f"megatron-cpo evaluate winrate --candidate {path} "
                    f"--baseline {self.results[0]} --judge {shlex.quote(how.judge.url)} "
                    f"--judge-model {shlex.quote(how.judge.model)}"
                )
                made.append(self._add(f"judge-{path.stem}", line, needs=(texts[0], text)))
        page = self.folder / "report.html"
        line = f"megatron-cpo evaluate report {results} --html {page}"
        table = self.folder / "report.md"
        self._add("report", f"{line} --markdown {table}", page, table,
                  needs=(*texts, *self.rankings, *made))  # fmt: skip
