"""Where an answer ends: every end that a model declares, and the whole end of a turn."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_cpo.groups.endings import ending_length, endings_of
from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_policy import policy_samplers
from megatron_cpo.negatives.from_records import context_of, truncation_negative
from megatron_cpo.policies.ends import checkpoint_ends, declared_ends
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.border import BORDERS, Border
from tests.policies import EOD, contexts, rngs, slow_sample
from tests.texts import ListedPairs, ToyTokenizer
from tests.tiny_models import save_hugging_face

TURN = (90, 91)
"""`<|im_end|>` and a line break, say."""


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 7}}, {7}),
        ({"config.json": {"eos_token_id": None}}, set()),
        ({"generation_config.json": {"eos_token_id": [3, 4]}}, {3, 4}),
        (
            {"generation_config.json": {"eos_token_id": [3]}, "config.json": {"eos_token_id": 5}},
            {3, 5},
        ),
        ({"config.json": {"text_config": {"eos_token_id": [8, 9]}}}, {8, 9}),
        ({"config.json": {"eos_token_id": [99, 100, -1]}}, {99}),
        ({"generation_config.json": {}}, set()),
    ],
)  # fmt: skip
def test_declared_ends(tmp_path, files, ends):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert declared_ends(tmp_path, 100) == ends


def test_ends_of_a_megatron_checkpoint(tmp_path):
    """Of the model's folder beside a converted one, and of the run's tokenizer."""
    for name, end in (("load/hugging_face", 3), ("model", 4)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"eos_token_id": end}))
    load, model = str(tmp_path / "load"), str(tmp_path / "model")
    assert checkpoint_ends(load, model, 100) == {3, 4}
    assert checkpoint_ends(load, None, 100) == {3}
    assert checkpoint_ends(str(tmp_path), str(tmp_path / "tokenizer.model"), 100) == set()
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model/config\.json: not JSON .* copy the model again"):
        checkpoint_ends(load, model, 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hugging_face(tmp_path_factory.mktemp("ends"), "gpt2")


def test_samples_stop_at_every_end_and_keep_it(folder):
    """Half of the vocabulary is declared as an end, and two more tokens are asked for."""
    path = f"{folder}/generation_config.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"eos_token_id": [*range(0, 90, 2), 100]}, file)
    policy = HuggingFacePolicy(folder, ToyTokenizer(), batch=32)
    assert policy.ends == {*range(0, 90, 2), EOD}
    ends, sampling, block = policy.ends | {1, 3}, Sampling(top_k=40), contexts(8)
    drawn = policy.sample(
        [c.prefix for c in block], [9] * 8, 4, rngs(block, "an"), sampling, (1, 3)
    )
    for context, rng, found in zip(block, rngs(block, "an"), drawn, strict=True):
        expected = slow_sample(policy, context.prefix, 9, 4, rng, sampling, ends)
        assert [c.tolist() for c in found] == expected
    assert len({int(c[-1]) for found in drawn for c in found}) > 5


class ListedSamples:
    """A policy that gives these samples, to see what becomes of their ends."""

    kinds, positions = ("an",), None
    ends = frozenset({EOD})

    def __init__(self, *samples):
        self.samples = samples

    def sample(self, prefixes, limits, count, rngs, sampling, stops=()):
        self.stops = set(stops)
        return [[np.array(s, dtype=np.int32) for s in self.samples] for _ in prefixes]


def chat_context(body=(1, 2, 3, 4, 5), room=None):
    """A record whose y_1 ends in `TURN`, of which decoding stops at the first."""
    pairs = ListedPairs([*body, *TURN])
    row = Border("p", "a", ending=TURN, after=1).row()
    pairs.borders = np.frombuffer(row, BORDERS)
    return replace(context_of(0, Answers(pairs), EOD, None), room=room)


def test_an_keeps_the_end_that_was_drawn():
    """y_1's own end token gets what follows it in y_1; a cut sample gets all of y_1's ending."""
    context = chat_context()
    policy = ListedSamples([7, 8, 90], [7, EOD], [7, 8, 9, 6, 5, EOD], [90])
    [drawn] = policy_samplers(policy, Sampling(max_new_tokens=6))["an"]([context], 4, [None])
    assert [c.tolist() for c in drawn] == [[7, 8, *TURN], [7, EOD], [7, 8, 9, 6, *TURN], [*TURN]]
    assert policy.stops == {90}
    tight = chat_context(room=3)
    [drawn] = policy_samplers(ListedSamples([7, 8, EOD], [7, 90]))["an"]([tight], 2, [None])
    assert [c.tolist() for c in drawn] == [[7, *TURN], [7, *TURN]]


def test_truncations_have_the_whole_ending():
    rng = np.random.default_rng(0)
    drawn = [c.tolist() for c in truncation_negative(chat_context(), 4, rng)]
    assert sorted(drawn, key=len) == [[*range(1, n + 1), *TURN] for n in (1, 2, 3, 4)]
    assert [c.tolist() for c in truncation_negative(chat_context((1,)), 1, rng)] == [[*TURN]]


def test_endings_of_a_manifest():
    """The longest first, so that a line break behind an end token is no text of its own."""
    manifest = {
        "tokenizer": {"eod": 2}, "endings": [{"ids": [90, 91]}, {"ids": [2]}], "ends": [2, 90],
    }  # fmt: skip
    endings = endings_of(manifest)
    assert endings == ((90, 91), (2,), (90,))
    found = [ending_length(np.array(t), endings) for t in ([5, 90, 91], [5, 90], [91], [2], [])]
    assert found == [2, 1, 0, 1, 0]
    assert endings_of({"eod": 7}) == ((7,),), "of earlier releases"
    assert endings_of({}) == ()
