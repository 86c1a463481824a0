r"""
Tests the paper's three findings at small scale: paired runs, and runs for the scaling law, on real text.

    python benchmarks/ablation.py --budget cpu --part 0/2 --output out/ablation/0.jsonl
    python benchmarks/ablation.py --budget cpu --part 1/2 --output out/ablation/1.jsonl
    python benchmarks/ablation_report.py out/ablation/0.jsonl out/ablation/1.jsonl

docs/scaling.md has the design. `--budget cpu` takes ten hours of two cores, one process each. `--budget h200` is the
same with larger models for 45 minutes of one GPU, with one process for every two of its cores; it has not been run.

The output has one JSON line per point: a run at one number of tokens, after its learning rate has decayed. Points in
the file are not repeated, so an interrupted command can be run again; a truncated last line is dropped. `--hours`
stops before the run that would end later. The order of the runs is such that any beginning of it can be reported.
"""

import argparse
import copy
import json
import math
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from ablation_data import LENGTH, VOCAB_SIZE, Text, load_text
from torch import nn
from tqdm import tqdm

from mobilemoe.artifacts import write_text
from mobilemoe.train.recipe import RecipeArguments, set_up_routing
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM


# E, granularity, shared expert.
ARMS = (
    (1, 2, False), (4, 2, False), (8, 2, False), (32, 2, False),
    (8, 8, False), (8, 16, False), (8, 8, True),
)  # fmt: skip
EXPANSIONS = (1, 2, 4, 8, 16, 32)
# Multiples of the learning rate that the third block tries.
RATES = (0.5, 2.0)
# Share of a point's tokens in which the learning rate decays, and the steps in which it rises.
DECAY, WARMUP = 0.2, 100
# At this width. It falls with the width, as the optimum of Adam does.
LEARNING_RATE, RATE_WIDTH = 1.6e-2, 32
# Five times the paper's, since the runs are short.
BIAS_RATE = 5e-3
# Widths of random streams, so that arms with fewer experts or rows start from the same values.
MAX_EXPERTS, MAX_EXPANSION = 512, 32
BUDGETS = {
    "cpu": {
        "size": (32, 2), "tokens": (2**20, 2**21), "seeds": 24,
        "sizes": ((24, 2), (32, 2), (48, 2), (64, 2)), "tokens_per_parameter": (20, 40, 80, 160), "law_seeds": 2,
        "batch": 8, "train": 40_000_000, "heldout": 2**19, "device": "cpu",
    },
    "h200": {
        "size": (128, 4), "tokens": (2**23, 2**24), "seeds": 24,
        "sizes": ((64, 4), (96, 4), (128, 4), (192, 6)), "tokens_per_parameter": (5, 10, 20, 40), "law_seeds": 2,
        "batch": 64, "train": 140_000_000, "heldout": 2**21, "device": "cuda",
    },
}  # fmt: skip


class NoSharedExpert(nn.Module):
    """Replaces the shared expert, which the architecture always has."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def run_config(run: dict) -> MobileMoEConfig:
    width, granularity = run["width"], run["granularity"]
    unit = 4 * width // granularity
    removed = 4 if run["shared"] else 0
    top_k = granularity - removed
    return MobileMoEConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=unit,
        intermediate_size_mlp=4 * unit,
        num_hidden_layers=run["layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=LENGTH,
        num_local_experts=granularity * run["expansion"] - removed,
        num_experts_per_tok=top_k,
        bos_token_id=VOCAB_SIZE - 16,
        # Keeps the mean weight per expert at the released 2.5 / 4 for any top-k.
        routed_scaling_factor=0.625 * top_k,
    )


def count_parameters(run: dict) -> dict[str, int]:
    """Active and total parameters (both with the tied embedding once), and those of the embedding and the routers."""
    config = run_config(run)
    # The configuration counts a shared expert also where it is removed.
    extra = 0 if run["shared"] else 3 * run["layers"] * run["width"] * config.intermediate_size_mlp
    return {
        "active_parameters": config.num_active_parameters - extra,
        "total_parameters": config.num_total_parameters - extra,
        "embedding_parameters": VOCAB_SIZE * run["width"],
        "router_parameters": run["layers"] * run["width"] * config.num_local_experts,
    }


def build_model(run: dict) -> MobileMoEForCausalLM:
    """
    The model of a run. Every weight has its own random stream of the seed, and experts are slices of one wide
    feed-forward network, the shared expert the first of them.
    """
    model = MobileMoEForCausalLM(run_config(run))
    width, std = run["width"], 0.7 / math.sqrt(run["width"])

    def draw(name: str, *shape: int) -> torch.Tensor:
        generator = np.random.default_rng([run["seed"], zlib.crc32(name.encode())])
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * std

    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(draw("embedding", VOCAB_SIZE, width))
        for index, layer in enumerate(model.model.layers):
            for name, parameter in layer.self_attn.named_parameters():
                parameter.copy_(draw(f"{index}.{name}", *parameter.shape))
            feed_forward = layer.feed_forward
            experts, shared = feed_forward.experts, feed_forward.shared_expert
            feed_forward.router.weight.copy_(draw(f"{index}.router", MAX_EXPERTS, width)[: experts.num_experts])
            # Rows of the wide network: (E * 4 width, width).
            gate, up, down = (draw(f"{index}.{part}", 4 * width * MAX_EXPANSION, width) for part in "gud")
            first = shared.gate_proj.weight.shape[0] if run["shared"] else 0
            last = first + experts.num_experts * experts.intermediate_dim
            sliced = [part[first:last].unflatten(0, (experts.num_experts, -1)) for part in (gate, up, down)]
            experts.gate_up_proj.copy_(torch.cat(sliced[:2], dim=1).transpose(1, 2))
            experts.down_proj.copy_(sliced[2])
            if run["shared"]:
                shared.gate_proj.weight.copy_(gate[:first])
                shared.up_proj.weight.copy_(up[:first])
                shared.down_proj.weight.copy_(down[:first].T)
            else:
                feed_forward.shared_expert = NoSharedExpert()
    return model


def plan_runs(budget: dict) -> list[dict]:
    """All runs in order: the findings of a third of the seeds, the law's first seed, and the rest."""

    def run(size: tuple[int, int], arm: tuple, tokens: tuple[int, ...], seed: int, rate: float = 1.0) -> dict:
        expansion, granularity, shared = arm
        return {
            "width": size[0], "layers": size[1], "expansion": expansion, "granularity": granularity,
            "shared": shared, "tokens": tokens, "seed": seed, "rate": rate,
        }  # fmt: skip

    def points(size: tuple[int, int], ratios: tuple[int, ...]) -> tuple[int, ...]:
        # Of the dense model, and for all E the same.
        active = count_parameters(run(size, (1, 2, False), (), 0))["active_parameters"]
        step = budget["batch"] * LENGTH
        return tuple(round(ratio * active / step) * step for ratio in ratios)

    def law(seed: int) -> list[dict]:
        ratios = budget["tokens_per_parameter"]
        return [run(size, (e, 2, False), points(size, ratios), seed) for size in budget["sizes"] for e in EXPANSIONS]

    findings = [run(budget["size"], arm, budget["tokens"], seed) for seed in range(budget["seeds"]) for arm in ARMS]
    rates = [
        run(size, (e, 2, False), points(size, budget["tokens_per_parameter"][:1]), 0, rate)
        for size in budget["sizes"]
        for e in (1, 8)
        for rate in RATES
    ]
    third = len(ARMS) * (budget["seeds"] // 3)
    others = [item for seed in range(1, budget["law_seeds"]) for item in law(seed)]
    return findings[:third] + law(0) + rates + findings[third:] + others


def point_id(run: dict, tokens: int) -> str:
    shared = "shared" if run["shared"] else "none"
    return (
        f"{run['width']}x{run['layers']}-e{run['expansion']}-g{run['granularity']}-{shared}-t{tokens}-s{run['seed']}"
        f"-r{run['rate']:g}"
    )


def token_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats. `batch` is `(rows, LENGTH + 1)`."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = model(batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


class Training:
    """A model in training: its optimizer, its routing, and how far it is."""

    def __init__(self, run: dict, text: Text, batch: int, device: str):
        self.text, self.batch, self.device = text, batch, device
        self.model = build_model(run).to(device).train()
        recipe = RecipeArguments(model="", expert_bias_update_rate=BIAS_RATE)
        self.routing = set_up_routing(self.model, recipe, gradient_accumulation_steps=1)
        self.routing.totals = self.routing.totals.to(device)
        self.learning_rate = run["rate"] * LEARNING_RATE * RATE_WIDTH / run["width"]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.rows = text.train
        # The same order for all models of a seed.
        self.order = np.random.default_rng(run["seed"]).permutation(len(self.rows))
        self.step = 0
        self.loss = torch.tensor(math.nan)

    def train_to(self, step: int, decay_from: int | None = None) -> None:
        """Trains up to `step`; the learning rate falls linearly to 0 from step `decay_from` on."""
        while self.step < step:
            chosen = self.order[self.step * self.batch : (self.step + 1) * self.batch]
            rows = torch.from_numpy(self.rows[chosen].astype(np.int64)).to(self.device)
            share = min(1.0, (self.step + 1) / WARMUP)
            if decay_from is not None:
                share *= (step - self.step) / (step - decay_from)
            self.optimizer.param_groups[0]["lr"] = share * self.learning_rate
            loss = token_loss(self.model, rows)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.routing.on_optimizer_step(None, SimpleNamespace(global_step=self.step), None)
            # Drop the pending records: nothing writes them to a file here.
            self.routing.pending.clear()
            self.step, self.loss = self.step + 1, loss.detach()

    def state(self) -> tuple:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.step))

    def restore(self, state: tuple) -> None:
        model, optimizer, self.step = state
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    @torch.inference_mode()
    def heldout_loss(self) -> float:
        self.model.eval()
        rows = torch.from_numpy(self.text.heldout.astype(np.int64))
        losses = [token_loss(self.model, part.to(self.device)).double() * len(part) for part in rows.split(64)]
        self.model.train()
        return sum(losses).item() / len(rows)


def train(run: dict, text: Text, batch: int, device: str) -> Iterator[dict]:
    """
    Trains one run and yields its points: the constant rate's state after 80 % of a point's tokens is decayed on the
    next 20 %, and the run resumes from before the decay.
    """
    training = Training(run, text, batch, device)
    started = time.perf_counter()
    for tokens in run["tokens"]:
        last = tokens // (batch * LENGTH)
        decay_from = last - max(1, round(DECAY * last))
        training.train_to(decay_from)
        state = training.state()
        training.train_to(last, decay_from)
        load = training.routing.load
        loss = training.heldout_loss()
        yield (
            {"id": point_id(run, tokens)}
            | run
            | count_parameters(run)
            | {
                "tokens": tokens,
                "learning_rate": training.learning_rate,
                "batch": batch,
                "text": text.digest,
                "loss": loss,
                "bits_per_byte": loss / math.log(2) / text.bytes_per_token,
                "train_loss": training.loss.item(),
                "imbalance": (load.amax(dim=1) / load.mean(dim=1)).max().item(),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        training.restore(state)


def read_points(file: Path) -> list[dict]:
    """Complete lines. A run that was killed while writing leaves a line without a newline."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check_text(points: list[dict], digest: str, file: Path) -> None:
    """
    Raises:
        ValueError: for points of other text, whose losses do not compare.
    """
    others = {point["text"] for point in points} - {digest}
    if others:
        raise ValueError(
            f"{file} has runs on text {', '.join(sorted(others))}, and this machine's is {digest}: losses of "
            "different text and tokenizers do not compare. Set another --output."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/ablation/0.jsonl"), help="one JSON line per point")
    parser.add_argument("--cache", type=Path, default=Path("out/ablation"), help="for the tokenized text")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th run, from the I-th on")
    parser.add_argument("--hours", type=float, default=math.inf, help="start no run after these")
    arguments = parser.parse_args()
    index, _, count = arguments.part.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise SystemExit(f"--part {arguments.part} is no share of the runs. Set 0/2 and 1/2 for two processes.")
    if not arguments.hours > 0:
        raise SystemExit(f"--hours {arguments.hours} leaves no time for a run. Set a positive number.")

    started = time.monotonic()
    # One process per core: at these sizes a second thread gains little.
    torch.set_num_threads(1)
    budget = BUDGETS[arguments.budget]
    text = load_text(arguments.cache, budget["train"], budget["heldout"])
    points = read_points(arguments.output)
    check_text(points, text.digest, arguments.output)
    write_text(arguments.output, "".join(json.dumps(point) + "\n" for point in points))
    done = {point["id"] for point in points}
    runs = [
        run
        for run in plan_runs(budget)[int(index) :: int(count)]
        if not all(point_id(run, tokens) in done for tokens in run["tokens"])
    ]
    for run in tqdm(runs, desc="ablation", unit="run"):
        if time.monotonic() - started > 3600 * arguments.hours:
            break
        # Of a run with several points, all are written when it ends.
        new = [point for point in train(run, text, budget["batch"], budget["device"]) if point["id"] not in done]
        with arguments.output.open("a") as file:
            file.write("".join(json.dumps(point) + "\n" for point in new))
        done |= {point["id"] for point in new}
    print(
        json.dumps(
            {
                "benchmark": "ablation",
                "points": len(done),
                "runs_left": sum(not all(point_id(run, tokens) in done for tokens in run["tokens"]) for run in runs),
            }
        )
    )


if __name__ == "__main__":
    main()
