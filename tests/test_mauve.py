"""MAUVE: the package's own figures, 1 of a set with itself, and less the more it is corrupted."""

import json
import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from megatron_cpo.evaluation.mauve_score import (
    FIRST_SEED,
    Features,
    describe_mauve,
    mauve_files,
    open_features,
    write_mauve,
)
from tests.commands import run_command
from tests.scored_texts import records, save_with_tokenizer, write_texts

TEXTS = 120
mauve = pytest.importorskip("mauve")


@pytest.fixture(scope="module")
def truths():
    return [answer for _, answer in records(TEXTS)]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Named so that the package's own loader takes it."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    folder.mkdir()
    return save_with_tokenizer(folder, "gpt2")


def corrupted(texts, share, seed=0):
    """A share of the texts in another order of their words."""
    rng = random.Random(seed)
    return [
        " ".join(rng.sample(text.split(), len(text.split()))) if rng.random() < share else text
        for text in texts
    ]


def letters():
    """Features that see the order of words little and foreign texts well: pairs of letters."""

    def featurize(texts):
        rng = np.random.default_rng(0)
        table = rng.normal(size=(1024, 32))
        return np.array(
            [
                np.mean([table[hash_pair(a, b)] for a, b in pairwise(t)], axis=0)
                for t in (text + "  " for text in texts)
            ],
            dtype=np.float32,
        )

    return Features(featurize, {"name": "letters"})


def hash_pair(a, b):
    return (ord(a) * 31 + ord(b)) % 1024


def garbled(texts, share, seed=0):
    """A share of the texts with each of their words backwards."""
    rng = random.Random(seed)
    return [
        " ".join(word[::-1] for word in text.split()) if rng.random() < share else text
        for text in texts
    ]


def test_equal_to_the_package_called_directly(gpt2, truths, tmp_path):
    """On texts, so that the features are the package's own as well: the last hidden state of the
    last token, in our batches; each seed's value, and the mean and deviation of them."""
    outputs = corrupted(truths, 1.0)
    path = write_texts(tmp_path / "cpo.json", outputs)
    [found], features = mauve_files([path], partial(open_features, f"hf:{gpt2}", batch=7), seeds=3)
    expected = [
        mauve.compute_mauve(
            p_text=truths, q_text=outputs, featurize_model_name=gpt2, max_text_length=64, seed=seed
        )
        for seed in found.seeds
    ]
    assert found.seeds == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
    assert found.values == pytest.approx([each.mauve for each in expected], abs=1e-3)
    assert found.buckets == 12
    assert found.value == pytest.approx(np.mean(found.values))
    assert found.sd == pytest.approx(np.std(found.values, ddof=1))
    assert features.identity["name"] == "gpt2"
    vectors = features.featurize(outputs)
    direct = mauve.compute_mauve(
        p_features=features.featurize(truths), q_features=vectors, seed=FIRST_SEED
    )
    assert found.values[0] == float(direct.mauve)


def test_one_of_a_set_with_itself_and_falling(truths, tmp_path):
    """The truths themselves, then a third, two thirds and all of them garbled."""
    paths = [
        write_texts(tmp_path / f"{name}.json", garbled(truths, share))
        for name, share in (("none", 0), ("third", 1 / 3), ("most", 2 / 3), ("all", 1))
    ]
    found, _ = mauve_files(paths, letters, seeds=3)
    values = [each.value for each in found]
    assert values[0] > 0.99
    assert values == sorted(values, reverse=True)
    assert values[3] < 0.5


def test_minilm_and_another_file(truths, tmp_path):
    """Answers of the same people are near each other; against itself a file is at 1."""
    pytest.importorskip("sentence_transformers")
    shifted = truths[1:] + truths[:1]
    paths = [
        write_texts(tmp_path / "a.json", shifted),
        write_texts(tmp_path / "b.json", ["I do not know that."] * TEXTS),
    ]
    found, _ = mauve_files(paths, partial(open_features, "minilm"), seeds=2)
    assert found[0].value > 0.99
    assert found[1].value < 0.2
    [same], _ = mauve_files(
        paths[:1], partial(open_features, "minilm"), baseline=str(paths[0]), seeds=1
    )
    assert same.value > 0.99
    assert same.sd is None


def test_the_file(truths, tmp_path):
    """Empty texts are left out and said; a record with two samples has one truth."""
    outputs = corrupted(truths, 0.5)
    outputs[4] = " "
    path = write_texts(tmp_path / "cpo.json", outputs)
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, {**rows[0], "sample": 1}]))
    found, features = mauve_files([path], letters, seeds=2)
    write_mauve(tmp_path / "mauve.json", found, features)
    content = json.loads((tmp_path / "mauve.json").read_text())
    [row] = content["mauve"]
    assert (row["texts"], row["empty"], row["baseline_texts"]) == (TEXTS, 1, TEXTS)
    assert (row["candidate"], row["baseline"]) == (str(path), "reference")
    assert row["value"] == pytest.approx(np.mean(row["values"]))
    assert 0 <= row["frontier_integral"] < 1
    assert content["features"] == {"name": "letters"}
    assert "1 empty ones left out" in describe_mauve(found, features)


def test_bad_input(truths, tmp_path, monkeypatch):
    few = write_texts(tmp_path / "few.json", truths[:40])
    with pytest.raises(ValueError, match=r"few.json: 40 texts .* needs at least 100; .* --few"):
        mauve_files([few], letters)
    assert mauve_files([few], letters, few=True, seeds=1)[0][0].buckets == 4
    fewer = write_texts(tmp_path / "fewer.json", truths[:6])
    with pytest.raises(ValueError, match=r"6 texts .* needs at least 10; generate more$"):
        mauve_files([fewer], letters, few=True)
    with pytest.raises(ValueError, match="--seeds 0: needs at least 1"):
        mauve_files([few], letters, seeds=0)
    other = write_texts(tmp_path / "other.json", truths[:40], data="sha256 88")
    with pytest.raises(ValueError, match="other data"):
        mauve_files([few, other], letters, few=True)
    with pytest.raises(ValueError, match="--features hf:nowhere: there is no such folder"):
        open_features("hf:nowhere")
    with pytest.raises(ValueError, match="--features nowhere: neither minilm, nor a model"):
        open_features("nowhere")
    monkeypatch.setitem(__import__("sys").modules, "mauve", None)
    with pytest.raises(ValueError, match=r"MAUVE needs the package mauve: pip install '.\[eval\]'"):
        mauve_files([few], letters)


def test_the_command(gpt2, truths, tmp_path, monkeypatch, capfd):
    """faiss warns, in C++, of few texts a cluster; not to people, whom the default gives so few."""
    path = write_texts(tmp_path / "cpo.json", corrupted(truths, 0.5))
    words = ["--candidate", str(path), "--features", f"hf:{gpt2}", "--seeds", "2"]
    assert run_command(monkeypatch, "evaluate", "mauve", *words) == 0
    said = capfd.readouterr()
    assert "WARNING" not in said.err
    assert "cpo against reference: " in said.out
    assert json.loads((tmp_path / "mauve.json").read_text())["features"]["pool"] == "last"
    mauve.compute_mauve(p_features=np.eye(100), q_features=np.eye(100))
    assert "WARNING clustering" in capfd.readouterr().err
