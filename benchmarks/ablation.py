r"""
Tests the paper's three findings at small scale: training runs on real text, and the scaling law fitted to them.

    python benchmarks/ablation.py [--sizes 24x2 32x2 48x2 --tokens 524288 1048576 2097152 --seeds 0 1 2]
    python benchmarks/ablation.py --device cuda --sizes 128x4 192x6 256x8 --tokens 2e7 4e7 8e7 --batch 64 \
        --output out/ablation/cuda.jsonl
    python benchmarks/ablation.py --report

`docs/ablation.jsonl` has one run per line. Runs in the file are not repeated, so an interrupted command can be run
again; a truncated last line is dropped. Use another file for other settings. After the runs, the script fits the law
and writes the results to `docs/ablation.md`; `--report` does only that.

The text is the Python standard library, tokenized once; held-out files are never trained on. There are three sweeps
along one axis each. None changes the number of active parameters, apart from the router:

- E, expert expansion, in 1, 2, 4, 8, 16, 32 at granularity 2: 2E experts of half the dense width, top-2, no shared
  expert; at every size and token count. Granularity 1 is left out: with one expert per token the normalised routing
  weight is constant, and the router gets no gradient from the loss.
- granularity 2, 4, 8, 16 at E = 8 without a shared expert: 8g experts, top-g; at the middle size and token count.
- a shared expert at E = 8 and granularity 8: 60 experts, top-4, and a shared one of four times their width; at the
  middle size and token count.

The learning rate is inversely proportional to the width, as the optimum for Adam: 1.6e-2 at width 32, the best of
three values at E = 1 and at E = 8. All runs of a seed see the same sequences in the same order. The first seed trains
the whole grid. The other seeds train the middle size and token count only, which gives the error bars.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mobilemoe.artifacts import replace_file, write_text
from mobilemoe.display import markdown
from mobilemoe.plan.fit import fit_law, heldout_error
from mobilemoe.plan.law import COEFFICIENTS, COLUMNS
from mobilemoe.plan.report import describe_fit, plot_fit
from mobilemoe.train.recipe import RecipeArguments, set_up_routing
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM


# The data and the tokenizer of the demo.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import is_heldout, standard_library_files  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


VOCAB_SIZE, LENGTH = 512, 128
EXPANSIONS, GRANULARITIES = (1, 2, 4, 8, 16, 32), (2, 4, 8, 16)
NUM_HELDOUT_TOKENS = 2**16
# Width at which `--learning-rate` applies.
RATE_WIDTH = 32
# 97.5 % quantiles of Student's t, by degrees of freedom.
T_QUANTILES = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# Each finding, and a weighted sum of losses that is negative if it holds: weights by (E, granularity, shared expert).
# For a diminishing gain, the sum is the gain of the second step minus that of the first.
FINDINGS = (
    ("1. experts help: E = 8 against dense", {(8, 2, False): 1, (1, 2, False): -1}),
    (
        "1. and saturate: E from 8 to 32 gains less than from 1 to 8",
        {(8, 2, False): 2, (32, 2, False): -1, (1, 2, False): -1},
    ),
    ("2. finer experts help: granularity 8 against 2", {(8, 8, False): 1, (8, 2, False): -1}),
    (
        "2. less and less: granularity from 8 to 16 gains less than from 2 to 8",
        {(8, 8, False): 2, (8, 16, False): -1, (8, 2, False): -1},
    ),
    ("3. a shared expert helps: one against none at granularity 8", {(8, 8, True): 1, (8, 8, False): -1}),
)
# The fields that identify a run.
KEY = ("width", "layers", "expansion", "granularity", "shared", "tokens", "seed")


class NoSharedExpert(nn.Module):
    """Replaces the shared expert, which the architecture always has."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def plan_runs(sizes: list[tuple[int, int]], tokens: list[int], seeds: list[int]) -> list[dict]:
    """The runs in order: those for the error bars, then the grid of the first seed. `sizes` and `tokens` ascend."""
    arms = [(expansion, 2, False) for expansion in EXPANSIONS]
    arms += [(8, granularity, False) for granularity in GRANULARITIES[1:]] + [(8, 8, True)]
    middle = (sizes[len(sizes) // 2], tokens[len(tokens) // 2])
    cells = [(*middle, arm, seed) for seed in seeds for arm in arms]
    cells += [(size, count, arm, seeds[0]) for size in sizes for count in tokens for arm in arms[: len(EXPANSIONS)]]
    runs = []
    for (width, layers), count, (expansion, granularity, shared), seed in dict.fromkeys(cells):
        values = (width, layers, expansion, granularity, shared, count, seed)
        runs.append(dict(zip(KEY, values, strict=True)))
    return runs


def build_model(run: dict) -> tuple[MobileMoEForCausalLM, dict[str, int]]:
    """The model of a run, and its active, total (both with the tied embedding once) and embedding parameters."""
    width, granularity = run["width"], run["granularity"]
    unit = 4 * width // granularity
    removed = 4 if run["shared"] else 0
    top_k = granularity - removed
    config = MobileMoEConfig(
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
        initializer_range=0.7 / math.sqrt(width),
    )
    torch.manual_seed(run["seed"])
    model = MobileMoEForCausalLM(config)
    counts = {
        "active_parameters": config.num_active_parameters,
        "total_parameters": config.num_total_parameters,
        "embedding_parameters": VOCAB_SIZE * width,
    }
    if not run["shared"]:
        for layer in model.model.layers:
            layer.feed_forward.shared_expert = NoSharedExpert()
        shared_expert = 3 * run["layers"] * width * config.intermediate_size_mlp
        counts["active_parameters"] -= shared_expert
        counts["total_parameters"] -= shared_expert
    return model, counts


def load_tokens(directory: Path) -> dict[str, torch.Tensor]:
    """Concatenated token ids of the training and held-out files, int64; cached on the first call."""
    file = directory / "tokens.npz"
    if not file.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        texts: dict[str, list[str]] = {"train": [], "heldout": []}
        for name, source in standard_library_files():
            texts["heldout" if is_heldout(name) else "train"].append(source)
        tokenizer = train_tokenizer(iter(texts["train"]), VOCAB_SIZE)
        arrays = {
            part: np.concatenate([np.array(ids, dtype=np.uint16) for ids in tokenizer(sources).input_ids])
            for part, sources in texts.items()
        }
        with replace_file(file) as partial:
            np.savez(partial, **arrays)
    with np.load(file) as arrays:
        return {part: torch.from_numpy(arrays[part].astype(np.int64)) for part in arrays}


def sequences(tokens: torch.Tensor) -> torch.Tensor:
    """Consecutive rows of `LENGTH + 1` ids, overlapping by one, for inputs and targets."""
    return tokens[: (len(tokens) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)


def train(run: dict, text: dict[str, torch.Tensor], arguments: argparse.Namespace) -> dict:
    """Trains one run and returns its row of the table: settings, counts, held-out loss in nats per token."""
    model, counts = build_model(run)
    model.to(arguments.device).train()
    recipe = RecipeArguments(model="", expert_bias_update_rate=arguments.bias_rate)
    routing = set_up_routing(model, recipe, gradient_accumulation_steps=1)
    routing.totals = routing.totals.to(arguments.device)
    rows = sequences(text["train"])
    num_steps = run["tokens"] // (arguments.batch * LENGTH)
    # The same order for all models of a seed.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run["seed"]))
    optimizer = torch.optim.AdamW(
        model.parameters(), run["learning_rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    warmup = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / num_steps))),
    )
    started = time.perf_counter()
    for step in tqdm(range(num_steps), desc=" ".join(f"{key[0]}{run[key]}" for key in KEY), leave=False):
        first = step * arguments.batch
        batch = rows[order[torch.arange(first, first + arguments.batch) % len(rows)]].to(arguments.device)
        loss = token_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        routing.on_optimizer_step(None, SimpleNamespace(global_step=step), None)
        # Drop the pending records: nothing writes them to a file here.
        routing.pending.clear()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - started
    load = routing.load
    model.eval()
    with torch.inference_mode():
        heldout = sequences(text["heldout"])[: NUM_HELDOUT_TOKENS // LENGTH].to(arguments.device)
        losses = [token_loss(model, part) * len(part) for part in heldout.split(64)]
    return (
        run
        | counts
        | {
            "loss": sum(losses).item() / len(heldout),
            "train_loss": loss.item(),
            "imbalance": (load.amax(dim=1) / load.mean(dim=1)).max().item(),
            "seconds": round(seconds, 1),
        }
    )


def token_loss(model: MobileMoEForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats. `batch` is `(rows, LENGTH + 1)`."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = model(batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def read_rows(file: Path) -> list[dict]:
    """Complete lines of the table. A run that was killed while writing leaves a line without a newline."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def contrast(rows: list[dict], weights: dict[tuple, int]) -> tuple[float, float] | None:
    """
    Weighted sum of held-out losses per seed: its mean over the seeds that have all arms, and the half width of the
    95 % interval of that mean (Student's t). `None` with fewer than two such seeds.
    """
    losses: dict[tuple, dict[int, float]] = {arm: {} for arm in weights}
    for row in rows:
        arm = (row["expansion"], row["granularity"], row["shared"])
        if arm in losses:
            losses[arm][row["seed"]] = row["loss"]
    seeds = sorted(set.intersection(*(set(values) for values in losses.values())))
    if len(seeds) < 2:
        return None
    sums = [sum(weight * losses[arm][seed] for arm, weight in weights.items()) for seed in seeds]
    quantile = T_QUANTILES[min(len(seeds) - 1, len(T_QUANTILES) - 1)]
    return statistics.mean(sums), quantile * statistics.stdev(sums) / math.sqrt(len(seeds))


def judge(measured: tuple[float, float] | None) -> str:
    """Whether a sum is negative, beyond its 95 % interval."""
    if measured is None:
        return "not measured: fewer than two seeds"
    mean, width = measured
    if abs(mean) <= width:
        return "not resolved"
    return "holds" if mean < 0 else "does not hold"


def report(rows: list[dict], num_planned: int, output: Path) -> tuple[str, dict]:
    """
    Reports losses with error bars, the verdict on each finding, and the fitted law, as Markdown and as a dict.

    Args:
        rows (`list[dict]`): the table.
        num_planned (`int`): number of runs in the whole plan.
        output (`Path`): path of the table; the plot of the law is written next to it.
    """
    if not rows:
        raise SystemExit("ablation: the table has no complete run. Leave out --report to train.")
    lines: list[str] = []
    seeds: dict[tuple, set] = {}
    for row in rows:
        seeds.setdefault((row["width"], row["layers"], row["tokens"]), set()).add(row["seed"])
    cell = max(seeds, key=lambda key: (len(seeds[key]), key))
    repeated = [row for row in rows if (row["width"], row["layers"], row["tokens"]) == cell]
    arms: dict[tuple, list[dict]] = {}
    for row in repeated:
        arms.setdefault((row["expansion"], row["granularity"], row["shared"]), []).append(row)
    hours = sum(row["seconds"] for row in rows) / 3600
    lines.append(f"{len(rows)} of {num_planned} runs of the plan are done, in {hours:.1f} hours of training.")
    lines.append(f"\n## Losses\n\nNats per held-out token, width {cell[0]}, {cell[1]} layers, {cell[2]:,} tokens.\n")
    losses = []
    for (expansion, granularity, shared), members in arms.items():
        values = [row["loss"] for row in members]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        counts = (f"{members[0]['active_parameters']:,}", f"{members[0]['total_parameters']:,}")
        mean = f"{statistics.mean(values):.4f}{spread}"
        losses.append((expansion, granularity, "yes" if shared else "no", *counts, mean, len(values)))
    columns = ("E", "granularity", "shared expert", "active", "total", "loss, mean ± sd", "seeds")
    lines.append(markdown(columns, losses))

    result: dict = {"benchmark": "ablation", "runs": len(rows), "findings": {}}
    lines.append("\n## Findings\n")
    findings = []
    for claim, weights in FINDINGS:
        measured = contrast(repeated, weights)
        text = "" if measured is None else f"{measured[0]:+.4f} ± {measured[1]:.4f}"
        result["findings"][claim] = {"measured": measured, "verdict": judge(measured)}
        findings.append((claim, text, judge(measured)))
    columns = ("finding of the paper", "below zero if it holds (95 % interval)", "verdict")
    lines.append(markdown(columns, findings))

    sweep = [row for row in rows if row["granularity"] == 2 and not row["shared"]]
    table = {name: np.array([float(row[name]) for row in sweep]) for name in COLUMNS}
    try:
        # Millions: these models have about 0.1 million parameters, so coefficients in billions would be extreme.
        fit = fit_law(table, unit=1e6)
    except ValueError as error:
        lines.append(f"\n## The law\n\nNone yet. {error}")
        return "\n".join(lines), result
    intervals = fit.intervals()
    lines.append(f"\n## The law\n\nOf the sweep over E. {describe_fit(fit, table)}")
    result["law"] = {name: [fit.law.__dict__[name], *intervals[name]] for name in COEFFICIENTS}
    result |= {"rmse": fit.law.rmse, "heldout_rmse": heldout_error(table, unit=1e6)}
    plot_fit(fit, table, output.with_suffix(".png"))
    lines.append(f"\n![Losses over E and the fitted law]({output.with_suffix('.png').name})")
    return "\n".join(lines), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/ablation.jsonl"),
        help="the table; .md and .png are written next to it",
    )
    parser.add_argument("--cache", type=Path, default=Path("out/ablation"), help="tokenized text")
    parser.add_argument("--sizes", nargs="+", default=["24x2", "32x2", "48x2"], help="width x layers, ascending")
    parser.add_argument("--tokens", type=lambda text: int(float(text)), nargs="+", default=[2**19, 2**20, 2**21])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1.6e-2, help=f"at width {RATE_WIDTH}")
    parser.add_argument(
        "--bias-rate", type=float, default=5e-3, help="update rate of the balancing bias; five times the paper's"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()

    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    plan = plan_runs(sizes, arguments.tokens, arguments.seeds)
    rows = read_rows(arguments.output)
    if not arguments.report:
        text = load_tokens(arguments.cache)
        digest = hashlib.sha256(b"".join(text[part].numpy().tobytes() for part in sorted(text))).hexdigest()[:12]
        settings = {"bias_rate": arguments.bias_rate, "batch": arguments.batch, "text": digest}
        for run in plan:
            run |= {"learning_rate": arguments.learning_rate * RATE_WIDTH / run["width"]} | settings
        done = {tuple(row[key] for key in plan[0]) for row in rows}
        runs = [run for run in plan if tuple(run.values()) not in done]
        write_text(arguments.output, "".join(json.dumps(row) + "\n" for row in rows))
        for run in tqdm(runs, desc="ablation", unit="run"):
            rows.append(train(run, text, arguments))
            with arguments.output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    markdown, result = report(rows, len(plan), arguments.output)
    print(markdown)
    command = f"python benchmarks/ablation.py --sizes {' '.join(arguments.sizes)} "
    command += f"--tokens {' '.join(map(str, arguments.tokens))} --seeds {' '.join(map(str, arguments.seeds))}"
    write_text(
        arguments.output.with_suffix(".md"),
        f"# Our ablation\n\n`{command}`\n\nWritten by that script from {arguments.output.name}; what the "
        f"sweeps are is said in it.\n\n{markdown}\n",
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
