"""MobileMoE for the Hugging Face ecosystem. Importing the package registers the architecture with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import kernels, packed_mobilemoe
from .configuration_mobilemoe import MobileMoEConfig
from .modeling_mobilemoe import MobileMoEForCausalLM, MobileMoEModel
from .quantization_mobilemoe import dequantize, quantize


packed_mobilemoe.has_cpu_kernels = kernels.available

AutoConfig.register(MobileMoEConfig.model_type, MobileMoEConfig, exist_ok=True)
AutoModel.register(MobileMoEConfig, MobileMoEModel, exist_ok=True)
AutoModelForCausalLM.register(MobileMoEConfig, MobileMoEForCausalLM, exist_ok=True)
# Saved checkpoints carry these files, so that they also load with `trust_remote_code=True` and without this package.
MobileMoEConfig.register_for_auto_class()
MobileMoEModel.register_for_auto_class("AutoModel")
MobileMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MobileMoEConfig", "MobileMoEForCausalLM", "MobileMoEModel", "dequantize", "quantize"]
