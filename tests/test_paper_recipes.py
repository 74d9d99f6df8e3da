"""A recipe of the paper on a tiny model, whole; `make recipes` runs all of them, by the command.

Here the stages are run by `tests.warm_stages`, in a quarter of the time.
"""

import pytest

from megatron_cpo.recipes import runner
from megatron_cpo.recipes.code import our_code
from megatron_cpo.recipes.outcome import outcome
from megatron_cpo.recipes.reading import read_recipe
from megatron_cpo.recipes.runner import run_stages
from megatron_cpo.recipes.stages import stages
from tests.paper_recipes import judge, tiny
from tests.warm_stages import warm


@pytest.fixture
def ranks(monkeypatch):
    """Stages are run by warm ranks; holds what each imported."""
    imported = {}
    monkeypatch.setattr(runner, "_execute", warm(imported))
    return imported


@pytest.mark.long
def test_a_recipe_of_the_paper_whole(tmp_path, ranks):
    folder = tmp_path / "run"
    folder.mkdir()
    with judge() as url:
        recipe = read_recipe(tiny("openllama-3b-wiki", tmp_path, url, ("mixn-ranked",)))
        plan = stages(recipe, folder)
        assert run_stages(plan, folder) == [stage.name for stage in plan]
    assert {"mauve", "judge-mixn-ranked-0.5", "merge-mixn-ranked-0.5"} <= ranks.keys()
    assert run_stages(plan, folder) == []
    for stage in plan:
        assert ranks[stage.name] <= our_code().modules(stage.line), stage.name
    said = outcome(plan, folder)
    assert "Sweep of win rate against reference: mixn-ranked" in said
    page = (folder / "report.html").read_text()
    assert "MAUVE" in page and "mixn-ranked@alpha=0.5" in page
