"""Models for lm-evaluation-harness: a checkpoint in PyTorch, and a `.pte`. Greedy decoding, one process.

Both run tokens that requests share only once: the prompt of a multiple-choice question, or few-shot examples.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import DynamicCache

from ..generation import common_length
from ..limits import limited
from ..runtime import CheckpointModel, PteModel


# (context and continuation as text, context tokens, continuation tokens), the format of TemplateLM.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# A prefix, and the continuations to score after it, each with the index of its request.
Group = tuple[tuple[int, ...], list[tuple[int, list[int]]]]

# Prompts share few-shot examples if at least MIN_SHARING_PROMPTS start with the same SHARED_HEAD tokens.
SHARED_HEAD = 48
MIN_SHARING_PROMPTS = 4
# Cached tokens allowed per token of a batch. They take memory, but no computation.
CACHED_PER_FED_TOKEN = 8
# Size of the FP32 logits that are computed at once.
LOGITS_BYTES = 1 << 27
# Stop sequences are searched in the text of this many last tokens.
STOP_WINDOW = 32


class CheckpointLM(HFLM):
    """
    A checkpoint, full-precision or packed INT4.

    Prompts, truncation and generation are the harness's. Only log-likelihoods are computed differently from its
    Hugging Face back-end: contexts shared by several requests run once, few-shot examples shared by several prompts
    run once, and the head runs only at scored positions. Log-probabilities are FP32, as with `softmax_dtype=float32`
    in the harness.

    Args:
        checkpoint (`CheckpointModel`): the model, on the device where it runs.
        tokens_per_batch (`int`, *optional*): maximum tokens per batch; by default 2,048 on a CPU and 65,536 on a GPU.
            The number of sequences follows from their lengths. Halved when the device runs out of memory.
    """

    def __init__(self, checkpoint: CheckpointModel, tokens_per_batch: int | None = None):
        super().__init__(pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, batch_size=1)
        self.tokens_per_batch = tokens_per_batch or (2048 if self.device.type == "cpu" else 65536)
        self.num_truncated = 0

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        continuations = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            tokens = context + continuation
            # As in the harness: the last token is only predicted, and long prompts are truncated on the left.
            self.num_truncated += len(tokens) > self.max_length + 1
            prefix = tokens[-(self.max_length + 1) :][: -len(continuation)]
            continuations[tuple(prefix)].append((index, continuation))
        answers: dict[int, tuple[float, bool]] = {}
        progress = tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm)
        for shared, groups in sharing_prompts(continuations):
            cache = self._feed_shared(shared)
            while groups:
                batch = groups[: self._batch_size(groups, len(shared))]
                try:
                    scored = self._score(batch, len(shared), cache)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    self.tokens_per_batch //= 2
                    continue
                groups = groups[len(batch) :]
                answers.update(scored)
                progress.update(len(scored))
        progress.close()
        for index, (text, _, _) in enumerate(requests):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _batch_size(self, groups: list[Group], num_shared: int) -> int:
        """Number of leading groups that fit into one batch. Prefixes are sorted from long to short."""
        prefix_length = len(groups[0][0]) - num_shared
        num_continuations = longest = 0
        for size, (_, continuations) in enumerate(groups, start=1):
            num_continuations += len(continuations)
            longest = max(longest, *(len(tokens) - 1 for _, tokens in continuations), 0)
            fed = max(size * prefix_length, num_continuations * longest)
            cached = num_continuations * (num_shared + prefix_length + longest)
            if fed > self.tokens_per_batch or cached > CACHED_PER_FED_TOKEN * self.tokens_per_batch:
                return max(1, size - 1)
        return len(groups)

    @torch.inference_mode()
    def _feed_shared(self, shared: tuple[int, ...]) -> DynamicCache:
        cache = DynamicCache(config=self.config)
        if shared:
            self.model.model(torch.tensor([shared], device=self.device), cache=cache, use_cache=True)
        return cache

    @torch.inference_mode()
    def _score(
        self, groups: list[Group], num_shared: int, shared_cache: DynamicCache
    ) -> dict[int, tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether it is the greedy one, by request index."""
        cache = copy.deepcopy(shared_cache)
        if num_shared:
            cache.batch_repeat_interleave(len(groups))
        # The part of every prefix after the shared tokens, (groups, T).
        tokens, valid = pad_right([prefix[num_shared:] for prefix, _ in groups], self.device)
        mask = torch.cat([valid.new_ones(len(groups), num_shared), valid], dim=1)
        position = num_shared + torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        hidden = self._hidden_states(tokens, mask, position, cache)
        # The last token of a prefix predicts the first token of all its continuations: its row has several targets.
        rows = [hidden[torch.arange(len(groups), device=self.device), valid.sum(dim=1) - 1]]  # (groups, H)
        scored = [
            (group, index, tokens) for group, (_, pairs) in enumerate(groups) for index, tokens in pairs
        ]  # one per continuation
        row_of_target = [group for group, _, _ in scored]
        targets = [tokens[0] for _, _, tokens in scored]
        owner = list(range(len(scored)))

        longer = [number for number, (_, _, tokens) in enumerate(scored) if len(tokens) > 1]
        if longer:
            group_of = torch.tensor([scored[number][0] for number in longer], device=self.device)
            cache.batch_select_indices(group_of)
            tokens, more = pad_right([scored[number][2][:-1] for number in longer], self.device)
            position = mask[group_of].sum(dim=1, keepdim=True) + torch.arange(tokens.shape[1], device=self.device)
            hidden = self._hidden_states(tokens, torch.cat([mask[group_of], more], dim=1), position, cache)
            rows.append(hidden[more.bool()])  # (all tokens, H)
            row_of_target += range(len(groups), len(groups) + len(rows[1]))
            targets += [token for number in longer for token in scored[number][2][1:]]
            owner += [number for number in longer for _ in scored[number][2][1:]]

        log_probs, greedy = self._predict(torch.cat(rows), row_of_target, targets)
        owner = torch.tensor(owner)
        total = torch.zeros(len(scored)).index_add_(0, owner, log_probs)
        misses = torch.zeros(len(scored)).index_add_(0, owner, (~greedy).float())
        return {
            index: (total[number].item(), misses[number].item() == 0) for number, (_, index, _) in enumerate(scored)
        }

    def _hidden_states(
        self, tokens: torch.Tensor, mask: torch.Tensor, position: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        return self.model.model(
            tokens, attention_mask=mask, position_ids=position, cache=cache, use_cache=True
        ).last_hidden_state

    def _predict(
        self, rows: torch.Tensor, row_of_target: list[int], targets: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FP32 log-probability of every target, and whether it is the most probable token; logits in chunks."""
        row_of_target, targets = torch.tensor(row_of_target), torch.tensor(targets)
        log_probs, greedy = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
        size = max(1, LOGITS_BYTES // (4 * self.config.vocab_size))
        for start in range(0, len(rows), size):
            logits = self.model.lm_head(rows[start : start + size]).float()  # (chunk, vocab)
            here = (row_of_target >= start) & (row_of_target < start + size)
            row, target = (row_of_target[here] - start).to(self.device), targets[here].to(self.device)
            log_probs[here] = (logits[row, target] - logits.logsumexp(dim=-1)[row]).cpu()
            greedy[here] = (logits.argmax(dim=-1)[row] == target).cpu()
        return log_probs, greedy

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates with the harness's own method, in batches of prompts of similar length."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        limits = [normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests]
        self.num_truncated += sum(
            length + limit > self.max_length for length, limit in zip(lengths, limits, strict=True)
        )
        left = sorted(range(len(requests)), key=lambda index: -lengths[index])
        answers = {}
        progress = tqdm(total=len(requests), desc="generation", disable=disable_tqdm)
        while left:
            longest = lengths[left[0]] + max(limits[index] for index in left)
            size = max(1, CACHED_PER_FED_TOKEN * self.tokens_per_batch // longest)
            batch = left[:size]
            self.batch_size_per_gpu = len(batch)
            try:
                texts = super().generate_until([requests[index] for index in batch], disable_tqdm=True)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.tokens_per_batch //= 2
                continue
            left = left[size:]
            answers.update(zip(batch, texts, strict=True))
            progress.update(len(batch))
        progress.close()
        return [answers[index] for index in range(len(requests))]


def sharing_prompts(continuations: dict[tuple[int, ...], list]) -> Iterator[tuple[tuple[int, ...], list[Group]]]:
    """Yields sets of prefixes, sorted from long to short, with the tokens that they share (few-shot examples)."""
    heads = Counter(prefix[:SHARED_HEAD] for prefix in continuations if len(prefix) > SHARED_HEAD)

    def key(prefix: tuple[int, ...]) -> tuple[int, ...]:
        head = prefix[:SHARED_HEAD]
        return head if len(prefix) > SHARED_HEAD and heads[head] >= MIN_SHARING_PROMPTS else ()

    ordered = sorted(continuations, key=lambda prefix: (key(prefix), -len(prefix)))
    for head, prefixes in groupby(ordered, key):
        prefixes = list(prefixes)
        # All prefixes share what the lexicographically first and last share. Leave one token to predict from.
        shared = common_length(min(prefixes), max(prefixes)) if head else 0
        shared = min(shared, len(prefixes[-1]) - 1)
        yield prefixes[0][:shared], [(prefix, continuations[prefix]) for prefix in prefixes]


def pad_right(sequences: list, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask, both `(len(sequences), longest)`."""
    longest = max(map(len, sequences))
    tokens = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return tokens.to(device), mask.to(device)


class PteLM(TemplateLM):
    """
    A `.pte`, one sequence at a time. Prompts are encoded as the harness encodes them for a checkpoint.

    Requests run in lexicographic order, so that the cache of the model holds much of each from the previous one.

    Args:
        model (`PteModel`): the program. If it returns the logits of all positions, a continuation takes one call,
            otherwise one for every 8 tokens, or for every token with the stock operators.

    Raises:
        ValueError: when a request exceeds the program's context, before the first request of the task runs.
    """

    def __init__(self, model: PteModel):
        super().__init__()
        self.pte = model
        self.tokenizer = model.tokenizer
        self.max_length = model.max_seq_len
        # Attributes of `CheckpointLM`. A `.pte` never truncates or batches.
        self.num_truncated, self.tokens_per_batch = 0, None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        with limited("The model's chat template"):
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

    def _check_length(self, longest: int) -> None:
        if longest > self.max_length:
            raise ValueError(
                f"This task needs a context of {longest} tokens, but the .pte was exported for {self.max_length}. "
                f"Export it again with --max-seq-len {longest} or more, or leave the task out with --tasks."
            )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        # The last token is only predicted.
        inputs = [(context + continuation)[:-1] for _, context, continuation in requests]
        self._check_length(max(map(len, inputs), default=0))
        answers = {}
        log_probs = None
        previous = None
        for index in tqdm(
            sorted(range(len(requests)), key=lambda index: inputs[index]), desc="log-likelihoods", disable=disable_tqdm
        ):
            text, _, continuation = requests[index]
            # Choices of a single token share the same input.
            if previous != (inputs[index], len(continuation)):
                log_probs = self.pte.sequence_logits(inputs[index], len(continuation)).log_softmax(dim=-1)
                previous = (inputs[index], len(continuation))
            target = torch.tensor(continuation)
            log_likelihood = log_probs[torch.arange(len(target)), target].sum().item()
            answers[index] = (log_likelihood, bool((log_probs.argmax(dim=-1) == target).all()))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in tqdm(requests, desc="rolling log-likelihoods", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            scored = self._loglikelihood_tokens(
                [(None, *make_disjoint_window(window)) for window in windows], disable_tqdm=True
            )
            totals.append(sum(log_likelihood for log_likelihood, _ in scored))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [normalize_gen_kwargs(request.args[1]) for request in requests]
        if any(setting["do_sample"] for setting in settings):
            raise ValueError("do_sample is set, but a .pte is evaluated greedily here. Set do_sample to false.")
        needed = [len(prompt) + setting["max_gen_toks"] for prompt, setting in zip(prompts, settings, strict=True)]
        self._check_length(max(needed, default=0))
        end = self.tokenizer.decode(self.eot_token_id)
        answers = {}
        for index in tqdm(
            sorted(range(len(requests)), key=lambda index: prompts[index]), desc="generation", disable=disable_tqdm
        ):
            stop = handle_stop_sequences(settings[index]["until"], eos=end)
            new_tokens = self._generate(prompts[index], settings[index]["max_gen_toks"], stop)
            text = self.tokenizer.decode(new_tokens, skip_special_tokens=True)
            answers[index] = postprocess_generated_text(text, stop, None)
            self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _generate(self, prompt: list[int], max_new_tokens: int, stop: list[str]) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + max_new_tokens:
            token = self.pte.sequence_logits(tokens)[-1].argmax().item()
            if token in self.pte.eos_ids:
                break
            tokens.append(token)
            tail = self.tokenizer.decode(tokens[len(prompt) :][-STOP_WINDOW:], skip_special_tokens=True)
            if any(sequence in tail for sequence in stop):
                break
        return tokens[len(prompt) :]
