"""Bits per byte of held-out text, against a loss that is computed token by token."""

import math

import numpy as np
import pytest
import torch
from test_documents import assistant, user
from transformers import TrainerState

from mobilemoe.train.documents import Document, encode
from mobilemoe.train.evaluation import BitsPerByte


TEXTS = ["def f():\n    return 1\n", "Ein Wört mit Ümläuten, 日本", "x = 1"]


def test_bits_per_byte_are_those_of_the_text(tokenizer, tiny_model):
    encoded = encode([{"text": text} for text in TEXTS], "text", tokenizer, 256)
    documents = [document for row in encoded for document in row]
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = tiny_model(ids).logits[0, :-1].log_softmax(-1)
        nats -= logps.gather(-1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    logs = {"eval_loss": nats / tokens}
    state = TrainerState(log_history=[dict(logs)])
    BitsPerByte(documents, tokenizer).on_log(None, state, None, logs=logs)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert logs["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert state.log_history[-1] == logs
    logs = {"loss": 1.0}
    BitsPerByte(documents, tokenizer).on_log(None, state, None, logs=logs)
    assert logs == {"loss": 1.0}


def test_of_a_conversation_the_answer_counts(chat_tokenizer):
    rows = [{"messages": [user("a long question " * 5), assistant("Yes, it is.")]}]
    ((document,),) = encode(rows, "chat", chat_tokenizer, 256)
    # The end of the turn is predicted and is no text.
    answer = chat_tokenizer("Yes, it is.<|eot|>", add_special_tokens=False)["input_ids"]
    found = BitsPerByte([document], chat_tokenizer)
    assert found.bits == pytest.approx(len(answer) / len("Yes, it is.") / math.log(2))


def test_nothing_to_evaluate_is_refused(tokenizer):
    only_end = np.array([tokenizer.bos_token_id, tokenizer.eos_token_id])
    with pytest.raises(ValueError, match="eval_data has 1 tokens to predict and no text in them, .* Set a longer"):
        BitsPerByte([Document(only_end, only_end)], tokenizer)
