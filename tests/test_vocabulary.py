"""How many ids a tokenizer has: gaps, lists that are incomplete, and every user of the number."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_cpo.groups.indexed import store_dtype
from megatron_cpo.model.vocabulary import VocabShard
from megatron_cpo.negatives.from_records import group_rng
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.source import Source
from megatron_cpo.records.vocabulary import check_rows, describe_size, unused_ids, vocabulary_size
from tests.texts import ToyTokenizer, dolly_tokenizer, write_jsonl
from tests.tiny_models import save_hugging_face

WORDS = [f"w{i}" for i in range(80)]
GAP_END = 104


def save_tokenizer(folder: Path, last: int = GAP_END) -> None:
    """80 words with ids 0 .. 79, <eos> 80, and one more whose id is `last`."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(WORDS)} | {"<eos>": 80, "far": last}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 128 rows whose tokenizer has a gap."""
    path = tmp_path_factory.mktemp("gap")
    save_hugging_face(path, rows=128)
    save_tokenizer(path)
    return path


def megatron_tokenizer(folder):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=False,
        chat_template=None,
        trust_remote_code=False,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        vocab_file=None,
        merge_file=None,
    )
    return build_tokenizer(args)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return megatron_tokenizer(folder)


class Lists:
    """A tokenizer that lists its vocabulary in one of the ways of Megatron's."""

    def __init__(self, vocab_size, **listed):
        self.vocab_size = vocab_size
        for name, value in listed.items():
            setattr(self, name, value)


def tiktoken(folder):
    """Megatron's, of 300 tokens; its `inv_vocab` has ids up to 309."""
    import base64

    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    tokens = [bytes([i]) for i in range(256)] + [b"a" + bytes([i]) for i in range(97, 131)]
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for i, token in enumerate(tokens)
    ]
    (folder / "tiktoken.json").write_text(json.dumps(rows))
    return TikTokenTokenizer(
        str(folder / "tiktoken.json"), num_special_tokens=10, vocab_size=len(tokens) + 10
    )


@pytest.mark.parametrize(
    ("listing", "size", "unused"),
    [
        (Lists(5, vocab=list("abcde")), 5, []),
        (Lists(3, vocab={"a": 0, "b": 1, "c": 5}), 6, [2, 3, 4]),
        (Lists(3, inv_vocab={0: "a", 1: "b", 5: "c"}), 6, [2, 3, 4]),
        (Lists(3, vocab={"a": 1, "b": 2, "c": 3}), 4, [0]),
        (Lists(3, vocab={"a": 0, "b": 1, "c": 1}), 3, []),  # two names of one id: all are believed
        (Lists(9, vocab={"a": 0, "b": 1, "c": 5}), 9, []),  # special tokens are not listed
        (Lists(9, vocab={"a": 0, "b": 1, "c": 11}), 12, []),
        (Lists(9), 9, []),
        (ToyTokenizer(), 100, []),
    ],
)
def test_size_and_gaps(listing, size, unused):
    assert vocabulary_size(listing) == size
    assert unused_ids(listing).tolist() == unused


def test_megatrons_tokenizers(tmp_path, tokenizer, folder):
    from transformers import AutoTokenizer

    assert tokenizer.vocab_size == 82
    for each in (tokenizer, AutoTokenizer.from_pretrained(folder)):
        assert vocabulary_size(each) == 105
        assert unused_ids(each).tolist() == list(range(81, 104))
        assert describe_size(each) == "82 tokens with ids up to 104"
    pieces = dolly_tokenizer(tmp_path)
    assert (vocabulary_size(pieces), len(unused_ids(pieces))) == (1000, 0)
    assert describe_size(pieces) == "1000 tokens"
    ranks = tiktoken(tmp_path)
    assert (vocabulary_size(ranks), len(unused_ids(ranks))) == (300, 0)
    assert max(ranks.inv_vocab) == 309  # why it is not asked


def test_integers_are_wide_enough():
    few = Lists(3, vocab={"a": 0, "b": 1, "c": 70_000})
    assert np.iinfo(store_dtype(vocabulary_size(few))).max >= 70_000


def test_a_model_without_a_row_for_each_id_is_refused(tokenizer):
    check_rows(105, tokenizer)
    check_rows(None, ToyTokenizer())
    match = r"has 82 tokens with ids up to 104, the model's vocabulary 104 rows: make .*least 105"
    with pytest.raises(ValueError, match=match):
        check_rows(104, tokenizer)
    with pytest.raises(ValueError, match=r"vocabulary 82 rows"):
        check_rows(None, tokenizer)


def test_documents_may_have_any_id(tmp_path, tokenizer):
    from megatron_cpo.groups.indexed import IndexedWriter

    def read(name, ids):
        writer = IndexedWriter(str(tmp_path / name), np.uint16)
        writer.add(np.array(ids), [len(ids)])
        writer.close()
        return list(read_pairs(Source((str(tmp_path / name),)), tokenizer, Dropped()))

    assert read("a", [1, 104, 3])[0].continuation.tolist() == [104, 3, 80]
    with pytest.raises(ValueError, match=r"ids 1 to 105, .* has 82 tokens with ids up to 104"):
        read("b", [1, 105, 3])


def plain_logps(policy, sequence, start):
    """Sum of the log-probs of a sequence from a token on, over the ids that there are."""
    with torch.no_grad():
        logits = policy._model(torch.tensor([sequence])).logits[0, :, :105].float()
    logps = logits.log_softmax(-1)
    return sum(float(logps[t - 1, sequence[t]]) for t in range(start, len(sequence)))


def test_a_hugging_face_policy(folder, tokenizer, tmp_path):
    """Scores over all ids; draws none that no token has, whatever the model thinks of them."""
    policy = HuggingFacePolicy(str(folder), tokenizer)
    prefix, candidate = np.array([5, 104], dtype=np.int32), np.array([104, 7, 80], dtype=np.int32)
    [[found]] = policy.logps([prefix], [[candidate]])
    assert found == pytest.approx(plain_logps(policy, [5, 104, 104, 7, 80], 2), rel=1e-5)
    # A head that likes the gap above all: without a mask nothing else would be drawn.
    head = policy._model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(128))
    head.bias.data[81:104] = 50.0
    policy._head_alone = policy._applies_head_alone()
    for top_k in (0, 30):
        [samples] = policy.sample([prefix], [20], 8, [group_rng(1, 0, "an")], Sampling(top_k=top_k))
        drawn = {int(token) for sample in samples for token in sample}
        assert len(drawn) > 8 and drawn.isdisjoint(range(81, 104)) and max(drawn) <= 104
    places = [np.ones((4, 3), dtype=bool)]
    [copies] = policy.replacements([prefix], [candidate], places, 5, [group_rng(1, 0, "mn")])
    assert not np.isin(copies, range(81, 104)).any()


def test_models_of_another_size_are_refused(tmp_path, folder, tokenizer):
    save_hugging_face(tmp_path / "small", rows=104)
    match = r"104 rows in its vocabulary, --tokenizer-model has 82 tokens with ids up to 104"
    with pytest.raises(ValueError, match=match):
        HuggingFacePolicy(str(tmp_path / "small"), tokenizer)
    save_hugging_face(tmp_path / "other", rows=128)
    save_tokenizer(tmp_path / "other", last=81)
    match = r"its tokenizer has 82 tokens, --tokenizer-model has 82 tokens with ids up to 104"
    with pytest.raises(ValueError, match=match):
        HuggingFacePolicy(str(tmp_path / "other"), tokenizer)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_megatron_head(rank):
    """Of 12 rows on two ranks, 10 are ids, of which 2, 6 and 7 have no token."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(12, 4), torch.randn(3, 4)
    group = SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    part = slice(6 * rank, 6 * rank + 6)
    shard = VocabShard(weight[part], 10, group, np.array([2, 6, 7], dtype=np.int32))
    expected = (hidden @ weight.t())[:, part].clone()
    scored, drawn = expected.clone(), expected
    scored[:, [i for i in range(6) if 6 * rank + i >= 10]] = -torch.inf
    drawn[:, [i for i in range(6) if 6 * rank + i in (2, 6, 7, 10, 11)]] = -torch.inf
    torch.testing.assert_close(shard.logits(hidden), scored)
    torch.testing.assert_close(shard.drawable(hidden), drawn)


def test_pairs_keep_every_id(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "r.jsonl", {"prompt": "w1 far", "completion": " w2 far"})
    [pair] = read_pairs(Source((path,)), tokenizer, Dropped())
    assert (pair.prefix.tolist(), pair.continuation.tolist()) == ([1, 104], [2, 104, 80])
