"""The chat template: released text, what an assistant writes, tool calls; with transformers and TRL themselves."""

import json
import random

import jinja2
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from mobilemoe.export.gguf import without_generation_tags
from mobilemoe.train.documents import encode
from mobilemoe.train.recipe import CHAT_TEMPLATE


# That of the SFT and QAT releases, written out once more on purpose.
RELEASED_TEMPLATE = r"""{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' + message['content'] + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|header_start|>assistant<|header_end|>\n\n' -}}
{%- endif -%}
"""
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Five."},
]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def test_plain_conversations_are_rendered_as_released(chat_tokenizer):
    generator = random.Random(0)
    roles = ["system", "user", "assistant", "tool", "a role"]
    pieces = [" a ", "\n", "\\n", "<|eot|>", "{{ bos_token }}", "{%", "é 字", "'", '"', "<b>&amp;", "word"]
    for _ in range(500):
        messages = [
            {"role": generator.choice(roles), "content": "".join(generator.choices(pieces, k=generator.randrange(6)))}
            for _ in range(generator.randrange(1, 6))
        ]
        for options in ({}, {"add_generation_prompt": True}, {"tools": None}, {"tools": []}):
            rendered = chat_tokenizer.apply_chat_template(messages, tokenize=False, **options)
            assert rendered == chat_tokenizer.apply_chat_template(
                messages, chat_template=RELEASED_TEMPLATE, tokenize=False, **options
            )
            # The same for a reader of Jinja that does not know transformers' tags.
            plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
            assert rendered == plain.from_string(without_generation_tags(CHAT_TEMPLATE)).render(
                messages=messages, bos_token="<|begin_of_text|>", **options
            )


def test_mask_is_what_the_assistant_writes(chat_tokenizer):
    encoded = chat_tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    written, masks = [], encoded["assistant_masks"]
    for token, masked, before in zip(encoded["input_ids"], masks, [0, *masks], strict=False):
        if masked:
            written += [[]] if not before else []
            written[-1].append(token)
    assert chat_tokenizer.batch_decode(written) == ["Four.<|eot|>", "Five.<|eot|>"]


def test_trl_needs_no_template_of_its_own(chat_tokenizer):
    assert get_training_chat_template(chat_tokenizer) is None
    assert supports_tool_calling(chat_tokenizer)
    assert is_chat_template_stop_token_trained(chat_tokenizer)


def test_assistant_only_loss_learns_what_our_recipes_learn(tiny_model, chat_tokenizer, tmp_path):
    arguments = SFTConfig(str(tmp_path), assistant_only_loss=True, max_steps=1, report_to="none", use_cpu=True)
    dataset = Dataset.from_list([{"messages": CONVERSATION}] * 8)
    trainer = SFTTrainer(tiny_model, arguments, train_dataset=dataset, processing_class=chat_tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    ((document,),) = encode([{"messages": CONVERSATION}], "chat", chat_tokenizer, 256)
    assert batch["labels"][0].tolist() == document.labels.tolist()
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_tools_and_their_calls_are_rendered(chat_tokenizer):
    calls = [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
        # As OpenAI's clients send them.
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "it."}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Again:", "tool_calls": calls[:1]},
    ]
    rendered = chat_tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    first = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    second = first.replace("1", "2")
    start, end = "<|header_start|>{}<|header_end|>\n\n", "<|eot|>"
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in rendered
    assert rendered.startswith("<|begin_of_text|>" + start.format("system"))
    assert rendered.endswith(
        f"{start.format('user')}Add it.{end}{start.format('assistant')}{first}\n{second}{end}"
        f"{start.format('tool')}3{end}{start.format('assistant')}Again:\n{first}{end}"
    )
    # A call is an answer to learn, in our recipes too.
    messages = [CONVERSATION[1], {"role": "assistant", "content": "", "tool_calls": calls[:1]}]
    ((document,),) = encode([{"messages": messages}], "chat", chat_tokenizer, 256)
    assert chat_tokenizer.decode(document.labels[document.labels != -100]) == first + end


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": None}, 'role "user" has neither content nor tool calls. Set its content to a string'),
        ({}, 'role "user" has neither content nor tool calls. Set its content to a string'),
        ({"content": [{"type": "image"}]}, 'part of type "image". The model reads text only: leave the part out'),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(chat_tokenizer, message, error):
    with pytest.raises(jinja2.TemplateError, match=error):
        chat_tokenizer.apply_chat_template([{"role": "user"} | message], tokenize=False)
