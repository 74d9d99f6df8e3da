"""Building a store, end to end: its content, its bytes, its messages, and what a failure leaves."""

import gzip
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.ranks import ROOT
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.negatives.from_records import NEGATIVES, OWN_PROMPT
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.pair_files import write_lm_dataset
from megatron_cpo.records.pairs import GLUED, UNUSED, read_pairs
from megatron_cpo.records.source import Source
from megatron_cpo.work.executors import run_stage
from megatron_cpo.work.job import Run
from tests.commands import assert_quick, run_command, run_tool, run_tool_here
from tests.texts import DOLLY, ToyTokenizer, dolly_tokenizer, write_jsonl

MAX_LENGTH = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return dolly_tokenizer(folder)


@pytest.fixture(scope="module")
def built(folder, tokenizer):
    """One build of the example data: its config, report and reader."""
    source = Source((DOLLY,), max_length=MAX_LENGTH)
    config = BuildConfig(source, str(folder / "groups"), negatives="bn=3,tn=8", k=12, seed=7)
    report = build_groups(config, tokenizer)
    return config, report, GroupReader(config.output_prefix)


def toy_config(tmp_path, *records, **options):
    """A config over a few records of numbers, for `ToyTokenizer`."""
    records = records or [{"prompt": f"{i} 1 ", "completion": f"{i} 3 4"} for i in range(5)]
    path = write_jsonl(tmp_path / "r.jsonl", *records)
    flags = {k: options.pop(k) for k in ("max_length", "on_bad_record") if k in options}
    return BuildConfig(Source((path,), **flags), str(tmp_path / "out" / "store"), **options)


def test_groups(built, tokenizer):
    _, report, reader = built
    dropped = report.manifest["dropped"]["longer than 256 tokens"]
    assert report.manifest["groups"] == len(reader) == 400 - dropped
    expected = [KINDS.index(kind) for kind in ["gt", *["bn"] * 3, *["tn"] * 8]]
    truths = [reader[i].candidates[0].tobytes() for i in range(len(reader))]
    for index in range(len(reader)):
        group = reader[index]
        truth, *negatives = group.candidates
        assert group.kinds.tolist() == expected
        assert all(c[-1] == tokenizer.eod for c in group.candidates)
        assert all(len(group.prefix) + len(c) <= MAX_LENGTH for c in group.candidates)
        assert sorted(group.ranks) == list(range(12))
        assert group.ranks[0] == 0
        assert group.similarities[0] == 1
        assert np.all(np.diff(group.similarities[np.argsort(group.ranks)]) <= 0)
        assert np.isnan(group.reference_logps).all()
        for bn in negatives[:3]:
            assert bn.tobytes() != truth.tobytes()
            assert bn.tobytes() in truths or len(group.prefix) + len(bn) == MAX_LENGTH
        for tn in negatives[3:]:
            assert len(tn) < len(truth) or len(truth) == 2
            assert tn[:-1].tobytes() == truth[: len(tn) - 1].tobytes()
    # White space at the end of the template belongs to the answer, so all candidates begin with it.
    assert tokenizer.detokenize(reader[0].prefix.tolist()).endswith("Hanged\nResponse:")
    newline = tokenizer.tokenize("\n")[-1]
    assert {int(c[0]) for i in range(len(reader)) for c in reader[i].candidates} == {newline}


def test_manifest(built, tokenizer):
    config, _, reader = built
    manifest = reader.manifest
    expected = {
        "k": 12,
        "groups": len(reader),
        "negatives": {"bn": 3, "tn": 8},
        "order": ["bn", "tn"],
        "seed": 7,
        "ranker": "lexical",
        "embedder": None,
        "policy": None,
        "block_records": 64,
        "max_length": MAX_LENGTH,
        "prefix_fraction": 0.15,
        "format": "auto",
        "prompt_template": "Instruction: {instruction}\nContext: {context}\nResponse:\n",
        "border": "whole-text",
        "control_tokens": "text",
        "endings": [{"ids": [tokenizer.eod], "text": "</s>", "records": len(reader)}],
        "notes": {},
        "dropped": {"longer than 256 tokens": 400 - len(reader)},
        "eod": tokenizer.eod,
        "reference": None,
    }
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["tokenizer"]["vocab_size"] == 1000
    (source,) = manifest["source"]
    assert source["name"] == "dolly-400.jsonl"
    assert source["sha256"] in (ROOT / "examples" / "data" / "README.md").read_text()
    assert str(ROOT) not in Path(config.output_prefix + ".json").read_text()


def test_report(built):
    _, report, reader = built
    groups = [reader[i] for i in range(len(reader))]
    found = report.manifest["statistics"]
    assert report.manifest["kinds"] == {
        "gt": len(groups),
        "bn": 3 * len(groups),
        "tn": 8 * len(groups),
    }
    assert found["prefix_tokens"] == sum(len(g.prefix) for g in groups)
    assert found["truth_tokens"] == sum(len(g.candidates[0]) for g in groups)
    assert found["negative_tokens"] == sum(len(c) for g in groups for c in g.candidates[1:])
    longest = [len(g.prefix) + max(map(len, g.candidates)) for g in groups]
    assert found["padded_tokens"] == 12 * sum(longest)
    truncated = np.concatenate([g.similarities[g.kinds == KINDS.index("tn")] for g in groups])
    assert found["mean_similarity"]["tn"] == pytest.approx(truncated.mean(), rel=1e-5)
    assert found["mean_similarity"]["tn"] > found["mean_similarity"]["bn"] > 0
    repeats = sum(12 - len({c.tobytes() for c in g.candidates}) for g in groups)
    assert found["duplicates"] == repeats > 0
    lines = str(report).splitlines()
    assert lines[0].split() == ["groups", str(len(groups)), "of", "K", "=", "12"]
    times = found["padded_tokens"] / report.manifest["tree_tokens"]
    assert any(line.endswith(f"{times:.1f} times the trees") for line in lines)
    assert any(line.startswith("negatives: tn") for line in lines)
    assert lines[-1].startswith("dropped: longer than 256 tokens")
    assert f"first {DOLLY}:" in lines[-1]


def test_report_says_what_is_noted(tmp_path):
    """Of records, with the first of them, and of negatives: all answer the same prompt here."""
    answers = [{"prompt": "1 ", "chosen": f"{i} 2", "rejected": ["", "3"]} for i in range(4)]
    config = toy_config(tmp_path, *answers, negatives="bn=2,given=1")
    report = build_groups(config, ToyTokenizer())
    noted = {"an empty rejected answer, left out": 4, OWN_PROMPT: 8}
    assert report.manifest["notes"] == noted
    lines = [line for line in str(report).splitlines() if line.startswith("noted: ")]
    assert [line.split("  ")[0].removeprefix("noted: ") for line in lines] == [*noted]
    assert lines[0].endswith(f"4, first {tmp_path}/r.jsonl:1")


def test_prompts_that_run_into_their_answers_and_answers_nobody_uses_are_noted(tmp_path):
    """Both were used without a word."""
    rows = [
        {"prompt": "5 1", "chosen": "2 3 4 5", "rejected": "4"},
        {"prompt": "5 1", "chosen": " 2 3 4 5", "rejected": "4"},
        {"prompt": "5 1 ", "completion": "2 3 4 5"},
        {"prompt": "5 1+", "completion": "2 3 4 5"},
    ]
    report = build_groups(toy_config(tmp_path, *rows, negatives="tn=2"), ToyTokenizer())
    assert report.manifest["notes"] == {UNUSED: 2, GLUED: 1}


SUFFIXES = (".bin", ".idx", ".values.bin", ".values.idx", ".json")


def files_of(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


def test_rebuild_has_the_same_bytes_and_leaves_nothing_else(built, tokenizer, tmp_path):
    """Also from another folder; another seed gives other bytes."""
    config, _, _ = built
    data = tmp_path / "dolly-400.jsonl"
    data.write_bytes(Path(DOLLY).read_bytes())
    source = replace(config.source, inputs=(str(data),))
    build_groups(BuildConfig(source, str(tmp_path / "other"), seed=8), tokenizer)
    build_groups(BuildConfig(source, str(tmp_path / "groups"), seed=7), tokenizer)
    assert files_of(tmp_path / "other")[0] != files_of(config.output_prefix)[0]
    assert files_of(tmp_path / "groups") == files_of(config.output_prefix)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["dolly-400.jsonl", *(f"{name}{s}" for name in ("groups", "other") for s in SUFFIXES)]
    )


def test_compressed_input_gives_the_same_groups(built, tokenizer, tmp_path):
    config, _, reader = built
    data = tmp_path / "d.jsonl.gz"
    data.write_bytes(gzip.compress(Path(DOLLY).read_bytes()))
    source = replace(config.source, inputs=(str(data),))
    build_groups(BuildConfig(source, str(tmp_path / "groups"), seed=7), tokenizer)
    theirs = GroupReader(str(tmp_path / "groups")).manifest
    assert theirs["files"] == reader.manifest["files"]
    assert theirs["source"] != reader.manifest["source"]


def test_more_truncations_leave_the_batch_negatives_alone(tmp_path):
    stores = []
    for name, negatives in {"a": "bn=2", "b": "tn=2,bn=2"}.items():
        config = toy_config(tmp_path, negatives=negatives)
        config = replace(config, output_prefix=str(tmp_path / name))
        build_groups(config, ToyTokenizer())
        stores.append(GroupReader(config.output_prefix))
    for index in range(5):
        few, many = stores[0][index], stores[1][index]
        assert [c.tolist() for c in few.candidates[1:]] == [c.tolist() for c in many.candidates[3:]]


def test_given_negatives(tmp_path):
    records = [{"prompt": "1 ", "chosen": "2", "rejected": [str(i), "8", "9"]} for i in (3, 4)]
    config = toy_config(tmp_path, *records, {"prompt": "1 ", "chosen": "5"}, negatives="given=2")
    report = build_groups(config, ToyTokenizer())
    assert report.manifest["dropped"] == {"fewer than 2 rejected continuations": 1}
    group = GroupReader(config.output_prefix)[1]
    assert [c.tolist() for c in group.candidates] == [[2, 99], [4, 99], [8, 99]]
    assert group.kinds.tolist() == [0, KINDS.index("given"), KINDS.index("given")]


def failing_sampler(context, count, rng):
    if context.index == 3:
        raise RuntimeError("out of luck")
    return [context.truth] * count


def test_a_store_and_a_dataset_of_documents_do_not_take_each_others_place(tmp_path):
    """One PREFIX for tokenize and build lost what came first, and trained on the other."""
    config, tokenizer = toy_config(tmp_path, negatives="bn=2"), ToyTokenizer()
    documents = tmp_path / "out" / "text"
    write_lm_dataset(config.source, tokenizer, str(documents))
    before = documents.with_suffix(".bin").read_bytes()
    same = replace(config, output_prefix=str(documents))
    with pytest.raises(ValueError, match=r"out/text\.bin is there, of a dataset that is no store"):
        build_groups(same, tokenizer)
    assert sorted(os.listdir(documents.parent)) == ["text.bin", "text.idx"]
    assert documents.with_suffix(".bin").read_bytes() == before
    build_groups(config, tokenizer)
    with pytest.raises(ValueError, match="out/store: a store of groups is there, which this"):
        write_lm_dataset(config.source, tokenizer, config.output_prefix)
    groups = Source((config.output_prefix,))
    with pytest.raises(ValueError, match="out/store: a store of groups, whose documents hold all"):
        list(read_pairs(groups, tokenizer, Dropped()))
    write_lm_dataset(config.source, tokenizer, str(documents))  # once more, as ever


def change(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: os.truncate(f"{p}.bin", 4), r"store\.bin: 4 bytes, .* or rebuild .*"),
        (lambda p: os.remove(f"{p}.values.bin"), r"store\.values\.bin: missing, .* or rebuild .*"),
        (lambda p: os.truncate(f"{p}.json", 99), r"store\.json: not the manifest .* rebuild it"),
        (
            lambda p: change(Path(f"{p}.json"), b'"format_version": 1', b'"format_version": 0'),
            r"store\.json: format version 0, .* rebuild the store",
        ),
        (lambda p: change(Path(f"{p}.json"), b'"seed": 1234', b'"seed": 7'), "with seed 7, .*"),
    ],
)
def test_a_store_that_cannot_stay_is_rebuilt_once_its_manifest_is_removed(tmp_path, damage, why):
    """That alone, since PREFIX.* may be the records as well: PREFIX.jsonl."""
    config, tokenizer = toy_config(tmp_path, negatives="bn=2"), ToyTokenizer()
    build_groups(config, tokenizer)
    prefix = Path(config.output_prefix)
    expected = {p: p.read_bytes() for p in prefix.parent.iterdir()}
    damage(prefix)
    with pytest.raises(ValueError, match=rf"{why}[:;] remove \S+/out/store\.json (first|to build)"):
        build_groups(config, tokenizer)
    assert not Path(f"{prefix}.build").exists()
    Path(f"{prefix}.json").unlink()
    build_groups(config, tokenizer)
    assert {p: p.read_bytes() for p in prefix.parent.iterdir()} == expected


def test_a_build_does_not_write_over_its_records(tmp_path):
    config = toy_config(tmp_path, negatives="bn=2")
    [path] = map(Path, config.source.inputs)
    records = path.rename(tmp_path / "data.json")
    over = replace(config, source=Source((str(records),)), output_prefix=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"--output-prefix \S+data\.json: it is read"):
        build_groups(over, ToyTokenizer())
    assert os.listdir(tmp_path) == ["data.json"]


def test_documents_that_are_half_in_place_are_no_dataset(tmp_path, monkeypatch):
    """Cut short between the two files of a dataset that takes the place of another."""
    config, documents = toy_config(tmp_path, negatives="bn=2"), str(tmp_path / "text")
    write_lm_dataset(config.source, ToyTokenizer(), documents)
    other = toy_config(tmp_path, {"prompt": "1 ", "completion": "2 3"}, negatives="bn=2")
    moved = os.replace

    def cut_short(source, target):
        if target.endswith(".idx"):
            raise KeyboardInterrupt
        moved(source, target)

    monkeypatch.setattr(os, "replace", cut_short)
    with pytest.raises(KeyboardInterrupt):
        write_lm_dataset(other.source, ToyTokenizer(), documents)
    assert [path.name for path in tmp_path.glob("text*")] == ["text.bin"]


def test_a_failure_keeps_finished_blocks(tmp_path, monkeypatch):
    """Of five records in blocks of two, two blocks; the same command then builds the others."""
    config = toy_config(tmp_path, negatives="tn=2", block_records=2)
    output = Path(config.output_prefix).parent
    with monkeypatch.context() as patch:
        patch.setitem(NEGATIVES, "tn", failing_sampler)
        with pytest.raises(RuntimeError, match="out of luck"):
            build_groups(config, ToyTokenizer(), run=Run(workers=1))
    assert os.listdir(output) == ["store.build"]
    assert os.listdir(output / "store.build" / "groups") == ["00000000.npz"]
    report = build_groups(config, ToyTokenizer())
    assert report.manifest["groups"] == 5
    assert GroupReader(config.output_prefix)[0].candidates[1].tolist() == [0, 3, 4, 99]  # kept
    assert GroupReader(config.output_prefix)[2].candidates[1].tolist() != [2, 3, 4, 99]
    assert not list(output.glob("store.build*"))


def test_mixes_of_another_order_are_not_mixed(tmp_path):
    """Their candidates lie in another order, although JSON has the same counts of both."""
    config = toy_config(tmp_path, negatives="bn=1,tn=1", block_records=2)
    assert build_groups(config, ToyTokenizer(), run=Run(share=0, shares=2)) is None
    other = replace(config, negatives="tn=1,bn=1")
    with pytest.raises(ValueError, match=r'unfinished work with order \["bn", "tn"\], this comm'):
        build_groups(other, ToyTokenizer())
    build_groups(config, ToyTokenizer())
    with pytest.raises(ValueError, match=r'a store built with order \["bn", "tn"\], this command'):
        build_groups(other, ToyTokenizer())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"negatives": "bn=3", "k": 12}, r"--k 12: --negatives bn=3 makes K = 4 .*leave --k out"),
        ({"negatives": "xn=3"}, r"--negatives xn=3: unknown kind 'xn'"),
        ({"seed": -1}, r"--seed -1: needs a number that is not negative"),
    ],
)
def test_flags_are_refused_before_anything_is_read(options, match):
    with pytest.raises(ValueError, match=match):
        BuildConfig(Source(("missing.jsonl",)), "out", **options)


@pytest.mark.parametrize(
    ("records", "options", "match"),
    [
        ([], {"negatives": "bn=5"}, r"--negatives bn=5: .* of 5 usable records only 4 are others"),
        ([], {"negatives": "MixN"}, r"--negatives mn=5: drawn from a policy; give --load"),
        ([b"x"], {}, r"r\.jsonl: no usable record .dropped: 1 not JSON"),
        ([b"x"], {"on_bad_record": "refuse"}, r"r\.jsonl:1: not JSON; correct this record"),
        ([], {"max_length": 4}, r"no usable record .dropped: 5 longer than 4 tokens"),
        ([], {"negatives": "given=1"}, r"dropped: 5 fewer than 1 rejected continuations"),
    ],
)
def test_data_that_cannot_be_built_from(tmp_path, records, options, match):
    config = toy_config(tmp_path, *records, **options)
    with pytest.raises(ValueError, match=match):
        build_groups(config, ToyTokenizer())
    output = Path(config.output_prefix).parent
    assert not output.exists() or os.listdir(output) == []


def test_commands_build_what_the_library_builds(built, folder, tmp_path, monkeypatch, capsys):
    """Three commands in a row, as the README runs them; the model exists since `built`."""
    _, _, reader = built

    def verb(*words):
        assert run_command(monkeypatch, *map(str, words)) == 0
        return capsys.readouterr().out

    flags = ["--input", DOLLY, "--max-length", MAX_LENGTH]
    model = tmp_path / "tokenizer.model"
    verb("train-tokenizer", *flags, "--output", model, "--vocab-size", 1000)
    assert model.read_bytes() == (folder / "tokenizer.model").read_bytes()
    flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    said = verb("tokenize", *flags, "--output-prefix", tmp_path / "mle")
    assert f"{len(reader)} documents; dropped: {400 - len(reader)} longer" in said
    said = verb("build", *flags, "--output-prefix", tmp_path / "groups", "--k", 12, "--seed", 7)
    assert GroupReader(str(tmp_path / "groups")).manifest == reader.manifest
    assert "of K = 12" in said


def test_tools_say_what_is_wrong_without_a_traceback(tmp_path):
    flags = ["--input", tmp_path / "missing.jsonl", "--output-prefix", tmp_path / "x"]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", 10]
    done = run_tool_here("build_negatives.py", *flags, "--max-position-embeddings", 128)
    assert done.returncode == 1
    assert "build_negatives.py: --input" in done.stderr
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_max_length_is_bounded_by_the_positions_of_the_model():
    import argparse

    from megatron_cpo.records.source import add_source_arguments, source_from_args

    parser = add_source_arguments(argparse.ArgumentParser())
    parser.add_argument("--max-position-embeddings", type=int)

    def length(*flags):
        return source_from_args(parser.parse_args(["--input", "x", *flags])).max_length

    positions = ["--max-position-embeddings", "128"]
    assert length() == 1024
    assert length(*positions) == 128
    assert length(*positions, "--max-length", "64") == 64
    with pytest.raises(ValueError, match=r"--max-length 129: the model has .* 128; give at most"):
        length(*positions, "--max-length", "129")


@pytest.mark.parametrize("name", ["build_negatives.py", "tokenize_lm.py", "train_tokenizer.py"])
def test_help_does_not_wait_for_megatron(name):
    done = run_tool(name, "--help")
    assert done.returncode == 0
    assert "instruction + response" in done.stdout
    assert_quick(done)


def on_a_gpu(patch) -> None:
    """As on a machine with one GPU that something in this process uses already."""
    for name in ("is_available", "is_initialized"):
        patch.setattr(torch.cuda, name, lambda: True)
    patch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("a GPU for work without a model"))


@pytest.mark.parametrize("workers", [None, 2])
def test_work_without_a_model_is_forked_on_a_machine_with_gpus(tmp_path, monkeypatch, workers):
    records = ({"prompt": f"{i} ", "completion": "2 3 4"} for i in range(4))
    config = toy_config(tmp_path, *records, negatives="tn=1", block_records=1)
    with monkeypatch.context() as patch:
        on_a_gpu(patch)
        report = build_groups(config, ToyTokenizer(), run=Run(workers=workers))
    assert report.manifest["groups"] == 4


def test_a_model_on_a_gpu_is_not_forked(tmp_path, monkeypatch):
    work = SimpleNamespace(missing=lambda _, blocks: list(blocks))
    job = SimpleNamespace(work=work, records=2, size=1, forks=False, work_of=lambda _: pytest.fail)
    with monkeypatch.context() as patch:
        on_a_gpu(patch)
        with pytest.raises(ValueError, match=r"^--workers 2: a model on a GPU cannot be shared"):
            run_stage(job, "groups", Run(workers=2), "groups", "records")
