"""A judge behind real HTTP: verdicts, a rerun that asks nothing, kills, keys, and refusals."""

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpo.cli.evaluating import winrate
from megatron_cpo.evaluation import command
from megatron_cpo.evaluation.judging import ROW
from megatron_cpo.evaluation.reporting.verdicts import read_verdicts
from megatron_cpo.evaluation.verdicts import Comparison
from megatron_cpo.evaluation.win_rate import judged, win_rate
from megatron_cpo.policies.chat import FIRST_REFUSALS, Reply, ReplyCache
from tests.commands import assert_one_line_error, run_python

PAIRS = 12


def served(*argv):
    """A judge's process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.judge_server", *argv], stdout=subprocess.PIPE, text=True
    )
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"


@pytest.fixture(scope="module")
def url():
    process, address = served()
    yield address
    process.kill()


def asked(url, model):
    with urllib.request.urlopen(f"{url}/asked") as answer:
        return json.load(answer).get(model, 0)


@pytest.fixture
def files(tmp_path):
    """Texts of two models: the candidate's are longer but for the first, of which both are one."""
    for name, extra in (("cpo", " indeed"), ("mle", "")):
        rows = [
            {"instruction": f"ask {i}", "output": f"say {i}{extra if i else ''}", "generator": name,
             "truth": f"say {i}"}
            for i in range(PAIRS)
        ]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def judge(files, url, model, **options):
    """The result of all pairs by the library."""
    ours, theirs = command.open_pair(files / "cpo.json", str(files / "mle.json"))
    options = command.JudgeOptions(url, model, **options)
    pairs = command.judge_pairs(ours, theirs, options, files / "replies.jsonl")
    return win_rate(ours.generator, theirs.generator, pairs)


def tool(files, url, model, *flags, env=None):
    return run_python(
        "-m", "megatron_cpo", "evaluate", "winrate", "--candidate", files / "cpo.json",
        "--baseline", files / "mle.json", "--judge", url, "--judge-model", model, *flags,
        env=env,
    )  # fmt: skip


def test_a_perfect_judge_and_a_rerun_that_is_free(files, url):
    """11 wins and one identical pair: (11 + 1/2) / 12; 22 requests, and none the second time."""
    before = asked(url, "longer")
    first = judge(files, url, "longer")
    assert (first.wins, first.ties, first.identical) == (11, 1, 1)
    assert first.win_rate.value == pytest.approx(11.5 / 12)
    assert asked(url, "longer") - before == 22
    assert judge(files, url, "longer") == first
    assert asked(url, "longer") - before == 22


def test_a_judge_that_always_says_a(files, url):
    found = judge(files, url, "first")
    assert (found.win_rate.value, found.order_bias) == (0.5, 1.0)
    assert judge(files, url, "first", both_orders=False).win_rate.value == pytest.approx(11.5 / 12)


def test_a_busy_judge_is_asked_again(files, url):
    assert judge(files, url, "busy", in_flight=2).wins == 11


def test_the_command_and_its_files(files, url):
    done = tool(files, url, "longer")
    assert done.returncode == 0, done.stderr
    assert "win rate           0.958 [" in done.stdout
    lines = (files / "cpo-against-mle.verdicts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["why"] for row in rows] == ["identical", *["judged"] * 11]
    assert rows[1]["replies"][0] == "One is longer.\n\nA."
    with (files / "leaderboard.csv").open() as file:
        [row] = csv.DictReader(file)
    assert (row["candidate"], row["n_wins"], row["judge"]) == ("cpo", "11", "longer")
    assert float(row["win_rate_low"]) < float(row["win_rate"]) < float(row["win_rate_high"])


def test_a_dry_run_asks_nothing(files, url):
    before = asked(url, "longer")
    done = tool(files, url, "longer", "--dry-run")
    assert "Response A:\nsay 1 indeed" in done.stdout
    assert "22 requests to longer" in done.stdout
    assert asked(url, "longer") == before


@pytest.mark.parametrize("model", ["rude", "empty"])
def test_replies_without_a_verdict_have_an_exit_status(files, url, model):
    """The result needs two prompts with a verdict; here the identical pair alone has one."""
    done = tool(files, url, model)
    assert done.returncode == 1
    assert "1 of 12 prompts have a verdict" in done.stderr
    text = (files / "cpo-against-mle.verdicts.jsonl").read_text()
    assert text.count('"unread"') == 11


@pytest.fixture
def in_process(files, url, monkeypatch, capsys):
    """Its exit status and what the command says, by the judge's name and further flags."""

    def run(model, *flags):
        words = ["--candidate", files / "cpo.json", "--baseline", files / "mle.json",
                 "--judge", url, "--judge-model", model, *flags]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["megatron-cpo evaluate winrate", *map(str, words)])
        try:
            winrate.main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def test_some_replies_without_a_verdict(in_process):
    """One pair of 12 is more than 5%: the result is there, and the exit status is 3."""
    status, said, complaint = in_process("partly")
    assert (status, "without a verdict  1 pairs" in said) == (3, True)
    assert "1 of 12 pairs have no clear verdict" in complaint
    assert in_process("partly", "--max-unread", 0.1)[0] == 0


def test_replies_that_are_cut_say_which_flag_helps(files, in_process):
    """Of a judge that thinks first, at the usual 512 tokens; asked again with more, it answers."""
    with pytest.raises(ValueError, match="replies of 11 pairs were cut: raise --judge-max-tokens"):
        in_process("thinks")
    rows = (files / "cpo-against-mle.verdicts.jsonl").read_text()
    assert rows.count('"why": "cut"') == 11
    status, result, _ = in_process("thinks", "--judge-max-tokens", 700)
    assert (status, "win rate           0.958 [" in result) == (0, True)
    with pytest.raises(ValueError, match="--judge-max-tokens 0: needs at least 1"):
        in_process("thinks", "--judge-max-tokens", 0)


def test_a_pair_that_the_server_refuses_is_one_without_a_verdict(files, url, in_process):
    """Also in a rerun, where the refused requests are the only ones."""
    said = "HTTP 400 stopped by the content filter"
    for _ in range(2):
        status, result, complaint = in_process("narrow")
        assert status == 3
        assert f"refused            1 of these, the first with {said}" in result
        assert f"1 of 12 pairs have no clear verdict (1 of them refused: {said})" in complaint
    assert asked(url, "narrow") == 22 + 2
    rows = map(json.loads, (files / "cpo-against-mle.verdicts.jsonl").read_text().splitlines())
    assert [row["replies"] for row in rows if row["why"] == "refused"] == [[said, said]]
    ours, theirs = command.open_pair(files / "cpo.json", str(files / "mle.json"))
    again = read_verdicts(files / "cpo-against-mle.verdicts.jsonl", ours, theirs)
    assert win_rate("cpo", "mle", again.pairs) == judge(files, url, "narrow")


def test_a_judge_that_refuses_all_ends_at_once(tmp_path, url):
    """With one request at a time, the first 32 of 80 are asked."""
    for name in ("cpo", "mle"):
        rows = [{"instruction": f"ask {i}", "output": name, "generator": name} for i in range(40)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"--judge http.*HTTP 400: stopped by the content filter"):
        judge(tmp_path, url, "strict", in_flight=1)
    assert asked(url, "strict") == FIRST_REFUSALS


def test_killed_in_the_middle(files, url):
    """kill -9: replies that had come are not paid for again; two were under way."""
    before = asked(url, "slow")
    argv = [sys.executable, "-m", "megatron_cpo", "evaluate", "winrate", "--candidate",
            files / "cpo.json", "--baseline", files / "mle.json", "--judge", url,
            "--judge-model", "slow", "--in-flight", "2"]  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cache = files / "judge-replies.jsonl"
    while not cache.exists() or cache.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = cache.read_bytes().count(b"\n")
    time.sleep(0.2)
    paid = asked(url, "slow") - before
    assert kept <= paid <= kept + 2
    assert tool(files, url, "slow").returncode == 0
    assert asked(url, "slow") - before == paid + 22 - kept


def test_half_a_reply_is_cut_off(tmp_path):
    path = tmp_path / "replies.jsonl"
    cache = ReplyCache(path, ROW)
    cache.add("k", "judge", Reply("A", "stop"))
    cache.close()
    path.write_bytes(path.read_bytes() + b'{"key": "l", "rep')
    again = ReplyCache(path, ROW)
    assert (len(again), again.find("k"), again.find("l")) == (1, Reply("A", "stop"), None)
    again.add("l", "judge", Reply("B"))
    again.close()
    assert len(path.read_text().splitlines()) == 2
    path.write_text('{"key": "k", "model": "judge", "reply": "A"}\n')  # of earlier releases
    assert ReplyCache(path, ROW).find("k") == Reply("A")
    path.write_text('nonsense\n{"key": "k", "reply": "A"}\n')
    with pytest.raises(ValueError, match=r"replies.jsonl:1: not a judge's reply"):
        ReplyCache(path, ROW)


def test_rows_that_another_process_adds_while_a_file_is_opened_stay(tmp_path, monkeypatch):
    path = tmp_path / "replies.jsonl"
    with closing(ReplyCache(path, ROW)) as first:
        first.add("k", "judge", Reply("A"))
        read = Path.read_bytes

        def read_late(self):
            content = read(self)
            first.add("l", "judge", Reply("B"))
            return content

        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", read_late)
            ReplyCache(path, ROW).close()
    with closing(ReplyCache(path, ROW)) as found:
        assert (found.find("k"), found.find("l")) == (Reply("A"), Reply("B"))


def test_half_a_character_is_one_that_files_can_hold(tmp_path):
    """JSON may spell half a surrogate pair; whole pairs stay what they are."""
    path = tmp_path / "replies.jsonl"
    row = {"key": "k", "model": "judge", "reply": "A \ud83d\ude00 \ud83d", "finish": "stop"}
    path.write_text(json.dumps(row) + "\n")
    with closing(ReplyCache(path, ROW)) as found:
        assert found.find("k").text == "A \N{GRINNING FACE} \N{REPLACEMENT CHARACTER}"


def test_judges_that_finish_at_once_and_other_decodings_keep_their_rows(tmp_path):
    path, options = tmp_path / "leaderboard.csv", command.JudgeOptions("http://a", "m")
    games = [judged(str(i), 0, Comparison("p", "a", "b"), ("A", "B")) for i in range(2)]
    found = win_rate("0", "mle", games)
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(6)

    def finish(name):
        begin.wait()
        command.update_leaderboard(path, replace(found, candidate=name), options, "greedy")

    processes = [context.Process(target=finish, args=(str(i),)) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    command.update_leaderboard(path, found, options, "top-k 50")
    command.update_leaderboard(path, found, options, "greedy")
    with path.open() as file:
        rows = [(row["candidate"], row["decoding"]) for row in csv.DictReader(file)]
    assert sorted(rows) == [("0", "greedy"), ("0", "top-k 50"), *((c, "greedy") for c in "12345")]


def test_a_row_of_before_which_names_no_decoding_is_replaced(tmp_path):
    path, options = tmp_path / "leaderboard.csv", command.JudgeOptions("http://a", "m")
    path.write_text("candidate,baseline,judge,template,n_wins\ncpo,mle,m,instruction,7\n")
    games = [judged(str(i), 0, Comparison("p", "a", "b"), ("A", "B")) for i in range(2)]
    command.update_leaderboard(path, win_rate("cpo", "mle", games), options, "greedy")
    with path.open() as file:
        assert [row["n_wins"] for row in csv.DictReader(file)] == ["2"]


def test_no_request_at_a_time_is_refused():
    with pytest.raises(ValueError, match="--in-flight 0: needs at least 1"):
        command.JudgeOptions("http://a", "m", in_flight=0)


def test_a_judge_is_not_paid_for_one_prompt(files):
    """No server is there, and none is asked."""
    path = files / "cpo.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    with pytest.raises(ValueError, match=r"cpo.json: texts of one prompt; a win rate needs"):
        command.judge_files(path, "reference", command.JudgeOptions("http://127.0.0.1:9", "m"))


def test_two_baselines_of_one_name_are_not_one_file_of_verdicts(files):
    """A recipe's reference is called as the records' own answers are: each took the other's place
    in the verdicts and the leaderboard, and the report refused what was left."""
    assert command.open_pair(files / "cpo.json", "reference")[1].generator == "reference"
    (files / "mle.json").rename(files / "reference.json")
    with pytest.raises(ValueError, match=r"--baseline reference: the records' own .* --baseline "
                                         r"\S*/reference.json for its texts, or copy"):  # fmt: skip
        command.open_pair(files / "cpo.json", "reference")
    assert command.open_pair(files / "cpo.json", str(files / "reference.json"))


def test_a_key_is_sent_and_nowhere_shown(files):
    process, address = served("s3cret-key")
    try:
        environment = os.environ | {"OTHER_KEY": "s3cret-key"}
        done = tool(files, address, "longer", "--judge-key-env", "OTHER_KEY", env=environment)
        assert done.returncode == 0, done.stderr
        without = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
        (files / "judge-replies.jsonl").unlink()
        refused = tool(files, address, "longer", env=without)
        assert refused.returncode == 1
        assert "401" in refused.stderr
        assert "key" in refused.stderr
        shown = [done.stdout, done.stderr, refused.stdout, refused.stderr]
        shown += [path.read_text() for path in files.iterdir()]
        assert not [text for text in shown if "s3cret-key" in text and "wrong key" not in text]
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--baseline": "nowhere.json"}, r"nowhere\.json: cannot be read"),
        ({"--judge": "localhost:1"}, r"--judge localhost:1"),
        ({"--judge": "http://127.0.0.1:9/v1"}, r"--judge http://127\.0\.0\.1:9/v1"),
        ({"--template": "nothing"}, r"--template nothing: neither instruction, continuation nor"),
        ({"--judge-key-env": "NOT_SET"}, r"--judge-key-env"),
        ({"--judge-model": "web"}, r"--judge http"),
    ],
)
def test_bad_input(files, url, change, message):
    flags = {"--candidate": files / "cpo.json", "--baseline": files / "mle.json", "--judge": url,
             "--judge-model": "longer"} | change  # fmt: skip
    words = [word for flag in flags.items() for word in flag]
    done = run_python("-m", "megatron_cpo", "evaluate", "winrate", *words)
    assert_one_line_error(done, "megatron-cpo evaluate")
    assert re.search(message, done.stderr)
