"""Packing and encoding: against rules written out here, and the tokens of inference."""

import itertools
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch

from mobilemoe.train.data import collate
from mobilemoe.train.documents import Document, UnreadableExample, as_messages, encode, pack, sequence


PAD = 497


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def learned(document, tokenizer):
    """The runs of tokens that the loss counts, as text."""
    runs = itertools.groupby(zip(document.input_ids, document.labels, strict=True), key=lambda pair: pair[1] != -100)
    assert all(token == label for token, label in zip(document.input_ids, document.labels, strict=True) if label >= 0)
    return [tokenizer.decode([token for token, _ in run]) for counted, run in runs if counted]


# Packing


def test_pack_takes_the_longest_first_and_the_tightest_place():
    # 6 and 5 open a sequence each; 4 fits only beside 6, 3 beside 5 (2 are left), 2 there too; 1 opens the last.
    assert pack([1, 6, 2, 4, 5, 3], 10) == [[1, 3], [4, 5, 2], [0]]
    # First fit would put 3 beside 6, where 4 are left; best fit fills the 3 beside 7.
    assert pack([6, 7, 3], 10) == [[1, 2], [0]]
    assert pack([], 10) == []


def test_pack_keeps_every_document_once_and_is_tighter_than_next_fit():
    generator = random.Random(0)
    lengths = [generator.randint(1, 100) for _ in range(2000)]
    bins = pack(lengths, 100)
    assert sorted(index for chosen in bins for index in chosen) == list(range(2000))
    assert max(sum(lengths[index] for index in chosen) for chosen in bins) <= 100
    next_fit, space = 0, 0
    for length in lengths:
        if length > space:
            next_fit, space = next_fit + 1, 100
        space -= length
    fewest = math.ceil(sum(lengths) / 100)
    assert len(bins) <= 1.02 * fewest < 1.2 * fewest < next_fit


def documents_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    texts = [generator.integers(3, 490, length) for length in lengths]
    return [Document(text, text) for text in texts]


def test_sequence_counts_no_first_token_and_no_padding():
    first = Document(np.array([10, 11, 12]), np.array([10, 11, 12]))
    second = Document(np.array([20, 21, 22]), np.array([20, -100, 22]))
    row = sequence([first, second], 8, PAD)
    assert row["input_ids"].tolist() == [10, 11, 12, 20, 21, 22, PAD, PAD]
    assert row["labels"].tolist() == [-100, 11, 12, -100, -100, 22, -100, -100]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert sequence([first], 3, PAD)["labels"].tolist() == [-100, 11, 12]
    assert first.labels.tolist() == [10, 11, 12]


PACKS = [[9, 14, 5], [20, 7]]


@pytest.mark.parametrize("flatten", [False, True])
def test_documents_of_a_pack_do_not_see_each_other(tiny_model, flatten):
    """On sdpa and without a cache, as a recipe trains: position_ids alone, no attention mask."""
    assert tiny_model.config._attn_implementation == "sdpa"
    packs = [documents_of(lengths, seed) for seed, lengths in enumerate(PACKS)]
    batch = collate([sequence(documents, 32, PAD) for documents in packs], flatten)
    assert batch["input_ids"].shape == ((1, 64) if flatten else (2, 32))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    others = [[pack[0], *documents_of(lengths[1:], seed=9)] for pack, lengths in zip(packs, PACKS, strict=True)]
    changed = collate([sequence(documents, 32, PAD) for documents in others], flatten)
    forward = partial(tiny_model, use_cache=False)
    with torch.no_grad():
        logits, logits_beside_others = (
            forward(input_ids=rows["input_ids"], position_ids=rows["position_ids"]).logits.reshape(2, 32, -1)
            for rows in (batch, changed)
        )
        joined = forward(input_ids=batch["input_ids"]).logits.reshape(2, 32, -1)
        for row, documents in enumerate(packs):
            start = 0
            for number, document in enumerate(documents):
                place = slice(start, start + len(document.input_ids))
                alone = forward(input_ids=torch.from_numpy(document.input_ids)[None]).logits[0]
                torch.testing.assert_close(logits[row, place], alone, atol=1e-5, rtol=1e-5)
                if number == 0:
                    # The same but for the sums of an expert's batch, which holds other tokens too.
                    torch.testing.assert_close(
                        logits[row, place], logits_beside_others[row, place], atol=1e-5, rtol=1e-5
                    )
                else:
                    # Without positions the documents are one text, and the comparison above would fail.
                    assert (joined[row, place] - alone).abs().max() > 0.1
                start = place.stop


@pytest.mark.parametrize("flatten", [False, True])
def test_documents_of_a_pack_give_each_other_no_gradient(tiny_model, flatten):
    packs = [documents_of(lengths, seed) for seed, lengths in enumerate(PACKS)]
    batch = collate([sequence(documents, 32, PAD) for documents in packs], flatten)
    embeddings = tiny_model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = tiny_model(inputs_embeds=embeddings, position_ids=batch["position_ids"], use_cache=False).logits
    # The second document of the first pack: 14 tokens from position 9 on.
    (gradient,) = torch.autograd.grad(logits.reshape(64, -1)[9:23].logsumexp(-1).sum(), embeddings)
    moved = gradient.reshape(64, -1).abs().sum(-1)
    assert (moved[9:23] > 0).all()
    assert (moved[:9] == 0).all() and (moved[23:] == 0).all()


# Encoding


def test_text_has_begin_and_end_and_loses_nothing(tokenizer):
    text = "def add(value):\n    return value + 1\n" * 3
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert (whole[0], whole[-1]) == (496, 497)
    short, long, empty, missing = encode(
        [{"text": "a b"}, {"text": text}, {"text": ""}, {"text": None}], "text", tokenizer, 16
    )
    assert [document.input_ids.tolist() for document in short] == [tokenizer("a b")["input_ids"] + [497]]
    assert [len(document.input_ids) for document in long[:-1]] == [16] * (len(whole) // 16)
    assert [token for document in long for token in document.input_ids] == whole
    assert all((document.labels == document.input_ids).all() for document in short + long)
    assert empty == missing == []


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    user("What is two plus two?"),
    assistant("It is four."),
    {"role": "tool", "content": "4"},
    user("And three?"),
    assistant("Then five."),
    user("Thank you"),
]


def test_chat_learns_exactly_the_answers(chat_tokenizer):
    ((document,),) = encode([{"messages": CONVERSATION}], "chat", chat_tokenizer, 256)
    assert learned(document, chat_tokenizer) == ["It is four.<|eot|>", "Then five.<|eot|>"]
    # The last user turn, which nobody answers, is gone; everything else is as the template renders it.
    whole = chat_tokenizer.apply_chat_template(CONVERSATION[:-1], tokenize=False)
    assert chat_tokenizer.decode(document.input_ids) == whole
    assert "Thank you" not in whole and whole.count("<|begin_of_text|>") == 1


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]


def test_calls_of_tools_are_learnt_and_definitions_are_not(chat_tokenizer):
    messages = [
        user("What is two plus two?"),
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": "4"},
        assistant("It is four."),
    ]
    row = {"messages": messages, "tools": [ADD]}
    ((document,),) = encode([row], "chat", chat_tokenizer, 512)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert learned(document, chat_tokenizer) == [f"{call}<|eot|>", "It is four.<|eot|>"]
    whole = chat_tokenizer.apply_chat_template(as_messages(messages), [ADD], tokenize=False)
    assert chat_tokenizer.decode(document.input_ids) == whole and '"name": "add", "parameters"' in whole
    # As data sets are stored: definitions as JSON, and what some objects of a column have as null in all others.
    null = {"properties": None, "b": None}
    stored = {
        "messages": [
            message | {"tool_calls": None} if index != 1 else message | {"name": None}
            for index, message in enumerate(messages)
        ],
        "tools": json.dumps([ADD]),
    }
    filled = row | {"tools": [{**ADD, "function": ADD["function"] | null}]}
    for same in (stored, filled):
        ((other,),) = encode([same], "chat", chat_tokenizer, 512)
        assert other.input_ids.tolist() == document.input_ids.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "["}, "its tools are not JSON"),
        ({"tools": {"name": "add"}}, "its tools are dict, not a list of objects"),
        ({"tools": '["add"]'}, "its tools are list, not a list of objects"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": "add"}]}, "tool_calls of its assistant message"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [{"name": 1}]}]}, "no list of calls"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "lacks role or content"),
    ],
)
def test_broken_tools_are_refused(chat_tokenizer, change, message):
    with pytest.raises(UnreadableExample, match=message):
        encode([{"messages": [user("a"), assistant("b")]} | change], "chat", chat_tokenizer, 512)


@pytest.mark.parametrize("content", [" four", "\nfour", "\n\n four", "1234", "'s"])
def test_chat_prompts_have_the_tokens_of_inference(chat_tokenizer, content):
    """Whatever an answer begins with: the last token of its prompt does not merge with it."""
    messages = [*CONVERSATION[:2], assistant(content), *CONVERSATION[3:5], assistant(content)]
    ((document,),) = encode([{"messages": messages}], "chat", chat_tokenizer, 256)
    for turn in (2, 5):
        prompt = chat_tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert document.input_ids[: len(prompt)].tolist() == prompt
        assert document.labels[len(prompt) - 1] == -100
        assert document.labels[len(prompt)] == document.input_ids[len(prompt)]
    assert learned(document, chat_tokenizer) == [content + "<|eot|>"] * 2


def test_pairs_are_strings_or_messages_or_both(chat_tokenizer):
    question, answer = "What is two plus two?", "It is four."
    rows = [
        {"prompt": question, "completion": answer},
        {"prompt": [user(question)], "completion": [assistant(answer)]},
        {"prompt": [user(question)], "completion": answer},
        {"prompt": question, "completion": [assistant(answer)]},
    ]
    encoded = encode(rows, "pair", chat_tokenizer, 256)
    prompt = chat_tokenizer.apply_chat_template([user(question)], add_generation_prompt=True)["input_ids"]
    for (document,) in encoded:
        assert document.input_ids[: len(prompt)].tolist() == prompt
        assert learned(document, chat_tokenizer) == [answer + "<|eot|>"]
        assert (document.input_ids == encoded[0][0].input_ids).all()


def test_pairs_do_not_learn_the_answers_of_their_prompt(chat_tokenizer):
    row = {"prompt": CONVERSATION[:5], "completion": "Then five."}
    ((document,),) = encode([row], "pair", chat_tokenizer, 256)
    assert learned(document, chat_tokenizer) == ["Then five.<|eot|>"]
    assert "It is four." in chat_tokenizer.decode(document.input_ids)


def test_sharegpt_keys_mean_the_same(chat_tokenizer):
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{"from": speakers.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in CONVERSATION]
    (expected,), (document,) = encode([{"messages": CONVERSATION}, {"messages": turns}], "chat", chat_tokenizer, 256)
    assert (document.input_ids == expected.input_ids).all() and (document.labels == expected.labels).all()


def test_chat_that_is_too_long_loses_its_end(chat_tokenizer):
    ((whole,),) = encode([{"messages": CONVERSATION}], "chat", chat_tokenizer, 256)
    ((document,),) = encode([{"messages": CONVERSATION}], "chat", chat_tokenizer, 60)
    assert (document.input_ids == whole.input_ids[:60]).all() and (document.labels == whole.labels[:60]).all()
    first = int((whole.labels != -100).argmax())
    assert encode([{"messages": CONVERSATION}], "chat", chat_tokenizer, first) == [[]]
    assert len(encode([{"messages": CONVERSATION}], "chat", chat_tokenizer, first + 1)[0]) == 1


def test_empty_answers_are_left_out(chat_tokenizer):
    rows = [
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": [assistant("")]},
        {"prompt": None, "completion": "b"},
    ]
    *empty, (document,) = encode(rows, "pair", chat_tokenizer, 64)
    assert empty == [[], [], []]
    assert learned(document, chat_tokenizer) == ["b<|eot|>"]
    # One of two answers: it is read and not learned.
    messages = [user("a"), assistant(""), user("b"), assistant("c")]
    ((document,),) = encode([{"messages": messages}], "chat", chat_tokenizer, 64)
    assert learned(document, chat_tokenizer) == ["c<|eot|>"]
    assert chat_tokenizer.decode(document.input_ids) == chat_tokenizer.apply_chat_template(messages, tokenize=False)
