"""Answers that a model writes behind real HTTP: the question, tokens, kills, and what is no use."""

import argparse
import json
import multiprocessing
import signal
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.building.flags import add_build_arguments, config_from_args, run_from_args
from megatron_cpo.groups.store import FILES, GroupReader
from megatron_cpo.negatives.from_records import group_rng
from megatron_cpo.negatives.from_writer import EMPTY, EQUAL, without_label
from megatron_cpo.policies import endpoint as endpoint_module
from megatron_cpo.policies.writer import Writer, question
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
from tests.texts import DOLLY, ToyTokenizer, dolly_tokenizer, write_jsonl
from tests.tokenizer_kinds import CHATML
from tests.writer_server import GATE, HELD, says, served

RECORDS = [json.loads(line) for line in Path(DOLLY).read_text(encoding="utf-8").splitlines()[:40]]
DROPPED = "no usable answer of the writer"


@pytest.fixture(scope="module")
def url():
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.001)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def ask(url, what):
    with urllib.request.urlopen(f"{url}/{what}") as answer:
        return json.load(answer)


def config(folder, url, model="writer", records=RECORDS, negatives="written=1", **options):
    folder.mkdir(exist_ok=True)
    path = write_jsonl(folder / "r.jsonl", *records)
    urls = (url,) if isinstance(url, str) else url
    settings = {
        name: options.pop(name) for name in ("tries", "options", "answers") if name in options
    }
    return BuildConfig(
        Source((path,), **options), str(folder / "out" / "groups"), negatives=negatives,
        block_records=16, writer=Writer(tuple(urls), model, in_flight=HELD, **settings),
    )  # fmt: skip


def texts(tokenizer, reader):
    """The negatives of each group, as text without an end."""
    encoder = Encoder(tokenizer)
    return [
        [encoder.spelled(c[:-1]).decode() for c in reader[i].candidates[1:]]
        for i in range(len(reader))
    ]


def twin(model, records, count=1, tries=4):
    """What comes of each record, and how often an answer was of no use, one after another."""
    notes, written = Counter(), []
    for index, record in enumerate(records):
        asked = "\n\n".join(filter(None, (record["instruction"], record["context"])))
        seeds = group_rng(1234, index, "written").integers(2**31, size=(tries, count)).tolist()
        found = {}
        for attempt in range(tries):
            for number in range(count):
                if number in found:
                    continue
                prompt = question(asked, record["response"])
                text = (says(model, prompt, seeds[attempt][number]) or "").strip()
                if not text:
                    notes[EMPTY] += 1
                elif text == record["response"].strip():
                    notes[EQUAL] += 1
                else:
                    found[number] = text
        written.append([found[n] for n in range(count)] if len(found) == count else None)
    return written, notes


def test_dpo_as_in_the_paper(url, tokenizer, tmp_path):
    """K = 2: the same tokens as if the answers had come with the records as rejected ones."""
    written = config(tmp_path / "written", url)
    report = build_groups(written, tokenizer)
    answers, _ = twin("writer", RECORDS)
    rejected = [r | {"rejected": a, "chosen": r["response"]}
                for r, a in zip(RECORDS, answers, strict=True)]  # fmt: skip
    path = write_jsonl(tmp_path / "given.jsonl", *rejected)
    given = BuildConfig(Source((path,)), str(tmp_path / "given"), negatives="given=1")
    build_groups(given, tokenizer)
    ours, theirs = GroupReader(written.output_prefix), GroupReader(given.output_prefix)
    assert len(ours) == len(theirs) == 40
    assert ours.manifest["k"] == 2 and ours.manifest["kinds"] == {"gt": 40, "written": 40}
    for index in range(40):
        assert ours[index].prefix.tolist() == theirs[index].prefix.tolist()
        found, expected = ours[index].candidates, theirs[index].candidates
        assert [c.tolist() for c in found] == [c.tolist() for c in expected]
    bodies = ask(url, "bodies")["writer"]
    first = next(b for b in bodies if RECORDS[0]["instruction"] in b["messages"][0]["content"])
    assert first["messages"] == [{"role": "user", "content": (
        "Given the ground truth instruction and response, can you generate a not helpful response?"
        f"\n\nInstruction:\n{RECORDS[0]['instruction']}\n\nResponse:\n{RECORDS[0]['response']}"
        "\n\nNot helpful response:"
    )}]  # fmt: skip
    assert (first["temperature"], first["max_tokens"]) == (1.0, 512)
    assert "negatives: written" in str(report)
    assert ours.manifest["writer"]["name"] == "writer" and url not in json.dumps(ours.manifest)


def test_answers_of_no_use_are_counted_and_asked_for_again(url, tokenizer, tmp_path):
    """Two answers a record, two tries each: against a plain loop; some records have none."""
    answers, notes = twin("moody", RECORDS, 2, 2)
    assert 0 < answers.count(None) < 40 and notes[EMPTY] > 9 and notes[EQUAL] > 9
    moody = config(tmp_path, url, "moody", negatives="written=2", tries=2)
    report = build_groups(moody, tokenizer)
    reader = GroupReader(moody.output_prefix)
    found = [[text.strip() for text in group] for group in texts(tokenizer, reader)]
    assert found == [a for a in answers if a]
    assert reader.manifest["notes"] == notes
    assert reader.manifest["dropped"] == {DROPPED: answers.count(None)}
    assert f"noted: {EMPTY}" in str(report) and f"dropped: {DROPPED}" in str(report)


def test_a_writer_that_says_nothing(url, tokenizer, tmp_path):
    message = rf"all records were left out \({DROPPED} 40\)"
    with pytest.raises(ValueError, match=message):
        build_groups(config(tmp_path, url, "mute", tries=1), tokenizer)
    assert ask(url, "asked")["mute"] == 40


def test_killed_in_the_middle_of_a_block(url, tokenizer, tmp_path):
    """SIGKILL when 20 answers were there and 4 on their way: those 4 alone are asked for again."""
    killed = config(tmp_path / "killed", url, "gated")
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=build_groups, args=(killed, tokenizer))
    process.start()
    ask(url, "held")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = Path(killed.output_prefix + "-written")
    files = sorted(kept.glob("*/answers.jsonl"))
    rows = [path.read_bytes().count(b"\n") for path in files]
    assert rows == [16, 4] and sum(rows) == GATE
    ask(url, "open")
    assert ask(url, "asked")["gated"] == GATE + HELD
    build_groups(killed, tokenizer)
    assert ask(url, "asked")["gated"] == 40 + HELD
    whole = config(tmp_path / "whole", url, "gated")
    build_groups(whole, tokenizer)
    files = [*FILES, ".json"]
    for suffix in files:
        ours, theirs = (Path(c.output_prefix + suffix).read_bytes() for c in (killed, whole))
        assert ours == theirs, suffix
    there = sorted(path.name for path in kept.parent.iterdir())
    assert there == sorted(["groups-written", *(f"groups{s}" for s in files)])
    for suffix in files:
        Path(killed.output_prefix + suffix).unlink()
    before = ask(url, "asked")["gated"]
    other = config(tmp_path / "other", url, "gated", negatives="bn=2,written=1", answers=str(kept))
    for again in (killed, other):
        build_groups(again, tokenizer)
        assert ask(url, "asked")["gated"] == before, "what is kept is not asked for again"


def test_a_merge_needs_no_server(url, tokenizer, tmp_path):
    """Nor its address; all blocks are in one folder, and not put together."""
    shards = [config(tmp_path / str(share), url) for share in range(2)]
    for share, shard in enumerate(shards):
        assert build_groups(shard, tokenizer, run=Run(share=share, shares=2)) is None
    ours, other = (Path(f"{shard.output_prefix}.build") / "groups" for shard in shards)
    [block] = other.iterdir()
    block.rename(ours / block.name)
    nobody = replace(shards[0], writer=replace(shards[0].writer, urls=()))
    with pytest.raises(ValueError, match="--writer and --writer-model are needed"):
        build_groups(nobody, tokenizer)
    assert build_groups(nobody, tokenizer, run=Run(merge_only=True)) is not None
    found = texts(tokenizer, GroupReader(nobody.output_prefix))
    assert [[text.strip()] for [text] in found] == twin("writer", RECORDS)[0]
    assert config_from_args(flags("--writer-model", "m", "--merge")).writer.urls == ()


def test_servers_share_the_work(url, tokenizer, tmp_path, caplog, monkeypatch):
    """And stand in for one that fails for good; whoever answers, the bytes are the same."""
    one = config(tmp_path / "one", url)
    build_groups(one, tokenizer)
    with served() as other:
        both = config(tmp_path / "both", (url, other))
        build_groups(both, tokenizer)
        assert 0 < ask(other, "asked")["writer"] < 40
    with served("down") as down:
        monkeypatch.setenv("OPENAI_API_KEY", "down")
        broken = config(tmp_path / "broken", (down, url))
        report = build_groups(broken, tokenizer)
        with pytest.raises(ValueError, match=r"--writer http://.*: 8 requests failed in a row"):
            build_groups(config(tmp_path / "none", (down,)), tokenizer)
    assert "the other servers go on without it" in caplog.text
    assert report.counts["asked again: HTTP 500"] >= 7
    stores = [Path(c.output_prefix + ".bin").read_bytes() for c in (one, both, broken)]
    assert stores[0] == stores[1] == stores[2]


@pytest.mark.parametrize(
    ("model", "options"),
    [("labelled", {}), ("quoting", {}), ("busy", {}), ("writer", {"options": {"seed": None}})],
)
def test_labels_busy_servers_and_servers_without_seeds(url, tokenizer, tmp_path, model, options):
    """Without a seed in the request, each of two answers is still asked for."""
    records = RECORDS[:4]
    before = ask(url, "asked").get(model, 0)
    found = config(tmp_path, url, model, records, "written=2", **options)
    build_groups(found, tokenizer)
    groups = texts(tokenizer, GroupReader(found.output_prefix))
    if options:
        assert ask(url, "asked")["writer"] - before == 8
        return
    assert [[t.strip() for t in group] for group in groups] == [
        [text.removeprefix("Not helpful response:").strip() for text in answers]
        for answers in twin(model, records, 2)[0]
    ]


def test_a_label_takes_nothing_of_the_answer_along():
    for label in (
        "Not helpful response: ",
        "**Not helpful response:**\n",
        '"Not Helpful Response":',
    ):
        for answer in ("-5 degrees.", '"Who knows?" is all I say.', "?!", "*No*"):
            assert without_label(f" {label}{answer}\n") == answer


def test_answers_that_are_cut(url, tokenizer, tmp_path):
    """At the writer's limit, or for want of room: y_1's end all the same, and counted."""
    records = [{"prompt": "Why?", "completion": "So."}, {"prompt": "Why not?", "completion": "No."}]
    long = config(tmp_path / "long", url, "long", records)
    report = build_groups(long, tokenizer)
    assert report.manifest["statistics"]["cut"] == {"written --writer-max-tokens": 2}
    assert "give --writer-max-tokens more than 512" in str(report)
    short = config(tmp_path / "short", url, "writer", records, max_length=12)
    report = build_groups(short, tokenizer)
    assert report.manifest["statistics"]["cut"] == {"written --max-length": 2}
    reader = GroupReader(short.output_prefix)
    for group in (reader[0], reader[1]):
        assert len(group.prefix) + len(group.candidates[1]) == 12
        assert group.candidates[1][-1] == tokenizer.eod


def test_what_is_cut_of_records_without_a_group_is_not_counted(url, tokenizer, tmp_path):
    """A batch negative is cut where it fills the room; most records have no answer of use."""
    answers = ["So says a tree.", "So says a tree. It is so."]
    records = [{"prompt": f"Why {n}?", "completion": answers[n % 2]} for n in range(16)]
    found = config(tmp_path, url, "moody", records, "bn=1,written=1", tries=1, max_length=20)
    manifest = build_groups(found, tokenizer).manifest
    reader = GroupReader(found.output_prefix)
    cut = sum(len(g.prefix) + len(g.candidates[1]) == 20 for g in map(reader.__getitem__, (0, 1)))
    assert manifest["groups"] == len(reader) == 2 and manifest["dropped"][DROPPED] == 7
    assert manifest["statistics"]["cut"] == {"bn --max-length": cut}
    assert manifest["statistics"]["ended_share"]["bn"] == 1 - cut / 2


def test_questions_that_the_writer_refuses_cost_their_records(url, tokenizer, tmp_path, caplog):
    records = [{"prompt": f"Why {'so ' * n}?", "completion": "So."} for n in (1, 99, 2, 98)]
    found = config(tmp_path, url, "narrow", records)
    report = build_groups(found, tokenizer)
    assert report.manifest["dropped"] == {DROPPED: 2} and report.manifest["groups"] == 2
    assert caplog.text.count("maximum context length is 99 tokens") == 1
    with pytest.raises(ValueError, match=r"--writer http.*maximum context length is 99 tokens"):
        build_groups(config(tmp_path / "all", url, "narrow", records[1::2]), tokenizer)


def test_texts_and_chats(url, tokenizer, tmp_path):
    """A whole text's beginning is the instruction; its white space, and a turn's end, stay."""
    text = {"text": "Once upon a time there was a tree. It was tall and green and very old."}
    found = config(tmp_path / "text", url, "writer", [text], prefix_fraction=0.5)
    build_groups(found, tokenizer)
    [group] = [GroupReader(found.output_prefix)[0]]
    encoder = Encoder(tokenizer)
    before, truth = (encoder.spelled(x).decode() for x in (group.prefix, group.candidates[0][:-1]))
    asked = ask(url, "bodies")["writer"][-1]
    prompt = question(before.strip(), truth.strip())
    assert asked["messages"][0]["content"] == prompt
    lead = truth[: len(truth) - len(truth.lstrip())]
    answer = lead + says("writer", prompt, asked["seed"])
    assert encoder.spelled(group.candidates[1][:-1]).decode() == answer
    chats = dolly_tokenizer(tmp_path, CHATML)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    found = config(tmp_path / "chat", url, "writer", [{"messages": turns}])
    build_groups(found, chats)
    assert ask(url, "bodies")["writer"][-1]["messages"][0]["content"] == question("Why?", "So.")
    truth, written = (
        Encoder(chats).spelled(c).decode() for c in GroupReader(found.output_prefix)[0].candidates
    )
    end = truth.removeprefix("So.")
    assert "<|im_end|>" in end and written.endswith(end)


def flags(*words):
    parser = add_build_arguments(argparse.ArgumentParser())
    parser.set_defaults(seed=1, load=None)
    words = ["--input", DOLLY, "--output-prefix", "x", "--negatives", "written=1", *words]
    return parser.parse_args(list(map(str, words)))


def test_flags_of_the_writer():
    words = ["--writer", "http://a:1/v1", "http://ann:pw@b:1/v1", "--writer-model", "m/it"]
    words += ["--writer-options", '{"temperature": 0.5, "seed": null}', "--writer-max-tokens", 9]
    args = flags(*words)
    assert "pw" not in f"{args}"
    writer = config_from_args(args).writer
    body = writer.body("ask", "say {response}", 7)
    assert body == {
        "model": "m/it", "temperature": 0.5, "max_tokens": 9,
        "messages": [{"role": "user", "content": question("ask", "say {response}")}],
    }  # fmt: skip
    assert writer.identity["name"] == "it" and "http" not in json.dumps(writer.identity)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"--negatives written=1: an instruct model writes them; give --writer URL"),
        (["--writer", "http://a:1"], r"--writer and --writer-model are needed"),
        (["--writer-model", "m"], r"--writer and --writer-model are needed"),
        (["--writer", "http://a:1", "--writer-model", "m", "--negatives", "bn=1"],
         r"--writer-model m: nothing is written with --negatives bn=1; add written=1"),
        (["--writer", "http://a:1", "--writer-model", "m", "--writer-tries", "0"],
         r"--writer-tries 0: needs at least 1"),
        (["--writer", "http://a:1", "--writer-model", "m", "--writer-options", "[1]"],
         r"--writer-options \[1\]: is no JSON object"),
    ],
)  # fmt: skip
def test_mistakes_in_flags(words, message):
    with pytest.raises(ValueError, match=message):
        config_from_args(flags(*words))


def test_what_cannot_be_written(url, tokenizer, tmp_path, monkeypatch):
    """No server, no key, no text; and ranks that would each pay."""
    with pytest.raises(ValueError, match=r"--writer http://127.0.0.1:9/v1: nothing answers there"):
        build_groups(config(tmp_path, (url, "http://127.0.0.1:9/v1")), tokenizer)
    with pytest.raises(ValueError, match=r"build's tokenizer knows numbers and no text"):
        build_groups(config(tmp_path, url), ToyTokenizer())
    with served("s3cret") as other:
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-k3y")
        with pytest.raises(ValueError, match=r"does not take the key in OPENAI_API_KEY") as error:
            build_groups(config(tmp_path, other), tokenizer)
        assert "wrong-k3y" not in str(error.value)
    words = ["--writer", url, "--writer-model", "m", "--negatives", "an=1,written=1"]
    args = flags(*words)
    args.load, args.tensor_model_parallel_size, args.pipeline_model_parallel_size = "x", 2, 1
    args.context_parallel_size, args.use_tp_pp_dp_mapping = 1, False
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 ranks hold the policy of --load together, and each"):
        run_from_args(args, config_from_args(args))
