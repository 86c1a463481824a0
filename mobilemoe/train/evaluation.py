"""Bits per byte of held-out text during training, which compares across tokenizers."""

import math

from transformers import PreTrainedTokenizerBase, TrainerCallback

from .documents import IGNORED, Document


def count_predicted(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens that the loss counts, and the bytes of the text in them; the first of a document is not predicted."""
    predicted = [document.labels[1:][document.labels[1:] != IGNORED] for document in documents]
    texts = tokenizer.batch_decode(predicted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(map(len, predicted)), sum(len(text.encode()) for text in texts)


class BitsPerByte(TrainerCallback):
    """
    Adds `eval_bits_per_byte` to the log of every evaluation.

    It follows from `eval_loss`, which is the mean over batches, not over tokens: the two differ a little where batches
    have different numbers of tokens that count.

    Args:
        documents (`list[Document]`): what is evaluated.
        tokenizer (`PreTrainedTokenizerBase`): of the documents.

    Raises:
        ValueError: when nothing of the documents is text.
    """

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerBase):
        num_tokens, num_bytes = count_predicted(documents, tokenizer)
        if num_bytes == 0:
            raise ValueError(
                f"eval_data has {num_tokens} tokens to predict and no text in them, so nothing would be evaluated. "
                "Set a longer max_length, or other data."
            )
        self.bits = num_tokens / num_bytes / math.log(2)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and "eval_loss" in logs:
            logs["eval_bits_per_byte"] = state.log_history[-1]["eval_bits_per_byte"] = logs["eval_loss"] * self.bits
