"""What a model is told of a record: instruction and response without a template around them."""

import numpy as np
import pytest

from megatron_cpo.records import pair_files
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.pair_files import write_pairs_resumed
from megatron_cpo.records.source import Source
from megatron_cpo.records.speller import Speller
from tests.texts import dolly_tokenizer, write_jsonl
from tests.tokenizer_kinds import CHATML

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
RECORDS = [
    ({"prompt": "Why? ", "completion": "So."}, ("Why? ", "So.")),
    ({"instruction": "Why?", "context": "", "response": "So."}, ("Why?", "So.")),
    ({"instruction": "Why?", "input": "It is.", "output": "So."}, ("Why?\n\nIt is.", "So.")),
    ({"messages": TURNS}, ("Why?", "So.")),
    (
        {"messages": [{"role": "system", "content": "Hm."}, *TURNS, *TURNS]},
        ("system: Hm.\n\nuser: Why?\n\nassistant: So.\n\nuser: Why?", "So."),
    ),
    ({"prompt": "Why?", "chosen": TURNS, "rejected": [TURNS[0], TURNS[1]]}, ("Why?", "So.")),
    ({"instruction": "Why?", "chosen": "So.", "rejected": "No."}, ("Why?", "So.")),
    ({"prompt": "Why? ", "chosen": "So.", "rejected": "No."}, ("Why? ", "So.")),
    ({"text": "Why? So. And so on."}, None),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dolly_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


def test_records_of_every_shape(tokenizer, tmp_path, monkeypatch):
    """Interrupted half way: texts go on behind those of the records that are noted."""
    source = Source((write_jsonl(tmp_path / "r.jsonl", *(record for record, _ in RECORDS)),))
    monkeypatch.setattr(pair_files, "NOTE_LINES", 2)
    left = iter(range(5))

    def interrupted(_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs_resumed(source, tokenizer, 0, tmp_path, interrupted, texts=True)
    pairs = write_pairs_resumed(source, tokenizer, 0, tmp_path, lambda _: None, texts=True)
    assert [pairs.texts[i] for i in range(len(pairs))] == [texts for _, texts in RECORDS]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert write_pairs_resumed(source, tokenizer, 0, plain, lambda _: None).texts is None
    assert (plain / "pairs.bin").read_bytes() == (tmp_path / "pairs.bin").read_bytes()


def test_texts_that_a_template_wrote_and_tokens_are_spelled_without_control_tokens(
    tokenizer, tmp_path
):
    record = {"prompt": "</s>Why? ", "completion": "So.</s>"}
    path = write_jsonl(tmp_path / "r.jsonl", record)
    source = Source((path,), control_tokens="parse")
    pairs = write_pairs_resumed(source, tokenizer, 0, tmp_path, lambda _: None, texts=True)
    assert pairs.texts[0] is None
    assert tokenizer.eod in pairs.prefix(0)
    body = pairs.continuation(0)
    found = Speller(Encoder(tokenizer)).pair(pairs.prefix(0), body)
    assert found == ("Why?", "So.")
    assert not np.isin(tokenizer.eod, body[:-1])
