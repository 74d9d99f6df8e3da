"""What --input may name: the same records in every format, and what is refused, by its name."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.groups.store import FILES, read_manifest
from megatron_cpo.records import lines as json_lines
from megatron_cpo.records.columns import Columns
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.inputs import expand, files_of, read_fields
from megatron_cpo.records.lines import Unreadable
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.reading import read_records
from megatron_cpo.records.remedies import FROM_CSV, FROM_TEXT
from megatron_cpo.records.source import Source
from tests.stored_records import CHAT, FORMATS, ROWS, arrow, lines, parquet, save_to_disk, zstd
from tests.texts import ToyTokenizer, write_jsonl

pytest.importorskip("pyarrow")


def read(path, skip=0):
    """All records, and what `advance` was told of."""
    told = []

    def advance(units, read):
        told.append((units, read))

    fields = list(read_fields(expand([str(path)]), advance, skip))
    return fields, told


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_records(tmp_path, kind):
    path = FORMATS[kind](tmp_path, ROWS)
    found, told = read(path)
    assert [fields for _, fields in found] == list(ROWS)
    places = [place for place, _ in found]
    source = Source((str(path),))
    assert len(set(places)) == len(ROWS) or "objects" in kind
    assert all(place.startswith(str(tmp_path)) for place in places)
    assert sum(read for _, read in told) == source.stored_bytes()
    assert min(read for _, read in told) >= 0
    units = sum(units for units, _ in told)
    for skip in range(0, units + 1, 4):  # as a build does that goes on
        rest, told = read(path, skip)
        assert rest == found[len(found) - len(rest) :]
        assert sum(units for units, _ in told) == units
        if units == len(ROWS):
            assert len(rest) == len(ROWS) - skip


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "arr" in kind or "obj" in kind])
@pytest.mark.parametrize("chunk", [1, 2, 50])
def test_json_in_small_windows(tmp_path, monkeypatch, kind, chunk):
    """Wherever the text that was read ends: within a string, an escape, a number, a character."""
    monkeypatch.setattr(json_lines, "CHUNK", chunk)
    path = FORMATS[kind](tmp_path, ROWS[:7])
    assert [fields for _, fields in read(path)[0]] == list(ROWS[:7])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        # A bad line costs itself, also where it is the first one.
        (b'{"a": 1}\n{"a": \n{"a": 2}', [{"a": 1}, "not JSON", {"a": 2}]),
        (b'{"a": \n{"a": 1}\n{"a": 2}', ["not JSON", {"a": 1}, {"a": 2}]),
        (b'{"a": "x\n{"a": 1}\n{"a": 2}', ["not JSON", {"a": 1}, {"a": 2}]),
        (b'{"a": oh}\n{"a": 1}\n', ["not JSON", {"a": 1}]),
        (b'# made by\n{"a": 1}\n', ["not JSON", {"a": 1}]),
        (b'"a"\n{"a": 1}\n', ["not a JSON object", {"a": 1}]),
        (b'{"a": 1}\n["a"]\n', [{"a": 1}, "not a JSON object"]),
        (b'{"a": 1}\n{"a": "\xff"}\n', [{"a": 1}, "not UTF-8"]),
        (b'{\n "a": 1\n}\n{\n "a": oh\n}\n{\n "a": 2\n}', [{"a": 1}, "not JSON", {"a": 2}]),
        (b'{\n "a": 1\n}\n{\n "a": "', [{"a": 1}, "not JSON"]),
        (b'[1, "a", null, [{"a": 1}], {"a": 2}]', [*["not a JSON object"] * 4, {"a": 2}]),
        (b"[]", []),
        (b"[\n]\n", []),
        (b"", []),
        (b"\n \n", []),
        (b'[{"a": 1},]', [{"a": 1}]),
        (b'{"a": 1}garbage\n{"a": 2}', ["not JSON", {"a": 2}]),
        (b'{"a": ' + b"9" * 5000 + b'}\n{"a": 2}', ["not JSON", {"a": 2}]),
        (b'{"a": ' + b"[" * 100_000 + b'\n{"a": 2}', ["not JSON", {"a": 2}]),
        (b'{\n"a": ' + b"9" * 5000 + b'\n}\n{"a": 2}', ["not JSON", {"a": 2}]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_bad_json(tmp_path, monkeypatch, content, found, chunk):
    monkeypatch.setattr(json_lines, "CHUNK", chunk)
    (tmp_path / "a.json").write_bytes(content)
    records, _ = read(tmp_path / "a.json")
    assert [fields for _, fields in records] == found
    assert all(isinstance(f, Unreadable) == isinstance(f, str) for _, f in records)


def test_an_array_of_one_line_is_never_held(tmp_path):
    """8 MB, packed to little; and places, which are those that jq shows."""
    row = {"text": "word " * 4000}
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps([row] * 400).encode(), 1))
    tracemalloc.start()
    places = [place for place, _ in read_fields([f"{tmp_path}/a.json.gz"], lambda *_: 0, 0)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert places[-1] == f"{tmp_path}/a.json.gz[399]"
    assert peak < 5 << 20


def test_an_object_longer_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 50)
    monkeypatch.setattr(json_lines, "CHUNK", 10)
    long = {"text": "a" * 100}
    (tmp_path / "a.json").write_bytes(lines([{"a": 1}, long, {"a": 2}], indent=1))
    assert [fields for _, fields in read(tmp_path / "a.json")[0]] == [
        {"a": 1},
        "object longer than 0 MiB",
        {"a": 2},
    ]
    (tmp_path / "b.json").write_bytes(json.dumps([{"a": 1}, long]).encode())
    with pytest.raises(ValueError, match=r"b\.json: item 1 of its array, line 1: object longer"):
        read(tmp_path / "b.json")


@pytest.mark.parametrize("kind", ["Parquet", "Arrow file", "Arrow stream"])
def test_tables_are_never_held(tmp_path, kind):
    """One row group or 40 record batches of 20 MB in all; a page of Parquet has 1,024 rows."""
    import pyarrow

    rows = [{"text": os.urandom(1000).hex()} for _ in range(10_000)]
    if kind == "Parquet":
        path = parquet(tmp_path, rows, group=len(rows))
    else:
        path = arrow(tmp_path / "a", rows, stream=kind == "Arrow stream", batch=250)
    before, most, found = pyarrow.total_allocated_bytes(), 0, 0
    for found, _ in enumerate(read_fields([str(path)], lambda *_: 0, 0), 1):  # noqa: B007
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert found == 10_000
    assert most < 6 << 20


def test_rows_of_tables_mean_what_their_objects_do(tmp_path):
    """Null is no field, within objects too; objects of unlike fields are stored as their JSON."""
    import pyarrow

    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [
        {"messages": CHAT, "tools": None},
        {"messages": [CHAT[0], call, CHAT[1]], "tools": [{"name": "f"}]},
        {"text": "t"},
    ]
    path = parquet(tmp_path, rows)
    records, dropped = list(read_records([str(path)], Dropped())), Dropped()
    expected = list(read_records([write_jsonl(tmp_path / "r.jsonl", *rows)], dropped))
    assert [(r.prefix, r.continuation) for r in records] == [
        (r.prefix, r.continuation) for r in expected
    ]
    assert read(path)[0][1][1]["messages"] == rows[1]["messages"]
    stored = pyarrow.array([json.dumps(m) for m in rows[1]["messages"]], pyarrow.json_())
    column = pyarrow.ListArray.from_arrays([0, 3], stored)
    arrow_file = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(
        str(arrow_file), pyarrow.schema({"messages": column.type})
    ) as writer:
        writer.write_batch(pyarrow.record_batch({"messages": column}))
    assert read(arrow_file)[0] == [(f"{arrow_file}:row 0", {"messages": rows[1]["messages"]})]


def test_columns_of_other_types(tmp_path):
    """Categories, large strings and bytes are text; numbers are not."""
    import pyarrow.parquet

    columns = {
        "a": pyarrow.array(["x", "y"]).dictionary_encode(),
        "b": pyarrow.array(["x", "y"], pyarrow.large_string()),
        "c": pyarrow.array([b"x", b"\xff"]),
        "d": pyarrow.array([1, None]),
        "e": pyarrow.array([["x"], []], pyarrow.large_list(pyarrow.large_string())),
        "f": pyarrow.array([{"g": "x", "h": None}, None]),
    }
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert [fields for _, fields in read(path)[0]] == [
        {"a": "x", "b": "x", "c": "x", "d": 1, "e": ["x"], "f": {"g": "x"}},
        {"a": "y", "b": "y", "c": "\udcff", "d": None, "e": [], "f": None},
    ]
    dropped = Dropped()
    assert len(list(read_records([str(path)], dropped, columns=Columns((("text", "c"),))))) == 1
    assert dropped.counts == {"not UTF-8": 1}


@pytest.mark.parametrize("rows", [[], [{"text": "a"}][:0]])
def test_tables_without_rows(tmp_path, rows):
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array(rows, "string")}), tmp_path / "r"
    )
    with pytest.raises(ValueError, match=r"no usable record .dropped: none.; give data"):
        list(read_records([str(tmp_path / "r")], Dropped()))


@pytest.mark.parametrize("kind", ["array, indented", "zstd", "Parquet", "save_to_disk", "pattern"])
def test_a_store_is_that_of_json_lines(tmp_path, kind):
    """Byte for byte, but for the names and digests of what it was made of."""
    rows = [{"prompt": str(i), "completion": f"{i} {i + 1} 3 4"} for i in range(20)]
    rows[3:3] = [{"prompt": "1"}, {"prompt": "1", "completion": " "}]
    stores = {}
    for name in ("JSON Lines", kind):
        (tmp_path / name).mkdir()
        path = FORMATS[name](tmp_path / name, rows)
        prefix = tmp_path / name / "out" / "groups"
        build_groups(
            BuildConfig(Source((str(path),)), str(prefix), negatives="bn=2,tn=2"), ToyTokenizer()
        )
        manifest = read_manifest(str(prefix))
        source = manifest.pop("source")
        assert [Path(file["name"]).is_absolute() for file in source] == [False] * len(source)
        stores[name] = manifest, [Path(f"{prefix}{suffix}").read_bytes() for suffix in FILES]
    assert stores[kind] == stores["JSON Lines"]
    assert sum(stores[kind][0]["dropped"].values()) == 2


def tar(content):
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stored.getvalue()


def zip_archive(content):
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("a.jsonl", content)
    return stored.getvalue()


GOOD = lines(ROWS)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (GOOD.decode().encode("utf-16"), r"not UTF-8 but UTF-16 .*; write it anew with iconv"),
        (GOOD.decode().encode("utf-16-le"), r"not UTF-8 but UTF-16"),
        (GOOD.decode().encode("utf-32"), r"not UTF-8 but UTF-16"),
        (gzip.compress(GOOD.decode().encode("utf-16")), r"UTF-16 or another .* inside gzip"),
        (zip_archive(GOOD), r"a zip archive; unpack it"),
        (tar(GOOD), r"a tar archive; unpack it"),
        (gzip.compress(tar(GOOD)), r"inside gzip: a tar archive; unpack it"),
        (gzip.compress(gzip.compress(GOOD)), r"gzip inside gzip; unpack it"),
        (b"\x04\x22\x4d\x18" + GOOD, r"packed by lz4"),
        (b"\x80\x04\x95 pickled \0\0", r"neither text nor a table"),
        (gzip.compress(GOOD)[:-20], r"not a whole gzip file \(.*\); copy it again"),
        (zstd(GOOD)[:-20], r"not a whole zstd file \(.*\); copy it again"),
        (b"PAR1" + GOOD, r"not a whole Parquet file \(.*\); copy it again"),
        (b"ARROW1\0\0" + GOOD, r"not a whole Arrow file \(.*\); copy it again"),
        (b"\xff\xff\xff\xff" + GOOD, r"not a whole Arrow file \(.*\); copy it again"),
        (json.dumps(ROWS).encode()[:-1], r"its array does not end: the file is cut off"),
        (json.dumps(ROWS).encode()[:-3], r"item 22 of its array, line 1: not JSON; correct it"),
        (json.dumps(ROWS, indent=0).encode().replace(b'"n": 7', b'"n": oh'),
         r"item 7 of its array, line 37: not JSON; correct it"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_its_name(tmp_path, content, match):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--input .*rows\.jsonl.*{match}"):
        read(path)


def test_plain_text_and_csv_are_told_what_makes_json_lines_of_them(tmp_path):
    """And the command does."""
    plain, table = tmp_path / "docs.txt", tmp_path / "qa.csv"
    plain.write_text("One two three.\nFour five six.\n")
    table.write_text('question,answer\n"What, red?"," A ""colour"".\nA line."\n')
    for path in (plain, table):
        said = f"; {FROM_TEXT} makes them of lines of plain text, {FROM_CSV} of CSV"
        with pytest.raises(ValueError, match=re.escape(said)):
            list(read_pairs(Source((str(path),)), ToyTokenizer(), Dropped()))
    command = FROM_CSV.replace("FILE", str(table)).replace("python3", sys.executable)
    made = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(made.stdout) == {"question": "What, red?", "answer": ' A "colour".\nA line.'}


def test_a_parquet_file_that_is_cut_or_damaged(tmp_path):
    path = parquet(tmp_path, ROWS)
    whole = path.read_bytes()
    for content in (whole[:-30], whole[:20] + bytes(200) + whole[220:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"rows\.parquet: not a whole Parquet file"):
            read(path)


def test_paths_that_name_no_file(tmp_path):
    missing = str(tmp_path / "missing")
    for path, match in (
        (missing + "-*.jsonl", r"the pattern matches nothing; give JSON Lines"),
        (missing, r"no such file; give JSON Lines"),
        ("https://example.com/a.jsonl", r"only local files are read; download it first"),
        ("/dev/null", r"not a file on a disk, and inputs are read more than once"),
    ):
        with pytest.raises(ValueError, match=match):
            read(path)
    for suffix, other in ((".bin", ".idx"), (".idx", ".bin")):
        (tmp_path / f"half{suffix}").touch()
        with pytest.raises(ValueError, match=rf"half{suffix} is there, but .*half{other} is not"):
            read(tmp_path / "half")
        (tmp_path / f"half{suffix}").unlink()


def test_folders_that_save_to_disk_did_not_write(tmp_path):
    (tmp_path / "data").mkdir()
    match = r"a folder, but none that save_to_disk wrote"
    with pytest.raises(ValueError, match=match + "$"):
        files_of(str(tmp_path))
    (tmp_path / "state.json").write_text("[]")  # of something else
    (tmp_path / "data" / "train-0.parquet").touch()
    with pytest.raises(ValueError, match=match + rf"; give its files: --input '{tmp_path}/\*/\*.p"):
        files_of(str(tmp_path))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=rf"splits train, test; .*--input {tmp_path}/train"):
        files_of(str(tmp_path))
    saved = save_to_disk(tmp_path, ROWS)
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{}]}))
    with pytest.raises(ValueError, match=r"an old datasets folder, .* save it again"):
        files_of(str(saved))


def test_a_pattern_names_a_dataset_once_and_nothing_that_is_there_literally(tmp_path):
    for name in ("a.bin", "a.idx", "b.bin", "b.idx", "[x]*.jsonl", "c.jsonl"):
        (tmp_path / name).touch()
    found = expand([f"{tmp_path}/*.bin", f"{tmp_path}/?.*", f"{tmp_path}/[x]*.jsonl"])
    assert [Path(path).name for path in found] == ["a", "b", "a", "b", "c.jsonl", "[x]*.jsonl"]
    assert Source((f"{tmp_path}/?.jsonl",)).inputs == (f"{tmp_path}/c.jsonl",)
    by_a_shell = [f"{tmp_path}/{name}" for name in ("a.bin", "a.idx", "b.idx", "c.jsonl")]
    assert expand(by_a_shell) == tuple(by_a_shell[i] for i in (0, 2, 3))
    with pytest.raises(ValueError, match=r"holds token ids and no text"):
        list(read_fields([str(tmp_path / "a")], lambda *_: 0, 0))


@pytest.mark.parametrize("kind", ["Parquet", "Arrow file", "save_to_disk", "zstd"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, kind):
    path = FORMATS[kind](tmp_path, ROWS)
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    message = r"needs the package pyarrow: pip install '\.\[data\]' in a checkout"
    with pytest.raises(ValueError, match=message):
        read(path)


def test_rows_are_not_touched_twice(tmp_path):
    """Skipping leaves whole row groups unread: a damaged one does not matter then."""
    path = parquet(tmp_path, [{"text": os.urandom(2000).hex()} for _ in range(20)], group=10)
    content = bytearray(path.read_bytes())
    content[4:100] = bytes(96)
    path.write_bytes(content)
    assert len(read(path, skip=10)[0]) == 10
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        read(path, skip=9)


def test_places_of_bad_records(tmp_path):
    """As they are told to who looks for them: a line, an item, a row."""
    bad = [{"text": "a"}, {"text": ""}]
    (tmp_path / "a.json").write_text(json.dumps(bad))
    expected = {
        write_jsonl(tmp_path / "a.jsonl", *bad): "a.jsonl:2",
        str(tmp_path / "a.json"): "a.json[1]",
        str(parquet(tmp_path, bad)): "rows.parquet:row 1",
        str(save_to_disk(tmp_path, bad, shards=1)): "data-00000-of-00001.arrow:row 1",
    }
    for path, place in expected.items():
        dropped = Dropped()
        assert len(list(read_records([path], dropped))) == 1
        assert dropped.first["empty continuation"].endswith(place)
    assert np.all([Path(path).exists() for path in expected])
