"""The recipes that ship: the schema takes them, and Megatron's parser all flags that they print."""

import shlex

import pytest
import yaml

from harness.ranks import ROOT
from megatron_cpo.cli.recipe_flags import check_flags
from megatron_cpo.host.compat import megatron_parser
from megatron_cpo.recipes.reading import read_recipe
from megatron_cpo.recipes.stages import FLAGS, stages
from megatron_cpo.training.config import add_cpo_args
from tests.conversions import CONFIGS, to_megatron, write_model

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
PAPER = [path for path in RECIPES if path.stem.startswith(("gpt2", "openllama"))]


@pytest.fixture
def shipped(tmp_path):
    """A shipped recipe as it is, but for its paths: a tiny model of the family, tiny records."""

    def read(path):
        content = yaml.safe_load(path.read_text())
        family = "gpt2" if path.stem.startswith("gpt2") else "llama"
        write_model(tmp_path / "model", CONFIGS[family])
        (tmp_path / "records.jsonl").write_text('{"text": "one two three"}\n' * 100)
        content["model"] = "model"
        content["data"] |= {"train": "records.jsonl", "test": "records.jsonl"}
        if "external" in content["evaluate"]:
            content["evaluate"]["external"] = "hf:model"
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return read_recipe(tmp_path / "recipe.yaml")

    return read


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_megatron_parses_what_a_recipe_trains_with(shipped, path, tmp_path):
    recipe = shipped(path)
    check_flags(recipe, path)
    to_megatron(recipe.model, tmp_path / "run" / "model")
    flags = (tmp_path / "run" / "model" / FLAGS).read_text()
    trainings = [
        stage for stage in stages(recipe, tmp_path / "run") if "pretrain_gpt" in stage.line
    ]
    assert len(trainings) == len(recipe.variants) + (recipe.mle is not None)
    parser = add_cpo_args(megatron_parser.__wrapped__())  # the cached one is others' too
    for stage in trainings:
        line = stage.line.replace(f"$(cat {tmp_path / 'run' / 'model' / FLAGS})", flags)
        said = line.partition("megatron_cpo.pretrain_gpt")[2]
        assert "$" not in said
        args = parser.parse_args(shlex.split(said))
        how = recipe.mle if stage.name == "mle" else recipe.variants[stage.name[len("train-") :]]
        assert args.train_iters == how.steps and args.global_batch_size == how.batch
        assert args.hidden_size == 32 and args.lr == how.lr


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_settings(shipped, path):
    recipe = shipped(path)
    assert recipe.mle and recipe.mle.steps == 2000 and recipe.mle.lr == 1e-5
    for name, variant in recipe.variants.items():
        assert (variant.k, variant.beta, variant.lr) == (12, 5, 1e-5)
        assert variant.weight_decay == 0.05 and "--top-k 50" in variant.build_flags
        assert variant.steps == (200 if name.startswith("an") else 1000)
    assert ("--prefix-fraction 0.15" in recipe.data.flags) == path.stem.endswith("wiki")
