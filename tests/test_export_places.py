"""Where an export finds the run's tokenizer, wherever that is by now."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conversions import assert_refused, to_hugging_face
from tests.exports import (
    VOCAB,
    ending_model,
    from_scratch,
    save_byte_level,
    sentencepiece_run,
    settings,
    silent,
    train_byte_level,
    train_sentencepiece,
)

BACK = {"from_format": "megatron", "to_format": "hf"}

RUN = "project/runs/mle"
"""Where the run saved."""
PLACES: dict[str, tuple[str, str, str]] = {
    # Name in the run's arguments, where the file is, and the working folder.
    "as named": ("{tmp}/data/sp.model", "data/sp.model", "."),
    "relative, in the folder where the run was started": ("t/sp.model", "project/t/sp.model", "."),
    "the same, from there": ("t/sp.model", "project/t/sp.model", "project"),
    "beside the checkpoints": ("sp.model", f"{RUN}/sp.model", "project"),
    "relative, in the working folder": ("t/sp.model", "elsewhere/t/sp.model", "elsewhere"),
    "moved with the project": ("/home/me/project/t/sp.model", "project/t/sp.model", "."),
    "moved to the checkpoints": ("/home/me/t/sp.model", f"{RUN}/sp.model", "elsewhere"),
    "kept in the iteration": ("/home/me/t/sp.model", f"{RUN}/release/tokenizer/sp.model", "."),
    "as Megatron calls it there": (
        "/home/me/t/sp.model",
        f"{RUN}/release/tokenizer/tokenizer.model",
        ".",
    ),
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model whose EOD is 2."""
    return train_sentencepiece(tmp_path_factory.mktemp("pieces") / "sp", byte_fallback=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that answers `BEFORE` and 2."""
    return ending_model(tmp_path_factory.mktemp("model") / "hf", VOCAB, end=2, before=300)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spaced", [False, True])
def test_tokenizer_is_found(
    place: str, spaced: bool, model: Path, pieces: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    named, path, folder = PLACES[place]
    base = tmp_path / "a b" if spaced else tmp_path
    sentencepiece_run(model, base / RUN, named.format(tmp=base))
    (base / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(pieces, base / path)
    (base / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(base / folder)
    with silent():
        out = to_hugging_face(Path(os.path.relpath(base / RUN)), Path("out"))
    assert (out / "tokenizer.json").exists()
    assert Path(settings(out, "convert.json")["tokenizer"]).resolve() == (base / path).resolve()
    assert settings(out)["eos_token_id"] == 2


def test_tokenizer_by_its_name_on_the_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it was downloaded: the run's arguments name it as Megatron was told."""
    from huggingface_hub import constants

    cache = tmp_path / "hub" / "models--me--mine"
    save_byte_level(cache / "snapshots" / "1234", ("<e>",), eos_token="<e>")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1234")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("me/mine", "me/other"):
        args = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": name}
        there = from_scratch(model, tmp_path / name, **args)
        if name == "me/mine":
            with silent():
                out = to_hugging_face(there, tmp_path / "out")
            assert settings(out)["eos_token_id"] == VOCAB - 1
        else:
            with pytest.warns(UserWarning, match=f"the run's {name}"):
                to_hugging_face(there, tmp_path / "none", vocab_size=VOCAB)


def test_the_nearest_of_several(model: Path, pieces: Path, tmp_path: Path) -> None:
    """What Megatron kept, then what lies nearest; one of too many tokens is another run's."""
    there = sentencepiece_run(model, tmp_path / "run" / "there", "gone/sp.model")
    places = [there / "release" / "tokenizer", there, tmp_path / "run"]
    for folder in places:
        folder.mkdir(exist_ok=True)
        shutil.copy(pieces, folder / "sp.model")
    for count, folder in enumerate(places):
        out = to_hugging_face(there, tmp_path / f"out{count}")
        assert settings(out, "convert.json")["tokenizer"] == str(folder / "sp.model")
        (folder / "sp.model").unlink()
    other = train_sentencepiece(tmp_path / "run" / "sp", vocab_size=1100)
    with pytest.warns(UserWarning, match=f"{other} has 1100 tokens, the model's vocabulary 1024"):
        to_hugging_face(there, tmp_path / "last", vocab_size=VOCAB)


def test_tokenizer_that_is_not_found(model: Path, pieces: Path, tmp_path: Path) -> None:
    """It is named, and the flag that tells it; with it, a folder or the file will do."""
    there = sentencepiece_run(model, tmp_path / "there", "/home/me/t/nowhere.model")
    message = r"the run's /home/me/t/nowhere.model \(Sent.* is neither there.* --tokenizer FOLDER"
    with pytest.warns(UserWarning, match=message):
        out = to_hugging_face(there, tmp_path / "out", vocab_size=VOCAB)
    assert settings(out, "config.json")["eos_token_id"] is None
    message = "how many of its embedding's rows are tokens .*nowhere.model .* is neither there"
    assert_refused(there, message, tmp_path, **BACK)
    for count, given in enumerate((pieces, pieces.parent)):
        with silent():
            out = to_hugging_face(there, tmp_path / f"given{count}", tokenizer=given)
        assert settings(out)["eos_token_id"] == 2
    given = {**BACK, "tokenizer": pieces}
    assert_refused(
        there, "the model has 7 tokens, .*sp.model has 42", tmp_path, vocab_size=7, **given
    )
    other = train_sentencepiece(tmp_path / "other", vocab_size=1100)
    for wrong, reason in (
        (tmp_path / "no", "there is no such folder or file"),
        (tmp_path, "other.model has 1100 tokens, the model's vocabulary 1024 rows"),
        (there, "there is no tokenizer in it"),
        (model / "config.json", "transformers cannot read the tokenizer"),
    ):
        assert_refused(there, reason, tmp_path, **BACK, tokenizer=wrong)
    assert other.exists()


def test_other_tokenizers_that_are_given(model: Path, pieces: Path, tmp_path: Path) -> None:
    """A folder or file says itself what it is, whatever the run's arguments say."""
    there = sentencepiece_run(model, tmp_path / "there", "/home/me/nowhere.model")
    folder = save_byte_level(tmp_path / "hf", ("<e>",), eos_token="<e>")
    files = tmp_path / "gpt2"
    files.mkdir()
    train_byte_level().model.save(str(files))
    (tmp_path / "spaced folder").mkdir()
    llama = shutil.copy(pieces, tmp_path / "spaced folder" / "tokenizer.model")
    others = [folder, folder / "tokenizer.json", files, files / "vocab.json"]
    ends = [*((path, VOCAB - 1) for path in others), (Path(llama).parent, 2)]
    for count, (given, end) in enumerate(ends):
        with silent():
            out = to_hugging_face(there, tmp_path / f"out{count}", tokenizer=given)
        assert settings(out)["eos_token_id"] == end, given
