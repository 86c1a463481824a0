"""Routing during training: the balancing bias, the router z-loss, drop-and-pad dispatch and routing statistics."""

import json
import math
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_mobilemoe.fused_mobilemoe import Int4FeedForward
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEFeedForward, MobileMoERouter, grouped_mm_experts

from ..artifacts import write_json, write_text
from ..display import picture


# The statistics of each layer and step, in the order of a row's tensor.
MEASURES = ("imbalance", "dropped", "entropy", "z_loss")


def shard_routers(model: PreTrainedModel, **options: Any) -> None:
    """
    Makes every router an FSDP2 unit of its own, in FP32, to be called before the layers are sharded.

    A mixed-precision policy rounds all parameters of a unit when it gathers them, and near-ties of FP32 scores decide
    which experts run.

    Args:
        model (`PreTrainedModel`): not sharded yet.
        options: of `fully_shard`, without `mp_policy`.
    """
    for module in model.modules():
        if isinstance(module, MobileMoERouter):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(), **options)


class _AddLossGradient(torch.autograd.Function):
    """Returns `value` and gives `loss` the gradient that it would have as a term of the training loss."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_output, torch.ones((), dtype=torch.float32, device=grad_output.device)


def router_z_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared log-sum-exp of the router logits `(tokens, E)` (ST-MoE, arXiv 2202.08906)."""
    return router_logits.logsumexp(dim=-1).square().mean()


def add_router_z_loss(model: PreTrainedModel, coefficient: float, gradient_accumulation_steps: int = 1) -> None:
    """
    Adds the z-loss of every router to the training loss, the paper's lambda_z.

    TRL computes its loss from the last hidden states and the head without the model's own forward, so a term added
    there would be lost. Hooks on the routers add only its gradient; the reported loss does not include the term. With
    activation checkpointing a layer runs twice, but the gradient passes through one of the two runs only.

    Args:
        model (`PreTrainedModel`): the model to train.
        coefficient (`float`): weight of the term, per layer.
        gradient_accumulation_steps (`int`, defaults to 1): micro-batches per optimizer step.
    """

    def hook(router, args, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
        router_logits, top_k_weights, top_k_index = output
        if not (router.training and torch.is_grad_enabled()):
            return None
        loss = coefficient / gradient_accumulation_steps * router_z_loss(router_logits)
        return router_logits, _AddLossGradient.apply(top_k_weights, loss), top_k_index

    for module in model.modules():
        if isinstance(module, MobileMoERouter):
            module.register_forward_hook(hook)


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Most tokens of a batch that one expert accepts: an even share times the factor, rounded up."""
    return math.ceil(capacity_factor * num_tokens * top_k / num_experts)


def count_assignments(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Assignments per expert, `(E,)`. `bincount` would synchronise with the GPU and has no static shape."""
    expert_ids = top_k_index.flatten()
    return expert_ids.new_zeros(num_experts).scatter_add_(0, expert_ids, torch.ones_like(expert_ids))


def capacity_experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    capacity_factor: float,
) -> torch.Tensor:
    """
    Drop-and-pad dispatch: every expert has a block of the same size; assignments beyond it are dropped, later tokens
    first.

    All shapes are static given the batch shape, as in the paper's pre- and mid-training. Outside training nothing is
    dropped. Arguments and result as in the experts interface of transformers.

    Raises:
        ValueError: under expert parallelism, where the tokens of an expert come from several ranks in no fixed order.
    """
    if not experts.training:
        return grouped_mm_experts(experts, hidden_states, top_k_index, top_k_weights)
    # The flag by which transformers' own implementations know it: transformers/integrations/moe.py.
    if experts._is_expert_parallel:
        raise ValueError(
            "capacity_factor is set on a model with ep_size > 1, but a rank does not know how many tokens the others "
            "send to its experts. Set tp_size or fsdp_size instead of ep_size, or leave capacity_factor out."
        )
    num_tokens, top_k = top_k_index.shape
    num_experts = experts.num_experts
    capacity = expert_capacity(num_tokens, top_k, num_experts, capacity_factor)
    # The position of an assignment in its expert's block is the number of earlier assignments to this expert.
    expert_ids = top_k_index.flatten()  # (tokens * top_k,)
    order = expert_ids.argsort(stable=True)
    counts = count_assignments(top_k_index, num_experts)
    starts = counts.cumsum(0) - counts
    assignments = torch.arange(len(order), device=order.device)
    position = torch.empty_like(order).scatter_(0, order, assignments - starts[expert_ids[order]])
    kept = position < capacity
    # An extra row behind the blocks receives the dropped assignments.
    row = torch.where(kept, expert_ids * capacity + position, num_experts * capacity)  # (tokens * top_k,)
    # The token at every position of the blocks; empty positions read a row of zeros behind the last token.
    source = torch.full((num_experts * capacity + 1,), num_tokens, device=row.device)
    source = source.scatter_(0, row, assignments // top_k)[:-1]  # (E * C,)

    blocks = nn.functional.pad(hidden_states, (0, 0, 0, 1)).index_select(0, source)  # (E * C, H)
    gated = experts._apply_gate(torch.bmm(blocks.unflatten(0, (num_experts, capacity)), experts.gate_up_proj))
    blocks = torch.bmm(gated, experts.down_proj).flatten(0, 1)  # (E * C, H)
    # A dropped assignment reads an arbitrary row with weight 0.
    outputs = blocks.index_select(0, row.clamp(max=num_experts * capacity - 1)).view(num_tokens, top_k, -1)
    weights = top_k_weights * kept.view(num_tokens, top_k)
    return (outputs * weights[..., None]).sum(dim=1).to(hidden_states.dtype)  # (tokens, H)


def set_capacity_factor(model: PreTrainedModel, capacity_factor: float) -> None:
    """
    Switches the experts of a model to drop-and-pad dispatch, registered as an experts implementation of transformers.

    Raises:
        ValueError: for a factor below 1, which would drop tokens of an evenly distributed batch.
    """
    if capacity_factor < 1:
        raise ValueError(
            f"capacity_factor={capacity_factor} is below 1, so even a perfectly balanced batch would lose tokens. "
            "Set 1 or more (1.5 in the paper), or leave it out to drop nothing."
        )
    name = f"capacity_{capacity_factor:g}"
    ALL_EXPERTS_FUNCTIONS.register(name, partial(capacity_experts_forward, capacity_factor=capacity_factor))
    model.set_experts_implementation(name)


# An operator of its own, so that its first line is evaluated when compiled code runs, not when it is traced.
@torch.library.custom_op("mobilemoe::record_routing", mutates_args=("totals",))
def record_routing(
    router_logits: torch.Tensor, top_k_index: torch.Tensor, totals: torch.Tensor, layer: int, capacity: int
) -> None:
    """
    Adds the statistics of one layer's forward pass to `totals`, unless activation checkpointing recomputes the pass.

    Args:
        router_logits (`torch.Tensor`): of shape `(tokens, E)`.
        top_k_index (`torch.Tensor`): of shape `(tokens, top_k)`.
        totals (`torch.Tensor`): of shape `(layers, E + 4)`: assignments per expert, then dropped assignments, sum of
            entropies, sum of z-losses and number of passes.
        layer (`int`): row of `totals`.
        capacity (`int`): most tokens of this batch that an expert accepts.
    """
    # Recomputation happens inside the backward pass, which has no public test. torch tests it in the same way:
    # https://github.com/pytorch/pytorch/blob/v2.11.0/torch/utils/checkpoint.py, `_checkpoint_hook`.
    if torch._C._current_graph_task_id() != -1:
        return
    num_experts = router_logits.shape[1]
    counts = count_assignments(top_k_index, num_experts)
    scores = router_logits.sigmoid()
    shares = scores / scores.sum(dim=-1, keepdim=True)
    totals[layer, :num_experts] += counts
    totals[layer, num_experts] += (counts - capacity).clamp(min=0).sum()
    totals[layer, num_experts + 1] -= torch.xlogy(shares, shares).sum(dim=-1).mean()
    totals[layer, num_experts + 2] += router_z_loss(router_logits)
    totals[layer, num_experts + 3] += 1


class ExpertBiasCallback(TrainerCallback):
    """
    Loss-free load balancing: after every optimizer step the bias of an expert with more than the mean load decreases
    by `update_rate`, and the bias of one with less increases (paper section 2.3; arXiv 2408.15664).

    Counts are summed over micro-batches and processes. Hooks on the routers collect them during training, outside the
    forward pass, and they stay on the device until the trainer logs or saves.

    In `args.output_dir`, `routing.jsonl` gets one line per optimizer step with one value per layer for each of: load
    of the busiest expert over the mean ("imbalance"), share of dropped assignments ("dropped"), entropy of the routing
    scores in nats, at most ln E ("entropy"), and z-loss ("z_loss"). After training `expert_load.json` holds the last
    step's counts and `routing.png` the curves. The trainer's log gets one number of each for the last step.

    Args:
        model (`PreTrainedModel`): the model to train.
        update_rate (`float`, defaults to 1e-3): the paper's lambda_lb; 0 only records.
        capacity_factor (`float`, *optional*): the factor of the dispatch, to count dropped assignments.
        generates (`bool`, defaults to `False`): the trainer generates too, and only passes with gradients count. With
            reentrant activation checkpointing there would be none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        update_rate: float = 1e-3,
        capacity_factor: float | None = None,
        generates: bool = False,
    ):
        self.update_rate, self.generates = update_rate, generates
        self.capacity_factor = capacity_factor
        self.layers = [
            module for module in model.modules() if isinstance(module, (MobileMoEFeedForward, Int4FeedForward))
        ]
        self.num_experts = len(self.layers[0].expert_bias)
        device = self.layers[0].expert_bias.device
        self.totals = torch.zeros(len(self.layers), self.num_experts + 4, device=device)
        # Assignments of the last step, `(layers, E)`.
        self.load = torch.zeros(len(self.layers), self.num_experts, device=device)
        # Steps not yet written, each with a tensor of shape `(len(MEASURES), layers)`.
        self.pending: list[tuple[int, torch.Tensor]] = []
        # The last written step that has not been logged.
        self.last_row: dict | None = None
        for index, layer in enumerate(self.layers):
            layer.router.register_forward_hook(self._record_hook(index))

    def _record_hook(self, layer: int):
        def hook(router, args, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            if not router.training or (self.generates and not torch.is_grad_enabled()):
                return
            router_logits, _, top_k_index = output
            # Without a factor an expert accepts all tokens.
            capacity = len(top_k_index)
            if self.capacity_factor is not None:
                capacity = expert_capacity(*top_k_index.shape, self.num_experts, self.capacity_factor)
            record_routing(router_logits.detach(), top_k_index, self.totals, layer, capacity)

        return hook

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # The trainer has moved the model to its device by now.
        self.totals = self.totals.to(self.layers[0].expert_bias.device)
        if not state.is_world_process_zero:
            return
        # If it is not installed, fail before training rather than after it.
        import matplotlib.figure  # noqa: F401

        file = Path(args.output_dir, "routing.jsonl")
        # Steps after the checkpoint run again, in a new run all steps. A truncated line lacks its newline.
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        write_text(file, "".join(kept))

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.totals)
        self.load = self.totals[:, : self.num_experts].clone()
        mean = self.load.mean(dim=1, keepdim=True)  # (layers, 1)
        for layer, direction in zip(self.layers, torch.sign(mean - self.load), strict=True):
            layer.expert_bias += self.update_rate * direction
        dropped, entropy, z_loss, passes = self.totals[:, self.num_experts :].unbind(1)
        row = [
            self.load.amax(dim=1) / mean.squeeze(1),
            dropped / self.load.sum(dim=1),
            entropy / passes,
            z_loss / passes,
        ]
        self.pending.append((state.global_step + 1, torch.stack(row)))
        # In place: compiled hooks refer to this tensor.
        self.totals.zero_()

    def _flush(self, args, state) -> None:
        """Writes the steps since the last flush; the only synchronisation with the GPU."""
        if not self.pending:
            return
        steps, tensors = zip(*self.pending, strict=True)
        self.pending.clear()
        rows = []
        for step, values in zip(steps, torch.stack(tensors).tolist(), strict=True):
            rounded = [[float(f"{value:.5g}") for value in layers] for layers in values]
            rows.append({"step": step} | dict(zip(MEASURES, rounded, strict=True)))
        if state.is_world_process_zero:
            with Path(args.output_dir, "routing.jsonl").open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.last_row = rows[-1]

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self._flush(args, state)
        if self.last_row is None or logs is None:
            return
        row, self.last_row = self.last_row, None
        summary = {
            "load_imbalance": max(row["imbalance"]),
            "dropped_tokens": statistics.mean(row["dropped"]),
            "router_entropy": statistics.mean(row["entropy"]),
            "router_z_loss": statistics.mean(row["z_loss"]),
        }
        logs |= summary
        # The trainer has already copied `logs` into its history.
        state.log_history[-1] |= summary

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # Before the checkpoint is saved, so that a run resumed from it finds the lines of all earlier steps.
        if control.should_save:
            self._flush(args, state)
            self._write_load(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._flush(args, state)
        self._write_load(args, state)
        if state.is_world_process_zero:
            plot_routing(args.output_dir)

    def _write_load(self, args, state) -> None:
        # There is none in a run that was resumed after its last step; the file has been written with its checkpoint.
        if state.is_world_process_zero and self.load.any():
            write_json(Path(args.output_dir, "expert_load.json"), {"load": self.load.tolist()})


def read_routing(output_dir: str | os.PathLike) -> list[dict]:
    """The rows of `routing.jsonl`, one per optimizer step."""
    return [json.loads(line) for line in Path(output_dir, "routing.jsonl").read_text().splitlines()]


def plot_routing(output_dir: str | os.PathLike) -> None:
    """Draws `routing.jsonl` into `routing.png`: every measure over the steps, its median and maximum over layers."""
    rows = read_routing(output_dir)
    num_experts = len(json.loads(Path(output_dir, "expert_load.json").read_text())["load"][0])
    titles = {
        "imbalance": "busiest expert over the mean",
        "dropped": "share of dropped assignments",
        "entropy": "entropy of the routing scores (nats)",
        "z_loss": "router z-loss",
    }
    # The loads that a capacity factor of 1.5 has room for, and the entropy of an even distribution.
    lines = {"imbalance": (1.5, "1.5"), "entropy": (math.log(num_experts), f"ln {num_experts}")}
    with picture(Path(output_dir, "routing.png"), (12, 7), 2, 2) as axes:
        for axis, name in zip(axes, MEASURES, strict=True):
            steps = [row["step"] for row in rows]
            axis.plot(steps, [statistics.median(row[name]) for row in rows], label="median layer")
            axis.plot(steps, [max(row[name]) for row in rows], label="highest layer")
            if name in lines:
                value, label = lines[name]
                axis.axhline(value, color="grey", linestyle="--", label=label)
            axis.set(xlabel="optimizer step", title=titles[name])
            axis.legend()
