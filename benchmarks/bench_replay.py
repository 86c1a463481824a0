r"""
How often the experts of a token differ between generation and training, the reason for or against router replay.

    python benchmarks/bench_replay.py --model out/demo/3-sft [--prompts 32] [--tokens 64] [--seed 0]

The model samples completions with its KV cache, one token at a time and all prompts in one padded batch, as TRL's
trainers do. Then one forward pass over prompts and completions computes what the trainer computes. Compared are the
sets of experts of every layer and completion token, and the logarithms of the probabilities of the sampled tokens, in
FP32 and under BF16 autocast over FP32 weights, as the recipes train. Beside it: the pass in another batch size, and
the two precisions. One JSON line last.
"""

import argparse
import json

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from mobilemoe.artifacts import load_tokenizer
from mobilemoe.display import show, table
from mobilemoe.machine import machine
from modeling_mobilemoe.modeling_mobilemoe import MobileMoERouter


class Recorder:
    """The experts that every router chooses, `(rows, positions, layers, top_k)`, sorted."""

    def __init__(self, model):
        self.rows = 0
        self.chosen: list[list[torch.Tensor]] = []
        routers = [module for module in model.modules() if isinstance(module, MobileMoERouter)]
        for layer, router in enumerate(routers):
            self.chosen.append([])
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int):
        def hook(router, args, output) -> None:
            self.chosen[layer].append(output[2].view(self.rows, -1, output[2].shape[-1]).sort(dim=-1).values)

        return hook

    def take(self) -> torch.Tensor:
        """Those since the last call."""
        found = torch.stack([torch.cat(calls, dim=1) for calls in self.chosen], dim=2)
        for calls in self.chosen:
            calls.clear()
        return found


def logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", required=True, help="checkpoint with a tokenizer and a chat template")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    recorder = Recorder(model)
    recorder.rows = arguments.prompts
    questions = [f"What does function_{i} do, and what is {i} + {i * i}?" for i in range(arguments.prompts)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    length = prompts["input_ids"].shape[1]
    result = vars(arguments) | {"benchmark": "replay"} | machine()
    runs, rows = {}, []
    for name in tqdm(("fp32", "bf16"), desc="precisions"):
        torch.manual_seed(arguments.seed)
        ids, mask, cache, sampled = prompts["input_ids"], prompts["attention_mask"], DynamicCache(), []
        step = ids
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            for _ in range(arguments.tokens):
                # As `generate` counts them, while the trainer's pass counts the padding.
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
                output = model(step, attention_mask=mask, position_ids=positions, cache=cache, logits_to_keep=1)
                probabilities = output.logits[:, -1].float().softmax(-1)
                step = probabilities.multinomial(1)
                sampled.append(probabilities.gather(-1, step).log())
                ids, mask = torch.cat([ids, step], dim=1), torch.cat([mask, torch.ones_like(step)], dim=1)
            # The last token, whose experts the last pass did not choose, is only predicted.
            generated, inputs = recorder.take(), {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
            logits = model(**inputs, use_cache=False).logits[:, length - 1 :]
            trained = recorder.take()
            recorder.rows = 1
            alone = []
            for row in range(arguments.prompts):
                model(**{key: value[row : row + 1] for key, value in inputs.items()}, use_cache=False)
                alone.append(recorder.take())
            recorder.rows = arguments.prompts
        answers = ids[:, length:]
        difference = (logps(logits, answers) - torch.cat(sampled, dim=1)).abs()
        runs[name] = (ids, trained)
        result[name] = compare(generated, trained, length) | {
            "logp_difference_mean": float(f"{difference.mean():.3g}"),
            "logp_difference_max": float(f"{difference.max():.3g}"),
            "another_batch": compare(torch.cat(alone), trained, length),
        }
        rows.append(
            (f"{name}: generation and training", *show_row(result[name]), result[name]["logp_difference_mean"])
        )
        rows.append((f"{name}: another batch size", *show_row(result[name]["another_batch"]), None))
    # The other precision over the same tokens.
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=runs["fp32"][0][:, :-1], attention_mask=mask[:, :-1], use_cache=False)
    result["bf16_and_fp32"] = compare(recorder.take(), runs["fp32"][1], length)
    rows.append(("training in fp32 and in bf16", *show_row(result["bf16_and_fp32"]), None))
    show(table(("compared", "sets that differ, %", "experts that differ, %", "worst layer, %", "logp, nats"), rows))
    print(json.dumps(result))


def compare(first: torch.Tensor, second: torch.Tensor, length: int) -> dict[str, float]:
    """Shares of the sets of completion tokens that differ, of all experts in them, and of sets in the worst layer."""
    first, second = first[:, length:], second[:, length:]
    differs = (first != second).any(dim=-1)  # (rows, positions, layers)
    shared = (first[..., :, None] == second[..., None, :]).any(dim=-1)
    return {
        "sets": differs.float().mean().item(),
        "experts": 1 - shared.float().mean().item(),
        "worst_layer": differs.float().mean(dim=(0, 1)).max().item(),
        "compared": differs.numel(),
    }


def show_row(result: dict[str, float]) -> list[str]:
    return [f"{100 * result[name]:.3f}" for name in ("sets", "experts", "worst_layer")]


if __name__ == "__main__":
    main()
