"""Sweeps of real models: merged, generated, scored, judged and reported; and nothing done twice."""

import json
import shutil
import subprocess
import sys
import urllib.request

import pytest
from safetensors.torch import load_file

from megatron_cpo.evaluation.reporting.contents import contents
from megatron_cpo.evaluation.reporting.folder import read_folder
from megatron_cpo.evaluation.results import read_results
from megatron_cpo.evaluation.sweeping import Commands, SweepConfig, merge_models
from tests.commands import assert_quick, run_command, run_python, run_tool, run_tool_here
from tests.conversions import flags_of, to_megatron
from tests.scored_texts import records, save_with_tokenizer
from tests.tiny_models import save_hugging_face

ALPHAS = ["0", "0.5", "1"]
KINDS = ("merge", "generate", "score", "winrate", "report")


@pytest.fixture(scope="module")
def url():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.judge_server"], stdout=subprocess.PIPE, text=True
    )
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    process.kill()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one tokenizer, and records."""
    folder = tmp_path_factory.mktemp("sweep")
    save_with_tokenizer(folder / "mle")
    shutil.copytree(folder / "mle", folder / "cpo")
    save_hugging_face(folder / "cpo", rows=1000, seed=5)
    rows = [{"prompt": x, "completion": y} for x, y in records(60, longest=12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(models, output, *flags, alphas=ALPHAS, cpo="cpo"):
    given = [
        "sweep", "--mle", models / "mle", "--cpo", models / cpo, "--alpha", *alphas,
        "--data", models / "data.jsonl", "--output", output, "--max-new-tokens", 10,
        "--max-length", 48, "--negatives", "MixN", *flags,
    ]  # fmt: skip
    return [str(word) for word in given]


def asked(url):
    return json.load(urllib.request.urlopen(f"{url}/asked"))["longer"]


def stages(said):
    lines = [line.split() for line in said.splitlines() if line.startswith("$ megatron-cpo")]
    return [next(word for word in line if word in KINDS) for line in lines]


@pytest.fixture(scope="module")
def measured(models, url):
    return ["--judge", url, "--judge-model", "longer", "--external", f"hf:{models / 'mle'}"]


@pytest.fixture(scope="module")
def swept(models, measured):
    """A sweep of Hugging Face folders by the command; its folder and what it said."""
    output = models / "results"
    done = run_tool_here("evaluate.py", *words(models, output, *measured))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_sweep_of_hugging_face_folders(models, swept):
    output, said = swept
    assert stages(said) == ["merge", *["generate"] * 3, "score", *["winrate"] * 3, "report"]
    for alpha, side in (("0", "cpo"), ("1", "mle")):
        merged = load_file(output / f"models/alpha-{alpha}/model.safetensors")
        given = load_file(models / side / "model.safetensors")
        assert all((merged[name] == tensor).all() for name, tensor in given.items())
    texts = {a: read_results(output / f"cpo-MixN-alpha-{a}-greedy.json") for a in ALPHAS}
    assert texts["0.5"].generator == "cpo@negatives=MixN,alpha=0.5"
    assert len({tuple(t.output for t in each.texts) for each in texts.values()}) == 3
    (choice,) = contents(read_folder(output)).choices
    assert choice.curve.quantity.name == "win_rate"
    assert list(choice.curve.points) == [0.0, 0.5, 1.0]
    assert f"best alpha {choice.alpha:g} of win rate against reference: cpo, MixN" in said
    assert (output / "report.html").is_file()
    assert (output / "figures/figure-1.png").is_file()


def test_nothing_is_done_twice(models, swept, measured, url, monkeypatch, capfd):
    """The same again asks and merges nothing; one alpha more merges that alone; another model
    under the same name is refused."""
    output, _ = swept
    before, page = asked(url), (output / "report.html").read_bytes()
    assert run_command(monkeypatch, "evaluate", *words(models, output, *measured)) == 0
    said = capfd.readouterr().out
    assert asked(url) == before
    assert "merge" not in stages(said)
    assert said.count("was there already") == 1 + 3, "scores, and three files of texts"
    assert (output / "report.html").read_bytes() == page

    more = words(models, output, alphas=[*ALPHAS, "0.25"])
    assert run_command(monkeypatch, "evaluate", *more) == 0
    assert "--alpha 0.25 --output" in capfd.readouterr().out
    assert sorted(path.name for path in (output / "models").iterdir()) == [
        "alpha-0", "alpha-0.25", "alpha-0.5", "alpha-1"
    ]  # fmt: skip

    save_hugging_face(models / "other", rows=1000, seed=6)
    other = words(models, output, cpo="other")
    assert run_command(monkeypatch, "evaluate", *other) == 1
    refused = capfd.readouterr().err
    assert "models/alpha-0: alpha 0 of cpo cpo " in refused
    assert "now --cpo is other " in refused


@pytest.mark.long
def test_megatron_checkpoints_on_two_ranks(models, swept, tmp_path):
    """One process after another checkpoint at tensor-parallel size 2: the texts of each alpha are
    those of the Hugging Face folders."""
    for side in ("mle", "cpo"):
        to_megatron(models / side, models / f"megatron-{side}")
    output = tmp_path / "results"
    given = words(models, output, *flags_of(models / "megatron-mle"), "--seq-length", 64,
                  "--tensor-model-parallel-size", 2, cpo="megatron-cpo")  # fmt: skip
    given[2] = str(models / "megatron-mle")
    done = run_python("-m", "megatron_cpo", "--nproc-per-node", 2, "evaluate", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "$ megatron-cpo --nproc-per-node 2 evaluate generate " in done.stdout
    for alpha in ALPHAS:
        name = f"cpo-MixN-alpha-{alpha}-greedy.json"
        ours, theirs = (read_results(folder / name) for folder in (output, swept[0]))
        assert {t.id: t.output for t in ours.texts} == {t.id: t.output for t in theirs.texts}
        assert len(ours.texts) > 10


def test_a_merge_that_was_killed_goes_on(models, tmp_path):
    """Before it moved to its place, and after it had moved in part."""
    config = SweepConfig(models / "mle", models / "cpo", (0.0, 1.0), tmp_path / "out")
    told = []
    merge_models(config, told.append)
    assert len(told) == 1
    beside = config.output / "models-0-1"
    beside.mkdir()
    config.model(1.0).rename(beside / "alpha-1")
    merge_models(config, told.append)
    assert len(told) == 1, "nothing was merged anew"
    assert config.model(1.0).is_dir()
    assert not beside.exists()
    (config.model(1.0) / "merge.json").unlink()
    with pytest.raises(ValueError, match=r"merge\.json: cannot be read .* it is merged anew"):
        merge_models(config, told.append)


def test_what_a_config_refuses(tmp_path):
    def config(**options):
        return SweepConfig(**{"mle": tmp_path, "cpo": tmp_path, "alphas": (0.0, 0.5),
                              "output": tmp_path, **options})  # fmt: skip

    for options, match in [
        ({"alphas": ()}, "at least one"),
        ({"alphas": (0.5, 0.5)}, "each once"),
        ({"alphas": (0.3, 0.1 + 0.2)}, "0.3 0.3: give at least one, and each once"),
        ({"alphas": (1.5,)}, r"must lie in \[0, 1\]"),
        ({"baseline": "mle"}, "add 1 to --alpha"),
        ({"name": "a/b"}, "without / and @"),
        ({"negatives": "a@b"}, "without / and @"),
        ({"negatives": "a/b"}, "without / and @"),
    ]:
        with pytest.raises(ValueError, match=match):
            config(**options)
    with pytest.raises(ValueError, match="not a checkpoint"):
        config().check()
    line = Commands(["megatron-cpo"], ["--data", "a b"]).generate(["--load", "m"], tmp_path, "x@y")
    assert line.startswith("megatron-cpo evaluate generate --data 'a b' --load m --output ")


def test_help_and_mistakes(models, tmp_path, monkeypatch, capfd):
    done = run_tool("evaluate.py", "sweep", "--help")
    assert "alpha 0 is the CPO model alone" in done.stdout
    assert_quick(done)
    for flags, status, match in [
        (["--policy", "hf:x"], 2, "--policy: a sweep gives it"),
        (["--judge", "http://x"], 2, "--judge URL and --judge-model NAME go together"),
        (["--max-new-tokns", "3"], 2, "--max-new-tokns"),
        (["--decode", "gredy"], 1, "--decode gredy: unknown"),
        (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--external", "hf:nowhere"], 1, "--external hf:nowhere"),
        (["--judge", "http://x", "--judge-model", "m", "--template", "t"], 1, "--template t"),
    ]:
        given = words(models, tmp_path / "new", *flags)
        assert run_command(monkeypatch, "evaluate", *given) == status
        assert match in capfd.readouterr().err
    assert not (tmp_path / "new").exists(), "nothing is merged before the flags are read"
