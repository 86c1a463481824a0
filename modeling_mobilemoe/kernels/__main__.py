"""
Builds the kernels, or the runner, and prints the path:

    python -m modeling_mobilemoe.kernels
    python -m modeling_mobilemoe.kernels runner [EXECUTORCH_ROOT] [CMAKE_OPTION ...]
"""

import sys

from . import BuildError, build_runner, build_torch_library


try:
    if sys.argv[1:2] == ["runner"]:
        roots = [argument for argument in sys.argv[2:3] if not argument.startswith("-")]
        print(build_runner(*roots or [None], *sys.argv[2 + len(roots) :]))
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        print(build_torch_library())
except BuildError as error:
    sys.exit(f"mobilemoe kernels: {error}")
