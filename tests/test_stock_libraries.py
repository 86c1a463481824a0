"""Generation modes and loaders of transformers, PEFT, TRL and accelerate, on full-precision and packed models."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from mobilemoe.train.lora import add_lora
from modeling_mobilemoe import MobileMoEForCausalLM, kernels
from modeling_mobilemoe.packed_mobilemoe import Int4Embedding


NEW_TOKENS = 12
# transformers prefetches through a CUDA stream.
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need CUDA")


@pytest.fixture(scope="module", params=["BF16", "INT4"])
def weights(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bf16_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(weights: str, bf16_checkpoint: Path, int4_checkpoint: Path) -> Path:
    return {"BF16": bf16_checkpoint, "INT4": int4_checkpoint}[weights]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MobileMoEForCausalLM:
    """In FP32, where both take the exact path. Do not modify it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def generate(model: MobileMoEForCausalLM, input_ids: torch.Tensor, **options) -> list[list[int]]:
    """The new tokens of each row; without end tokens, so that all rows have the same length."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": [], "pad_token_id": 2} | options
    tokens = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    return tokens[:, input_ids.shape[1] :].tolist()


@pytest.mark.works_with("generate, with a dynamic, a static and no cache, and chunked prefill", "transformers")
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 7},
    ],
    ids=str,
)
def test_generation_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor, options: dict):
    expected = generate(model, input_ids)
    assert generate(model, input_ids, **options) == expected
    # A row must not be the same token again and again, which any cache would give.
    assert all(len(set(row)) > NEW_TOKENS // 2 for row in expected)


@needs_cuda
@pytest.mark.works_with("generate(cache_implementation='offloaded'), 'offloaded_static'", "transformers")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_cache_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor, cache: str):
    model, input_ids = copy.deepcopy(model).to("cuda"), input_ids.to("cuda")
    assert generate(model, input_ids, cache_implementation=cache) == generate(model, input_ids)


@pytest.mark.works_with("generate(num_beams=...)", "transformers")
@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_beams_do_not_depend_on_the_cache(model: MobileMoEForCausalLM, input_ids: torch.Tensor, cache: dict):
    expected = generate(model, input_ids, num_beams=3)
    assert generate(model, input_ids, num_beams=3, **cache) == expected
    assert expected != generate(model, input_ids)


@pytest.mark.works_with("generate(prompt_lookup_num_tokens=...), generate(assistant_model=...)", "transformers")
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_speculation_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor, options: dict):
    # Twice the same prompt, so that a look-up finds something.
    prompt = input_ids[:1].repeat(1, 2)
    if "assistant_model" in options:
        options = {"assistant_model": copy.deepcopy(model)}
    assert generate(model, prompt, **options) == generate(model, prompt)


@pytest.mark.works_with("generate(assistant_early_exit=...)", "transformers")
def test_early_exit_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    calls = [0, 0]

    def count(layer, *_):
        calls[layer.self_attn.layer_idx] += 1

    hooks = [layer.register_forward_hook(count) for layer in model.model.layers]
    early = generate(model, input_ids[:1], assistant_early_exit=1)
    for hook in hooks:
        hook.remove()
    assert early == generate(model, input_ids[:1])
    # The drafts come from the first layer alone.
    assert calls[0] > calls[1] > 0


@pytest.mark.works_with("generate(cache_implementation='quantized')", "transformers")
def test_quantised_cache_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    pytest.importorskip("hqq", reason="needs hqq")
    # In 8 bits: keys and values are rounded, and this prompt has no near-ties.
    config = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16}
    quantised = generate(model, input_ids[:1], cache_implementation="quantized", cache_config=config)
    assert quantised == generate(model, input_ids[:1])


@pytest.mark.works_with("generate_batch, continuous batching", "transformers")
def test_continuous_batching_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    prompts = [input_ids[0, :9].tolist(), input_ids[1].tolist(), input_ids[0, 5:20].tolist()]
    options = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=2)
    # By default the cache takes most of the free memory.
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = copy.deepcopy(model).generate_batch(
        prompts, generation_config=options, continuous_batching_config=memory
    )
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert [output.generated_tokens] == generate(model, torch.tensor([prompt]))


IN_MEMORY = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
ON_DISK = {
    "layers": IN_MEMORY | {"model.layers": "disk"},
    "embedding": IN_MEMORY | {"model.embed_tokens": "disk", "lm_head": "disk"},
    "everything": {"": "disk"},
}


def unfused(model: MobileMoEForCausalLM) -> MobileMoEForCausalLM:
    """One operator would read the tensors of several modules, which are there one at a time under offloading."""
    model.model.layers.apply(lambda module: module.register_forward_hook(lambda *_: None))
    return model


@pytest.mark.works_with("from_pretrained(device_map=...) with parts or all on disk", "accelerate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ON_DISK)
@torch.no_grad()
def test_disk_offload_equals_memory(
    checkpoint: Path, kind: str, dtype: torch.dtype, input_ids: torch.Tensor, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, device_map=ON_DISK[kind], offload_folder=tmp_path
    )
    assert any(tensor.is_meta for tensor in model.state_dict().values())
    expected = unfused(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype))
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)


@pytest.mark.works_with("cpu_offload", "accelerate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cpu_offload_equals_memory(checkpoint: Path, dtype: torch.dtype, input_ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    expected = unfused(copy.deepcopy(model))(input_ids).logits
    cpu_offload(model, "cpu", offload_buffers=True)
    assert torch.equal(model(input_ids).logits, expected)


# accelerate cannot have everything on disk, or a tied head, which is not in the checkpoint.
@pytest.mark.works_with("load_checkpoint_and_dispatch", "accelerate")
@pytest.mark.parametrize("kind", ["memory", "layers"])
@torch.no_grad()
def test_load_checkpoint_and_dispatch_equals_from_pretrained(
    checkpoint: Path, weights: str, kind: str, input_ids: torch.Tensor, tmp_path: Path
):
    # accelerate leaves what is on disk in the dtype of the checkpoint.
    dtype = torch.bfloat16 if weights == "BF16" else torch.float32
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint), dtype=dtype)
    model.tie_weights()
    device_map = ON_DISK.get(kind, IN_MEMORY)
    options = {"offload_folder": str(tmp_path), "offload_buffers": True}
    model = load_checkpoint_and_dispatch(model.eval(), str(checkpoint), device_map=device_map, **options)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)


@pytest.mark.works_with("resize_token_embeddings", "transformers", weights=["INT4"])
@pytest.mark.parametrize("num_tokens", [512, 520, 500])
@torch.no_grad()
def test_resized_packed_embedding(int4_checkpoint: Path, input_ids: torch.Tensor, num_tokens: int, tmp_path: Path):
    input_ids = input_ids.clamp(max=499)
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    expected = model(input_ids).logits
    assert isinstance(model.resize_token_embeddings(num_tokens), Int4Embedding)
    model.save_pretrained(tmp_path)
    for resized in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        assert resized.config.vocab_size == resized.get_input_embeddings().num_embeddings == num_tokens
        logits = resized(input_ids).logits
        assert logits.shape[-1] == num_tokens
        kept = min(512, num_tokens)
        assert torch.equal(logits[..., :kept], expected[..., :kept])
        # New rows are near the mean of the old ones, and not zero.
        assert (logits[..., kept:].abs().amax(dim=(0, 1)) > 0).all()


ADAPTERS = {
    "linears": {"target_modules": ["q_proj", "shared_expert.down_proj"]},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "norms": {"target_modules": ["o_proj"], "modules_to_save": ["post_attention_layernorm"]},
}


@pytest.mark.works_with("from_pretrained(adapter), load_adapter", "transformers", "peft", weights=["BF16"])
@pytest.mark.parametrize("kind", ADAPTERS)
@torch.no_grad()
def test_adapter_directory_loads_as_a_model(tiny_checkpoint: Path, kind: str, input_ids: torch.Tensor, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="needs the `train` extra")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    plain = base(input_ids).logits
    adapted = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **ADAPTERS[kind])).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.mul_(1.5)
    adapted.save_pretrained(tmp_path)
    expected = adapted(input_ids).logits
    assert (expected - plain).abs().max() > 0.1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, expected)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    loaded.load_adapter(tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_the_tied_embedding_is_refused(
    tiny_model: MobileMoEForCausalLM, tiny_checkpoint: Path, input_ids: torch.Tensor, target: str, tmp_path: Path
):
    peft = pytest.importorskip("peft", reason="needs the `train` extra")
    adapted = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=[target]))
    adapted.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for use in (
        adapted.train,
        lambda: adapted(input_ids),
        lambda: peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload(),
    ):
        with pytest.raises(ValueError, match="MobileMoE ties the two"):
            use()


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [1, 2, 180]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_embedding_trained_the_other_ways_merges(
    tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, options: dict, tmp_path: Path
):
    peft = pytest.importorskip("peft", reason="needs the `train` extra")
    plain = tiny_model(input_ids).logits
    adapted = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=["q_proj"], **options)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = adapted(input_ids).logits
    assert (expected - plain).abs().max() > 0.1
    adapted.merge_and_unload().save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-4, rtol=1e-4)


def first_dpo_loss(checkpoint: Path, chat_tokenizer, output_dir: Path, training: bool, **options) -> float:
    trl = pytest.importorskip("trl", reason="needs the `train` extra")
    from datasets import Dataset

    data = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "chosen": [{"role": "assistant", "content": f"def number_{i}(self): return"}],
            "rejected": [{"role": "assistant", "content": "import argparse"}],
        }
        for i in range(4)
    ]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    arguments = trl.DPOConfig(
        output_dir=str(output_dir), max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", **options,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=add_lora(model, "dense", rank=4).train(training),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def test_dpo_on_a_packed_model_starts_at_log_2(text_checkpoint: Path, chat_tokenizer, tmp_path: Path):
    """The reference is computed without gradients and the policy with them: both in the exact arithmetic."""
    loss = first_dpo_loss(text_checkpoint, chat_tokenizer, tmp_path, training=False)
    assert loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.skipif(not kernels.available(), reason="needs the C++ kernels")
def test_dpo_computes_references_ahead_in_the_mode_of_the_model(text_checkpoint: Path, chat_tokenizer, tmp_path: Path):
    """As docs/checkpoints.md says: TRL computes them before it switches to training mode."""
    exact, kernel = (
        first_dpo_loss(
            text_checkpoint, chat_tokenizer, tmp_path / str(training), training, precompute_ref_log_probs=True
        )
        for training in (True, False)
    )
    assert exact == pytest.approx(math.log(2), abs=1e-6)
    assert abs(kernel - math.log(2)) > 1e-6


@pytest.mark.skipif(not kernels.available(), reason="needs the C++ kernels")
def test_training_mode_has_one_arithmetic(int4_checkpoint: Path, input_ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    exact = model.train()(input_ids).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, exact)
        # The kernels, which round activations.
        assert not torch.equal(model.eval()(input_ids).logits, exact)


@pytest.mark.works_with("torch.compile(fullgraph=True)", "torch", weights=["INT4"])
@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_compiled_packed_model_is_one_graph(
    int4_checkpoint: Path, input_ids: torch.Tensor, dtype: torch.dtype, tokens: int
):
    torch.compiler.reset()
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=dtype)
    # One token uses fewer experts than there are, 24 use all.
    input_ids = input_ids[:1, :tokens]
    expected = model(input_ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, use_cache=False).logits
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(compiled, expected, **close)


LM_EVAL_WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_mobilemoe", "mobilemoe"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", dtype="float32")
request = Instance("loglikelihood", {}, ("def function(", "value):"), 0)
print(type(model.model.lm_head).__name__, model.loglikelihood([request])[0][0])
"""


def test_lm_eval_reads_a_packed_directory_without_the_package(text_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="needs the `eval` extra")
    completed = subprocess.run(
        [sys.executable, "-I", "-c", LM_EVAL_WITHOUT_THE_PACKAGE, str(text_checkpoint)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf_home")},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    head, log_likelihood = completed.stdout.split()[-2:]
    assert head == "Int4Head" and -50 < float(log_likelihood) < 0
