"""Traces a program with `torch.export` and lowers it to ExecuTorch."""

import logging
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig

from ..machine import peak_memory
from .program import ExportModel, ProgramOptions


logger = logging.getLogger(__name__)

EXPERTS_FILE = "experts"
# Packages whose versions affect what a program computes.
VERSIONS = ("torch", "transformers", "torchao", "executorch")
# Length of the example input for tracing, and the shortest context. `torch.export` assumes dynamic sizes of at least
# 2: in a context of 2 it would conclude that every call starts at position 0.
TRACED_TOKENS = 8


def metadata(config: MobileMoEConfig, options: ProgramOptions, eos_ids: list[int]) -> dict:
    """Constant methods of the program. ExecuTorch's runners read the first six, optimum-executorch the others."""
    return {
        "get_max_seq_len": options.max_seq_len,
        "get_max_context_len": options.max_seq_len,
        "get_eos_ids": eos_ids,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": config.bos_token_id,
        "get_max_batch_size": 1,
    }


def lower(model: ExportModel, constant_methods: dict, experts_file: bool, stages: "Stages"):
    """Traces and lowers the program: linears and elementwise work to XNNPACK, the rest to CPU operators."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers llama::*
    import executorch.kernels.quantized  # noqa: F401  registers quantized_decomposed::embedding_4bit
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from torchao.utils import unwrap_tensor_subclass

    unwrap_tensor_subclass(model)
    max_seq_len = model.options.max_seq_len
    dynamic_shapes = ({1: torch.export.Dim("length", min=1, max=max_seq_len)}, {})
    # XNNPACK has BF16 kernels for few CPUs. ExecuTorch's own linear runs on all and can share the tied embedding.
    bf16 = model.options.weights == "bf16"
    # With our operators there is nothing left to delegate.
    partitioner = [] if bf16 or model.on_kernels else [XnnpackPartitioner()]
    preserved = [torch.ops.aten.linear.default] if bf16 else []
    example = (torch.zeros((1, TRACED_TOKENS), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad(), warnings.catch_warnings():
        # ExecuTorch's own operators use a deprecated torch check, which warns once per layer and pass.
        warnings.simplefilter("ignore", FutureWarning)
        with stages("trace"):
            exported = torch.export.export(model, example, dynamic_shapes=dynamic_shapes, strict=False)
        with stages("lower", f"{len(model.layers)} layers, up to 15 s each"):
            # One partitioner for linears and elementwise operators. With two, as in ExecuTorch's llama example, every
            # linear becomes a separate delegate, which is slower to lower and to run.
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=partitioner,
                compile_config=EdgeCompileConfig(
                    _check_ir_validity=False, _skip_dim_order=True, preserve_ops=preserved
                ),
                constant_methods=constant_methods,
            )
            del exported
        with stages("plan"), warnings.catch_warnings():
            # It warns of buffers that programs write. Ours is the cache, which is written before it is read.
            warnings.filterwarnings("ignore", message="Mutation on a buffer in the model is detected")
            return edge.to_executorch(
                ExecutorchBackendConfig(
                    extract_delegate_segments=True,
                    do_quant_fusion_and_const_prop=True,
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                    sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                    external_constants=external_constant if experts_file else False,
                    # Of a tile's 64-byte columns none should lie in two lines of the cache.
                    constant_tensor_alignment=64,
                )
            )


def external_constant(node: torch.fx.Node) -> str | None:
    return EXPERTS_FILE if "packed_" in node.name else None


def program_operators(program) -> list[str]:
    """Names of the operators that the runtime must provide, without delegated ones."""
    plan = program.executorch_program.execution_plan[0]
    return sorted(f"{operator.name}.{operator.overload}".rstrip(".") for operator in plan.operators)


class Stages:
    """Logs the progress of stages and records their seconds."""

    report_every = 30.0

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, note: str = "") -> Iterator[None]:
        logger.info(f"{name} ...{f' ({note})' if note else ''}")
        started, finished = time.perf_counter(), threading.Event()

        def report() -> None:
            # torch.export and ExecuTorch take minutes and log no progress.
            while not finished.wait(self.report_every):
                logger.info(
                    f"{name}: {time.perf_counter() - started:.0f} s so far, peak memory {peak_memory() / 1e9:.2f} GB"
                )

        threading.Thread(target=report, daemon=True).start()
        try:
            yield
        finally:
            finished.set()
        self.seconds[name] = round(time.perf_counter() - started, 1)
        logger.info(f"{name}: {self.seconds[name]} s, peak memory {peak_memory() / 1e9:.2f} GB")
