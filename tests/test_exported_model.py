"""The module that becomes a program: what the checkpoint stores arrives in the operators bit for bit."""

import pytest
import torch

from mobilemoe.export.program import (
    MOE_MODULES,
    DenseMoE,
    ExportEmbedding,
    ExportModel,
    ProgramOptions,
    export_linear,
)
from modeling_mobilemoe import quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format, unpack_int4


pytest.importorskip("executorch.kernels.quantized", reason="executorch is not installed: make setup")
pytest.importorskip("executorch.extension.llm.custom_ops.custom_ops")


@pytest.fixture
def packed(tiny_model):
    return quantize(tiny_model, Int4Format("input"))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_embedding_rows_in_the_runtime_are_those_of_the_checkpoint(packed, num_bits):
    """In a program of its own: the operator in PyTorch rounds to the FP16 of its scales, the runtime does not."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    embedding = packed.get_input_embeddings()
    tokens = torch.arange(512).view(1, -1)
    exported = torch.export.export(ExportEmbedding(embedding, num_bits), (tokens,))
    edge = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    program = Runtime.get().load_program(edge.to_executorch().buffer)
    (rows,) = program.load_method("forward").execute((tokens,))
    assert torch.equal(rows, embedding(tokens))


def test_linears_and_head_keep_integers_and_scales(packed):
    for stored in (packed.model.layers[1].self_attn.o_proj, packed.get_input_embeddings()):
        weight = export_linear(stored).weight
        assert torch.equal(weight.qdata, unpack_int4(stored.qweight))
        # As XNNPACK stores them.
        assert torch.equal(weight.scale, stored.weight_scale.bfloat16().float())
        assert not weight.zero_point.any()


def test_full_precision_module_is_the_model(tiny_model, input_ids):
    tokens = input_ids[:1]
    with torch.no_grad():
        expected = tiny_model(tokens).logits
        module = ExportModel(tiny_model, ProgramOptions(max_seq_len=32, weights="fp32", all_logits=True), DenseMoE)
        whole = module(tokens, torch.tensor([0]))
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
        # The second half again, over the cache of the first.
        half = tokens.shape[1] // 2
        torch.testing.assert_close(
            module(tokens[:, half:], torch.tensor([half])), expected[:, half:], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("expert_bits", [4, 8])
def test_moe_operator_computes_the_experts_of_the_checkpoint(packed, expert_bits):
    layer = packed.model.layers[1]
    hidden_states = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = layer.feed_forward(hidden_states) - layer.feed_forward.shared_expert(hidden_states)
        moe = MOE_MODULES["llama"](layer, ProgramOptions(max_seq_len=32, expert_bits=expert_bits))
        torch.testing.assert_close(moe(hidden_states[0]), expected[0], rtol=1e-4, atol=1e-4)
