"""A small tokenizer of the released shape, for runs that start from nothing."""

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


# The pre-tokenizer of the released tokenizer.json: the Llama-3 split, then bytes.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Released special tokens by their distance from the first special id (128000 in the releases).
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    5: "<|header_start|>",
    6: "<|header_end|>",
    7: "<|eom|>",
    8: "<|eot|>",
}
NUM_TOY_SPECIAL_TOKENS = 16


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a small tokenizer of the released shape: byte-level BPE, the Llama-3 split, no normalizer, BOS in front, and
    the released special tokens at the end of the vocabulary, at the released distances from each other.

    Args:
        texts (iterator of `str`): training text.
        vocab_size (`int`): all ids, the 16 special ones included.
    """
    first_special = vocab_size - NUM_TOY_SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=first_special, initial_alphabet=alphabet))
    if tokenizer.get_vocab_size() != first_special:
        raise ValueError(
            f"The text yields {tokenizer.get_vocab_size()} tokens, but vocab_size={vocab_size} needs {first_special}. "
            "Give more text or a smaller vocabulary."
        )
    special_tokens = [SPECIAL_TOKENS.get(i, f"<|reserved_special_token_{i}|>") for i in range(NUM_TOY_SPECIAL_TOKENS)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    bos = SPECIAL_TOKENS[0]
    prepend_bos = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, first_special)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), prepend_bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[1],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
