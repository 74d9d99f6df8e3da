"""Recipes: mistakes found before anything runs, and what runs again when something has changed.

The commands here are bash's own: the runner runs whatever line a stage has.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml

from harness.ranks import ROOT
from megatron_cpo.cli.recipe_flags import check_flags
from megatron_cpo.recipes.reading import read_recipe
from megatron_cpo.recipes.runner import digests, run_stages
from megatron_cpo.recipes.schema import Part, Recipe
from megatron_cpo.recipes.shell import script, slurm
from megatron_cpo.recipes.stages import Stage, stages
from tests.commands import run_python


@pytest.fixture
def recipe(tmp_path):
    """Write a good recipe with changes to its top level, and give its path."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text('{"text": "one two three"}\n')

    def write(**changes):
        variant = {"negatives": "bn=3", "lr": 1e-4, "steps": 20, "batch": 1, "seeds": [1, 2]}
        content = {
            "model": "hf",
            "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 64},
            "row_length": 256,
            "variants": {"a": variant, "b": variant | {"beta": 0.5, "rounds": 2, "seeds": [1]}},
            "alphas": [0, 0.5],
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def variant(**changes):
    fast = {"steps": 2, "warmup": 1, "batch": 1}
    return {"v": {"negatives": "bn=3", "lr": 1e-4} | fast | changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alphs": [0]}, "alphs: no such key; did you mean alphas?"),
        ({"variants": variant(betta=1)}, "variants.v.betta: no such key; did you mean beta?"),
        ({"variants": variant(k=12)}, "variants.v: k 12: negatives bn=3 make 4, y_1 included"),
        ({"variants": variant(negatives="zn=3")}, "unknown kind 'zn'"),
        ({"variants": variant(seeds=[1, 1])}, "one is there twice"),
        ({"alphas": [1.5]}, "alphas 1.5: the MLE model's share must lie in [0, 1]"),
        ({"alphas": [0, 1]}, "alphas 1: that is the reference"),
        (
            {"variants": variant(alphas=[0, 0])},
            "variants.v: alphas 0 0: give at least one, and each once",
        ),
        ({"evaluate": {"decode": {"a b": "--decode greedy"}}}, "'a b': use letters, digits"),
        ({"evaluate": {"decode": {}}}, "names nothing"),
        ({"evaluate": {"limit": 1}}, "evaluate.limit: Input should be greater than or equal to 2"),
        ({"layout": {"ranks": 3, "tp": 2}}, "ranks 3 is not a multiple of tp 2 x pp 1 x cp 1"),
        ({"variants": variant(negatives="written=1")}, "variants.v: negatives written=1 need a"),
        ({"writer": {"url": "http://a", "modle": "m"}}, "writer.modle: no such key; did you mean"),
        ({"model": "nowhere"}, "nowhere is not there"),
        ({"variants": variant(warmup=2)}, "variants.v: warmup 2: needs fewer than the 2 steps"),
        ({"layout": {"ranks": 2}}, "variants.a: batch 1 is not a multiple of the 2 copies of the"),
        ({"row_length": "long"}, "row_length: Input should be a valid integer"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(recipe, changes, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the line is compared below
        read_recipe(recipe(**changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_refused(recipe):
    """YAML takes the last: of two variants of one name the first was left out without a word."""
    path = recipe()
    good = path.read_text()
    path.write_text(good + "row_length: 512\n")
    lines = good.splitlines()
    twice = f"line {lines.index('row_length: 256') + 1} and in line {len(lines) + 1}; remove one"
    with pytest.raises(ValueError, match=f"'row_length' is there twice, in {twice}"):
        read_recipe(path)
    a = "{negatives: bn=3, lr: 1.0e-4, steps: 20, batch: 1}"
    head = good.partition("variants:")[0]
    path.write_text(f"{head}variants:\n  a: {a}\n  a: {a}\n")
    with pytest.raises(ValueError, match="'a' is there twice"):
        read_recipe(path)
    path.write_text(
        f"{head}variants:\n  a: &a {a}\n  b: &b {{<<: *a, lr: 2}}\n  c: {{<<: *b, lr: 3}}\n"
    )
    assert [v.lr for v in read_recipe(path).variants.values()] == [1e-4, 2, 3]


def test_mauve_of_too_few_texts_is_refused_before_anything_runs(recipe, tmp_path):
    """A long text is cut into pieces, each of them a record: one of 65 bytes counts as two."""
    test = tmp_path / "test.jsonl"
    asked = {"evaluate": {"mauve": True}}
    few = r"evaluate.mauve: \S*/test.jsonl: 99 records at most; .* needs at least 100; give more"
    for record in ({"text": "x" * 20}, {"prompt": "x" * 99, "completion": "y"}):
        lines = [json.dumps(record)] * 99
        test.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=few):
            read_recipe(recipe(**asked))
        test.write_text("\n".join([*lines, "", lines[0]]))
        assert read_recipe(recipe(**asked)).evaluate.mauve
        for short in ({"limit": 99}, {"flags": "--top-k 50 --limit 99"}):
            with pytest.raises(ValueError, match=r"limit 99: .* needs at least 100; raise the lim"):
                read_recipe(recipe(evaluate={"mauve": True} | short))
    texts = ["x" * 20] * 98 + ["x" * 65]
    test.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert read_recipe(recipe(**asked)).evaluate.mauve


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"decode": "gredy"}, "evaluate.decode: --decode gredy: unknown; give one of greedy, "),
        ({"decode": {"a": "--decode greedy --samples 2"}}, r"evaluate.decode.a: --samples 2"),
        ({"flags": "--top-p 7"}, r"evaluate.decode: .*top.p"),
        ({"decode": {"a": "--decode beam --beams x"}}, r"evaluate.decode.a: argument --beams"),
    ],
)  # fmt: skip
def test_a_way_to_decode_that_is_none_is_refused_before_anything_runs(recipe, evaluate, said):
    with pytest.raises(ValueError, match=rf"recipe\.yaml: {said}"):
        read_recipe(recipe(evaluate=evaluate))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"flags": "--formt text"}}, r"data.flags: --formt: .*did you mean --format\?"),
        ({"mle": {"steps": 20, "batch": 1, "lr": 1e-4, "flags": "--lr-decay-styl=cosine"}},
         r"mle.flags: --lr-decay-styl: .*did you mean --lr-decay-style\?"),
        ({"variants": {"a": {"flags": "--cpo-bta 5"}}}, r"variants.a.flags: --cpo-bta: "),
        ({"variants": {"a": {"build_flags": "--rnk minilm"}}}, r"variants.a.build_flags: --rnk: "),
        ({"evaluate": {"flags": "--smples 2"}}, r"evaluate.flags: --smples: .*mean --samples\?"),
        ({"evaluate": {"decode": {"x": "--decode greedy --zzzzzzzzzz"}}},
         r"evaluate.decode.x: --zzzzzzzzzz: .* see megatron-cpo evaluate generate --help"),
        ({"evaluate": {"judge": {"url": "http://h/v1", "model": "m", "flags": "--max-unrd 1"}}},
         r"evaluate.judge.flags: --max-unrd: .*mean --max-unread\?"),
    ],
)  # fmt: skip
def test_a_flag_that_no_command_has_is_refused_before_anything_runs(recipe, changes, said):
    """It stopped the first stage that read it, after hours of others."""
    whole = yaml.safe_load(recipe().read_text())
    for key, part in changes.items():
        for name, values in part.items() if key == "variants" else ((None, part),):
            into = whole.setdefault(key, {})
            (into[name] if name else into).update(values)
    path = recipe(**whole)
    with pytest.raises(ValueError, match=rf"recipe\.yaml: {said}"):
        check_flags(read_recipe(path), path)


def test_flags_of_all_sorts_are_known(recipe):
    """Megatron's, ours, and the beginning of a judge's."""
    path = recipe(evaluate={
        "flags": "--policy-batch 8 --micro-batch-size=2",
        "judge": {"url": "http://h/v1", "model": "m", "flags": "--max-unr 0.2 --one-order"},
    })  # fmt: skip
    check_flags(read_recipe(path), path)


def test_a_path_that_a_shell_reads_otherwise_is_refused(recipe):
    for name in ("a b", "it's", "a$b", "a%j", "a;b", "a(1)"):
        path = recipe(model=name)
        (path.parent / name).mkdir()
        with pytest.raises(ValueError, match="shells read it otherwise; choose another path"):
            read_recipe(path)
    (path.parent / "größe_1.0+x=3,@~").mkdir()
    assert read_recipe(recipe(model="größe_1.0+x=3,@~"))


def test_models_of_an_evaluation_lie_beside_the_recipe(recipe, tmp_path):
    (tmp_path / "embedder").mkdir()
    for name, words, inputs in (
        ("embedder", f"--similarity {tmp_path}/embedder", (tmp_path / "embedder",)),
        ("org/model", "--similarity org/model", ()),
        ("minilm", "--similarity minilm", ()),
    ):
        plan = stages(read_recipe(recipe(evaluate={"similarity": name})), tmp_path / "out")
        score = next(stage for stage in plan if stage.name == "score")
        assert f" {words} " in score.line and score.inputs == inputs
    plan = stages(read_recipe(recipe(evaluate={"external": "hf:hf"})), tmp_path / "out")
    assert next(s for s in plan if s.name == "score").inputs == (tmp_path / "hf",)


def test_files_in_flags_lie_beside_the_recipe_and_count(recipe, tmp_path):
    """A judge's template that was edited left its verdicts as they were; a relative path was that
    of the folder in which the run was started."""
    template = tmp_path / "judge.txt"
    template.write_text("{prompt} {a} {b}")
    (tmp_path / "text").write_text("not the word of --format")
    judge = {"url": "http://localhost:1", "model": "m", "flags": "--one-order --template judge.txt"}
    evaluate = {"judge": judge, "decode": {"way": "--decode sample --x=./judge.txt"}}
    data = {
        "train": "train.jsonl",
        "test": "test.jsonl",
        "max_length": 64,
        "flags": "--format text",
    }
    variants = variant(build_flags="--policy hf:hf --rank 'judge.txt'", flags="--y nowhere.txt")
    path = recipe(evaluate=evaluate, data=data, variants=variants)

    def now():
        plan = stages(read_recipe(path), tmp_path / "out")
        return {stage.name: stage for stage in plan}, digests(plan)

    found, before = now()
    judged = found["judge-v-0.0-way"]
    assert f"--one-order --template {template} " in judged.line and template in judged.inputs
    assert f"--x={template} " in found["generate-reference-way"].line
    built = found["build-v-train"]
    assert f"--policy hf:{tmp_path}/hf --rank 'judge.txt' " in built.line
    assert built.inputs.count(tmp_path / "hf") == 1 and template not in built.inputs
    assert " --format text " in built.line and " --y nowhere.txt" in found["train-v"].line
    template.write_text("{prompt}: {a} {b}")
    changed = {name for name, digest in now()[1].items() if digest != before[name]}
    assert {"judge-v-0.5-way", "generate-reference-way"} <= changed
    assert not any(name.startswith(("build", "train", "merge")) for name in changed)


def test_only_what_depends_on_a_setting_changes(recipe, tmp_path):
    def now(**changes):
        return digests(stages(read_recipe(recipe(**changes)), tmp_path / "out"))

    before = now()
    variants = yaml.safe_load(recipe().read_text())["variants"]
    variants["b"] = variants["b"] | {"beta": 2.0}
    after = now(variants=variants)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "train-b", "build-b-r2-train", "build-b-r2-test", "train-b-r2", "rank-b", "merge-b-0.5",
        "generate-b-0.0", "generate-b-0.5", "score", "report",
    }  # fmt: skip
    (tmp_path / "test.jsonl").write_text('{"text": "four five six"}\n')
    after = now()
    changed = {name for name in before if before[name] != after[name]}
    assert not any(name.startswith(("convert", "train", "merge")) for name in changed)
    assert {"build-a-s1-test", "generate-reference", "rank-a-s2"} <= changed
    assert set(now(alphas=[0, 0.5, 0.7])) - set(before) == {
        f"{verb}-{own}-0.7" for verb in ("merge", "generate") for own in ("a-s1", "a-s2", "b")
    }


def test_several_ways_to_decode_are_compared_each_by_itself(recipe, tmp_path):
    ways = {"greedy": "--decode greedy", "top-k": "--decode sample --top-k 50"}
    judge = {"url": "http://localhost:1", "model": "m"}
    evaluate = {"decode": ways, "similarity": "minilm", "judge": judge}
    found = {s.name: s for s in stages(read_recipe(recipe(evaluate=evaluate)), tmp_path)}
    for way, flags in ways.items():
        texts = [n for n in found if n.startswith("generate") and n.endswith(f"-{way}")]
        assert len(texts) == 7 and all(f" {flags} " in found[name].line for name in texts)
        score = found[f"score-{way}"]
        assert score.needs == tuple(texts) and "--similarity minilm" in score.line
        judged = [s for n, s in found.items() if n.startswith("judge") and n.endswith(f"-{way}")]
        assert len(judged) == 6
        assert all(f"--baseline {tmp_path}/results/reference-{way}.json" in s.line for s in judged)


def test_beam_search_is_asked_of_a_hugging_face_folder(recipe, tmp_path):
    """A Megatron checkpoint cannot do it: the run ended at its first texts."""
    ways = {"greedy": "--decode greedy", "beam": "--decode beam --beams 4"}
    said = read_recipe(recipe(evaluate={"decode": ways}))
    found = {s.name: s for s in stages(said, tmp_path)}
    first = found["generate-reference-beam"]
    assert f" --policy hf:{tmp_path}/hf " in first.line and "--load" not in first.line
    assert first.needs == () and tmp_path / "hf" in first.inputs
    for tag, model, trained in (("a-s2-0.0", "cpo/a-s2", "train-a-s2"),
                                ("b-0.5", "merged/b-0.5", "merge-b-0.5")):  # fmt: skip
        made, text = found[f"beam-{tag}"], found[f"generate-{tag}-beam"]
        assert f" --policy hf:{tmp_path}/beam/{tag} " in text.line and text.needs == (made.name,)
        assert made.line.endswith(f" --input {tmp_path}/{model} --output {tmp_path}/beam/{tag}")
        assert trained in made.needs and made.outputs == (tmp_path / "beam" / tag,)
        assert "--load" in found[f"generate-{tag}-greedy"].line
    mle = {"steps": 20, "batch": 1, "lr": 1e-4}
    path = recipe(mle=mle, evaluate={"decode": "beam"})
    found = {s.name: s for s in stages(read_recipe(path), tmp_path)}
    assert found["generate-reference"].needs == ("beam-reference",)
    assert f" --input {tmp_path}/mle " in found["beam-reference"].line


def test_flags_win_over_keys_and_those_of_a_way_over_those_of_all(recipe, tmp_path):
    """Of a flag that is there twice, argparse takes the last."""
    ways = {"short": "--decode greedy --max-new-tokens 8", "long": "--decode sample --seed 2"}
    flags = "--max-new-tokens 64 --seed 1 --limit 7"
    evaluate = {"decode": ways, "flags": flags, "max_new_tokens": 32, "limit": 9}
    found = {s.name: s for s in stages(read_recipe(recipe(evaluate=evaluate)), tmp_path)}
    parser = argparse.ArgumentParser()
    for flag in ("--max-new-tokens", "--seed", "--limit"):
        parser.add_argument(flag, type=int)
    for way, expected in (("short", (8, 1, 7)), ("long", (64, 2, 7))):
        args, _ = parser.parse_known_args(shlex.split(found[f"generate-reference-{way}"].line))
        assert (args.max_new_tokens, args.seed, args.limit) == expected


def test_words_of_flags_are_those_that_were_written(recipe, tmp_path):
    """White space in quotes is the word's own; flags over several lines are one command."""
    flags = """--prompt-template 'Q:  {instruction}
    it"s\t' --x \\
      a\\ b
    "c  \\"d" 'e  f'
    """
    data = {"train": "train.jsonl", "test": "test.jsonl", "max_length": 64, "flags": flags}
    built = next(s for s in stages(read_recipe(recipe(data=data)), tmp_path) if "build" in s.name)
    show = 'megatron-cpo() { printf "%s\\0" "$@"; }; ' + built.line
    said = subprocess.run(["bash", "-c", show], check=True, capture_output=True, text=True).stdout
    template = 'Q:  {instruction}\n    it"s\t'
    words = ["--prompt-template", template, "--x", "a b", 'c  "d', "e  f", "--load"]
    assert "\0".join(words) in said


def test_a_variants_own_alphas_and_rows_and_seeds_in_turn(recipe, tmp_path):
    variants = yaml.safe_load(recipe().read_text())["variants"]
    variants["b"] |= {"alphas": [0], "row_length": 512, "seeds": [1, 2], "rounds": 1}
    found = {s.name: s for s in stages(read_recipe(recipe(variants=variants)), tmp_path)}
    assert {n for n in found if n.startswith("merge")} == {"merge-a-s1-0.5", "merge-a-s2-0.5"}
    assert "--seq-length 512" in found["train-b-s1"].line
    assert "--seq-length 256" in found["train-a-s1"].line
    trained = [name for name in found if name.startswith("train")]
    assert trained == ["train-a-s1", "train-b-s1", "train-a-s2", "train-b-s2"]
    built = [name for name in found if name.startswith("build")]
    assert len(built) == 4, "rows of another length are scored anew"


def test_groups_of_one_mix_are_built_once(recipe, tmp_path):
    names = [stage.name for stage in stages(read_recipe(recipe()), tmp_path)]
    built = [name for name in names if name.startswith("build")]
    assert built == ["build-a-s1-train", "build-a-s1-test", "build-b-r2-train", "build-b-r2-test"]


def test_some_variants_are_what_they_are_among_all(recipe, tmp_path):
    said = read_recipe(recipe())
    every = {stage.name: stage for stage in stages(said, tmp_path)}
    some = {stage.name: stage for stage in stages(said, tmp_path, ["b"])}
    same = [name for name in some if name not in ("score", "report")]
    assert [some[name] for name in same] == [every[name] for name in same]
    assert {n for n in same if n.startswith("build")} == {
        "build-a-s1-train", "build-b-r2-train", "build-b-r2-test"}  # fmt: skip
    assert {n for n in same if n.startswith("train")} == {"train-b", "train-b-r2"}
    assert set(some["score"].needs) == {n for n in same if n.startswith("generate")}
    with pytest.raises(ValueError, match="--variants c: no such variant; the recipe has a, b"):
        stages(said, tmp_path, ["a", "c"])


def keys(part, prefix=""):
    """Every key below a part of a recipe, with how the page writes its default."""
    for name, field in part.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        parts = [t for t in inner if issubclass(t, Part)]
        path = f"{prefix}{name}.NAME." if name == "variants" else f"{prefix}{name}."
        if not parts or (field.default is None and name == "judge"):
            default = '`""`' if field.default == "" else f"`{field.default}`"
            yield prefix + name, "" if field.is_required() else default
        for inside in parts:
            yield from keys(inside, path)


def test_every_key_is_on_the_page():
    """With its default, where that is not what stands in for it."""
    table = (ROOT / "docs" / "recipes.md").read_text().split("\n## Keys\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    said = {key: row[2] for row in rows for key in re.findall("`([^`]+)`", row[1])}
    found = dict(keys(Recipe))
    assert said.keys() == found.keys()
    for key, default in found.items():
        words = {"`None`": ("none", "all", "from the mix", "the recipe's")}
        assert said[key].strip() in words.get(default, (default,)), key


def test_an_output_that_would_be_an_input_is_refused(recipe, tmp_path):
    """It would have been removed: the folder of a recipe is a likely --output."""
    path = recipe(model="model", mle={"steps": 20, "batch": 1, "lr": 1e-4})
    (tmp_path / "hf").rename(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"convert makes {tmp_path}/model, and the recipe reads "):
        stages(read_recipe(path), tmp_path)
    with pytest.raises(ValueError, match=rf"makes .*/model/runs/model, .* reads {tmp_path}/model,"):
        stages(read_recipe(path), tmp_path / "model" / "runs")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=rf"convert makes {tmp_path}/model, and the recipe reads "):
        stages(read_recipe(path), tmp_path / "link")
    data = yaml.safe_load(path.read_text())["data"]
    (tmp_path / "train.jsonl").rename(tmp_path / "text.jsonl")
    path = recipe(model="model", mle={"steps": 20, "batch": 1, "lr": 1e-4},
                  data=data | {"train": "text.jsonl"})  # fmt: skip
    (tmp_path / "model").rename(tmp_path / "small")
    path.write_text(path.read_text().replace("model: model", "model: small"))
    with pytest.raises(ValueError, match=rf"tokenize makes {tmp_path}/text\.\*, and the recipe"):
        stages(read_recipe(path), tmp_path)
    plan = stages(read_recipe(path), tmp_path / "out")
    for spelt in (tmp_path / "link" / "out", tmp_path / "x" / ".." / "out"):
        assert stages(read_recipe(path), spelt) == plan, "another spelling ran everything again"


def test_quoted_flags_of_a_model_are_refused(recipe, tmp_path):
    """Their quotes would have been parts of the words, in the first stage that reads them."""
    path = recipe(model="ck")
    (tmp_path / "ck").mkdir()
    flags = tmp_path / "ck" / "megatron_flags.txt"
    for bad in ("--tokenizer-model '/a b/x'", "--num-layers 2 \\\n--x", '--x "y"'):
        flags.write_text(bad)
        with pytest.raises(ValueError, match=rf"model: {flags}: bash takes each word of it as it"):
            stages(read_recipe(path), tmp_path / "out")
    flags.write_text("--num-layers 2\n--x\n")
    assert stages(read_recipe(path), tmp_path / "out")


def test_a_variant_that_is_called_as_the_seed_of_another_is_refused(recipe, tmp_path):
    variants = yaml.safe_load(recipe().read_text())["variants"]
    variants["a-s1"] = variants["b"] | {"rounds": 1}
    with pytest.raises(ValueError, match=r"two of them have a stage train-a-s1: a variant's seeds"):
        stages(read_recipe(recipe(variants=variants)), tmp_path)


def test_written_negatives_of_all_variants_and_rounds_are_paid_once(recipe, tmp_path):
    dpo = variant(negatives="written=1", rounds=2)["v"]
    variants = {"dpo": dpo, "two": dpo | {"negatives": "bn=1,written=1"}, "bn": variant()["v"]}
    writer = {"url": ["http://a/v1", "http://b/v1"], "model": "m", "flags": "--writer-tries 8"}
    found = stages(read_recipe(recipe(variants=variants, writer=writer)), tmp_path)
    built = {stage.name: stage for stage in found if stage.name.startswith("build")}
    written = {name: stage for name, stage in built.items() if not name.startswith("build-bn")}
    assert len(written) == 6, "test groups of the last round alone are ranked"
    assert "--writer" not in built["build-bn-train"].line
    for name, stage in written.items():
        answers = tmp_path / "written" / name.rpartition("-")[2]
        flags = f"--writer http://a/v1 http://b/v1 --writer-model m --writer-answers {answers} "
        assert f" {flags}--writer-tries 8 " in stage.line
        assert answers not in stage.outputs, "they outlive a stage that runs again"


def copies(folder, first="cat"):
    """Three stages, of which the last does not need the first two; they count their runs."""

    def stage(name, line, inputs=(), needs=()):
        output = folder / f"{name}.txt"
        return Stage(name, f"bash -c 'echo {name} >> {folder}/ran; {line} > {output}'",
                     inputs, needs, (output,))  # fmt: skip

    return [
        stage("first", f"{first} {folder}/in", (folder / "in",)),
        stage("second", f"cat {folder}/first.txt", needs=("first",)),
        stage("third", "echo 3"),
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").write_text("input\n")
    return tmp_path


def test_a_stage_runs_again_only_when_something_has_changed(folder):
    assert run_stages(copies(folder), folder) == ["first", "second", "third"]
    assert run_stages(copies(folder), folder) == []
    assert run_stages(copies(folder, "tac"), folder) == ["first", "second"]
    (folder / "in").write_text("other\n")
    assert run_stages(copies(folder, "tac"), folder) == ["first", "second"]
    assert (folder / "second.txt").read_text() == "other\n"
    (folder / "third.txt").unlink()
    assert run_stages(copies(folder, "tac"), folder) == ["third"]
    assert (folder / "ran").read_text().split().count("third") == 2


def test_a_training_without_its_log_says_what_to_do(folder):
    """The report read it, and ended in "No such file"."""
    plan = [Stage("train-a", f"bash -c 'echo > {folder}/a'", outputs=(folder / "a",))]
    assert run_stages(plan, folder) == ["train-a"]
    (folder / "logs" / "train-a.log").unlink()
    with pytest.raises(ValueError, match=r"train-a\.log: it is gone, .* delete .*train-a\.json"):
        run_stages(plan, folder)
    (folder / "stages" / "train-a.json").unlink()
    assert run_stages(plan, folder) == ["train-a"]


def texts(folder, *names, line="echo {}"):
    """A stage for the results of each of some variants."""
    return [
        Stage(f"generate-{name}", f"bash -c '{line.format(name)} > {folder}/results/{name}.json'",
              outputs=(folder / "results" / f"{name}.json",), resumes=True)
        for name in names
    ]  # fmt: skip


def test_results_of_other_variants_stay_while_the_recipe_has_them_as_they_were(folder):
    whole = texts(folder, "a", "b")
    assert run_stages(whole[:1], folder, whole) == ["generate-a"]
    assert run_stages(whole[1:], folder, whole) == ["generate-b"]
    assert run_stages(whole, folder) == []
    edited = [*texts(folder, "a", line="echo other {}"), whole[1]]
    assert run_stages(edited[1:], folder, edited) == []
    assert not (folder / "results" / "a.json").exists(), "no text of the recipe of before"
    assert run_stages(texts(folder, "a"), folder) == ["generate-a"]
    assert not (folder / "results" / "b.json").exists(), "the recipe has it no longer"


def test_what_an_interrupted_stage_left_is_gone_when_it_is_another(folder):
    """As `evaluate generate` does, which refuses to go on with the blocks of another command."""
    begin = 'mkdir -p {0}; test -z "$(ls {0})" || exit 1; touch {0}/block; exit 9; echo'
    left = folder / "results" / "a.json.generate"
    with pytest.raises(ValueError, match="generate-a: exit status 9"):
        run_stages(texts(folder, "a", line=begin.format(left)), folder)
    assert (left / "block").exists()
    with pytest.raises(ValueError, match="generate-a: exit status 9"):
        run_stages(texts(folder, "a", line=begin.format(left) + " again"), folder)
    with pytest.raises(ValueError, match="generate-a: exit status 1:"):
        run_stages(texts(folder, "a", line=begin.format(left) + " again"), folder)
    assert (left / "block").exists(), "the same command goes on"
    mine = folder / "results" / "a.json.txt"
    mine.write_text("notes")
    assert run_stages(texts(folder, "a"), folder) == ["generate-a"]
    assert mine.exists() and not left.exists()


def test_verdicts_are_what_a_judges_stage_makes(recipe, tmp_path):
    judge = {"url": "http://localhost:1", "model": "m", "flags": "--max-unread 0.2"}
    found = stages(read_recipe(recipe(evaluate={"judge": judge})), tmp_path)
    judged = next(stage for stage in found if stage.name == "judge-b-0.5")
    results = tmp_path / "results"
    assert judged.outputs == (results / "b-0.5-against-reference.verdicts.jsonl",)
    assert judged.line.endswith(f"--max-unread 0.2 --candidate {results / 'b-0.5.json'}")


def test_what_a_stage_warns_of_is_said(folder, capsys):
    """It stood in a log that nobody reads."""
    line = f"bash -c 'echo warning: 66% were cut; echo more; echo > {folder}/a'"
    run_stages([Stage("build-a", line, outputs=(folder / "a",))], folder)
    assert "build-a" in (said := capsys.readouterr().out)
    assert "\n          warning: 66% were cut\n" in said
    assert "more" not in said


def test_a_failure_names_its_log_and_is_not_taken_for_done(folder):
    bad = copies(folder, "cat /nowhere")
    with pytest.raises(ValueError, match=r"first: exit status 1: .*first.log"):
        run_stages(bad, folder)
    assert run_stages(copies(folder), folder) == ["first", "second", "third"]


def test_a_failed_training_says_why_and_not_how_torchrun_ends(folder):
    """Its report ends in a rule of `=`, which was all that a run said."""
    script = folder / "train.py"
    script.write_text(
        "import sys, time\n"
        "sys.stderr.write('ValueError: --cpo-k 7: groups of 5\\n')\n"
        "print('a warning', flush=True)\n"
        "time.sleep(0.2)\n"
        "sys.exit(3)\n"
    )
    line = f"torchrun --standalone --nproc-per-node 2 {script}"
    with pytest.raises(ValueError, match=r"status 1: ValueError: --cpo-k 7: groups of 5; all of"):
        run_stages([Stage("train", line)], folder)


def test_a_stage_that_makes_nothing_is_a_failure(folder):
    with pytest.raises(ValueError, match=r"ended well but did not make .*x"):
        run_stages([Stage("idle", "true", outputs=(folder / "x",))], folder)


def test_the_script_makes_the_same_files(folder, tmp_path):
    run_stages(copies(folder), folder)
    made = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    for name in made:
        (folder / name).unlink()
    subprocess.run(["bash"], input=script(copies(folder), folder).encode(), check=True)
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == made


SBATCH = """#!/usr/bin/env bash
# Runs a job at once, as a cluster would whose queue is empty; says what it was given.
echo "$@" >> "$(dirname "$0")/given"
bash "${@: -1}" > /dev/null && echo "$(wc -l < "$(dirname "$0")/given");cluster"
"""


def submit(folder, plan):
    """Write jobs, and submit them."""
    (folder / "slurm").mkdir(exist_ok=True)
    for name, content in slurm(plan, folder).items():
        (folder / "slurm" / name).write_text(content)
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", folder / "slurm" / "submit.sh", "--gpus=8"], check=False,
                          env=os.environ | path, capture_output=True, text=True)  # fmt: skip


def test_slurms_jobs_make_the_same_files_and_wait_for_what_they_need(folder):
    plan = copies(folder)
    run_stages(plan, folder)
    made = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    for name in made:
        (folder / name).unlink()
    done = submit(folder, plan)
    assert done.stdout == "submitted 3 jobs\n"
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == made
    first, second, third = (folder / "given").read_text().splitlines()
    assert "--dependency=afterok:1 " in second and "--gpus=8" in second
    assert "--dependency" not in first + third


def test_slurms_jobs_go_on_where_they_were(folder):
    """Most of our commands refuse an output that is there, so the first job of a second submission
    failed and Slurm cancelled the others."""

    def plan(word, fails="true"):
        once = (
            f"bash -c 'test ! -e {folder}/x && echo x >> {folder}/ran && echo {word} > {folder}/x'"
        )
        more = f"bash -c 'echo y >> {folder}/ran; echo {word} >> {folder}/y.0; {fails}'"
        return [Stage("x", once, outputs=(folder / "x",)),
                Stage("y", more, needs=("x",), outputs=(folder / "y.",), resumes=True)]  # fmt: skip

    def ran(*words):
        (folder / "ran").write_text("")
        done = submit(folder, plan(*words))
        return done.returncode == 0, "".join((folder / "ran").read_text().split())

    assert ran("one", f"test -e {folder}/in2") == (False, "xy")
    (folder / "in2").touch()
    assert ran("one", f"test -e {folder}/in2") == (True, "y")
    assert (folder / "y.0").read_text() == "one\none\n", "it goes on with what was begun"
    assert ran("one", f"test -e {folder}/in2") == (True, "")
    assert ran("two") == (True, "xy")
    assert (folder / "y.0").read_text() == "two\n", "another command begins anew"
    (folder / "y.0").unlink()
    assert ran("two") == (True, "y")


RUN = """
import sys; from pathlib import Path
from megatron_cpo.recipes.runner import run_stages; from megatron_cpo.recipes.stages import Stage
folder = Path(sys.argv[1])
slow = f"bash -c 'echo $$ > {folder}/pid; sleep 300; echo x > {folder}/a'"
run_stages([Stage("a", slow, outputs=(folder / "a",))], folder)
"""


def test_a_second_runner_is_refused_and_a_killed_one_leaves_nothing_at_work(folder):
    first = subprocess.Popen([sys.executable, "-c", RUN, folder], cwd=ROOT)
    pid = folder / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    second = run_python("-c", RUN, folder)
    assert second.returncode and "another run is at work in it" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    worker = int(pid.read_text())
    wait_for(lambda: not alive(worker))
    assert not json.loads((folder / "stages" / "a.json").read_text())["done"]
    assert run_stages([Stage("a", f"cp {folder}/in {folder}/a", outputs=(folder / "a",))], folder)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
