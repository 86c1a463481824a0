"""The toy tokenizer has the released shape."""

import pytest
from toy_tokenizer import SPECIAL_TOKENS, train_tokenizer

from mobilemoe.train.recipe import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def tokenizer():
    words = ["def", "return", "class", "self", "import", "for", "while", "lambda", "yield", "assert"]
    text = " ".join(f"{a}_{b}{i} = {a}({b})\n" for i, a in enumerate(words * 40) for b in words)
    return train_tokenizer(iter([text]), 400)


def test_tokenizer_has_the_released_shape(tokenizer):
    first_special = 400 - 16
    assert len(tokenizer) == 400
    # The releases have the same distances from 128000.
    for offset, token in SPECIAL_TOKENS.items():
        assert tokenizer.convert_tokens_to_ids(token) == first_special + offset
    text = "def f(x):\n\n    return x + 12345  # é 字\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == first_special
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # Digits in groups of at most three, as the Llama-3 split makes them.
    assert not any(len(token.strip("Ġ")) > 3 for token in tokenizer.tokenize("1234567") if token.strip("Ġ").isdigit())


def test_tokenizer_needs_enough_text():
    with pytest.raises(ValueError, match="Give more text or a smaller vocabulary"):
        train_tokenizer(iter(["too little"]), 1000)


def test_chat_template_is_the_released_form(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": " Name one JVM language. "}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # Content is not trimmed, BOS stands once in front, no system prompt is injected.
    assert rendered == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n Name one JVM language. <|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
