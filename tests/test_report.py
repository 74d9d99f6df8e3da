"""What a build says of its candidates: how long they are, and how they end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpo.building.blocks import count_ended
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.building.report import BuildReport
from megatron_cpo.groups.endings import longest_first
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import Group, GroupReader, read_manifest
from megatron_cpo.negatives.from_policy import policy_samplers
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.source import Source
from megatron_cpo.work.job import Run
from tests.policies import contexts, rngs
from tests.texts import ToyTokenizer, write_jsonl
from tests.tiny_models import save_hugging_face

EOD = ToyTokenizer.eod


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_hugging_face(tmp_path_factory.mktemp("model"))


def policy_that_ends(model, wish):
    """A model that likes EOD more, by so many nats, than it would."""
    policy = HuggingFacePolicy(model, ToyTokenizer())
    head = policy._model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(100))
    head.bias.data[EOD] = wish
    return policy


def build(folder, use=None, max_length=40, workers=1, text=False, **options):
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 99, rng.integers(2, 25)))) for _ in range(40)]
    records = [
        {"text": f"{x} {y}"} if text else {"prompt": x, "completion": y}
        for x, y in zip(texts[::2], texts[1::2], strict=True)
    ]
    path = write_jsonl(folder / "r.jsonl", *records)
    source = Source((path,), max_length=max_length)
    options = {"block_records": 3, **options}
    config = BuildConfig(source, str(folder / "out" / "groups"), **options)
    report = build_groups(config, ToyTokenizer(), use, Run(workers=workers))
    return report, GroupReader(config.output_prefix)


def by_kind(reader):
    """All candidates of each kind."""
    found = {}
    for index in range(len(reader)):
        group = reader[index]
        for code, tokens in zip(group.kinds, group.candidates, strict=True):
            found.setdefault(KINDS[code], []).append((len(group.prefix), tokens.tolist()))
    return found


@pytest.mark.parametrize("wish", [-50.0, 5.0])
@pytest.mark.parametrize("new_tokens", [9, 100])
def test_how_samples_end(model, tmp_path, wish, new_tokens):
    """A sample that has EOD at its last place has it because it was cut there."""
    use = PolicyUse(lambda: policy_that_ends(model, wish), Sampling(max_new_tokens=new_tokens))
    report, reader = build(tmp_path, use, negatives="an=3,tn=2", workers=2)
    drawn = by_kind(reader)["an"]
    cut = {"--max-new-tokens": 0, "--max-length": 0}
    for prefix, tokens in drawn:
        limit = min(new_tokens, 40 - prefix)
        cut["--max-new-tokens" if limit == new_tokens else "--max-length"] += len(tokens) == limit
        assert tokens.index(EOD) == len(tokens) - 1 < limit
    found = reader.manifest["statistics"]
    expected = {f"an {flag}": n for flag, n in cut.items() if n}
    assert found["cut"] == expected
    assert found["ended_share"] == {"gt": 1.0, "an": 1 - sum(cut.values()) / len(drawn)}
    lines = str(report).splitlines()
    if wish < 0:
        assert sum(cut.values()) == len(drawn)
        flag, limit = ("--max-new-tokens", 9) if new_tokens == 9 else ("--max-length", 40)
        assert lines[-1].startswith("warning: 100% of an were cut, with an end put where they have")
        assert lines[-1].endswith(f"give {flag} more than {limit}, or a policy that says EOD (99)")
        [end] = [line for line in lines if line.startswith("end: an")]
        assert "0.0% by themselves" in end and f"% cut at {flag}" in end
    else:
        assert (new_tokens == 9) == (sum(cut.values()) > 0)
        assert sum(cut.values()) < len(drawn) / 2
        assert not [line for line in lines if line.startswith("warning")]
    assert not [line for line in lines if line.startswith(("end: gt", "end: tn"))]


def test_lengths_against_a_slow_twin(tmp_path):
    report, reader = build(tmp_path, negatives="bn=3,tn=2")
    found = reader.manifest["statistics"]["candidate_tokens"]
    kinds = by_kind(reader)
    assert found.keys() == {"gt", "bn", "tn"}
    for kind, candidates in kinds.items():
        lengths = [len(tokens) for _, tokens in candidates]
        quantiles = np.quantile(lengths, [0.05, 0.5, 0.95], method="inverted_cdf")
        assert found[kind]["mean"] == pytest.approx(np.mean(lengths))
        assert [found[kind][name] for name in ("5%", "50%", "95%")] == quantiles.tolist()
    [line] = [line for line in str(report).splitlines() if line.startswith("length: tn")]
    assert (
        line.split()[2:]
        == (
            f"mean {found['tn']['mean']:.1f} tokens; 5% {found['tn']['5%']}, "
            f"50% {found['tn']['50%']}, 95% {found['tn']['95%']}"
        ).split()
    )


def test_batch_negatives_that_do_not_fit_are_counted(tmp_path):
    """Twin: the answer of which it is the beginning, and an EOD that is not there."""
    _, reader = build(tmp_path, negatives="bn=3", max_length=30)
    kinds = by_kind(reader)
    answers = {tuple(tokens) for _, tokens in kinds["gt"]}
    cut = sum(tuple(tokens) not in answers for _, tokens in kinds["bn"])
    assert 0 < cut < len(kinds["bn"])
    found = reader.manifest["statistics"]
    assert found["cut"] == {"bn --max-length": cut}
    assert found["ended_share"] == {"gt": 1.0, "bn": 1 - cut / len(kinds["bn"])}


def test_pieces_of_texts_do_not_end(tmp_path):
    """Nor do batch negatives that are such pieces; neither was cut by a sampler."""
    report, reader = build(tmp_path, negatives="bn=2,tn=1", max_length=9, text=True)
    kinds, found = by_kind(reader), reader.manifest["statistics"]
    for kind in ("gt", "bn"):
        ended = sum(tokens[-1] == EOD for _, tokens in kinds[kind])
        assert 0 < ended < len(kinds[kind])
        cut = found["cut"].get(f"{kind} --max-length", 0)
        assert found["ended_share"][kind] == (ended - cut) / len(kinds[kind])
    assert f"{found['ended_share']['gt']:.1%} by themselves" in str(report)


def test_stores_of_before_are_reported_as_they_were(tmp_path):
    report, reader = build(tmp_path, negatives="tn=2")
    path = Path(reader.path_prefix + ".json")
    manifest = read_manifest(reader.path_prefix)
    for name in ("candidate_tokens", "ended_share", "cut"):
        del manifest["statistics"][name]
    path.write_text(json.dumps(manifest))
    old = str(BuildReport.read(reader.path_prefix)).splitlines()
    now = str(BuildReport(report.manifest)).splitlines()
    new = [line for line in now if not line.startswith("length: ")]
    assert [line.split() for line in old] == [line.split() for line in new]


class Fixed:
    """A policy that answers with these samples."""

    kinds, positions, ends = ("an",), None, frozenset({EOD})

    def __init__(self, *samples):
        self._samples = [np.array(tokens, dtype=np.int32) for tokens in samples]

    def sample(self, prefixes, *_):
        return [self._samples for _ in prefixes]


def test_a_sample_without_an_end_was_cut():
    """As a server's, whose text is encoded again in fewer tokens than were drawn."""
    policy = Fixed([1, 2, EOD], [1, 2], [], [1, 2, 3, 4, 5, 6, 7, 8, EOD])
    block = contexts(2)
    drawn = policy_samplers(policy, Sampling(max_new_tokens=9))["an"](block, 4, rngs(block, "an"))
    for samples, context in zip(drawn, block, strict=True):
        assert [tokens.tolist() for tokens in samples] == [
            [1, 2, EOD], [1, 2, EOD], [EOD], [1, 2, 3, 4, 5, 6, 7, 8, EOD]
        ]  # fmt: skip
        assert context.cut == {"an --max-new-tokens": 3}


def test_ends_of_turns_are_ends():
    """A turn that ends as its template ends it, a policy's own end token, and neither of both."""
    kinds = np.array([KINDS.index(kind) for kind in ("gt", "an", "an", "an", "bn", "tn")])
    candidates = [[1, 5, 6], [5, 6], [2, 7], [2, 6], [5, 6], [5, 6]]
    group = Group(
        np.array([1], dtype=np.int32),
        [np.array(tokens, dtype=np.int32) for tokens in candidates],
        kinds,
        *(np.zeros(6, dtype=np.float32) for _ in range(3)),
    )
    endings = longest_first([(5, 6), (EOD,), (7,)])
    assert count_ended([group], endings, {}) == {"gt": 1, "an": 2, "bn": 1}
    assert count_ended([group], endings, {"bn --max-length": 1}) == {"gt": 1, "an": 2, "bn": 0}
