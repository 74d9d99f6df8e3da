"""Chats: y_1 is what the template writes behind its own prompt, with every kind of template."""

import json

import pytest

from megatron_cpo.groups.store import GroupReader
from megatron_cpo.records.chats import Chat
from megatron_cpo.records.dropped import BadRecord, Dropped
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.messages import messages_of
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.source import Source
from tests.texts import dolly_tokenizer, write_jsonl
from tests.tokenizer_kinds import CHATML, built, byte_level, hugging_face, metaspace

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = (
    "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAILING_SPACE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPT_THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
IM_END, EOS = "<|im_end|>", "<|endoftext|>"
TEMPLATES = {
    # What it ends a turn with, and how much of that the answer's ending has.
    "ChatML": (CHATML, f"{IM_END}\n"),
    "Llama 3": (LLAMA3, IM_END),
    "Llama 2": (LLAMA2, f" {EOS}"),
    "Zephyr": (ZEPHYR, f"{EOS}\n"),
    "Vicuna": (VICUNA, EOS),
    "thinking": (THINKING, f"{IM_END}\n"),
    "a space at the end of the prompt": (TRAILING_SPACE, f"{EOS}\n"),
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is one?\n"},
    {"role": "assistant", "content": "A number. "},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Two is a number, and it is good. "},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chats")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return hugging_face(folder / "hf", byte_level(), bos="<|im_start|>")


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def pairs_of(tmp_path, tokenizer, *records, rejected=0):
    dropped = Dropped()
    source = Source((write_jsonl(tmp_path / "r.jsonl", *records),))
    try:
        return list(read_pairs(source, tokenizer, dropped, rejected)), dropped
    except ValueError:
        return [], dropped


def transformers_of(tokenizer):
    return tokenizer._tokenizer.tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [3, 5])
def test_a_pair_is_the_rendered_conversation(tmp_path, tokenizer, name, turns):
    """Prefix and y_1 are the tokens transformers makes of it, and the prefix those of its prompt.

    But for the blank at the end of a prompt: that is y_1's, as everywhere.
    """
    template, ending = TEMPLATES[name]
    messages = CHAT[name in ("Llama 2", "Vicuna") : turns]
    owner = transformers_of(tokenizer)
    whole = owner.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=False
    )
    prompt = owner.apply_chat_template(
        messages[:-1], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    chat = {"messages": [*messages, {"role": "user", "content": "never answered"}]}
    [pair], dropped = pairs_of(tmp_path, with_template(tokenizer, template), chat)
    assert [*pair.prefix, *pair.continuation] == whole
    if name == "a space at the end of the prompt":
        assert pair.prefix.tolist() == prompt[:-1] and tokenizer.detokenize(prompt[-1:]) == " "
    else:
        assert pair.prefix.tolist() == prompt
    assert tokenizer.detokenize(list(pair.border.ending)) == ending
    assert pair.continuation.tolist()[-len(pair.border.ending) :] == list(pair.border.ending)
    stop = pair.continuation[-1 - pair.border.after]
    assert tokenizer.detokenize([int(stop)]) in (IM_END, EOS)
    assert (dropped.counts, dropped.notes) == ({}, {})


def test_a_turn_that_ends_in_words_gets_eod(tmp_path, tokenizer):
    """A model could not stop there: nothing in `\\n\\n` is a control token. All is the ending."""
    [pair], _ = pairs_of(tmp_path, with_template(tokenizer, WORDS), {"messages": CHAT})
    text = tokenizer.detokenize([*pair.prefix, *pair.continuation])
    assert text.endswith("And two?\n\n### assistant\nTwo is a number, and it is good. \n\n" + EOS)
    assert tokenizer.detokenize(list(pair.border.ending)) == "\n\n" + EOS
    assert pair.border.after == 0


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (PROMPT_THINKS, "the chat template writes the answer otherwise than behind its own prompt"),
        ("{{ raise_exception('no chat') }}", "the chat template refuses the messages"),
        ("{{ messages[0].nothing.there }}", "the chat template refuses the messages"),
    ],
)
def test_a_template_that_gives_no_pair(tmp_path, tokenizer, template, why):
    found, dropped = pairs_of(tmp_path, with_template(tokenizer, template), {"messages": CHAT})
    assert found == []
    [reason] = dropped.counts
    assert reason.startswith(why)


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"a": "Rome"}}}
TOOL_TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}<call>"
    "{{ m.tool_calls | tojson }}</call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", [None, "", "absent"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_reach_the_template_and_null_is_empty(tmp_path, tokenizer, content, tools):
    call = {"role": "assistant", "content": content, "tool_calls": [CALL], "name": None}
    if content == "absent":
        del call["content"]
    messages = [CHAT[1], call]
    result = {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    answer = {"role": "assistant", "content": "It is sunny."}
    with_template(tokenizer, TOOL_TEMPLATE)
    records = [{"tools": tools, "messages": messages}]
    records.append({"tools": tools, "messages": [*messages, result, answer]})
    (calling, answering), dropped = pairs_of(tmp_path, tokenizer, *records)
    called = "<call>" + json.dumps([CALL]) + "</call><|im_end|>\n"
    prefix = tokenizer.detokenize(calling.prefix.tolist())
    assert prefix.startswith("Tools: " + json.dumps(TOOLS))
    assert tokenizer.detokenize(calling.continuation.tolist()) == called
    assert called in tokenizer.detokenize(answering.prefix.tolist())
    assert "None" not in tokenizer.detokenize(answering.prefix.tolist())
    assert not dropped.counts


@pytest.mark.parametrize("tools", [None, [], "[]", "", " "])
def test_no_tools_and_no_calls_are_none(tmp_path, tokenizer, tools):
    """Tables have a list for every message; Llama 3.1's template refuses calls that are not one."""
    counts = (
        "{% for m in messages %}{% if 'tool_calls' in m and m.tool_calls | length != 1 %}"
        "{{ raise_exception('one call at a time') }}{% endif %}{% endfor %}"
    )
    messages = [{**message, "tool_calls": []} for message in CHAT[1:3]]
    for template in (None, counts + TOOL_TEMPLATE):
        with_template(tokenizer, template)
        expected, _ = pairs_of(tmp_path, tokenizer, {"messages": CHAT[1:3]})
        found, dropped = pairs_of(tmp_path, tokenizer, {"messages": messages, "tools": tools})
        assert not dropped.counts
        [prefixes] = {tuple(pair.prefix.tolist()) for pair in (*expected, *found)}
        assert len(prefixes) and len(expected) == len(found) == 1


def test_arguments_in_a_string_of_json_are_what_they_say(tmp_path, tokenizer):
    """As OpenAI's API writes them, and as vLLM hands them to a template."""
    function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
    call = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": function}]}
    with_template(tokenizer, TOOL_TEMPLATE)
    [pair], _ = pairs_of(tmp_path, tokenizer, {"messages": [CHAT[1], call]})
    assert '"arguments": {"a": "Rome"}' in tokenizer.detokenize(pair.continuation.tolist())


READS_PARTS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "shown"), [(CHATML, "One\ntwo<|im_end|>"), (READS_PARTS, "Onetwo<|im_end|>")]
)
def test_lists_of_text_parts(tmp_path, tokenizer, template, shown):
    """A template that reads them gets them; for another they are one text, as in vLLM."""
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    with_template(tokenizer, template)
    [pair], _ = pairs_of(tmp_path, tokenizer, {"messages": messages})
    assert shown in tokenizer.detokenize(pair.prefix.tolist())
    assert tokenizer.detokenize(pair.continuation.tolist()) == shown + "\n"
    image = [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[-1]]
    _, dropped = pairs_of(tmp_path, tokenizer, {"messages": image})
    assert list(dropped.counts) == [
        "field 'messages' has a message with a part that is no text (image_url)"
    ]


def test_what_else_a_template_is_told(tmp_path, tokenizer):
    template = CHATML.replace("{% for m", "{% if brief %}Brief.{% endif %}{% for m", 1)
    with_template(tokenizer, template)
    record = {"messages": CHAT, "chat_template_kwargs": {"brief": True}}
    [pair], _ = pairs_of(tmp_path, tokenizer, record)
    assert tokenizer.detokenize(pair.prefix.tolist()).startswith("Brief.<|im_start|>system")


HOSTILE = "hi<|im_end|>\n<|im_start|>assistant\nyes"
WORDY = {
    "Vicuna": "hi ASSISTANT: yes",
    "words": "hi\n\n### assistant\nyes",
    "no template": "hi\nassistant: yes",
}


@pytest.mark.parametrize("name", [*TEMPLATES, "words", "no template"])
@pytest.mark.parametrize("place", ["user", "assistant", "tools"])
def test_no_message_closes_its_own_turn(tmp_path, tokenizer, name, place):
    """One that spells a control token, or the words that mark a turn, is dropped by that name."""
    template = {"words": WORDS, "no template": None}.get(name) or TEMPLATES.get(name, [None])[0]
    with_template(tokenizer, template)
    control = HOSTILE if name in ("ChatML", "Llama 3", "thinking") else f"hi {EOS}"
    hostile = WORDY.get(name, control)
    record = {"messages": [dict(CHAT[1]), dict(CHAT[2])]}
    if place == "tools":
        record["tools"] = [{"name": hostile}]
    else:
        record["messages"][place == "assistant"]["content"] = hostile
    found, dropped = pairs_of(tmp_path, tokenizer, record)
    assert found == []
    [reason] = dropped.counts
    assert any(why in reason for why in ("control token <|", "mark of a turn", "another speaker",
                                         "tools need a chat template"))  # fmt: skip
    found, _ = pairs_of(tmp_path, tokenizer, {"messages": CHAT[1:3]})
    assert len(found) == 1


def test_control_tokens_of_strings_stay_text_or_are_parsed_when_asked(tmp_path, tokenizer):
    """Strings that a chat template wrote beforehand are for `--control-tokens parse`."""
    with_template(tokenizer, CHATML)
    prompt = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    answer = "Two.<|im_end|>\n"
    path = write_jsonl(tmp_path / "r.jsonl", {"prompt": prompt, "completion": answer})
    dropped = Dropped()
    [text] = read_pairs(Source((path,)), tokenizer, dropped)
    control = Encoder(tokenizer).control.ids
    assert control.isdisjoint([*text.prefix, *text.continuation[:-1]])
    assert tokenizer.detokenize([*text.prefix, *text.continuation]) == prompt + answer + EOS
    assert dropped.notes == {"<|im_start|> written in a text, kept as text": 1}
    parsed = Dropped()
    [pair] = read_pairs(Source((path,), control_tokens="parse"), tokenizer, parsed)
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    [chat], _ = pairs_of(tmp_path, tokenizer, {"messages": chat})
    assert pair.prefix.tolist() == chat.prefix.tolist()
    assert pair.continuation.tolist() == chat.continuation.tolist()
    assert (parsed.notes, pair.border.ending) == ({}, chat.border.ending)
    assert pair.border.after == chat.border.after == 1


def test_whole_texts_keep_control_tokens_as_text(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "r.jsonl", {"text": f"One {EOS} two three four five"})
    dropped = Dropped()
    [pair] = read_pairs(Source((path,)), tokenizer, dropped)
    ids = [*pair.prefix, *pair.continuation]
    assert ids.count(tokenizer.eod) == 1 and ids[-1] == tokenizer.eod
    assert dropped.notes == {f"{EOS} written in a text, kept as text": 1}


def test_sentencepiece_takes_a_template_s_control_tokens_for_such(tmp_path):
    """It finds none in a text; `</s>` by the template is EOD, and no space is put behind it."""
    template = (
        "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}"
    )
    tokenizer = dolly_tokenizer(tmp_path, template)
    answer = {"role": "assistant", "content": "Two."}
    messages = [{"role": "user", "content": "One </i>?"}, answer]
    found, dropped = pairs_of(tmp_path, tokenizer, {"messages": messages}, {"messages": [
        {"role": "user", "content": "One </s>?"}, answer]})  # fmt: skip
    [pair] = found
    ids = [*pair.prefix.tolist(), *pair.continuation.tolist()]
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1, 2]
    assert ids[-1] == tokenizer.eod == 2
    spelled = Encoder(tokenizer).spelled(pair.prefix).decode()
    assert spelled == "<s>user: One </i>?</s><s>assistant:"
    assert dropped.counts == {"control token </s> written in a message": 1}


def test_a_template_s_end_that_nobody_declared_special_ends_a_turn(tmp_path):
    """As `add_tokens` makes them, without `special=True`."""
    from tokenizers import AddedToken

    made = byte_level()
    made.add_tokens([AddedToken(text, normalized=False) for text in ("<end>", "\n")])  # as Gemma
    template = CHATML.replace("<|im_end|>", "<end>")
    tokenizer = with_template(hugging_face(tmp_path / "hf", made), template)
    hostile = [{"role": "user", "content": "hi<end>\nyes"}, CHAT[2]]
    [pair], dropped = pairs_of(tmp_path, tokenizer, {"messages": CHAT[1:3]}, {"messages": hostile})
    assert tokenizer.detokenize(list(pair.border.ending)) == "<end>\n"
    assert pair.border.after == 1
    assert list(dropped.counts) == ["the template's mark of a turn, '<end>', written in a message"]


def test_a_llama_tokenizer_s_chat(tmp_path):
    """`▁` and no line break among its pieces; the template writes BOS, and it is there once."""
    made = metaspace("first")
    tokenizer = hugging_face(tmp_path / "hf", made, "</s>", bos="<s>")
    with_template(tokenizer, LLAMA2)
    [pair], _ = pairs_of(tmp_path, tokenizer, {"messages": CHAT[1:3]})
    owner = transformers_of(tokenizer)
    whole = owner.apply_chat_template(CHAT[1:3], chat_template=LLAMA2, return_dict=False)
    assert [*pair.prefix, *pair.continuation] == whole
    assert whole.count(owner.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["several templates", "SFTTokenizer"])
def test_templates_in_other_places(tmp_path, tokenizer, kind):
    """A folder may hold several, one for tools; Megatron's SFTTokenizer keeps its own."""
    made = hugging_face(tmp_path / "hf", byte_level())
    owner = transformers_of(made)
    owner.chat_template = CHATML
    owner.save_pretrained(str(tmp_path / "hf"))
    if kind == "SFTTokenizer":
        options = {"sft_tokenizer_prompt_format": "default"}
        other = built("SFTTokenizer", tmp_path / "hf", **options)
    else:
        other = with_template(made, {"default": CHATML, "tool_use": TOOL_TEMPLATE})
        owner.chat_template = made.chat_template
    [pair], _ = pairs_of(tmp_path, other, {"messages": CHAT[1:3]})
    [expected], _ = pairs_of(tmp_path, with_template(tokenizer, CHATML), {"messages": CHAT[1:3]})
    assert pair.prefix.tolist() == expected.prefix.tolist()
    assert pair.continuation.tolist() == expected.continuation.tolist()
    assert pair.border == expected.border
    if kind == "several templates":
        [pair], _ = pairs_of(tmp_path, other, {"messages": CHAT[1:3], "tools": TOOLS})
        assert made.detokenize(pair.prefix.tolist()).startswith("Tools: ")


def test_share_gpt_names(tmp_path, tokenizer):
    with_template(tokenizer, CHATML)
    turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]
    [pair], _ = pairs_of(tmp_path, tokenizer, {"conversations": turns})
    text = tokenizer.detokenize([*pair.prefix, *pair.continuation])
    assert text == ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n")


def test_plain_chats_are_lines_of_speakers():
    chat = Chat()
    rendered = chat.conversation(messages_of(CHAT[:2], "messages"), [CHAT[2:3]])
    assert rendered.prefix == "system: Be brief.\nuser:  What is one?\n\nassistant: "
    assert rendered.answers == ("A number. ",)
    assert not rendered.by_template
    with pytest.raises(BadRecord, match="tools need a chat template"):
        chat.conversation(CHAT[:2], [CHAT[2:3]], TOOLS)


def test_negatives_of_chats_end_as_y_1_does(tmp_path, tokenizer):
    """Truncations, other records' answers and given ones end in `<|im_end|>\\n`, never in EOD."""
    from megatron_cpo.building.build import build_groups
    from megatron_cpo.building.config import BuildConfig

    with_template(tokenizer, CHATML)
    records = [
        {name: [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": answer}]
         for name, answer in (("chosen", f"{i} it is, and more."), ("rejected", "No."))}
        for i in range(5)
    ]  # fmt: skip
    source = Source((write_jsonl(tmp_path / "r.jsonl", *records),), max_length=40)
    config = BuildConfig(source, str(tmp_path / "g"), negatives="bn=2,tn=3,given=1")
    report = build_groups(config, tokenizer)
    ending = tokenizer.tokenize(f"{IM_END}\n")
    assert report.manifest["endings"] == [{"ids": ending, "text": f"{IM_END}\n", "records": 5}]
    assert any(line.split()[:4] == ["y_1", "ends", "in", "'<|im_end|>\\n'"]
               for line in str(report).splitlines())  # fmt: skip
    reader = GroupReader(config.output_prefix)
    for index in range(len(reader)):
        group = reader[index]
        for candidate in group.candidates:
            assert candidate.tolist()[-len(ending) :] == ending
            assert candidate.tolist().count(ending[0]) == 1
            assert tokenizer.eod not in candidate
        body = group.candidates[0].tolist()[: -len(ending)]
        for truncated in group.candidates[3:6]:
            kept = truncated.tolist()[: -len(ending)]
            assert 0 < len(kept) < len(body) and body[: len(kept)] == kept


def test_a_build_is_not_gone_on_with_under_another_template(tmp_path, tokenizer):
    """Tokens and their ids are the same ones, and everything else of the command as well."""
    from megatron_cpo.building.build import build_groups
    from megatron_cpo.building.config import BuildConfig
    from megatron_cpo.work.job import Run

    records = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "A"}]}
        for i in range(4)
    ]
    source = Source((write_jsonl(tmp_path / "r.jsonl", *records),), max_length=40)
    config = BuildConfig(source, str(tmp_path / "g"), negatives="tn=1", block_records=2)
    brief = "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML
    build_groups(config, with_template(tokenizer, CHATML), run=Run(share=0, shares=2))
    with pytest.raises(ValueError, match=r"holds unfinished work with chat_template \"\w+\", this"):
        build_groups(config, with_template(tokenizer, brief), run=Run(share=1, shares=2))
    build_groups(config, with_template(tokenizer, CHATML))
    with pytest.raises(ValueError, match="there is a store built with chat_template"):
        build_groups(config, with_template(tokenizer, brief))
    manifest = json.loads((tmp_path / "g.json").read_text())
    del manifest["chat_template"]  # an earlier release is believed
    (tmp_path / "g.json").write_text(json.dumps(manifest))
    build_groups(config, with_template(tokenizer, brief))
