"""Requests a second that the judge's client keeps up, of a server that takes 200 ms for each."""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.setting import Rows, Setting
from megatron_cpo.evaluation import command

PAIRS = 256
IN_FLIGHT = (1, 8, 32)
LATENCY = 0.2
"""Seconds, of the server's model `latent`."""


def bench_judge(setting: Setting) -> Rows:
    """Rows of the table."""
    folder = Path(setting.folder)
    for name, extra in (("cpo", " indeed"), ("mle", "")):
        rows = [
            {"instruction": f"ask {i}", "output": f"say {i}{extra}", "generator": name}
            for i in range(PAIRS)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    ours, theirs = command.open_pair(folder / "cpo.json", str(folder / "mle.json"))
    found: Rows = []
    with subprocess.Popen(
        [sys.executable, "-m", "tests.judge_server"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        warm = command.JudgeOptions(url, "longer")  # imports, and the server's first threads
        command.judge_pairs(ours, theirs, warm, folder / "replies-warm.jsonl")
        for in_flight in IN_FLIGHT:
            judge = command.JudgeOptions(url, "latent", in_flight=in_flight)
            pairs = [side_of(side, 8 * in_flight) for side in (ours, theirs)]
            start = time.perf_counter()
            command.judge_pairs(*pairs, judge, folder / f"replies-{in_flight}.jsonl")
            rate = 2 * min(8 * in_flight, PAIRS) / (time.perf_counter() - start)
            found.append(
                (
                    f"judge: {in_flight} requests in flight, {LATENCY * 1000:.0f} ms each",
                    f"{rate:,.0f} requests/s, {rate * LATENCY / in_flight:.2f} of N / 0.2",
                )
            )
        server.kill()
    return found


def side_of(side: command.Results, count: int) -> command.Results:
    """The first texts of a file."""
    return command.Results(side.path, side.texts[:count], side.made)
