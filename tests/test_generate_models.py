"""Generated texts of Megatron checkpoints, at any layout, and of servers."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.ranks import ROOT, run_ranks
from megatron_cpo.evaluation.decoding import Decoding, continue_prompts
from megatron_cpo.evaluation.generating import GenerateConfig, generate
from megatron_cpo.evaluation.results import read_results
from megatron_cpo.inspection.tokenizer import folder_tokenizer
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.policies.server import ServerPolicy
from megatron_cpo.records.source import Source
from tests.conversions import flags_of, to_megatron
from tests.generated import MOST, by_transformers, prompts, save_records
from tests.scored_texts import save_with_tokenizer


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    return save_with_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def megatron(folder, tmp_path_factory):
    return to_megatron(Path(folder), tmp_path_factory.mktemp("converted") / "megatron")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_records(tmp_path_factory.mktemp("data") / "records.jsonl")


def policy_of(folder):
    return HuggingFacePolicy(folder, folder_tokenizer("the model", folder))


def greedy_texts(flags):
    """On one rank: greedy texts of a checkpoint, token by token."""
    from megatron_cpo import install
    from megatron_cpo.host.loading import open_tokenizer, score_args
    from megatron_cpo.policies.megatron import MegatronPolicy

    install()
    sys.argv = ["generate", *flags, "--seq-length", "64"]
    args = score_args()
    policy = MegatronPolicy.load(args, open_tokenizer(args), 16)
    decoding = Decoding("greedy", Sampling(max_new_tokens=MOST))
    return [y.body.tolist() for [y] in continue_prompts(policy, prompts(), decoding)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_greedy_of_a_checkpoint_equals_transformers(folder, megatron, ranks):
    layout = ["--load", str(megatron), "--tensor-model-parallel-size", str(ranks)]
    found = run_ranks(greedy_texts, ranks, [*flags_of(megatron), *layout])
    policy = policy_of(folder)
    ends = policy.ends | {0}
    expected = by_transformers(policy, ends, num_beams=1)
    expected = [y[: len(y) - (y[-1] in ends)] for y in expected]
    for ours in found:
        assert ours == expected


def the_command(flags):
    """On one rank: `evaluate generate`, but for what it hides and says."""
    from megatron_cpo import install
    from megatron_cpo.cli.evaluating import generate as verb

    install()
    sys.argv = ["generate", *flags]
    return verb.generate_from_args(verb.parse_generate_args())


def test_any_number_of_ranks_gives_the_same_bytes(megatron, data, tmp_path):
    """The flags that `convert` wrote are enough."""
    flags = [*flags_of(megatron), "--load", str(megatron), "--data", str(data)]
    flags += ["--decode", "sample", "--samples", "2", "--max-new-tokens", str(MOST)]
    flags += ["--block-records", "4"]
    layouts = {
        "one": (1, ""),
        "data": (2, ""),
        "tensor": (2, "--tensor-model-parallel-size 2"),
        "pipeline": (2, "--pipeline-model-parallel-size 2"),
    }
    content = {}
    for name, (ranks, layout) in layouts.items():
        output = tmp_path / f"{name}.json"
        said = run_ranks(the_command, ranks, [*flags, *layout.split(), "--output", str(output)])
        assert sum(text is not None for text in said) == 1
        content[name] = output.read_bytes()
        assert not list(tmp_path.glob("*.generate"))
    assert len(read_results(tmp_path / "one.json").texts) == 2 * 22
    assert content["data"] == content["one"]
    assert content["tensor"] == content["one"]
    assert content["pipeline"] == content["one"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and where a server of it is."""
    folder = save_with_tokenizer(tmp_path_factory.mktemp("served"))
    command = [sys.executable, "-m", "tests.completions_server", folder]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True
    ) as process:
        yield folder, f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        process.kill()


@pytest.mark.parametrize("model", ["tiny", "plain"])
def test_a_server_gives_the_same_greedy_texts(served, data, model, tmp_path, monkeypatch):
    """Also one that knows no top-k; its text is encoded again, and may be cut for the more tokens
    that random pieces then are."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    folder, url = served
    tokenizer = folder_tokenizer("the model", folder)
    sampling = Sampling(top_k=1, max_new_tokens=MOST)

    def texts(name, open_policy):
        source = Source((str(data),), max_length=40)  # so that all texts have room
        config = GenerateConfig(source, tmp_path / name, Decoding("greedy", sampling))
        return generate(config, tokenizer, open_policy).texts

    local = texts("local.json", lambda: policy_of(folder))
    remote = texts("remote.json", lambda: ServerPolicy(Endpoint(url), tokenizer, sampling, model))
    assert [text.id for text in remote] == [text.id for text in local] and len(local) == 15
    for ours, theirs in zip(remote, local, strict=True):
        if model == "tiny":
            assert (ours.output, ours.finish) == (theirs.output, theirs.finish)
        assert ours.output[:12] == theirs.output[:12]
