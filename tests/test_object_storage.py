"""Stores in object storage: the same groups; what is changed, lost or absent is said."""

import argparse
import json
import re
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from harness.ranks import run_pretrain
from harness.stores import VOCAB_SIZE, write_store
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.building.flags import add_build_arguments, run_from_args
from megatron_cpo.files import make_folder, write_whole
from megatron_cpo.groups.damage import check_contents
from megatron_cpo.groups.publishing import publish
from megatron_cpo.groups.store import FILES, GroupReader
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.writer import Writer
from megatron_cpo.records.source import Source
from megatron_cpo.scoring.under_policy import rescore
from megatron_cpo.storage import blocks, copies, remote
from megatron_cpo.work.job import Run
from tests.commands import run_command
from tests.object_storage import BUCKET, Server, answering
from tests.runs import CPO, MODEL, cpo_curves
from tests.texts import ToyTokenizer, dolly_tokenizer, write_jsonl
from tests.tiny_models import save_hugging_face
from tests.writer_server import served

K, GROUPS = 5, 60
URL = f"s3://{BUCKET}/groups"
OBJECTS = sorted(f"groups{suffix}" for suffix in (*FILES, ".blocks", ".json"))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return write_store(tmp_path_factory.mktemp("store") / "groups", GROUPS, K, longest=16)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Path:
    """What the server begins with after each start."""
    return tmp_path_factory.mktemp("bucket")


@pytest.fixture(scope="module")
def server(bucket: Path):
    running = Server(bucket)
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def surroundings(server: Server, tmp_path, monkeypatch) -> None:
    """A machine that knows the server and has kept nothing; small blocks; no waiting."""
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(copies.VARIABLE, str(tmp_path / "kept"))
    monkeypatch.setattr(blocks, "BLOCK", 2048)
    monkeypatch.setattr(remote, "PART", 1024)
    monkeypatch.setattr(remote, "DELAYS", (0.01, 0.01))
    remote._objects.cache_clear()
    client = server.client
    for name in server.names():
        client.delete_object(Bucket=BUCKET, Key=name)


def assert_same(found: GroupReader, expected: GroupReader) -> None:
    assert len(found) == len(expected)
    for index in np.random.default_rng(0).permutation(len(found)):
        ours, theirs = found[index], expected[index]
        assert [c.tolist() for c in ours.candidates] == [c.tolist() for c in theirs.candidates]
        for name in ("prefix", "kinds", "similarities", "ranks", "reference_logps"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_groups_are_those_of_the_store_here(store: str, server: Server, tmp_path) -> None:
    """Read in any order, and by Megatron's own reader; looked at before training, verified."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.object_storage_utils import ObjectStorageConfig

    assert publish(store, URL)
    assert server.names() == OBJECTS
    here, there = GroupReader(store), GroupReader(URL)
    assert_same(there, here)
    np.testing.assert_array_equal(there.tree_sizes(), here.tree_sizes())
    check_contents(there, VOCAB_SIZE + 1)
    there.verify()
    config = ObjectStorageConfig(str(tmp_path / "theirs"))
    theirs = IndexedDataset(URL, mmap=False, object_storage_config=config)
    mapped = IndexedDataset(store)
    assert theirs[7].tolist() == mapped[7].tolist()
    assert not publish(store, URL)  # it is there


def test_each_block_comes_once(store: str, server: Server) -> None:
    """What was read is here: with the manifest alone left there, groups are read again."""
    publish(store, URL)
    first = GroupReader(URL)
    groups = [first[index] for index in range(GROUPS)]
    second = GroupReader(URL)
    server.client.delete_object(Bucket=BUCKET, Key="groups.bin")
    assert second[3].prefix.tolist() == groups[3].prefix.tolist()


def test_a_copy_that_is_cut_off_is_refused(store: str, tmp_path) -> None:
    """As by a file system that forgets; without it, it is fetched again."""
    publish(store, URL)
    groups = [GroupReader(URL)[index].tokens.tolist() for index in range(GROUPS)]
    [folder] = (tmp_path / "kept").glob("tokens-*")
    (folder / "00000000").write_bytes(b"")
    with pytest.raises(ValueError, match="00000000: this copy has 0 bytes: remove it, and start"):
        GroupReader(URL)[0]
    (folder / "00000000").unlink()
    assert GroupReader(URL)[0].tokens.tolist() == groups[0]


def test_a_store_copied_by_other_means(store: str, server: Server, tmp_path) -> None:
    """Without digests of blocks its tokens come as a whole, and are compared as a whole."""
    for suffix in (*FILES, ".json"):
        server.put(f"groups{suffix}", Path(store + suffix).read_bytes())
    assert_same(GroupReader(URL), GroupReader(store))
    shutil.rmtree(tmp_path / "kept")
    content = bytearray(server.get("groups.bin"))
    content[5000] ^= 1
    server.put("groups.bin", bytes(content))
    with pytest.raises(ValueError, match=r"groups\.bin: sha256 \w+, its manifest says \w+: it was"):
        GroupReader(URL)


@pytest.mark.parametrize("suffix", [".bin", *FILES[1:], ".blocks"])
def test_a_changed_byte_is_refused(store: str, server: Server, suffix: str) -> None:
    """Wherever it is, by the time that something of it is used, and again the next time."""
    publish(store, URL)
    content = bytearray(server.get(f"groups{suffix}"))
    content[len(content) // 2] ^= 1
    server.put(f"groups{suffix}", bytes(content))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"groups\{suffix}: sha256 .* changed or damaged"):
            [GroupReader(URL)[index] for index in range(GROUPS)]


@pytest.mark.parametrize("suffix", [*FILES, ".json", ".blocks"])
def test_what_is_not_there_is_named(store: str, server: Server, suffix: str) -> None:
    publish(store, URL)
    server.client.delete_object(Bucket=BUCKET, Key=f"groups{suffix}")
    said = rf"^s3://data/groups\{suffix}: (no manifest there|missing|there is no such object)"
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        GroupReader(URL)


def test_a_part_of_a_file_is_refused_by_its_size(store: str, server: Server) -> None:
    publish(store, URL)
    server.put("groups.bin", server.get("groups.bin")[:-4])
    with pytest.raises(ValueError, match=r"groups\.bin: \d+ bytes, its manifest says \d+ bytes"):
        GroupReader(URL)


def test_an_object_that_is_replaced_while_it_is_read(store: str, server: Server, tmp_path) -> None:
    """By another store of the same size: refused at the first block of it."""
    publish(store, URL)
    reader = GroupReader(URL)
    other = np.fromfile(f"{store}.bin", dtype=np.uint16)[::-1]
    server.put("groups.bin", other.tobytes())
    with pytest.raises(ValueError, match=r"groups\.bin: sha256 of bytes 0 to 2048 is"):
        reader[0]


@pytest.mark.parametrize("done", [0, 2, 5])
def test_a_publication_that_is_cut_off_is_no_store(
    store: str, server: Server, monkeypatch, done: int
) -> None:
    """After any number of objects; the same call then ends it, over another store as well."""
    publish(write_store(Path(store).with_name("other"), 9, K), URL)
    upload, write, left = remote.upload, remote.write, iter(range(done))

    def cut(call):
        def counted(*args):
            if next(left, None) is None:
                raise KeyboardInterrupt
            call(*args)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr(remote, "upload", cut(upload))
        patched.setattr(remote, "write", cut(write))
        with pytest.raises(KeyboardInterrupt):
            publish(store, URL, replace=True)
    with pytest.raises(ValueError, match=r"groups\.json: no manifest there"):
        GroupReader(URL)
    assert publish(store, URL)
    assert_same(GroupReader(URL), GroupReader(store))


def test_another_store_is_replaced_when_asked(store: str, tmp_path, monkeypatch, capsys) -> None:
    for said in ("published", "it is there already"):
        assert run_command(monkeypatch, "publish", store, URL) == 0
        assert capsys.readouterr().out == f"{URL}: {said}\n"
    other = write_store(tmp_path / "other", 9, K)
    with pytest.raises(ValueError, match=r"another store is there, of tokens \w{12} and 60 groups"):
        publish(other, URL)
    assert run_command(monkeypatch, "publish", other, URL, "--replace") == 0
    assert len(GroupReader(URL)) == 9


@pytest.mark.parametrize("suffix", [".values.bin", ".blocks"])
def test_what_is_lost_or_damaged_there_is_published_again(
    store: str, server: Server, suffix: str
) -> None:
    """What is missing or cut off shows by itself, changed bytes only to who says --replace."""
    publish(store, URL)
    whole = server.get(f"groups{suffix}")
    server.put(f"groups{suffix}", whole[:-1])
    assert publish(store, URL) and server.get(f"groups{suffix}") == whole
    server.client.delete_object(Bucket=BUCKET, Key=f"groups{suffix}")
    assert publish(store, URL) and server.get(f"groups{suffix}") == whole
    server.put(f"groups{suffix}", whole[:-1] + b"?")
    with pytest.raises(ValueError, match="publish the store again with --replace"):
        GroupReader(URL)
    assert not publish(store, URL)
    assert publish(store, URL, replace=True) and server.get(f"groups{suffix}") == whole
    server.put("groups.json", b"{")
    with pytest.raises(ValueError, match="not the manifest of a group store"):
        publish(store, URL)
    assert publish(store, URL, replace=True)
    assert_same(GroupReader(URL), GroupReader(store))


def test_nothing_else_is_written_there(tmp_path, monkeypatch) -> None:
    """Nor into a folder that is called `s3:`."""
    monkeypatch.chdir(tmp_path)
    for scheme in ("s3", "msc", "gs"):
        with pytest.raises(ValueError, match=f"^{scheme}://data/x.json: only stores of groups are"):
            write_whole(Path(f"{scheme}://data/x.json"), b"{}")
        for call in (make_folder, lambda folder: Writer(("http://a",), "m", answers=str(folder))):
            with pytest.raises(ValueError, match=f"^{scheme}://data/x: only stores of groups are"):
                call(Path(f"{scheme}://data/x"))
    for call in (GroupReader, lambda url: write_store(url, 9, K)):
        with pytest.raises(ValueError, match=r"^gs://data/x\S*: stores are at s3://BUCKET"):
            call("gs://data/x")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_store_is_not_published(store: str, server: Server, tmp_path) -> None:
    for suffix in (*FILES, ".json"):
        shutil.copy(store + suffix, tmp_path / f"groups{suffix}")
    with (tmp_path / "groups.bin").open("r+b") as file:
        file.write(b"\x07\x07")
    with pytest.raises(ValueError, match=r"groups\.bin: sha256 \w+, its manifest says"):
        publish(str(tmp_path / "groups"), URL)
    assert server.names() == []


def test_a_server_that_comes_back_is_waited_for(
    store: str, server: Server, bucket: Path, monkeypatch, capsys
) -> None:
    """Killed while a store is read; the reader asks again until it is back."""
    publish(store, URL)
    for name in OBJECTS:
        (bucket / name).write_bytes(server.get(name))
    reader = GroupReader(URL)
    groups = [reader[0]]
    server.kill()
    waited = []

    def start_again(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            server.start()

    monkeypatch.setattr(remote.time, "sleep", start_again)
    monkeypatch.setattr(remote, "DELAYS", (1.0, 2.0, 4.0))
    groups += [reader[index] for index in range(1, GROUPS)]
    assert waited == [1, 2]
    here = GroupReader(store)
    assert [g.tokens.tolist() for g in groups] == [here[i].tokens.tolist() for i in range(GROUPS)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"megatron_cpo: {URL}.bin: lost (")
    assert said[0].endswith("trying again in 1 s")


def test_a_server_that_stays_away_is_named(store: str, server: Server, monkeypatch, capsys) -> None:
    """After a bounded number of tries, in one line."""
    publish(store, URL)
    server.kill()
    try:
        assert run_command(monkeypatch, "inspect", URL) == 1
    finally:
        server.start()
    *tries, last = capsys.readouterr().err.splitlines()
    assert len(tries) == 2
    endpoint = re.escape(server.variables["AWS_ENDPOINT_URL"])
    named = rf"megatron-cpo inspect: {URL}.json: {endpoint} did not answer in 3 tries over \d+ s \("
    assert re.match(named, last)


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ("half whole", 2),
        ("503 429 whole", 3),
        ("half 500 half", 3),  # and no more
        ("403", 1),
    ],
)
def test_an_answer_that_is_none_is_asked_for_again(monkeypatch, answers: str, asked: int) -> None:
    """Cut off in its middle, or of a server that is overloaded; what is refused is final."""
    with answering(answers.split(), bytes(range(100))) as (endpoint, requests):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        remote._objects.cache_clear()
        if answers.endswith("whole"):
            assert remote.read(URL, range(100)) == bytes(range(100))
        else:
            said = f"^{URL}: {endpoint} (did not answer in 3 tries|refuses it: Nope, no$)"
            with pytest.raises(OSError, match=said):
                remote.read(URL, range(100))
    assert requests == ["bytes=0-99"] * asked


def test_mistakes_are_one_line(store: str, server: Server, monkeypatch, capsys) -> None:
    """No bucket, no keys, no address, no boto3."""

    def line(*words: str) -> str:
        assert run_command(monkeypatch, *words) == 1
        [said] = capsys.readouterr().err.splitlines()
        return said.removeprefix(f"megatron-cpo {words[0]}: ")

    endpoint, words = re.escape(server.variables["AWS_ENDPOINT_URL"]), ("inspect", URL)
    refused = rf"s3://nowhere/groups\.json: {endpoint} refuses it: NoSuchBucket, The specified"
    assert re.match(refused, line("inspect", "s3://nowhere/groups"))
    assert line("inspect", "s3://data").startswith(
        "s3://data.json: needs a bucket and a name in it"
    )
    for pair in ((store, "groups"), (URL, f"{URL}2")):
        said = line("publish", *pair)
        assert said.startswith(f"publish {' '.join(pair)}: needs the PREFIX of a store on this")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    remote._objects.cache_clear()
    assert line(*words).startswith(f"{URL}.json: Unable to locate credentials")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    remote._objects.cache_clear()
    assert line(*words).startswith("s3://: Invalid endpoint: no address: see AWS_ENDPOINT_URL")
    remote._objects.cache_clear()
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert line(*words).startswith("s3:// needs the package boto3: pip install '.[s3]'")


def test_multi_storage_client(store: str, server: Server, tmp_path, monkeypatch, capsys) -> None:
    """The same by a profile of NVIDIA's client: read, changed, away for good, not installed."""
    place = {"base_path": BUCKET, "endpoint_url": server.variables["AWS_ENDPOINT_URL"]}
    options = place | {"region_name": "us-east-1", "retries": {"total_max_attempts": 1}}
    profiles = {"loopback": {"storage_provider": {"type": "s3", "options": options}}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": profiles}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    url = "msc://loopback/groups"
    with pytest.raises(ValueError, match=f"^{url}.json: no manifest there"):
        GroupReader(url)
    publish(store, url)
    assert server.names() == OBJECTS
    other = write_store(tmp_path / "other", 9, K)
    publish(other, url, replace=True)
    reader = GroupReader(url)
    assert_same(reader, GroupReader(other))
    shutil.rmtree(tmp_path / "kept")
    server.put("groups.bin", bytes(len(server.get("groups.bin"))))
    reader = GroupReader(url)
    with pytest.raises(ValueError, match=rf"{url}\.bin: sha256 of bytes 0 to \d+ is"):
        reader[0]
    server.kill()
    try:
        with pytest.raises(
            OSError, match=rf"^{url}\.bin: the storage of its profile did not answer"
        ):
            reader[0]
    finally:
        server.start()
    assert f"{url}.bin: lost (" in capsys.readouterr().err
    remote._objects.cache_clear()
    monkeypatch.setitem(sys.modules, "multistorageclient", None)
    with pytest.raises(ValueError, match=r"^msc:// needs the package multistorageclient"):
        GroupReader(url)


def test_written_answers_are_kept_on_this_machine(server: Server, tmp_path, monkeypatch) -> None:
    """With the work, and not in a folder named `s3:`; the store gone, none is paid for again."""
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(
        tmp_path / "r.jsonl", *({"prompt": f"Why {i}?", "completion": "So."} for i in range(6))
    )
    tokenizer = dolly_tokenizer(tmp_path)
    with served() as url:
        writer = Writer((url,), "writer")
        config = BuildConfig(Source((path,)), URL, negatives="written=1", writer=writer)
        build_groups(config, tokenizer)
        assert server.names() == OBJECTS
        answers = list((tmp_path / "kept").rglob("answers.jsonl"))
        assert [file.read_text().count("\n") for file in answers] == [6]
        assert not list(tmp_path.glob("s3:*"))
    build_groups(config, tokenizer)  # it is there: nobody has to answer
    for name in server.names():
        server.client.delete_object(Bucket=BUCKET, Key=name)
    with served() as url:
        writer = Writer((url,), "writer")
        build_groups(
            BuildConfig(Source((path,)), URL, negatives="written=1", writer=writer), tokenizer
        )
        with urllib.request.urlopen(f"{url}/asked") as answer:
            assert json.load(answer) == {}
    assert server.names() == OBJECTS


def test_a_build_and_its_scoring_end_there(server: Server, tmp_path, monkeypatch) -> None:
    """In the bytes of one here; what its connection is lost for good of, the next call sends."""
    lines = ({"prompt": f"{i} 1 ", "completion": f"{i} 3 4"} for i in range(70))
    source = Source((write_jsonl(tmp_path / "r.jsonl", *lines),))
    model, asked = save_hugging_face(tmp_path / "model"), []

    def open_policy() -> HuggingFacePolicy:
        asked.append(model)
        return HuggingFacePolicy(model, ToyTokenizer())

    def build(prefix: str) -> None:
        build_groups(BuildConfig(source, prefix, negatives="bn=2,tn=1"), ToyTokenizer())

    def score(prefix: str) -> None:
        rescore(prefix, ToyTokenizer(), PolicyUse(open_policy, score=True), Run(workers=1))

    def lose(file: Path, url: str) -> None:
        raise OSError(f"{url}: lost")

    with pytest.raises(OSError, match=r"^s3://nowhere/groups.* refuses it: NoSuchBucket"):
        build("s3://nowhere/groups")
    assert not (tmp_path / "kept" / "work").exists(), "told after all was built"
    here = str(tmp_path / "out" / "groups")
    for call in (build, score):
        call(here)
        with monkeypatch.context() as patched:
            patched.setattr(remote, "upload", lose)
            with pytest.raises(OSError, match=rf"^{URL}[.values]+bin: lost"):
                call(URL)
        assert "groups.json" not in server.names()
        with monkeypatch.context() as patched:
            patched.setattr(HuggingFacePolicy, "logps", None)
            call(URL)
        assert server.names() == OBJECTS
        for suffix in FILES:
            assert server.get(f"groups{suffix}") == Path(here + suffix).read_bytes()
        theirs = json.loads(server.get("groups.json"))
        del theirs["files"][".blocks"]
        assert theirs == json.loads(Path(here + ".json").read_text())
    assert list((tmp_path / "kept" / "work").iterdir()) == []
    words = f"--input x --output-prefix {URL} --executor ray".split()
    flags = add_build_arguments(argparse.ArgumentParser()).parse_args(words)
    with pytest.raises(ValueError, match=rf"--executor ray --output-prefix {URL}: its nodes need"):
        run_from_args(flags)


def test_training_reads_the_same_batches(store: str, server: Server, tmp_path) -> None:
    """Two ranks, two loading processes each: the losses of a run on files, to the digit."""
    publish(store, URL)
    flags = (
        "--seq-length 256 --micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 0.01 "
        "--lr-decay-style constant --log-interval 1 --eval-iters 1 --eval-interval 1000 "
        "--num-workers 2 --object-storage-cache-path"
    ).split()
    kept = tmp_path / "cache"
    curves = [
        cpo_curves(
            run_pretrain(
                [*MODEL, *CPO, *flags, str(kept), "--cpo-data-path", path],
                world_size=2,
                variables=server.variables,
            )[-1]
        )
        for path in (store, URL)
    ]
    assert len(curves[0]["cpo_loss"]) == 4
    assert curves[1] == curves[0]
    [tokens] = kept.glob("tokens-*")
    bytes_read = json.loads(server.get("groups.json"))["files"][".bin"]["bytes"]
    assert sum(path.stat().st_size for path in tokens.glob("0*")) == bytes_read
