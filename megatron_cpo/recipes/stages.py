"""A recipe's stages: each is one command, what it reads and what it makes."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpo.evaluation.command import verdicts_of
from megatron_cpo.negatives.from_records import parse_mix
from megatron_cpo.policies.writer import KIND
from megatron_cpo.recipes.schema import Judge, Optimization, Recipe, Variant

FLAGS = "megatron_flags.txt"
_DECODE = re.compile(r"--decode[ =](\S+)")
_QUOTED_OR_SPACE = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\[^\n])|(?:\s|\\\n)+""", re.DOTALL)


TRAINING = "train-"
"""How the names of stages that train a variant begin."""


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


def stages(recipe: Recipe, folder: Path, variants: Sequence[str] = ()) -> list[Stage]:
    """All stages of a recipe in an order in which they can run; paths are absolute.

    Args:
        variants: only those of these; each as it is among all, with the stores that they share.

    Raises:
        ValueError: no such variant, two whose names meet, the model is not usable, or an input
            would be removed with an output of that name.
    """
    every = _Plan(recipe, folder.resolve()).all()
    if not variants:
        return every
    for name in variants:
        if name not in recipe.variants:
            raise ValueError(
                f"--variants {name}: no such variant; the recipe has {', '.join(recipe.variants)}"
            )
    chosen = {name: it for name, it in recipe.variants.items() if name in variants}
    some = recipe.model_copy(update={"variants": chosen})
    return _Plan(some, folder.resolve(), every).all()


class _Plan:
    def __init__(self, recipe: Recipe, folder: Path, known: Sequence[Stage] = ()) -> None:
        self.recipe, self.folder, self.known = recipe, folder, known
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
        self.texts: dict[str, dict[Path, str]] = {}
        """By the way to decode: the stage that makes each file, the reference's first."""
        self.rankings: list[str] = []
        self.trained: list[str] = []
        """Stages, whose logs are called as they are."""

    def all(self) -> list[Stage]:
        reference, need = self._reference()
        self._generate("reference", "reference", reference, need)
        # By seed: a run that is cut has compared every variant by the seeds it has.
        most = max(len(variant.seeds) for variant in self.recipe.variants.values())
        for number in range(most):
            for name, variant in self.recipe.variants.items():
                for seed in variant.seeds[number : number + 1]:
                    self._variant(name, variant, seed, reference, need)
        self._evaluate()
        plan = list(self.found.values())
        _check_apart(plan, self.folder)
        return plan

    def _add(self, name: str, line: str, *outputs: Path, inputs: tuple[Path, ...] = (),
             needs: tuple[str, ...] = (), resumes: bool = False) -> str:  # fmt: skip
        line = _one_space(line)
        words = {word.rpartition("=")[2].removeprefix("hf:") for word in line.split()}
        named = sorted(path for path in self.recipe.named if shlex.quote(str(path)) in words)
        inputs += tuple(path for path in named if path not in inputs)
        stage = Stage(name, line, inputs, needs, outputs, resumes)
        if self.found.setdefault(name, stage) != stage:
            raise ValueError(
                f"variants: two of them have a stage {name}: a variant's seeds and rounds are "
                "called NAME-s1, NAME-r2; give one of both another name"
            )
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
        else:
            _check_flags(model / FLAGS)
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

    def _row(self, variant: Variant) -> int:
        return variant.row_length or self.recipe.row_length

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
            f"--seq-length {self._row(variant)} {self._writer(part, variant)} {variant.build_flags}"
        )
        for stage in (*self.found.values(), *self.known):
            prefix = str(next(iter(stage.outputs))).removesuffix(".")
            if stage.line == _one_space(f"{line} --output-prefix {prefix}"):
                self.found.setdefault(stage.name, stage)
                return stage.name, Path(prefix)
        output = self.folder / "groups" / f"{tag}-{part}"
        name = self._add(f"build-{tag}-{part}", f"{line} --output-prefix {output}",
                         Path(f"{output}."), inputs=(records, *self.inputs), needs=need,
                         resumes=True)  # fmt: skip
        return name, output

    def _writer(self, part: str, variant: Variant) -> str:
        """Flags of the writer; all builds from the same records share what it has answered."""
        writer = self.recipe.writer
        if writer is None or KIND not in parse_mix(variant.negatives):
            return ""
        urls = " ".join(map(shlex.quote, writer.urls))
        return (
            f"--writer {urls} --writer-model {shlex.quote(writer.model)} "
            f"--writer-answers {self.folder / KIND / part} {writer.flags}"
        )

    def _variant(self, name: str, variant: Variant, seed: int, reference: Path,
                 need: tuple[str, ...]) -> None:  # fmt: skip
        own = f"{name}-s{seed}" if len(variant.seeds) > 1 else name
        model, before = reference, need
        for number in range(1, variant.rounds + 1):
            tag = f"{own}-r{number}" if number > 1 else own
            built, groups = self._groups("train", tag, variant, model, before)
            if number == variant.rounds:
                heldout, test = self._groups("test", tag, variant, model, before)
            output = self.folder / "cpo" / tag
            line = (
                f"{self.train} {self.flags} --cpo-aux-loss --cpo-data-path {groups} "
                f"--cpo-k {variant.k} --cpo-objective {variant.objective} "
                f"--cpo-beta {variant.beta!r} --cpo-mle-weight {variant.mle_weight!r} "
                f"--load {model} --finetune --eval-iters 0 --seed {seed} "
                f"{self._settings(variant, self._row(variant), output)}"
            )
            trained = self._add(f"{TRAINING}{tag}", line, output, inputs=self.inputs,
                                needs=(*before, built))  # fmt: skip
            model, before = output, (*need, trained)
            self.trained.append(trained)
        ranking = self.folder / "results" / f"ranking-{own}.json"
        line = f"{self.verb} evaluate score --groups {test} --load {model} {self.flags}"
        line += f" {self.split} --seq-length {self._row(variant)} --beta {variant.beta!r}"
        self.rankings.append(
            self._add(f"rank-{own}", f"{line} --output {ranking}", ranking, inputs=self.inputs,
                      needs=(*before, heldout))
        )  # fmt: skip
        for alpha in variant.alphas or self.recipe.alphas:
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
        for way, flags in how.decodings.items():
            name = f"{tag}-{way}" if way else tag
            output = self.folder / "results" / f"{name}.json"
            limit = f"--limit {how.limit}" if how.limit else ""
            which = (
                f"--load {model} {self.flags} {self.split} "
                f"--seq-length {self.recipe.data.max_length}"
            )
            needs, inputs = need, self.inputs
            if _DECODE.findall(f"{how.flags} {flags}")[-1:] == ["beam"]:
                folder, needs, inputs = self._in_transformers(tag, model, need)
                which = f"--policy hf:{folder}"
            line = (
                f"{self.verb} evaluate generate --data {self.recipe.data.test} {which} "
                f"{self.records} --max-new-tokens {how.max_new_tokens} {limit} {how.flags} {flags} "
                f"--generator {shlex.quote(generator)} --output {output}"
            )
            made = self._add(f"generate-{name}", line, output,
                             inputs=(self.recipe.data.test, *inputs), needs=needs,
                             resumes=True)  # fmt: skip
            self.texts.setdefault(way, {})[output] = made

    def _in_transformers(
        self, tag: str, model: Path, need: tuple[str, ...]
    ) -> tuple[Path, tuple[str, ...], tuple[Path, ...]]:
        """A model as beam search needs it, which is transformers': folder, stages, inputs."""
        if tag == "reference" and self.recipe.mle is None and need:
            return self.recipe.model, (), (self.recipe.model,)  # what was converted
        output = self.folder / "beam" / tag
        line = f"megatron-cpo convert --from megatron --to hf --input {model} --output {output}"
        return output, (self._add(f"beam-{tag}", line, output, inputs=self.inputs, needs=need),), ()

    def _judge(self, judge: Judge, texts: dict[Path, str]) -> list[str]:
        """Each model's texts against the reference's, which are the first."""
        asked = f"--judge {shlex.quote(judge.url)} --judge-model {shlex.quote(judge.model)}"
        (baseline, base), *others = texts.items()
        line = f"megatron-cpo evaluate winrate --baseline {baseline} {asked} {judge.flags}"
        return [
            self._add(f"judge-{path.stem}", f"{line} --candidate {path}",
                      verdicts_of(path, str(baseline)), needs=(base, made))
            for path, made in others
        ]  # fmt: skip

    def _evaluate(self) -> None:
        how, results, made = self.recipe.evaluate, self.folder / "results", []
        texts = tuple(name for each in self.texts.values() for name in each.values())
        asked = f"--external {how.external}" if how.external else ""
        asked += f" --similarity {shlex.quote(how.similarity)}" if how.similarity else ""
        models = [Path((name or "").removeprefix("hf:")) for name in (how.external, how.similarity)]
        inputs = tuple(model for model in models if model.is_absolute())
        for way, each in self.texts.items():
            tag, files = f"-{way}" if way else "", " ".join(map(str, each))
            output = results / f"scores{tag}.json"
            line = f"megatron-cpo evaluate score --candidate {files} {asked} --output {output}"
            made.append(self._add(f"score{tag}", line, output, inputs=inputs,
                                  needs=tuple(each.values()), resumes=True))  # fmt: skip
            if how.mauve:
                output = results / f"mauve{tag}.json"
                line = f"megatron-cpo evaluate mauve --candidate {files} --output {output}"
                made.append(self._add(f"mauve{tag}", line, output, needs=tuple(each.values())))
            if how.judge:
                made += self._judge(how.judge, each)
        page, title = self.folder / "report.html", "/".join(self.folder.parts[-2:])
        logs = " ".join(f"{self.folder / 'logs' / name}.log" for name in self.trained)
        line = f"megatron-cpo evaluate report {results} --title {title} --log {logs} --html {page}"
        table = self.folder / "report.md"
        self._add("report", f"{line} --markdown {table}", page, table,
                  needs=(*texts, *self.rankings, *made))  # fmt: skip


def _check_flags(file: Path) -> None:
    """Refuse flags of a model that `$(cat ...)` would not read as they are meant.

    Raises:
        ValueError: something is quoted, such as a path with a space.
    """
    text = file.read_text()
    if any(sign in text for sign in "'\"\\"):
        raise ValueError(
            f"model: {file}: bash takes each word of it as it is, quotes and backslashes too, so a "
            "recipe needs it without them; give what is quoted a path without white space"
        )


def _one_space(line: str) -> str:
    """A line with one space between words, whose flags may have been written on several lines.

    White space in quotes is a word's own, such as a template's.
    """
    return _QUOTED_OR_SPACE.sub(lambda found: found[1] or " ", line).strip()


def _check_apart(plan: Sequence[Stage], folder: Path) -> None:
    """Refuse an output that is an input of the recipe: it is removed before it is made anew.

    And one within an input, whose content would be another after each run.
    """
    inputs = {path.resolve(): path for stage in plan for path in stage.inputs}
    for stage in plan:
        for output in stage.outputs:
            place = output.parent.resolve() / output.name
            for real, path in inputs.items():
                inside = [real, *real.parents]
                if output.name.endswith("."):
                    made = any(p.parent == place.parent and p.name.startswith(place.name)
                               for p in inside)  # fmt: skip
                else:
                    made = place in inside
                if made or real in place.parents:
                    raise ValueError(
                        f"--output {folder}: the stage {stage.name} makes {output}"
                        f"{'*' * output.name.endswith('.')}, and the recipe reads {path}, which "
                        "must lie elsewhere; give another --output"
                    )
