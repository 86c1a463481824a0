"""
A recipe under an accelerate configuration with FSDP2, on CPU processes, for `test_processes.py`:

    torchrun --nproc_per_node 2 tests/fsdp2_recipe.py CONFIG SCRIPT [ARGUMENT ...]

accelerate takes FSDP up on accelerators only and makes CPU processes plain DDP. Here they become FSDP after all; the
rest, from wrapping to saving, is accelerate's and the trainer's own. Computes in FP32, or with PRECISION=bf16 as the
configuration says.
"""

import os
import runpy
import sys

from accelerate import accelerator, state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modeling_mobilemoe.modeling_mobilemoe import MobileMoERouter


def main(config: str, script: str, *arguments: str) -> None:
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, script]))
    environment = prepare_multi_gpu_env(launch)
    os.environ |= {
        name: value for name, value in environment.items() if name.startswith(("FSDP", "ACCELERATE_USE_FSDP"))
    }
    os.environ["ACCELERATE_MIXED_PRECISION"] = os.environ.get("PRECISION", "no")
    initialize = state.AcceleratorState.__init__

    def initialize_sharded(self, *args, fsdp_plugin=None, **kwargs) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    prepare, prepared = accelerator.fsdp2_prepare_model, []

    def prepare_sharded(*args, **kwargs):
        prepared.append(prepare(*args, **kwargs))
        return prepared[-1]

    state.AcceleratorState.__init__ = initialize_sharded
    accelerator.fsdp2_prepare_model = prepare_sharded
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    (model,) = prepared
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    routers = [module for module in model.modules() if isinstance(module, MobileMoERouter)]
    assert routers and all(isinstance(router, FSDPModule) for router in routers)


if __name__ == "__main__":
    main(*sys.argv[1:])
