"""NaN, infinity and ids that no token has: refused where they arise, by group and by model."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.ranks import run_pretrain
from harness.stores import VOCAB_SIZE, random_group, write_store
from megatron_cpo.building.blocks import Recipe, in_blocks, make_block
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.checkpoints.formats.opening import open_checkpoint
from megatron_cpo.files import write_json
from megatron_cpo.groups import damage
from megatron_cpo.groups.damage import check_contents
from megatron_cpo.groups.dataset import GroupDataset, MixedDataset, RowConfig
from megatron_cpo.groups.packed import pack_groups
from megatron_cpo.groups.store import VALUE_ROWS, GroupReader
from megatron_cpo.groups.writing import write_reference_logps
from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_records import NEGATIVES
from megatron_cpo.policies.choosing import choose, draw
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.border import Border
from megatron_cpo.records.encoder import Pair
from megatron_cpo.records.source import Source
from megatron_cpo.scoring.under_policy import rescore
from megatron_cpo.work.job import Run
from tests.runs import MODEL
from tests.texts import ToyTokenizer, write_jsonl, write_pairs
from tests.tiny_models import save_hugging_face

K, GROUPS = 5, 12
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=3), Sampling(top_k=0), Sampling(top_k=0, top_p=0.5)]
)
def test_nothing_is_drawn_from_logits_that_are_none(bad: float, sampling: Sampling) -> None:
    """Of that row alone; the others draw what they draw without it. Two ranks: `test_choosing`."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    expected = [choose(logits, numbers, sampling), draw(logits, numbers[:, None])[:, 0]]
    logits[1, 4] = bad
    logits[3] = -math.inf
    for found, wanted in zip(
        (choose(logits, numbers, sampling), draw(logits, numbers[:, None])[:, 0]),
        expected,
        strict=True,
    ):
        assert found.tolist() == [int(wanted[0]), -1, int(wanted[2]), -1]


@pytest.fixture(scope="module", params=["nan", "inf"])
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face model one of whose weights is no number."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    save_hugging_face(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float(request.param)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def build(folder: Path, model: str, negatives: str, score: bool = False, **options: Any) -> str:
    """Of six records of numbers; returns the store's PREFIX."""
    records = [{"prompt": f"{i} 5 6", "completion": f"7 {i} 8 9"} for i in range(6)]
    path = write_jsonl(folder / "r.jsonl", *records)
    prefix = str(folder / "out" / "groups")
    config = BuildConfig(Source((path,)), prefix, negatives=negatives, **options)
    opened = partial(HuggingFacePolicy, model, ToyTokenizer())
    sampling = Sampling(max_new_tokens=5)
    build_groups(config, ToyTokenizer(), PolicyUse(opened, sampling, score=score), Run(workers=1))
    return prefix


@pytest.mark.parametrize(
    ("negatives", "options", "message"),
    [
        ("an=2", {}, "the logits of broken are NaN or infinite, so nothing can be drawn from it"),
        ("mn=2", {}, "the logits of broken are NaN or infinite, so nothing can be drawn from it"),
        ("pss=2", {}, "the logits of broken are NaN or infinite, so nothing can be drawn from it"),
        ("tn=2", {"score": True}, "the log-prob of candidate 0 is nan under broken, not a finite"),
        ("tn=2", {"ranker": "policy"}, "the similarity to y_1 of candidate 1 is nan under broken"),
    ],
)
def test_a_policy_whose_weights_are_none_is_refused(
    tmp_path: Path, broken: str, negatives: str, options: dict, message: str
) -> None:
    """And no store is written; run again it is refused again."""
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^record 0: {message}.*check that model, or run it"):
            build(tmp_path, broken, negatives, **options)
    assert not list((tmp_path / "out").glob("groups.*n"))


def test_scoring_a_store_under_such_a_policy_is_refused(tmp_path: Path, broken: str) -> None:
    prefix = build(tmp_path, broken, "tn=2")
    use = PolicyUse(partial(HuggingFacePolicy, broken, ToyTokenizer()), score=True)
    with pytest.raises(ValueError, match=r"^group 0: the log-prob of candidate 0 is nan under br"):
        rescore(prefix, ToyTokenizer(), use, Run(workers=1))
    assert GroupReader(prefix).manifest["reference"] is None


@pytest.mark.parametrize("bad", BAD)
def test_a_ranking_that_is_none_is_refused(tmp_path: Path, bad: float) -> None:
    borders = [Border(str(i), str(i), ending=(99,)) for i in (3, 5, 7)]
    records = [Pair([1, 2], [i, i + 1, 99], (), b) for i, b in zip((3, 5, 7), borders, strict=True)]
    pairs = write_pairs(records, str(tmp_path / "pairs"))

    def similarity(candidates: Any) -> list[np.ndarray]:
        found = [np.full(len(group), 0.5, dtype=np.float32) for group in candidates]
        found[1][2] = bad
        return found

    recipe = Recipe(
        answers=Answers(pairs), mix={"tn": 2}, seed=1, eod=99, max_length=None,
        samplers={"tn": in_blocks(NEGATIVES["tn"])}, similarity=similarity, score=None,
        ranker="minilm",
    )  # fmt: skip
    message = f"^record 1: the similarity to y_1 of candidate 2 is {bad} under minilm, not a fin"
    with pytest.raises(ValueError, match=message):
        make_block(range(3), recipe)


def test_what_goes_into_a_store_is_looked_at() -> None:
    """The last place that all groups pass; log-probs that are all NaN are not there yet."""
    group = random_group(np.random.default_rng(0), K)
    for token in (VOCAB_SIZE + 1, 70_000, -1):
        group.candidates[2][0], before = token, group.candidates[2][0]
        with pytest.raises(ValueError, match=rf"^group 8: token id {token} is outside the vocab"):
            pack_groups([random_group(np.random.default_rng(1), K), group], VOCAB_SIZE + 1, 7)
        group.candidates[2][0] = before
    for bad in BAD:
        group.similarities[2], before = bad, group.similarities[2]
        with pytest.raises(
            ValueError, match=f"^group 0: the similarity to y_1 of candidate 2 is {bad}"
        ):
            pack_groups([group], VOCAB_SIZE + 1)
        group.similarities[2] = before
    group.reference_logps[:] = math.nan
    pack_groups([group], VOCAB_SIZE + 1)
    group.reference_logps[0] = -3.0
    with pytest.raises(ValueError, match=r"^group 0: the log-prob of candidate 1 is nan under th"):
        pack_groups([group], VOCAB_SIZE + 1)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return write_store(tmp_path / "groups", GROUPS, K)


@pytest.mark.parametrize("bad", BAD)
def test_log_probs_that_are_none_are_not_written(store: str, bad: float) -> None:
    before = Path(f"{store}.json").read_bytes()
    logps = np.full((GROUPS, K), -1.0, dtype=np.float32)
    logps[7, 3] = bad
    with pytest.raises(ValueError, match=f"^group 7: the log-prob of candidate 3 is {bad} under m"):
        write_reference_logps(store, logps, {"name": "mle"})
    assert Path(f"{store}.json").read_bytes() == before


def test_json_has_no_number_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for bad in BAD:
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"mean": [1.0, bad]})
        assert not list(tmp_path.iterdir())
    write_json(path, {"mean": 1.0})
    assert json.loads(path.read_text()) == {"mean": 1.0}


def change(store: str, group: int, row: str, place: int, value: float) -> None:
    """Put another number into a store's values, behind its manifest's back."""
    values = np.memmap(f"{store}.values.bin", dtype=np.float32, mode="r+")
    values[group * (4 * K + 2) + VALUE_ROWS.index(row) * K + place] = value
    values.flush()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("group", "row", "place"),
    [(0, "kinds", 0), (3, "similarities", 2), (5, "ranks", 4), (7, "reference_logps", 1),
     (GROUPS - 1, "sizes", 1)],
)  # fmt: skip
def test_a_store_is_looked_through(
    store: str, group: int, row: str, place: int, bad: float
) -> None:
    check_contents(GroupReader(store), VOCAB_SIZE + 1)
    change(store, group, row, place, bad)
    message = f"^group {group} of {store}: {row} of candidate {place} is {bad}, not a finite number"
    with pytest.raises(ValueError, match=message):
        check_contents(GroupReader(store), VOCAB_SIZE + 1)


def write_token(store: str, group: int, token: int) -> None:
    """Make the first token of a group's prefix another."""
    reader = GroupReader(store)
    places = (reader.locate("", place)[0] for place in range(10_000))
    tokens = np.memmap(f"{store}.bin", dtype=reader.numbers("").dtype, mode="r+")
    tokens[next(place for place, found in enumerate(places) if found == group)] = token
    tokens.flush()


def test_an_id_that_no_token_has_is_found(store: str) -> None:
    check_contents(GroupReader(store), VOCAB_SIZE + 1)
    with pytest.raises(
        ValueError, match=rf"token id \d+ is outside the vocabulary of {VOCAB_SIZE}"
    ):
        check_contents(GroupReader(store), VOCAB_SIZE)  # EOD is none then
    write_token(store, 9, 4000)
    with pytest.raises(
        ValueError, match=f"^group 9 of {store}: token id 4000 is outside the vocab"
    ):
        check_contents(GroupReader(store), VOCAB_SIZE + 1)


def test_of_a_large_store_each_rank_looks_at_a_share(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together at all of it, as far as the bytes go that each may look at."""
    change(store, 7, "reference_logps", 1, math.nan)
    size = Path(f"{store}.values.bin").stat().st_size
    refused = []
    monkeypatch.setattr(damage, "LOOKED_AT", size // 4)
    for rank in range(4):
        try:
            check_contents(GroupReader(store), VOCAB_SIZE + 1, rank, 4)
        except ValueError:
            refused.append(rank)
    assert refused == [7 * 4 // GROUPS]
    monkeypatch.setattr(damage, "LOOKED_AT", 400)
    check_contents(GroupReader(store), VOCAB_SIZE + 1, 0, 1)  # group 7 is further on


def test_a_row_is_looked_at_when_it_is_read(store: str) -> None:
    """As training does; scoring has no log-probs to look at."""

    def read_row_of(group: int, **options: Any) -> Any:
        config = RowConfig(160, K, vocab_size=VOCAB_SIZE + 1, **options)
        rows = GroupDataset(GroupReader(store), config, rows=None, shuffle=False)
        [row] = [row for row in range(len(rows)) if group in rows.group_indices(row)]
        return rows[row]

    change(store, 7, "reference_logps", 1, math.nan)
    message = f"^group 7 of {store}: the log-prob of candidate 1 is nan under its reference, not a"
    with pytest.raises(ValueError, match=message):
        read_row_of(7, scored=True)
    assert 7 in read_row_of(7)["group_indices"]
    write_token(store, 9, 4000)
    message = f"^group 9 of {store}: token id 4000 is outside the vocabulary of 500 tokens"
    with pytest.raises(ValueError, match=message):
        read_row_of(9)


def test_a_plain_row_is_looked_at_when_it_is_read(store: str) -> None:
    """--data-path of another tokenizer, in late pretraining."""
    config = RowConfig(160, K, vocab_size=VOCAB_SIZE + 1, scored=True)
    groups = GroupDataset(GroupReader(store), config, rows=9)
    ids = np.arange(80) + 450
    sample = {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": np.ones(79)}
    rows = MixedDataset(groups, [sample] * 40, 79, 0.5, 9)
    [row] = np.flatnonzero(rows.groups_per_row == 0)[:1]
    with pytest.raises(ValueError, match="sample 0 of --data-path: token id 500 is outside the vo"):
        rows[int(row)]


TRAIN = (
    "--seq-length 256 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --log-interval 1 "
    "--eval-iters 0 --eval-interval 1000 --split 1,0,0 --ckpt-format torch_dist"
).split()


def test_a_checkpoint_whose_weights_are_none(tmp_path: Path, store: str) -> None:
    """Scoring, drawing and training under Megatron: each names it."""
    cpo = ["--cpo-aux-loss", "--cpo-no-warmup", "--cpo-k", str(K), "--cpo-data-path", store]
    save = str(tmp_path / "mle")
    run = ["--train-iters", "1", "--save", save, "--save-interval", "1"]
    run_pretrain([*MODEL, *TRAIN, *cpo, *run], 1)
    [piece] = open_checkpoint(Path(save)).tensors["decoder.final_layernorm.weight"].pieces
    content = bytearray(piece.path.read_bytes())
    content[piece.start : piece.start + 4] = np.float32(math.nan).tobytes()
    piece.path.write_bytes(content)
    model = [*MODEL, "--load", save, "--seq-length", "256", "--micro-batch-size", "1"]

    unscored = write_store(tmp_path / "unscored", 4, K, scored=False)
    flags = ["--score-only", "--output-prefix", unscored]
    flags += ["--tensor-model-parallel-size", "2"]
    message = "group 0: the log-prob of candidate 0 is nan under mle iteration 1, not a finite"
    with pytest.raises(Exception, match=message):
        run_pretrain([*model, *flags], 2, script="tools/build_negatives.py")

    records = write_jsonl(tmp_path / "r.jsonl", {"prompt": "1 2", "completion": "3 4 5"})
    flags = ["--input", records, "--output-prefix", str(tmp_path / "drawn"), "--negatives", "an=2"]
    message = "record 0: the logits of mle iteration 1 are NaN or infinite, so nothing can be drawn"
    with pytest.raises(Exception, match=message):
        run_pretrain([*model, *flags], 1, script="tools/build_negatives.py")

    message = r"the first CPO loss is nan: the policy's log-probs of group \d+.* of the store are N"
    with pytest.raises(ValueError, match=message):
        run_pretrain([*MODEL, *TRAIN, *cpo, "--load", save, "--finetune", "--train-iters", "2"], 1)


def test_a_loss_that_diverges_names_the_groups(tmp_path: Path, store: str) -> None:
    """Later than the first iteration Megatron looks, and repeats the iteration before it ends."""
    flags = ["--cpo-aux-loss", "--cpo-no-warmup", "--cpo-k", str(K), "--cpo-data-path", store]
    flags += ["--train-iters", "3"]
    flags += ["--lr", "1e30", "--clip-grad", "0", "--save", str(tmp_path / "cpo")]
    with pytest.raises(RuntimeError, match="exited with 16") as error:  # to look on another GPU
        run_pretrain([*MODEL, *TRAIN, *flags, "--save-interval", "9"], 1)
    notes = "".join(error.value.__notes__)
    assert re.search(
        r"megatron_cpo: CPO loss nan: the policy's log-probs of group \d+.* of the store", notes
    )
