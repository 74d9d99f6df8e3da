"""The stages of a recipe: what each is told, what it needs, and what is done once for several."""

import argparse
import shlex
import subprocess

import pytest
import yaml

from megatron_cpo.recipes.reading import read_recipe
from megatron_cpo.recipes.runner import digests
from megatron_cpo.recipes.stages import stages
from tests.recipe_files import recipe_writer, variant


@pytest.fixture
def recipe(tmp_path):
    return recipe_writer(tmp_path)


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


def test_verdicts_are_what_a_judges_stage_makes(recipe, tmp_path):
    judge = {"url": "http://localhost:1", "model": "m", "flags": "--max-unread 0.2"}
    found = stages(read_recipe(recipe(evaluate={"judge": judge})), tmp_path)
    judged = next(stage for stage in found if stage.name == "judge-b-0.5")
    results = tmp_path / "results"
    assert judged.outputs == (results / "b-0.5-against-reference.verdicts.jsonl",)
    assert judged.line.endswith(f"--max-unread 0.2 --candidate {results / 'b-0.5.json'}")
