"""Weighted sums of any number of checkpoints, their distance, and the tool's other modes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_cpo.checkpoints import combine, merge
from megatron_cpo.checkpoints.formats.opening import open_model
from megatron_cpo.checkpoints.merging.distance import by_part, distances, draw, table
from tests.checkpoints import DTYPES, assert_rounded_once, read_model, weights, write_model
from tests.commands import Done, run_tool_here


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three float32 models."""
    return [
        write_model(tmp_path / name, weights(seed, torch.float32), shards=seed + 1)
        for seed, name in enumerate("abc")
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_soup(dtype: torch.dtype, tmp_path: Path) -> None:
    """Three models, 0.5 a + 0.3 b + 0.2 c, rounded once; integers agree."""
    models = [weights(seed, dtype) for seed in range(3)]
    paths = [write_model(tmp_path / str(seed), model) for seed, model in enumerate(models)]
    shares = [0.5, 0.3, 0.2]
    soup = read_model(combine(paths, shares, tmp_path / "soup", verify=True))
    for name, stored in soup.items():
        if stored.is_floating_point():
            exact = sum(w * model[name].double() for w, model in zip(shares, models, strict=True))
            assert_rounded_once(stored, exact)
        else:
            assert torch.equal(stored, models[0][name])


def test_average_and_provenance(folders: list[Path], tmp_path: Path) -> None:
    output = combine(folders, None, tmp_path / "soup")
    a, b, c, soup = map(read_model, (*folders, output))
    exact = sum(model["scale"].double() for model in (a, b, c)) / 3
    torch.testing.assert_close(soup["scale"].double(), exact, rtol=2**-24, atol=0)
    record = json.loads((output / "merge.json").read_text())
    assert [side["weight"] for side in record["checkpoints"]] == [1 / 3] * 3
    assert [side["name"] for side in record["checkpoints"]] == ["a", "b", "c"]
    assert record["checkpoints"][1]["digest"] == open_model(folders[1]).identity()["digest"]


def test_two_weights_are_a_merge(folders: list[Path], tmp_path: Path) -> None:
    merged = merge(*folders[:2], 0.3, tmp_path / "merged")
    combined = combine(folders[:2], [0.3, 0.7], tmp_path / "combined")
    name = "model.safetensors"
    assert (merged / name).read_bytes() == (combined / name).read_bytes()


def test_task_vectors(folders: list[Path], tmp_path: Path) -> None:
    """base + 0.7 (a - base) - 0.4 (b - base); weights of 0 give the base bit for bit."""
    a, b, base = map(read_model, folders)
    output = combine(
        folders[:2], [0.7, -0.4], tmp_path / "both", base=folders[2], verify=True
    )  # fmt: skip
    for name, stored in read_model(output).items():
        if stored.is_floating_point():
            origin = base[name].double()
            exact = origin + 0.7 * (a[name].double() - origin) - 0.4 * (b[name].double() - origin)
            torch.testing.assert_close(stored.double(), exact, rtol=2**-23, atol=1e-9)
    record = json.loads((output / "merge.json").read_text())
    assert [side["weight"] for side in record["checkpoints"]] == [0.7, -0.4]
    assert record["base"]["weight"] == pytest.approx(0.7)
    assert record["base"]["name"] == "c"
    same = combine(folders[:2], [0, 0], tmp_path / "same", base=folders[2])
    assert all(torch.equal(values, base[name]) for name, values in read_model(same).items())


def test_float32_sum_of_products(folders: list[Path], tmp_path: Path) -> None:
    """The formula of mergekit's `linear` in float32: its two weights, two products and the sum are
    rounded, and our sum is; each by 2**-24 of the terms at most.
    """
    a, b, *_ = map(read_model, folders)
    merged = read_model(merge(*folders[:2], 0.3, tmp_path / "merged"))
    for name, values in merged.items():
        if values.is_floating_point():
            one, other = 0.3 * a[name], 0.7 * b[name]
            off = (values - (one + other)).abs()
            assert (off <= 2**-22 * (one.abs() + other.abs())).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2, [0.5, 0.4]), {}, "weights add up to 0.9, not to 1; .* --base"),
        ((2, [0.5]), {}, "2 checkpoints and 1 weights"),
        ((0, []), {}, "--checkpoint: give at least one"),
        ((2, [math.nan, 1]), {}, "must be finite"),
        ((1, None), {"base": 2}, "--base needs a weight"),
        ((2, [0.5, 0.5]), {"base": 1}, "give each checkpoint once"),
    ],
)
def test_weights_that_do_not_fit(
    arguments: Any, options: Any, message: str, folders: list[Path], tmp_path: Path
) -> None:
    count, shares = arguments
    base = folders[options["base"]] if options else None
    with pytest.raises(ValueError, match=message):
        combine(folders[:count], shares, tmp_path / "soup", base=base)
    assert not list(tmp_path.glob("soup*"))


def test_nan_of_an_input_with_weight_0(folders: list[Path], tmp_path: Path) -> None:
    """It is named although it would not spoil the sum."""
    tensors = read_model(folders[0])
    tensors["model.norm.weight"][2] = torch.inf
    save_file(tensors, folders[0] / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight of the .*a checkpoint has NaN"):
        combine(folders[:2], [0, 1], tmp_path / "soup")
    merged = combine(folders[:2], [0, 1], tmp_path / "soup", allow_nan=True)
    assert read_model(merged)["model.norm.weight"].isfinite().all()


def test_sum_that_overflows(tmp_path: Path) -> None:
    """Of two float16 values with weights 2 and -1: an error, not an infinity."""
    for name, value in (("a", 6e4), ("b", -6e4)):
        write_model(tmp_path / name, {"model.w": torch.full((3,), value).half()})
    with pytest.raises(ValueError, match=r"model\.w at weights 2 -1: 180000 does not fit float16"):
        combine([tmp_path / "a"], [2], tmp_path / "out", base=tmp_path / "b")
    assert not list(tmp_path.glob("out*"))


# ---- distances


def layered(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, 7), "model.norm.weight": (7,)}
    for layer in range(3):
        shapes[f"model.layers.{layer}.mlp.weight"] = (700, 500)
        shapes[f"model.layers.{layer}.norm.weight"] = (7,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_distances(tmp_path: Path) -> None:
    """Norms, relative distance and cosine of each layer, against plain torch on whole tensors."""
    a, b = layered(0), layered(1)
    b["model.norm.weight"] = a["model.norm.weight"].clone()
    folders = [write_model(tmp_path / name, model) for name, model in (("a", a), ("b", b))]
    found = distances(*folders)
    rows = by_part(found)
    assert list(rows) == [
        "model.embed_tokens.weight", "model.norm.weight", "layer 0", "layer 1", "layer 2",
        "all weights",
    ]  # fmt: skip
    for part, names in (
        ("layer 1", ["model.layers.1.mlp.weight", "model.layers.1.norm.weight"]),
        ("all weights", list(a)),
    ):
        one, other = (torch.cat([m[n].reshape(-1) for n in names]).double() for m in (a, b))
        row = rows[part]
        assert row.values == len(one)
        assert row.norm == pytest.approx(float((other - one).norm()))
        assert row.relative == pytest.approx(float((other - one).norm() / one.norm()))
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
        assert row.cosine == pytest.approx(float(cosine))
        assert row.largest == float((other - one).abs().max())
    same = rows["model.norm.weight"]
    assert (same.norm, same.relative) == (0, 0) and same.cosine == pytest.approx(1)
    assert ("layer 2", "model.layers.*.mlp.weight") in found
    assert table(found).splitlines()[-1].startswith("all weights")
    draw(found, tmp_path / "moved.png", *folders)
    assert (tmp_path / "moved.png").read_bytes()[1:4] == b"PNG"


# ---- the tool


def run_tool(*flags: Any) -> Done:
    return run_tool_here("merge_checkpoints.py", *flags)


def test_tool_modes(folders: list[Path], tmp_path: Path) -> None:
    """A soup and a comparison from the command line."""
    a, b, c = folders
    soup, name = tmp_path / "soup", "model.safetensors"
    shares = [f"{a}=0.5", f"{b}=0.3", f"{c}=0.2"]
    assert run_tool("--checkpoint", *shares, "--output", soup).returncode == 0
    expected = combine(folders, [0.5, 0.3, 0.2], tmp_path / "expected")
    assert (soup / name).read_bytes() == (expected / name).read_bytes()
    picture = tmp_path / "moved.png"
    done = run_tool("--diff", a, soup, "--picture", picture)
    assert done.returncode == 0 and "all weights" in done.stdout and picture.exists()
    done = run_tool("--checkpoint", f"{a}=0.5", b, "--output", tmp_path / "no")
    assert done.returncode == 1 and "give each a weight as PATH=WEIGHT" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mle a --checkpoint b --output no", "give --mle, --cpo and --alpha, or --checkpoint"),
        ("--mle a --cpo b --output no", "give --mle, --cpo and --alpha, or --checkpoint"),
        ("--output no", "give --mle, --cpo and --alpha, or --checkpoint"),
        ("--diff a b --base c", "--base goes with --checkpoint"),
        ("--checkpoint a --picture p --output no", "--picture with --diff"),
        ("--mle a --cpo b --alpha 1", "--output is required"),
    ],
)
def test_modes_that_do_not_go_together(flags: str, message: str) -> None:
    done = run_tool(*flags.split())
    assert done.returncode == 2 and message in done.stderr
