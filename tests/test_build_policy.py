"""The build tool with a policy: a Megatron checkpoint at several layouts, and later scoring."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from harness.ranks import run_pretrain
from harness.stores import VOCAB_SIZE, null_tokenizer, write_store
from megatron_cpo.building import flags as arguments
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.groups.store import FILES, GroupReader
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.records.source import Source
from megatron_cpo.scoring.under_policy import rescore
from megatron_cpo.work.job import Run
from tests.texts import ToyTokenizer, write_jsonl
from tests.tiny_models import GPT_FLAGS, save_hugging_face, train_megatron


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """--load of a checkpoint after one step from random weights."""
    return train_megatron(tmp_path_factory.mktemp("reference"), GPT_FLAGS)


def build_with_tool(folder, reference, world_size, layout=""):
    rng = np.random.default_rng(5)
    texts = [" ".join(map(str, rng.integers(0, 499, rng.integers(3, 12)))) for _ in range(24)]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    records = [{"prompt": f"{x} ", "completion": y} for x, y in pairs]
    data = write_jsonl(folder / "r.jsonl", *records)
    flags = ["--input", data, "--output-prefix", folder / "out" / "groups", "--load", reference]
    flags += "--negatives an=2,mn=2,bn=1 --rank policy --block-records 2".split()
    flags += ["--max-new-tokens", "8", "--micro-batch-size", "1", *layout.split()]
    outputs = run_pretrain([*GPT_FLAGS, *flags], world_size, script="tools/build_negatives.py")
    assert sorted(os.listdir(folder / "out")) == sorted(f"groups{s}" for s in (*FILES, ".json"))
    return GroupReader(str(folder / "out" / "groups")), "".join(outputs)


@pytest.fixture(scope="module")
def built(tmp_path_factory, reference):
    return build_with_tool(tmp_path_factory.mktemp("built"), reference, 1)


def test_one_command_samples_ranks_and_scores(built):
    reader, output = built
    manifest = reader.manifest
    assert manifest["kinds"] == {"gt": 12, "an": 24, "mn": 24, "bn": 12}
    assert manifest["policy"]["backend"] == "megatron"
    assert manifest["reference"]["digest"] == manifest["policy"]["digest"]
    for index in range(12):
        group = reader[index]
        assert np.isfinite(group.reference_logps).all()
        assert group.similarities.min() >= -1 and group.similarities[0] == 1
    logp = manifest["statistics"]["mean_reference_logp"]["an"]
    assert f"mean reference log-prob {logp:.1f} nats" in output


@pytest.mark.parametrize(
    "layout",
    [
        *("", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"),
        "--pipeline-model-parallel-size 2 --use-tp-pp-dp-mapping",
    ],
    ids=["DP=2", "TP=2", "PP=2", "PP=2, DP=2, stages side by side"],
)
def test_layouts_draw_the_same_tokens(built, reference, tmp_path, layout):
    """Data-parallel ranks write the same bytes of tokens; a split model rounds otherwise, and
    still comes to the same tokens here."""
    expected, _ = built
    world = 4 if "mapping" in layout else 2
    found, _ = build_with_tool(tmp_path, reference, world, layout)
    for index in range(12):
        ours, theirs = expected[index], found[index]
        assert [c.tolist() for c in theirs.candidates] == [c.tolist() for c in ours.candidates]
        np.testing.assert_allclose(theirs.similarities, ours.similarities, atol=1e-4)
        np.testing.assert_allclose(theirs.reference_logps, ours.reference_logps, rtol=1e-4)


@pytest.mark.parametrize(
    ("world", "tp", "cp", "pp"),
    [(1, 1, 1, 1), (4, 1, 1, 1), (4, 2, 1, 1), (4, 1, 1, 2), (8, 2, 1, 2), (4, 1, 2, 1)],
)
@pytest.mark.parametrize("stages_first", [False, True])
def test_shares_of_ranks(monkeypatch, world, tp, cp, pp, stages_first):
    """Every block has one writer, and the ranks of a replica have its blocks.

    Tensor, context, data, pipeline is Megatron's order of ranks; --use-tp-pp-dp-mapping has the
    stages of a replica side by side.
    """
    from argparse import Namespace

    args = Namespace(
        shard="1/2", executor="local", workers=None, merge=False, load="x", policy=None,
        tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp,
        use_tp_pp_dp_mapping=stages_first,
    )  # fmt: skip
    config = BuildConfig(Source(("x",)), "x", negatives="an=1")
    replicas = world // (tp * cp * pp)
    runs = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        runs.append(arguments.run_from_args(args, config))
    assert all(run.shares == 2 * replicas for run in runs)
    # Every second block from 1 on, whatever the other shard runs on.
    assert sorted(run.share for run in runs if run.writer) == list(range(1, 2 * replicas, 2))
    for replica in range(replicas):
        mine = [rank for rank, run in enumerate(runs) if run.share == 1 + 2 * replica]
        assert len(mine) == tp * cp * pp
        if stages_first:
            assert mine == list(range(replica * tp * cp * pp, (replica + 1) * tp * cp * pp))
        else:
            first = [stage * world // pp + replica * tp * cp for stage in range(pp)]
            assert mine == [rank + inner for rank in first for inner in range(tp * cp)]


@pytest.mark.parametrize("flag", ["tensor_model", "context", "pipeline_model"])
def test_ranks_that_hold_a_policy_together_have_no_workers(monkeypatch, flag):
    """One of them would ask the others from a forked process, which waits for ever."""
    from argparse import Namespace

    sizes = {f"{name}_parallel_size": 1 for name in ("tensor_model", "context", "pipeline_model")}
    args = Namespace(
        shard=None, executor="local", workers=2, use_tp_pp_dp_mapping=False,
        **sizes | {f"{flag}_parallel_size": 2},
    )  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--workers 2: 2 ranks hold .* leave --workers out"):
        arguments.share_of_work(args, by_megatron=True)
    args.workers = 1
    assert arguments.share_of_work(args, by_megatron=True).workers == 1


@pytest.fixture
def store(tmp_path):
    path = write_jsonl(
        tmp_path / "r.jsonl", *({"prompt": f"{i} 7 ", "completion": f"{i} 3 4"} for i in range(90))
    )
    config = BuildConfig(Source((path,)), str(tmp_path / "out" / "groups"), negatives="bn=2,tn=1")
    build_groups(config, ToyTokenizer(), run=Run(workers=1))
    return config.output_prefix


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_hugging_face(tmp_path_factory.mktemp("model"))


def use_of(model):
    return PolicyUse(lambda: HuggingFacePolicy(model, ToyTokenizer()), score=True)


def test_scoring_later_equals_asking_the_policy(store, model):
    tokens = Path(store + ".bin").read_bytes()
    assert rescore(store, ToyTokenizer(), use_of(model), Run(share=1, shares=2)) is None
    report = rescore(store, ToyTokenizer(), use_of(model), Run(share=0, shares=2))
    reader, policy = GroupReader(store), use_of(model).open()
    reader.verify()
    for index in (0, 63, 64, 89):
        group = reader[index]
        [logps] = policy.logps([group.prefix], [group.candidates])
        np.testing.assert_allclose(group.reference_logps, logps, rtol=1e-5)
    assert reader.manifest["reference"] == policy.identity
    assert "mean reference log-prob" in str(report)
    assert Path(store + ".bin").read_bytes() == tokens
    assert sorted(os.listdir(Path(store).parent)) == sorted(f"groups{s}" for s in (*FILES, ".json"))


def test_a_store_that_says_less_of_itself_has_a_shorter_report(store, model):
    """As one of another tool, or of an earlier version."""
    path = Path(store + ".json")
    manifest = json.loads(path.read_text())
    for name in ("statistics", "dropped", "notes", "endings", "border"):
        del manifest[name]
    path.write_text(json.dumps(manifest))
    report = str(rescore(store, ToyTokenizer(), use_of(model), Run()))
    assert [line.split("  ")[0] for line in report.splitlines()] == [
        "groups", "tokens: token trees", "y_1: gt", "negatives: bn", "negatives: tn",
    ]  # fmt: skip
    assert "mean reference log-prob" in report


def test_blocks_with_and_without_scores_are_not_mixed(store, model):
    config = BuildConfig(
        Source((str(Path(store).parents[1] / "r.jsonl"),)), store, negatives="bn=2,tn=1"
    )
    build_groups(config, ToyTokenizer())
    message = r"with score false, this command has true;"
    with pytest.raises(ValueError, match=message):
        build_groups(config, ToyTokenizer(), use_of(model))


def test_scoring_is_resumed_and_not_mixed_with_another_policy(store, model, tmp_path):
    assert rescore(store, ToyTokenizer(), use_of(model), Run(share=0, shares=2)) is None
    other = use_of(save_hugging_face(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"groups\.score holds unfinished work with reference"):
        rescore(store, ToyTokenizer(), other, Run())
    with pytest.raises(ValueError, match=r"--merge: 1 of 2 blocks in .*groups\.score are not"):
        rescore(store, ToyTokenizer(), use_of(model), Run(merge_only=True))
    asked = []
    logps = HuggingFacePolicy.logps

    def counting(self, prefixes, candidates):
        asked.append(len(prefixes))
        return logps(self, prefixes, candidates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFacePolicy, "logps", counting)
        rescore(store, ToyTokenizer(), use_of(model), Run())
        assert asked == [26], "the block of the first run is kept"
        rescore(store, ToyTokenizer(), use_of(model), Run())
        assert asked == [26], "a scored store is left as it is"
    assert np.isfinite(GroupReader(store)[0].reference_logps).all()


def test_a_store_of_another_tokenizer_is_not_scored(store, model):
    tokenizer = ToyTokenizer()
    tokenizer.vocab_size = 101
    with pytest.raises(ValueError, match=r'built with the tokenizer .*"vocab_size": 100.* 101'):
        rescore(store, tokenizer, use_of(model), Run())


def test_a_store_that_is_longer_than_the_policy_reads_is_not_scored(tmp_path):
    """Rotary positions have no end by themselves: it was scored where the model knows none."""
    store = write_store(tmp_path / "long", 3, 3, longest=90)
    folder = save_hugging_face(tmp_path / "model", rows=VOCAB_SIZE + 1)
    use = PolicyUse(lambda: HuggingFacePolicy(folder, null_tokenizer()))
    with pytest.raises(ValueError, match=r"has \d+ tokens to read, the model reads at most 64; "):
        rescore(store, null_tokenizer(), use, Run())
    assert GroupReader(store).manifest["reference"]["name"] == "random"


@pytest.mark.parametrize("flag", ["score", "score_only"])
def test_scoring_needs_a_model(flag):
    from argparse import Namespace

    args = Namespace(score=False, score_only=False, policy="http://localhost:1/v1", load=None)
    setattr(args, flag, True)
    message = rf"--{flag.replace('_', '-')} needs the model to score under: --load CHECKPOINT"
    with pytest.raises(ValueError, match=message):
        arguments.policy_use_from_args(args, ToyTokenizer())


@pytest.mark.parametrize("flag", ["score", "score_only"])
def test_scoring_under_two_models_is_refused(flag):
    """Negatives of one and log-probs of the other are --load without --score."""
    from argparse import Namespace

    args = Namespace(
        score=False, score_only=False, policy="hf:m", load="x", shard=None, temperature=1.0,
        top_k=50, top_p=1.0, max_new_tokens=8, mask_share=0.15, replace_share=0.5,
    )  # fmt: skip
    use = arguments.policy_use_from_args(args, ToyTokenizer())
    assert use is not None and not use.score
    setattr(args, flag, True)
    message = rf"--{flag.replace('_', '-')} --policy hf:m --load x: two models to score under"
    with pytest.raises(ValueError, match=message):
        arguments.policy_use_from_args(args, ToyTokenizer())


@pytest.mark.parametrize("flag", ["score", "score_only"])
def test_a_shard_is_not_scored_under_a_checkpoint(flag):
    from argparse import Namespace

    args = Namespace(score=False, score_only=False, policy=None, load="x", shard="0/2")
    setattr(args, flag, True)
    message = rf"--{flag.replace('_', '-')} --shard 0/2: .*without --shard"
    with pytest.raises(ValueError, match=message):
        arguments.policy_use_from_args(args, ToyTokenizer())
