"""The training stages, which are what the recipe scripts and `mobilemoe train` run."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig

from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM
from modeling_mobilemoe.quantization_mobilemoe import quantization_table, quantize
from modeling_mobilemoe.saving_mobilemoe import replace_when_complete

from ..artifacts import load_tokenizer
from ..display import show, table
from .checkpoints import check_output_dir, mark_output_dir
from .checks import check_numbers
from .data import check_weights
from .distillation import Distillation
from .evaluation import BitsPerByte
from .fake_quantization import activation_grid
from .lora import add_lora, trainable_table
from .qat import FakeQuantizationStart, convert, preparation_table, prepare
from .recipe import CHAT_TEMPLATE, RecipeArguments, load_model, make_trainer, reading_tokenizer, train
from .shards import prepare as prepare_shards


@dataclass
class LoRAArguments:
    lora_scope: str | None = field(
        default=None, metadata={"help": "What gets adapters in place of training all: attention, experts, dense, all."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the adapters."})
    lora_budget: int | None = field(default=None, metadata={"help": "Or their number of parameters."})


@dataclass
class QATArguments:
    expert_axis: str = field(
        default="output", metadata={"help": "Groups of experts: output (released) or input (ExecuTorch's kernels)."}
    )
    activation_grid: str | None = field(
        default=None,
        metadata={"help": "INT8 inputs as in mobilemoe's operators, per_token as in ExecuTorch's, or none."},
    )
    quantize_from_step: int = field(default=0, metadata={"help": "Optimizer steps in full precision before QAT."})
    distill: float = field(
        default=1.0,
        metadata={"help": "Weight of the divergence from the model before QAT; the rest is cross-entropy."},
    )
    distill_temperature: float = field(default=1.0, metadata={"help": "By which logits are divided for it."})


def _begin(recipe: RecipeArguments, training_args: SFTConfig, stage: str) -> None:
    check_output_dir(training_args.output_dir, recipe.model, stage, recipe.overwrite_output_dir)
    # Random weights of a new model, and adapters.
    set_seed(training_args.seed)


def _train(
    trainer, recipe: RecipeArguments, training_args: SFTConfig, stage: str, report: TrainerCallback | None = None
) -> None:
    if report is not None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(report)
    if training_args.process_index == 0:
        mark_output_dir(training_args.output_dir, recipe.model, stage)
    train(trainer)
    trainer.save_state()


def prepare_data(
    recipe: RecipeArguments, lora: LoRAArguments, quantization: QATArguments, training_args: SFTConfig
) -> None:
    """
    Tokenizes the data of any stage into the shards that the same stage then reads with `shards`.

    The arguments are those of the stage: its tokenizer, `data`, `max_length` and `seed` decide what is written.
    `dataset_num_proc` processes work.
    """
    if recipe.shards is None:
        raise ValueError("shards is not set, so there is no place for what is prepared. Add --shards DIR.")
    if training_args.max_length is None or training_args.max_length < 2:
        raise ValueError(f"max_length={training_args.max_length} is no length of a sequence. Set 2 or more.")
    num_processes = 1 if training_args.dataset_num_proc is None else training_args.dataset_num_proc
    if num_processes < 1:
        raise ValueError(f"dataset_num_proc={num_processes} cannot work. Set 1 or more processes.")
    # Epochs have no weights.
    if training_args.max_steps > 0 or not recipe.data:
        check_weights(recipe.data)
    tokenizer = reading_tokenizer(load_tokenizer(recipe.tokenizer or recipe.model))
    length, seed = training_args.max_length, training_args.seed
    prepared = prepare_shards(recipe.data, tokenizer, length, seed, recipe.shards, num_processes)
    names = ("rows", "documents", "tokens", "learnt", "bytes")
    totals = [[each.total(name) for name in names] for each in prepared]
    rows = [
        (str(source), *(f"{value:,}" for value in total)) for source, total in zip(recipe.data, totals, strict=True)
    ]
    rows.append(("all", *(f"{sum(column):,}" for column in zip(*totals, strict=True))))
    show(table(("data source", *names), rows, bold=len(rows) - 1))


def pretrain(recipe: RecipeArguments, training_args: SFTConfig) -> None:
    """Pre-training and mid-training on raw text."""
    stage = "pre-training"
    _begin(recipe, training_args, stage)
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model)
    model = load_model(recipe.model, recipe.attn_implementation)
    trainer = make_trainer(model, tokenizer, recipe, training_args)
    _train(trainer, recipe, training_args, stage)
    with replace_when_complete(training_args.output_dir) as partial:
        trainer.save_model(partial)


def check_lora(lora: LoRAArguments, recipe: RecipeArguments, training_args: SFTConfig) -> None:
    check_numbers(lora)
    if lora.lora_scope is None:
        if lora.lora_rank or lora.lora_budget:
            raise ValueError(
                "lora_rank or lora_budget is set without lora_scope, and would do nothing. Set lora_scope."
            )
        return
    if recipe.expert_bias_update_rate:
        raise ValueError(
            f"expert_bias_update_rate={recipe.expert_bias_update_rate} with lora_scope={lora.lora_scope}: the biases "
            "would move, but an adapter does not hold them. Set 0 or leave it out."
        )
    recipe.expert_bias_update_rate = 0.0


def fine_tuning_name(lora_scope: str | None) -> str:
    return "fine-tuning" if lora_scope is None else f"LoRA ({lora_scope})"


def fine_tune(
    recipe: RecipeArguments, lora: LoRAArguments, training_args: SFTConfig, *, report: TrainerCallback | None = None
) -> None:
    """
    Fine-tuning on conversations, or on prompts and completions; the loss counts the answers only.

    With `lora_scope`, adapters train in place of all weights: `output_dir/adapter` holds them, and `output_dir` the
    merged model, for QAT or export. Over a packed INT4 base there is only the adapter. A `report` prints in place of
    the trainer, and of the tables.
    """
    check_lora(lora, recipe, training_args)
    stage = fine_tuning_name(lora.lora_scope)
    _begin(recipe, training_args, stage)
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model)
    # Base checkpoints have no chat template; from here on the model has one.
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    model = load_model(recipe.model, recipe.attn_implementation)
    if lora.lora_scope is not None:
        model = add_lora(model, lora.lora_scope, lora.lora_rank, lora.lora_budget)
        if training_args.process_index == 0 and report is None:
            print(trainable_table(model))
    trainer = make_trainer(model, tokenizer, recipe, training_args)
    _train(trainer, recipe, training_args, stage, report)
    if lora.lora_scope is None:
        with replace_when_complete(training_args.output_dir) as partial:
            trainer.save_model(partial)
        return
    adapter = Path(training_args.output_dir, "adapter")
    with replace_when_complete(adapter) as partial:
        trainer.save_model(partial)
    if trainer.is_world_process_zero() and model.config.quantization is None:
        if trainer.accelerator.is_fsdp2:
            base = load_model(recipe.model, recipe.attn_implementation)
            # The trainer has added the tokenizer's special tokens.
            base.config, base.generation_config = model.config, model.generation_config
            model = PeftModel.from_pretrained(base, adapter)
        with replace_when_complete(training_args.output_dir) as partial:
            model.merge_and_unload().save_pretrained(partial)
            tokenizer.save_pretrained(partial)


def check_quantization(quantization: QATArguments, recipe: RecipeArguments, training_args: SFTConfig) -> None:
    check_numbers(quantization)
    grid = activation_grid(quantization.activation_grid, Int4Format(quantization.expert_axis))
    if recipe.capacity_factor is not None and grid == "mobilemoe":
        raise ValueError(
            f"capacity_factor={recipe.capacity_factor} with activation_grid=mobilemoe: the operators round inputs per "
            "expert, and drop nothing. Leave capacity_factor out, or set activation_grid=per_token."
        )
    check_quantized_steps(quantization, training_args)
    if recipe.expert_bias_update_rate is None:
        # Biases are packed in BF16, whose spacing exceeds the usual step of 1e-3 from 0.25 on.
        recipe.expert_bias_update_rate = 0.0


def check_quantized_steps(quantization: QATArguments, training_args: SFTConfig) -> None:
    """Steps that come from epochs are known only once the data have been read."""
    if 0 < training_args.max_steps <= quantization.quantize_from_step:
        raise ValueError(
            f"quantize_from_step={quantization.quantize_from_step} with max_steps={training_args.max_steps}: no step "
            "would see INT4 weights, and packing would only round them. Set a step below max_steps."
        )


def quantize_aware(
    recipe: RecipeArguments,
    quantization: QATArguments,
    training_args: SFTConfig,
    *,
    report: TrainerCallback | None = None,
) -> None:
    """
    INT4 quantization-aware training of a fine-tuned checkpoint; ends in a packed checkpoint.

    The model learns to be what it was before its weights were rounded: the loss is the divergence from the predictions
    of the checkpoint. With `distill: 0` it learns from the data. A `report` prints in place of the trainer, and of the
    tables.
    """
    check_quantization(quantization, recipe, training_args)
    stage = "QAT"
    _begin(recipe, training_args, stage)
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model)
    int4_format = Int4Format(quantization.expert_axis)
    model = load_model(recipe.model, recipe.attn_implementation)
    teacher = copy.deepcopy(model) if quantization.distill else None
    model = prepare(model, int4_format, quantization.activation_grid)
    if training_args.process_index == 0 and report is None:
        print(preparation_table(model))
    trainer = make_trainer(model, tokenizer, recipe, training_args)
    check_quantized_steps(quantization, training_args)
    if teacher is not None:
        if not trainer.accelerator.is_fsdp2:
            teacher.to(training_args.device)
        trainer.distillation = Distillation(model, teacher, quantization.distill, quantization.distill_temperature)
        # The loss of an evaluation is a divergence then.
        trainer.remove_callback(BitsPerByte)
    trainer.add_callback(FakeQuantizationStart(quantization.quantize_from_step))
    _train(trainer, recipe, training_args, stage, report)
    if trainer.state.global_step <= quantization.quantize_from_step:
        raise ValueError(
            f"Training ended after {trainer.state.global_step} steps with quantize_from_step="
            f"{quantization.quantize_from_step}: no step saw INT4 weights, and packing would only round them. Resume "
            "from the last checkpoint with --resume_from_checkpoint true, or set an earlier step."
        )
    # All processes gather them, and the main one keeps them.
    whole = trainer.accelerator.get_state_dict(trainer.model) if trainer.accelerator.is_fsdp2 else None
    if trainer.is_world_process_zero():
        if whole is None:
            packed = convert(model)
        else:
            plain = MobileMoEForCausalLM(model.config)
            plain.load_state_dict(whole)
            packed = quantize(plain, int4_format)
        with replace_when_complete(training_args.output_dir) as partial:
            packed.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if report is None:
            print(quantization_table(packed))
