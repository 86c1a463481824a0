"""Quick checks without benchmarks: bits per byte, agreement of two models, and expert utilisation by domain."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_mobilemoe.modeling_mobilemoe import MobileMoERouter

from ..artifacts import describe_model
from ..generation import LanguageModel
from ..machine import machine
from ..results import Check, ExpertUse, Machine, TextAgreement
from ..runtime import CheckpointModel, load_language_model


# Tokens per window, including BOS. A shorter context limits it further.
WINDOW = 512


def text_windows(model: LanguageModel, text: str, max_tokens: int, window: int) -> Iterator[list[int]]:
    """Yields the text as windows of token ids. Each starts with BOS; all other tokens occur once."""
    bos, *tokens = model.encode(text)
    tokens = tokens[:max_tokens]
    for start in range(0, len(tokens), window - 1):
        yield [bos, *tokens[start : start + window - 1]]


def text_agreement(
    model: LanguageModel, reference: LanguageModel | None, text: str, max_tokens: int = 4096
) -> TextAgreement:
    """
    Bits per byte of a model on a text, and its agreement with a reference model.

    Args:
        model (`LanguageModel`): a checkpoint or a `.pte`.
        reference (`LanguageModel`, *optional*): a model with the same vocabulary.
        text (`str`): text to score, in windows of 512 tokens.
        max_tokens (`int`, defaults to 4096): number of tokens to score.

    Returns:
        `TextAgreement`: `bits_per_byte` of the model. With a reference also its `reference_bits_per_byte`; `kl`, the
        divergence KL(reference || model) in nats, averaged over positions; and `top1`, the share of positions where
        both models have the same most probable token.

    Raises:
        ValueError: when the text is empty or the tokenizers differ.
    """
    window = min(WINDOW, *(other.max_seq_len for other in (model, reference) if other is not None))
    windows = list(text_windows(model, text, max_tokens, window))
    if not windows:
        raise ValueError("The text is empty. Give one with at least one token.")
    if reference is not None and reference.encode(text) != model.encode(text):
        raise ValueError("The two models tokenize the text differently. Compare models with the same tokenizer.")
    loss = reference_loss = divergence = agreeing = num_tokens = num_bytes = 0
    for tokens in tqdm(windows, desc="windows"):
        targets = torch.tensor(tokens[1:])
        log_probs = model.all_logits(tokens)[:-1].log_softmax(dim=-1).cpu()  # (T, vocab)
        loss -= log_probs.gather(1, targets[:, None]).sum().item()
        num_tokens += len(targets)
        num_bytes += len(model.decode(tokens[1:]).encode())
        if reference is not None:
            expected = reference.all_logits(tokens)[:-1].log_softmax(dim=-1).cpu()
            reference_loss -= expected.gather(1, targets[:, None]).sum().item()
            divergence += (expected.exp() * (expected - log_probs)).sum().item()
            agreeing += (expected.argmax(dim=-1) == log_probs.argmax(dim=-1)).sum().item()
    result = TextAgreement(bits_per_byte=loss / math.log(2) / num_bytes, num_tokens=num_tokens)
    if reference is not None:
        result.reference_bits_per_byte = reference_loss / math.log(2) / num_bytes
        result.kl = divergence / num_tokens
        result.top1 = agreeing / num_tokens
    return result


def token_routes(model: CheckpointModel, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The experts that each token of a sequence is routed to.

    Args:
        model (`CheckpointModel`): full-precision or packed INT4.
        tokens (`list[int]`): one sequence, run in a single forward pass.

    Returns:
        Two tensors of shape `(layers, tokens, top_k)`: expert ids in the order of selection, and the weights of their
        outputs, which sum to `routed_scaling_factor`.
    """
    routes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def hook(router, arguments, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        routes.append(output)

    routers = [module for module in model.model.modules() if isinstance(module, MobileMoERouter)]
    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        model.all_logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    _, weights, experts = zip(*routes, strict=True)
    return torch.stack(experts).cpu(), torch.stack(weights).cpu()


def expert_utilisation(model: CheckpointModel, text: str, max_tokens: int = 4096) -> ExpertUse:
    """
    Expert utilisation on a text.

    Returns:
        `ExpertUse`: `load` of shape `(layers, E)`, the share of assignments of each expert; and per layer `used`, the
        share of experts with at least one token, and `effective`, the exponential of the load's entropy divided by E:
        1 when all experts are used evenly, 1/E when only one is used.
    """
    config = model.model.config
    num_experts = config.num_local_experts
    counts = torch.zeros(config.num_hidden_layers, num_experts, dtype=torch.int64)
    for tokens in text_windows(model, text, max_tokens, min(WINDOW, model.max_seq_len)):
        experts = token_routes(model, tokens)[0].flatten(1)  # (layers, tokens * top_k)
        counts.scatter_add_(1, experts, torch.ones_like(experts))
    load = counts / counts.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(load, load).sum(dim=1)
    return ExpertUse(
        load=load.tolist(),
        used=(counts > 0).float().mean(dim=1).tolist(),
        effective=(entropy.exp() / num_experts).tolist(),
    )


def check_models(
    model_path: str,
    reference_path: str | None,
    texts: list[str],
    max_tokens: int = 4096,
    command: str | None = None,
) -> Check:
    """
    Runs the checks on texts given as `DOMAIN=FILE`. Expert utilisation is measured for checkpoints only.

    Raises:
        ValueError: for a text that is not `DOMAIN=FILE`, models that cannot be compared, or fewer than 2 tokens.
        OSError: when a file cannot be read.
    """
    if max_tokens < 2:
        raise ValueError(f"--max-tokens {max_tokens} leaves nothing to predict. Set 2 or more.")
    files = {}
    for text in texts:
        domain, separator, file = text.partition("=")
        if not (domain and separator and file):
            raise ValueError(f"--text {text} does not name a domain. Give DOMAIN=FILE, as in code=held_out.py.")
        files[domain] = Path(file).read_text()
    model = load_language_model(model_path)
    reference = load_language_model(reference_path) if reference_path is not None else None
    paths = {"model": model_path, "reference": reference_path}
    domains = {}
    for domain, text in files.items():
        domains[domain] = text_agreement(model, reference, text, max_tokens)
        if isinstance(model, CheckpointModel):
            domains[domain].experts = expert_utilisation(model, text, max_tokens)
    return Check(
        command=command,
        **paths,
        texts=texts,
        max_tokens=max_tokens,
        descriptions={name: describe_model(path) for name, path in paths.items() if path is not None},
        machine=Machine(**machine()),
        domains=domains,
    )


def check_lines(check: Check) -> Iterator[str]:
    """One line per domain. Expert utilisation is averaged over layers."""
    for domain, row in check.domains.items():
        numbers = row.model_dump(exclude_unset=True, exclude={"experts"})
        if row.experts is not None:
            numbers["used"] = statistics.mean(row.experts.used)
            numbers["effective"] = statistics.mean(row.experts.effective)
        yield f"{domain} {json.dumps({key: round(value, 5) for key, value in numbers.items()})}"
