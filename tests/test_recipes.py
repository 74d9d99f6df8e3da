"""Recipes: what one may say, and mistakes found before anything runs."""

import json
import re
from typing import get_args

import pytest
import yaml

from harness.ranks import ROOT
from megatron_cpo.cli.recipe_flags import check_flags
from megatron_cpo.recipes.reading import read_recipe
from megatron_cpo.recipes.schema import Part, Recipe
from megatron_cpo.recipes.stages import stages
from tests.recipe_files import recipe_writer, variant


@pytest.fixture
def recipe(tmp_path):
    return recipe_writer(tmp_path)


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
        ({"decode": "sample", "flags": "--top-p 7"}, r"evaluate.decode: .*top.p"),
        ({"decode": {"a": "--decode beam --beams x"}}, r"evaluate.decode.a: argument --beams"),
    ],
)  # fmt: skip
def test_a_way_to_decode_that_is_none_is_refused_before_anything_runs(recipe, evaluate, said):
    path = recipe(evaluate=evaluate)
    with pytest.raises(ValueError, match=rf"recipe\.yaml: {said}"):
        check_flags(read_recipe(path), path)


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
        "flags": "--policy-batch 8 --micro-batch-size=2 --verbose",
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
