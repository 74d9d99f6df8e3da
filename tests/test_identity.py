"""Which checkpoint is it? Every byte of its weights counts, and nothing else does."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from megatron_cpo.checkpoints import digest as digest_module
from megatron_cpo.checkpoints.digest import Part, digest_of, digest_of_ends
from megatron_cpo.checkpoints.formats.opening import open_checkpoint, open_model
from megatron_cpo.checkpoints.formats.torch_dist import read_arguments
from megatron_cpo.checkpoints.identity import (
    checkpoint_identity,
    require_checkpoint,
    same_checkpoint,
)
from megatron_cpo.checkpoints.meaning import architecture_of_arguments, unusual
from megatron_cpo.training.gate import StepZeroGate
from tests.checkpoints import change_weight, weights, write_model
from tests.conversions import CONFIGS, to_megatron
from tests.conversions import write_model as write_hugging_face
from tests.exports import VOCAB, save_byte_level


def test_digest_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAKE3 of the labels, sizes and BLAKE3s of the chunks, whatever order the parts come in."""
    monkeypatch.setattr(digest_module, "_CHUNK", 4)
    monkeypatch.setattr(digest_module, "_BUFFER", 3)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    parts = [Part("b", path, 1, 6), Part("a", path, 0, 0)]
    text = b"a 0 0\n" + blake3(b"").digest()
    text += b"b 0 4\n" + blake3(b"1234").digest() + b"b 4 2\n" + blake3(b"56").digest()
    assert digest_of(parts) == digest_of(parts[::-1]) == blake3(text).hexdigest()
    with pytest.raises(ValueError, match="file is truncated: it ends before byte 11"):
        digest_of([Part("a", path, 8, 3)])


def flip(path: Path, at: float) -> None:
    """Change one byte, and neither size nor time of modification."""
    found, content = path.stat(), bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of more than 128 KiB, with a configuration."""
    return write_model(tmp_path_factory.mktemp("hf") / "model", weights(0, torch.float32), shards=2)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0, None])
def test_every_byte_of_a_model_counts(at: float | None, model: Path, tmp_path: Path) -> None:
    """Of its values, from the first to the last, and of its configuration."""
    changed = shutil.copytree(model, tmp_path / "model")
    if at is None:
        text = (changed / "config.json").read_text()
        text = text.replace('"vocab_size": 20', '"vocab_size": 21')
        (changed / "config.json").write_text(text)
    else:
        content = (path := changed / "model-00002-of-00002.safetensors").read_bytes()
        start = (16 + int.from_bytes(content[:8], "little")) / len(content)
        flip(path, start + at * (1 - start))
    ours, theirs = open_model(model).identity(), open_model(changed).identity()
    assert ours["name"] == theirs["name"] == "model"
    assert len(ours["digest"]) == 64
    assert not same_checkpoint(ours, theirs)


BESIDE = ["README.md", ".gitattributes", "tokenizer.json", "model.safetensors.lock", "merge.json"]


def test_what_lies_beside_a_model_does_not_count(model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "model")
    for name in BESIDE:
        (moved / name).write_text("{}")
    (moved / ".cache").mkdir()
    (moved / ".cache" / "model.safetensors").write_text("cached")
    os.utime(moved / "config.json")
    assert open_model(moved).identity() == open_model(model).identity()


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    return to_megatron(write_hugging_face(folder / "hf", CONFIGS["gpt2"]), folder / "run")


def test_a_megatron_checkpoint(megatron: Path, tmp_path: Path) -> None:
    """The same to whoever asks, wherever it lies; a byte in the middle of a tensor counts."""
    moved = shutil.copytree(megatron, tmp_path / "run")
    ours = checkpoint_identity(str(megatron))
    assert ours == open_checkpoint(megatron).identity() == open_checkpoint(moved).identity()
    release = moved / "release"
    (release / "tokenizer").mkdir()
    (release / "tokenizer" / "tokenizer.model").write_text("newer Megatron keeps it there")
    (release / "metadata.lock").write_text("")
    assert checkpoint_identity(str(moved)) == ours
    change_weight(moved)
    assert not same_checkpoint(checkpoint_identity(str(moved)) or {}, ours or {})


def test_two_conversions_of_a_model_are_one(tmp_path: Path) -> None:
    """Though their arguments name other folders; another norm epsilon is another model."""
    config = CONFIGS["gpt2"] | {"vocab_size": VOCAB}
    found, arguments = [], []
    for name, epsilon in (("one", 1e-5), ("other", 1e-5), ("changed", 1e-6)):
        write_hugging_face(tmp_path / f"{name}-hf", config | {"layer_norm_epsilon": epsilon})
        save_byte_level(tmp_path / f"{name}-hf", ("<|endoftext|>",), eos_token="<|endoftext|>")
        run = to_megatron(tmp_path / f"{name}-hf", tmp_path / name)
        found.append(checkpoint_identity(str(run)) or {})
        arguments.append(read_arguments(run / "release"))
        assert found[-1] == open_checkpoint(run).identity()
    assert arguments[0]["tokenizer_model"] != arguments[1]["tokenizer_model"]
    assert same_checkpoint(found[0], found[1]) and not same_checkpoint(found[0], found[2])


def test_a_setting_that_a_later_version_knows_changes_no_digest() -> None:
    plain = architecture_of_arguments({"num_layers": 2, "hidden_size": 8})
    said = architecture_of_arguments({"num_layers": 2, "hidden_size": 8, "qk_layernorm": True})
    assert "qk_layernorm" in plain and "qk_layernorm" not in unusual(plain)
    assert unusual(said)["qk_layernorm"] is True


def test_training_state_does_not_count(tmp_path: Path) -> None:
    """A run's last checkpoint without its optimizer is the same model."""
    import torch.distributed.checkpoint as dcp

    for name, state in {
        "with": {"optimizer.state.exp_avg.weight": torch.ones(5)},
        "without": {},
    }.items():
        folder = tmp_path / name / "iter_0000001"
        tensors = {"decoder.weight": torch.arange(3.0), **state}
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("1")
    ours, theirs = (checkpoint_identity(str(tmp_path / name)) for name in ("with", "without"))
    assert ours and theirs and ours["digest"] == theirs["digest"]


def test_identity_is_of_the_step_that_is_loaded_wherever_it_lies(tmp_path: Path) -> None:
    """Latest by the tracker, another by --ckpt-step; of a format that is not read, all files."""
    for folder in (tmp_path / "run", tmp_path / "moved" / "run"):
        for iteration, text in ((1, "one"), (2, "two")):
            step = folder / f"iter_{iteration:07d}" / "mp_rank_00"
            step.mkdir(parents=True)
            (step / "model_optim_rng.pt").write_text(text)
        (folder / "latest_checkpointed_iteration.txt").write_text("2")
    latest = checkpoint_identity(str(tmp_path / "run"))
    assert latest is not None
    assert (latest["name"], latest["iteration"]) == ("run", "2")
    assert checkpoint_identity(str(tmp_path / "run"), 1) != latest
    assert checkpoint_identity(str(tmp_path / "moved" / "run")) == latest
    tokenizer = tmp_path / "moved" / "run" / "iter_0000002" / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text("{}")
    assert checkpoint_identity(str(tmp_path / "moved" / "run")) == latest
    assert checkpoint_identity(str(tmp_path / "nowhere")) is None
    assert checkpoint_identity(None) is None


def test_a_reference_of_an_older_version_is_recognised(megatron: Path, tmp_path: Path) -> None:
    """By the digest that it has: SHA-256 over names, sizes and 64 KiB at each end of a file."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (megatron / "release").rglob("*") if p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(megatron / 'release')} {len(content)}\n".encode())
        digest.update(content[: 1 << 16] + content[-(1 << 16) :])
    assert digest_of_ends(megatron / "release") == digest.hexdigest()
    old = {"name": "run", "iteration": "release", "sha256": digest.hexdigest(), "dtype": "float32"}
    start = checkpoint_identity(str(megatron), None, old)
    assert start == {name: old[name] for name in ("name", "iteration", "sha256")}
    gate = StepZeroGate("best", 4, 5.0, old)
    assert gate.begin(start) is None
    other = StepZeroGate("best", 4, 5.0, old | {"sha256": "b" * 64})
    assert f"mle ({'b' * 12})".replace("mle", "run iteration release") in str(other.begin(start))
    assert not same_checkpoint(checkpoint_identity(str(megatron)) or {}, old)


class Args:
    ckpt_step = None

    def __init__(self, load: Path) -> None:
        self.load = str(load)


def test_no_megatron_checkpoint(model: Path, tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "nowhere": (tmp_path / "nowhere", "no Megatron checkpoint there .* that --save wrote"),
        "hf": (model, "it is a Hugging Face model; convert it .* --policy hf:"),
    }
    for folder, message in cases.values():
        with pytest.raises(ValueError, match=message):
            require_checkpoint(Args(folder))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a PEFT adapter .* merge it into its base"):
        require_checkpoint(Args(adapter))
