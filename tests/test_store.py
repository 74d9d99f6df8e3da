"""The group store: what is written comes back, and whatever does not fit together is refused."""

import gc
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from harness.stores import VOCAB_SIZE, random_group
from megatron_cpo.files import aside
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import FILES, Group, GroupReader, no_scores, read_manifest
from megatron_cpo.groups.writing import GroupWriter, finish_publishing, write_reference_logps
from megatron_cpo.tree import build_tree

REFERENCE = {"name": "mle", "iteration": "100", "sha256": "ab" * 32}
VALUES = ("kinds", "similarities", "ranks", "reference_logps")


def make_groups(count: int = 7, seed: int = 0) -> list[Group]:
    """Groups of 1 to 6 candidates."""
    rng = np.random.default_rng(seed)
    return [random_group(rng, 1 + index % 6) for index in range(count)]


def write(prefix: Path, groups: list[Group], vocab_size: int = VOCAB_SIZE + 1) -> str:
    writer = GroupWriter(str(prefix), {"mix": "mixn", "seed": 3}, vocab_size)
    for group in groups:
        writer.add(group)
    writer.close()
    return str(prefix)


def assert_equal(found: Group, expected: Group, but: tuple[str, ...] = ()) -> None:
    assert found.prefix.tolist() == expected.prefix.tolist()
    assert [c.tolist() for c in found.candidates] == [c.tolist() for c in expected.candidates]
    for name in VALUES:
        if name not in but:
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path) -> str:
    return write(tmp_path / "store", make_groups())


def test_round_trip(store: str) -> None:
    groups, reader = make_groups(), GroupReader(store)
    assert len(reader) == len(groups)
    for index in (3, 0, 6, 1, 2, 4, 5):  # in any order
        assert_equal(reader[index], groups[index])
    group = reader[5]
    assert group.prefix.dtype == group.candidates[0].dtype == np.int32
    assert group.similarities.dtype == group.reference_logps.dtype == np.float32
    reader.verify()


def test_values_belong_to_their_group(tmp_path) -> None:
    """Two groups of the same tokens keep their own values, whichever is written first."""
    base = make_groups()[5]
    twins = [
        Group(**{**vars(base), "reference_logps": np.arange(6, dtype=np.float32) + 10 * n})
        for n in range(2)
    ]
    reader = GroupReader(write(tmp_path / "store", [twins[1], twins[0]]))
    assert reader[0].reference_logps.tolist() == [10, 11, 12, 13, 14, 15]
    assert reader[1].reference_logps.tolist() == [0, 1, 2, 3, 4, 5]


def test_groups_outlive_their_reader(store: str) -> None:
    """Megatron unmaps the file when the reader is collected; reading a view then crashes."""
    group = GroupReader(store)[5]
    gc.collect()
    assert_equal(group, make_groups()[5])


@pytest.mark.parametrize("vocab_size", [60_000, 200_000])
def test_token_ids_of_any_size_come_back(tmp_path, vocab_size: int) -> None:
    """Megatron stores uint16 for small vocabularies; both come back as int32."""
    group = make_groups(2)[1]
    group.candidates[0][:2] = vocab_size - 1, 40_000
    reader = GroupReader(write(tmp_path / "store", [group], vocab_size))
    assert reader[0].candidates[0].tolist() == group.candidates[0].tolist()
    assert reader[0].candidates[0].dtype == np.int32


def test_the_manifest_describes_the_store(store: str) -> None:
    groups, manifest = make_groups(), read_manifest(store)
    trees = [build_tree(g.prefix, g.candidates) for g in groups]
    kinds = [KINDS[kind] for group in groups for kind in group.kinds]
    assert manifest["groups"] == 7
    assert manifest["k"] == 6
    assert manifest["mix"] == "mixn"
    assert manifest["seed"] == 3
    assert manifest["reference"] is None
    assert manifest["kinds"] == {kind: kinds.count(kind) for kind in set(kinds)}
    assert manifest["tree_tokens"] == sum(len(tree.tokens) for tree in trees)
    assert manifest["sequence_tokens"] == sum(
        len(group.prefix) + len(candidate) for group in groups for candidate in group.candidates
    )
    assert set(manifest["files"]) == set(FILES)
    for suffix, described in manifest["files"].items():
        content = Path(store + suffix).read_bytes()
        assert described == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def test_the_same_groups_give_the_same_bytes(tmp_path) -> None:
    first, second = (write(tmp_path / name, make_groups()) for name in ("a", "b"))
    for suffix in (*FILES, ".json"):
        assert Path(first + suffix).read_bytes() == Path(second + suffix).read_bytes()


def test_sizes_are_known_without_building_trees(store: str) -> None:
    trees = [build_tree(g.prefix, g.candidates) for g in make_groups()]
    tokens, queries = GroupReader(store).tree_sizes()
    assert tokens.tolist() == [len(tree.tokens) for tree in trees]
    assert queries.tolist() == [len(tree.query_targets) for tree in trees]
    prefix, truth = GroupReader(store).prefix_and_truth_lengths()
    assert prefix.tolist() == [len(g.prefix) for g in make_groups()]
    assert truth.tolist() == [len(g.candidates[0]) for g in make_groups()]


def test_reference_logps_are_replaced_and_nothing_else(store: str) -> None:
    groups = make_groups()
    tokens_before = Path(store + ".bin").read_bytes()
    sizes_before = GroupReader(store).tree_sizes()
    scores = [
        np.linspace(-9, -1, len(g.candidates), dtype=np.float32) - i for i, g in enumerate(groups)
    ]
    write_reference_logps(store, scores, REFERENCE)

    reader = GroupReader(store)
    assert reader.manifest["reference"] == REFERENCE
    assert reader.manifest["mix"] == "mixn"
    for index, group in enumerate(groups):
        assert_equal(reader[index], group, but=("reference_logps",))
        assert reader[index].reference_logps.tolist() == scores[index].tolist()
    assert Path(store + ".bin").read_bytes() == tokens_before
    np.testing.assert_array_equal(reader.tree_sizes(), sizes_before)
    reader.verify()
    assert names(Path(store).parent) == {f"store{suffix}" for suffix in (*FILES, ".json")}


def test_unscored_groups_come_back_as_nan(tmp_path) -> None:
    base = make_groups()[5]
    group = Group(**{**vars(base), "reference_logps": no_scores(6)})
    reader = GroupReader(write(tmp_path / "store", [group]))
    assert np.isnan(reader[0].reference_logps).all()
    assert reader[0].reference_logps.shape == (6,)


def test_scores_for_another_number_of_groups_are_refused(store: str) -> None:
    with pytest.raises(ValueError, match=r"7 groups, 2 were scored"):
        write_reference_logps(store, [g.reference_logps for g in make_groups(2)], REFERENCE)
    assert_equal(GroupReader(store)[6], make_groups()[6])


@pytest.mark.parametrize("name", VALUES)
def test_a_value_per_candidate_is_required(tmp_path, name: str) -> None:
    base = make_groups()[5]
    group = Group(**{**vars(base), name: getattr(base, name)[:5]})
    writer = GroupWriter(str(tmp_path / "store"), {}, VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match=f"group has 6 candidates but 5 {name}"):
        writer.add(group)


def test_a_group_without_a_candidate_is_refused(tmp_path) -> None:
    base, none = make_groups()[0], np.zeros(0)
    group = Group(base.prefix, [], none, none, none, none)
    with pytest.raises(ValueError, match="group has 0 candidates"):
        GroupWriter(str(tmp_path / "store"), {}, VOCAB_SIZE + 1).add(group)


def test_an_empty_store_is_refused_and_leaves_nothing(tmp_path) -> None:
    writer = GroupWriter(str(tmp_path / "store"), {}, VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match=r"store: no group to write"):
        writer.close()
    assert not names(tmp_path)


def test_an_interrupted_writer_leaves_nothing_under_the_prefix(tmp_path) -> None:
    """Neither closed nor aborted: one folder aside, and no store; the next one clears it."""
    writer = GroupWriter(str(tmp_path / "store"), {}, VOCAB_SIZE + 1)
    writer.add(make_groups()[5])
    assert names(tmp_path) == {aside(tmp_path / "store").name}
    with pytest.raises(ValueError, match="no manifest there"):
        GroupReader(str(tmp_path / "store"))
    write(tmp_path / "store", make_groups())
    assert names(tmp_path) == {f"store{suffix}" for suffix in (*FILES, ".json")}


def test_an_interrupted_writer_leaves_the_old_store_as_it_was(tmp_path, store: str) -> None:
    writer = GroupWriter(store, {}, VOCAB_SIZE + 1)
    writer.add(make_groups(1, seed=9)[0])
    writer.abort()
    reader = GroupReader(store)
    reader.verify()
    assert_equal(reader[5], make_groups()[5])
    assert names(tmp_path) == {f"store{suffix}" for suffix in (*FILES, ".json")}


BUILD = [("build", renames) for renames in range(5)]  # four files, then the manifest
SCORE = [("score", renames) for renames in range(3)]  # two files, then the manifest


@pytest.mark.parametrize(("operation", "renames"), BUILD + SCORE)
def test_a_store_is_unreadable_rather_than_mixed_while_it_is_replaced(
    store: str, monkeypatch, operation: str, renames: int
) -> None:
    """Power is cut after so many renames: there is no manifest, so there is no store."""
    replace, done = os.replace, []

    def cut(source: Path, target: str) -> None:
        if Path(target).parent.name == aside(Path(store)).name:  # the seal: decided
            return replace(source, target)
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    scores = [g.reference_logps for g in make_groups()]
    replacing = {
        "build": lambda: write(Path(store), make_groups(3, seed=8)),
        "score": lambda: write_reference_logps(store, scores, REFERENCE),
    }
    with pytest.raises(KeyboardInterrupt):
        replacing[operation]()
    assert len(done) == renames
    with pytest.raises(ValueError, match="no manifest there"):
        GroupReader(store)
    monkeypatch.undo()
    assert finish_publishing(store)
    assert not finish_publishing(store)
    assert names(Path(store).parent) == {f"store{suffix}" for suffix in (*FILES, ".json")}
    reader = GroupReader(store)
    reader.verify()
    assert len(reader) == (3 if operation == "build" else 7)
    assert (reader.manifest["reference"] == REFERENCE) == (operation == "score")


def test_what_an_earlier_release_left_half_moved_is_finished(store: str) -> None:
    """It wrote aside in PREFIX.writing, and moved the manifest out of it last."""
    folder = Path(store + ".writing")
    folder.mkdir()
    for suffix in (".values.idx", ".json"):
        os.replace(store + suffix, folder / f"store{suffix}")
    assert finish_publishing(store)
    GroupReader(store).verify()
    assert names(folder.parent) == {f"store{suffix}" for suffix in (*FILES, ".json")}


def test_replacing_a_store(store: str) -> None:
    write(Path(store), make_groups(3, seed=8))
    reader = GroupReader(store)
    assert len(reader) == 3
    assert_equal(reader[2], make_groups(3, seed=8)[2])
    reader.verify()


def test_a_missing_manifest_is_refused(tmp_path) -> None:
    message = r"nowhere\.json: no manifest there.*megatron-cpo build --output-prefix"
    with pytest.raises(ValueError, match=message):
        GroupReader(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b'{"groups": 3}', b"\xff\xfe\x00"])
def test_what_is_not_a_manifest_is_refused(store: str, content: bytes) -> None:
    Path(store + ".json").write_bytes(content)
    with pytest.raises(ValueError, match=r"store\.json: not the manifest of a group store"):
        GroupReader(store)


def edit_manifest(store: str, **changes: object) -> None:
    path = Path(store + ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_format_version_is_refused(store: str) -> None:
    edit_manifest(store, format_version=99)
    with pytest.raises(ValueError, match=r"format version 99, this release reads 1: rebuild"):
        GroupReader(store)


@pytest.mark.parametrize("suffix", FILES)
def test_a_truncated_file_is_refused(store: str, suffix: str) -> None:
    path = Path(store + suffix)
    size = path.stat().st_size
    os.truncate(path, size - 4)
    message = rf"{suffix}: {size - 4} bytes, its manifest says {size} bytes: .*truncated"
    with pytest.raises(ValueError, match=message):
        GroupReader(store)


@pytest.mark.parametrize("suffix", FILES)
def test_a_missing_file_is_refused(store: str, suffix: str) -> None:
    Path(store + suffix).unlink()
    with pytest.raises(ValueError, match=rf"{suffix}: missing, its manifest says \d+ bytes"):
        GroupReader(store)


@pytest.mark.parametrize("suffix", FILES)
def test_a_damaged_file_is_found_by_verify(store: str, suffix: str) -> None:
    """One bit of a value, or of a length behind an index's header (34 bytes); sizes agree."""
    path = Path(store + suffix)
    content = bytearray(path.read_bytes())
    content[38] ^= 1
    path.write_bytes(content)
    reader = GroupReader(store)
    with pytest.raises(
        ValueError, match=rf"{suffix}: sha256 \w+, its manifest says \w+: .*damaged"
    ):
        reader.verify()


def test_another_number_of_groups_is_refused(store: str) -> None:
    edit_manifest(store, groups=8)
    with pytest.raises(ValueError, match="7 groups, its manifest says 8"):
        GroupReader(store)
