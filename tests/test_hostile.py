"""Hostile files are refused in one line: a short form of `make chaos`, and what that has found."""

import io
import json
import os
import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.stores import write_store
from megatron_cpo.checkpoints.folders import checkpoint_folder
from megatron_cpo.checkpoints.formats.archive import frame
from megatron_cpo.checkpoints.formats.opening import open_checkpoint, open_model
from megatron_cpo.checkpoints.formats.unpickling import unpickle, unpickle_archive
from megatron_cpo.checkpoints.identity import checkpoint_identity
from megatron_cpo.groups.store import FILES, GroupReader
from tests.chaos.hostile import FORK, findings_of, targets
from tests.chaos.mutations import OUTSIDE
from tests.checkpoints import write_pair

CASES = 25


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", ["store", "safetensors", "torch_dist", "records"])
def test_changed_files_open_or_are_refused(inputs, name):
    """Seeded: the same cases in every run."""
    counts, found = findings_of(inputs[name], 7, range(CASES))
    assert found == []
    assert counts["opens"] + counts["refused"] == CASES
    assert counts["refused"] > 2


@pytest.mark.parametrize("name", [f"../{OUTSIDE}", "/etc/hostname", "", "..", 7, "a/b"])
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    """The file is there, and whole; it is none of the model's."""
    mle, _ = write_pair(tmp_path)
    path = mle / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    whole = mle / index["weight_map"]["scale"]
    (tmp_path / OUTSIDE).write_bytes(whole.read_bytes())
    index["weight_map"]["scale"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"hf_mle(/model.*json)? (names .* as a file|is damaged)"):
        open_checkpoint(mle)


@pytest.mark.parametrize("name", [f"../../{OUTSIDE}", f"/tmp/{OUTSIDE}"])
def test_metadata_that_leads_out_of_its_folder(inputs, tmp_path, name):
    """Merging would have written there."""
    folder = copy_of(inputs["torch_dist"].folder, tmp_path / "model")
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    for read in (open_checkpoint, lambda folder: checkpoint_identity(str(folder))):
        with pytest.raises(ValueError, match=r"names .* as a file of its own, which it cannot be"):
            read(folder)


def copy_of(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to))


def take_little(content):
    """In a fork: the pickle must not get more memory than this process has now, and 1 GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os._exit(0 if unpickle(io.BytesIO(content)) is None else 1)


def test_a_pickle_that_asks_for_gigabytes():
    """LONG_BINPUT at 2^29: the unpickler in C makes room for all numbers up to there."""
    process = FORK.Process(target=take_little, args=(b"\x80\x02Nr\xff\xff\xff\x1f.",))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_an_archive_that_grows():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bytes(1 << 20), protocol=2))
    with pytest.raises(ValueError, match=r"data\.pkl is compressed, which torch\.save does not do"):
        unpickle_archive(content.getvalue())
    torch.save({"a": 1}, whole := io.BytesIO())
    assert unpickle_archive(whole.getvalue()) == {"a": 1}


def frame_in_no_room(messages):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        frame(torch.float32, (40, 40))
    except OSError as error:
        messages.put(str(error))


def test_no_room_for_temporary_files():
    """Torch's own error is a RuntimeError of its streams."""
    messages = FORK.SimpleQueue()
    process = FORK.Process(target=frame_in_no_room, args=(messages,))
    process.start()
    process.join()
    assert "torch cannot write there" in messages.get()


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"7"])
def test_json_that_no_parser_likes(tmp_path, content):
    mle, _ = write_pair(tmp_path)
    (mle / "config.json").write_bytes(content)
    for read in (open_checkpoint, open_model):
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read(mle)


@pytest.mark.parametrize("content", [b"\xff\xff", b"../x", b"1_0", "٣".encode(), b"9" * 30])
def test_a_tracker_file_of_something_else(tmp_path, content):
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"latest_checkpointed_iteration\.txt (holds|is damaged)"):
        checkpoint_folder(str(tmp_path))


def test_an_index_of_a_store_that_leads_elsewhere(tmp_path):
    """A length of -1 is "all that is left" to numpy: of a large store, its terabytes."""
    prefix = write_store(tmp_path / "groups", 5, 4)
    for number in (-1, 2**31 - 1):
        index = np.memmap(prefix + ".idx", dtype=np.int32, mode="r+", offset=34, shape=(1,))
        index[0] = number
        index.flush()
        reader = GroupReader(prefix)
        with pytest.raises(ValueError, match=r"group 0 of .* has bytes .* damaged; copy it again"):
            reader[0]
        assert len(reader[1].candidates) == 4


@pytest.mark.parametrize("number", [-3, 2**40])
def test_documents_of_a_store_that_lead_elsewhere(tmp_path, number):
    """What a run asks of a store before its first row: the lengths of its candidates."""
    prefix = write_store(tmp_path / "groups", 5, 4)
    index = np.memmap(prefix + ".idx", dtype=np.uint8, mode="r+")
    index[-6 * 8 :].view(np.int64)[2] = number  # where each of 5 groups begins, and the end
    index.flush()
    reader = GroupReader(prefix)
    for groups in ([1, 3], [0, 2]):
        with pytest.raises(ValueError, match=r"its index leads to place .* copy it again"):
            reader.candidate_lengths(np.array(groups))
    assert (reader.candidate_lengths(np.array([0, 4]))[:, 0] > 0).all()


@pytest.mark.parametrize("suffix", FILES)
def test_a_manifest_that_lacks_a_file(tmp_path, suffix):
    prefix = write_store(tmp_path / "groups", 5, 4)
    manifest = json.loads(Path(prefix + ".json").read_text())
    del manifest["files"][suffix]
    Path(prefix + ".json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not the manifest of a group store"):
        GroupReader(prefix)
