"""An export of what was converted: the origin's files, the ends of both, merging, and flags."""

import json
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.formats.beside import FLAGS
from tests.conversions import (
    CONFIGS,
    flags_of,
    to_hugging_face,
    to_megatron,
    write_model,
)
from tests.exports import (
    VOCAB,
    ending_model,
    save_byte_level,
    sentencepiece_run,
    settings,
    silent,
    train_sentencepiece,
)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model whose EOD is 2."""
    return train_sentencepiece(tmp_path_factory.mktemp("pieces") / "sp", byte_fallback=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that answers `BEFORE` and 2."""
    return ending_model(tmp_path_factory.mktemp("model") / "hf", VOCAB, end=2, before=300)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with two ends, its tokenizer and templates."""
    folder = tmp_path_factory.mktemp("origin") / "hf"
    special = ("<|endoftext|>", "<|im_end|>")
    write_model(folder, CONFIGS["llama"] | {"vocab_size": VOCAB})
    save_byte_level(folder, special, eos_token="<|im_end|>", chat_template="{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    ends = {"eos_token_id": [VOCAB - 1, VOCAB - 2], "pad_token_id": VOCAB - 2, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(ends | {"do_sample": True}))
    config = settings(folder, "config.json") | {"eos_token_id": VOCAB - 1, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def test_origin_comes_back(origin: Path, tmp_path: Path) -> None:
    """Its files as they were, but that its tokenizer pads; from a run that saved elsewhere, too."""
    there = to_megatron(origin, tmp_path / "there")
    run = tmp_path / "run"
    shutil.copytree(there / "release", run)
    for count, source in enumerate((there, run)):
        with silent():
            back = to_hugging_face(source, tmp_path / f"back{count}")
        changed = {"model.safetensors", "tokenizer_config.json"}
        files = {p.relative_to(origin) for p in origin.rglob("*") if p.is_file()}
        assert {p.relative_to(back) for p in back.rglob("*") if p.is_file()} - files == {
            Path("convert.json")
        }
        for name in files:
            if name.name not in changed:
                assert (back / name).read_bytes() == (origin / name).read_bytes(), name
        before, after = (settings(f, "tokenizer_config.json") for f in (origin, back))
        assert after == before | {"pad_token": "<|im_end|>"}


def _generation(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps({k: v for k, v in changes.items() if v is not None}))

    return change


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "generation_config.json").unlink()
        config = settings(folder, "config.json") | changes
        kept = {k: v for k, v in config.items() if v != "left out"}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


EOD = VOCAB - 1
ORIGINS: dict[str, tuple[Callable[[Path], None], dict[str, Any], bool]] = {
    # What the origin declares, what the output's generation_config.json says, and is that news?
    "the EOD": (_generation(eos_token_id=EOD), {"eos_token_id": EOD, "pad_token_id": EOD}, False),
    "another end": (
        _generation(eos_token_id=5, pad_token_id=0),
        {"eos_token_id": [5, EOD], "pad_token_id": 0},
        True,
    ),
    "no end": (_generation(top_k=3), {"top_k": 3, "eos_token_id": EOD, "pad_token_id": EOD}, False),
    "config.json alone": (
        _config(eos_token_id=[EOD, 7], pad_token_id=9, bos_token_id=3),
        {"bos_token_id": 3, "eos_token_id": [EOD, 7], "pad_token_id": 9},
        False,
    ),
    "an old config.json": (
        _config(eos_token_id=EOD, do_sample=True, max_length=50, pad_token_id=-1),
        {"eos_token_id": EOD, "do_sample": True, "max_length": 50, "pad_token_id": EOD},
        False,
    ),
    "config.json says null": (
        _config(eos_token_id=None),
        {"eos_token_id": EOD, "pad_token_id": EOD},
        False,
    ),
    "config.json leaves it to transformers": (
        _config(eos_token_id="left out", bos_token_id="left out"),
        {"bos_token_id": 1, "eos_token_id": [2, EOD], "pad_token_id": EOD},
        True,
    ),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_ends_of_an_origin(name: str, origin: Path, tmp_path: Path) -> None:
    """Its own and the run's EOD, which is its tokenizer's; what else it says is kept."""
    change, expected, news = ORIGINS[name]
    source = shutil.copytree(origin, tmp_path / "hf")
    change(source)
    there = to_megatron(source, tmp_path / "there")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        back = to_hugging_face(there, tmp_path / "back")
    found = settings(back)
    assert {k: v for k, v in found.items() if "output" not in k and k != "use_cache"} == expected
    assert [f"id {EOD}, the EOD of" in str(w.message) for w in said] == [True] * news
    config = settings(source, "config.json")
    if "eos_token_id" in config and config["eos_token_id"] is None:
        config["eos_token_id"] = EOD
    assert settings(back, "config.json") == config


def test_origin_without_a_tokenizer(pieces: Path, tmp_path: Path) -> None:
    """Then the flags name its end as that of NullTokenizer; a run's own tokenizer is taken."""
    source = write_model(
        tmp_path / "hf", CONFIGS["llama"] | {"vocab_size": VOCAB, "eos_token_id": 2}
    )
    there = to_megatron(source, tmp_path / "there")
    assert flags_of(there)[-2:] == ["--null-tokenizer-eod-id", "2"]
    with silent():
        back = to_hugging_face(there, tmp_path / "back")
    assert settings(back)["eos_token_id"] == 2 and not (back / "tokenizer_config.json").exists()
    with silent():
        back = to_hugging_face(there, tmp_path / "given", tokenizer=pieces)
    assert settings(back)["eos_token_id"] == 2 and (back / "tokenizer.json").exists()
    assert settings(back, "config.json") == settings(source, "config.json")


def test_origin_whose_tokenizer_needs_code(origin: Path, tmp_path: Path) -> None:
    """Nothing of it is run; its files travel, and it is said that nobody looked."""
    source = shutil.copytree(origin, tmp_path / "hf")
    classes = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(classes))
    (source / "mine.py").write_text("raise SystemExit('was run')")
    there = to_megatron(source, tmp_path / "there")
    with pytest.warns(UserWarning, match="cannot read .*; the files in .* are copied as they are"):
        back = to_hugging_face(there, tmp_path / "back")
    for name in ("tokenizer_config.json", "tokenizer.json", "mine.py", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("alphas", [0.5, [0.25]])
def test_merged_checkpoint_exports_like_its_inputs(
    alphas: Any, origin: Path, model: Path, pieces: Path, tmp_path: Path
) -> None:
    """From a model and from scratch, and without what the inputs' arguments name.

    The tokenizer of those from scratch lies where they name it, or where newer Megatron keeps it.
    """
    name = "alpha-0.25" if isinstance(alphas, list) else ""
    sides = [to_megatron(origin, tmp_path / side) for side in ("a", "b")]
    moved = shutil.copytree(sides[0] / "release", tmp_path / "moved")
    merged = merge(moved, sides[1], alphas, tmp_path / "merged a" / "new") / name
    copied = Path(shutil.copy(pieces, tmp_path / "copied.model"))
    scratch = [sentencepiece_run(model, tmp_path / side, str(copied)) for side in ("c", "d")]
    if name:
        for path in scratch:
            (path / "release" / "tokenizer").mkdir()
            shutil.copy(copied, path / "release" / "tokenizer" / "tokenizer.model")
        copied.unlink()
    other = merge(*scratch, alphas, tmp_path / "other") / name
    copied.unlink(missing_ok=True)
    for path in (*sides, *scratch, moved):
        shutil.rmtree(path)
    tokenizer = merged.absolute() / "hugging_face"
    flags = flags_of(merged)
    assert flags[flags.index("--tokenizer-model") + 1] == str(tokenizer)
    with silent():
        back, again = (
            to_hugging_face(merged, tmp_path / "x"),
            to_hugging_face(other, tmp_path / "y"),
        )
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (back / name).read_bytes() == (origin / name).read_bytes()
    assert settings(again)["eos_token_id"] == 2 and (again / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["plain", "with space", 'it\'s $HOME * "q"', "ünï 漢"])
def test_flags_survive_a_shell(
    name: str, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted, evaluated and through xargs, from another folder; a relative output was absolute."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    there = to_megatron(origin, Path(name) / "there")
    path = (there / FLAGS).absolute()
    expected = flags_of(there)
    assert expected[-1] == str(tmp_path / name / "there" / "hugging_face")
    pasted = " \\\n".join(path.read_text().splitlines())
    for script in (f"printf '%s\\0' {pasted}", f"xargs -a {FLAGS} printf '%s\\0'"):
        found = subprocess.run(
            ["bash", "-c", script], capture_output=True, check=True, text=True, cwd=path.parent
        )
        assert found.stdout.split("\0")[:-1] == expected
    if name in ("plain", "with space"):
        script = f"eval printf '%s,' $(cat {FLAGS})"
        found = subprocess.run(
            ["bash", "-c", script], capture_output=True, check=True, text=True, cwd=path.parent
        )
        assert found.stdout.split(",")[:-1] == expected
