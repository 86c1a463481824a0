"""
The C++ kernels and the operators made of them, `mobilemoe::moe_ffn` above all, in PyTorch and ExecuTorch.

CMake compiles them on first use, or beforehand by `python -m modeling_mobilemoe.kernels`, and they stay in the user's
cache under a hash of their sources and one of their bytes. Importing this module builds nothing. MOBILEMOE_KERNELS=0
turns them off.
"""

import atexit
import ctypes
import errno
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
# What a compilation takes at most.
BUILD_BYTES = 30 * 10**6
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says what is missing."""


def build_hash(*options: str) -> str:
    """Names a build: its sources and options, and the kind of machine."""
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()} {options}".encode())
    for path in sorted([SOURCES / "CMakeLists.txt", *SOURCES.glob("include/*"), *SOURCES.glob("src/*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_directory() -> Path:
    """Where what was compiled stays."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobilemoe"


def build(target: str, *options: str, headers: str = "", executable: bool = False) -> Path:
    """
    Compiles a target of CMakeLists.txt, unless that was done before, and returns its path.

    Args:
        target (`str`): of CMakeLists.txt.
        options (`str`): for CMake.
        headers (`str`): version of the package that is compiled against; another one means another build.
        executable (`bool`, defaults to `False`): the target is a program and no shared library.

    Raises:
        BuildError: without CMake or a C++ compiler, when the compiler fails, or without a place for the result.
    """
    prefix, suffix = ("", "") if executable else ("lib", SUFFIX)
    name = f"{prefix}{target}-{build_hash(*options, headers)}"
    cache = cache_directory() / "kernels"
    try:
        return find_built(cache, name, suffix) or _compile(cache, target, options, prefix, name, suffix)
    except OSError as error:
        # Read-only, full, or of another user.
        logger.warning(
            f"Compiled kernels cannot be kept in {cache} ({error.strerror}), so every process compiles them again. "
            "Set XDG_CACHE_HOME to a directory with space that can be written to."
        )
        try:
            place = _temporary_place()
            return find_built(place, name, suffix) or _compile(place, target, options, prefix, name, suffix)
        except OSError as second:
            raise BuildError(f"There is no place for compiled kernels: {error}; {second}.") from second


def find_built(place: Path, name: str, suffix: str) -> Path | None:
    """A build whose bytes are those that the compiler wrote: their hash is the last part of its name."""
    for path in sorted(place.glob(f"{name}-*{suffix}")):
        if path.name == _file_name(path, name, suffix):
            return path
        logger.warning(f"{path} is damaged and is compiled again.")
        path.unlink()
    return None


def _file_name(path: Path, name: str, suffix: str) -> str:
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}{suffix}"


@functools.cache
def _temporary_place() -> Path:
    """A directory that only this process uses, until it ends."""
    place = Path(tempfile.mkdtemp(prefix="mobilemoe-kernels-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _compile(place: Path, target: str, options: tuple[str, ...], prefix: str, name: str, suffix: str) -> Path:
    """
    Raises:
        OSError, BuildError: as [`compile_target`].
    """
    place.mkdir(parents=True, exist_ok=True)
    # Otherwise the first use would be silent for a minute.
    logger.warning("Compiling %s for this machine, once: up to a minute; kept in %s", target, place)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        made = compile_target(Path(directory), target, *options, file=f"{prefix}{target}{suffix}")
        built = place / _file_name(made, name, suffix)
        # Moved when complete, so that another process never loads half a file.
        os.replace(made, built)
    return built


def compile_target(directory: Path, target: str, *options: str, file: str) -> Path:
    """
    Compiles a target of CMakeLists.txt in a directory, and returns the path of the file that this makes there.

    Raises:
        OSError: when the directory cannot be written to or is full.
        BuildError: without CMake, or when the compiler fails.
    """
    # pip's CMake lies beside the interpreter, which need not be on the PATH.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=search_path)
    if cmake is None:
        raise BuildError("CMake is missing: pip install cmake.")
    for command in (
        [cmake, "-S", str(SOURCES), "-B", str(directory), "-DCMAKE_BUILD_TYPE=Release", *options],
        [cmake, "--build", str(directory), "--target", target, "--parallel", str(os.cpu_count() or 1)],
    ):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            full = any(os.strerror(code) in result.stdout for code in (errno.ENOSPC, errno.EDQUOT))
            if full or shutil.disk_usage(directory).free < BUILD_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
            raise BuildError(
                "The kernels did not compile; they need a C++ compiler (Debian: apt install g++). "
                f"{' '.join(command)} said:\n{result.stdout[-2000:]}"
            )
    return directory / file


def build_torch_library() -> Path:
    return build("mobilemoe_torch", f"-DTORCH_ROOT={Path(torch.__file__).parent}", headers=torch.__version__)


def build_executorch_library() -> Path:
    import executorch

    root = next(iter(executorch.__path__))
    return build("mobilemoe_executorch", f"-DEXECUTORCH_ROOT={root}", headers=version("executorch"))


def build_runner(executorch_root: str | Path | None = None, *options: str) -> Path:
    """
    Compiles `mobilemoe_runner` (README.md) against the installed executorch, or another copy of its wheel.

    Args:
        executorch_root (`str` or `Path`, *optional*): the directory `executorch` of an unpacked wheel.
        options (`str`): for CMake, as a toolchain file for another machine.

    Raises:
        BuildError: as [`build`].
    """
    if executorch_root is None:
        import executorch

        executorch_root = next(iter(executorch.__path__))
    options = (f"-DEXECUTORCH_ROOT={executorch_root}", *options)
    return build("mobilemoe_runner", *options, headers=version("executorch"), executable=True)


@functools.cache
def available() -> bool:
    """Whether PyTorch can run the operators. The first call builds them, or warns that they cannot be built."""
    if os.environ.get("MOBILEMOE_KERNELS") == "0":
        return False
    try:
        torch.ops.load_library(build_torch_library())
    except (BuildError, OSError) as error:
        warnings.warn(f"INT4 on the CPU runs without its kernels: correct, but slow. {error}", stacklevel=2)
        return False
    return True


@functools.cache
def load_executorch() -> None:
    """
    Makes `.pte` programs with these operators run in this process.

    Raises:
        BuildError: when the operators cannot be compiled here.
    """
    # Loads the runtime, whose registry the library registers its operators in.
    import executorch.runtime  # noqa: F401

    library = build_executorch_library()
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"The kernels were compiled and do not load: {error}.") from error


def memory_read_rate(num_threads: int) -> float:
    """
    Read bandwidth of the memory in bytes per second: the fastest of five passes of a plain loop over 512 MB.

    Args:
        num_threads (`int`): threads that read a part each.

    Raises:
        ValueError: for less than one thread.
        BuildError: when the loop cannot be compiled here.
        MemoryError: without 512 MB of memory.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} read nothing. Set 1 or more.")
    library = ctypes.CDLL(str(build("mobilemoe_read_rate")))
    library.mobilemoe_read_rate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    library.mobilemoe_read_rate.restype = ctypes.c_double
    rate = library.mobilemoe_read_rate(num_threads, 2**29, 5)
    if rate == 0:
        raise MemoryError("The read bandwidth is measured over 512 MB of memory, which the system refused.")
    return rate


# Declared here and not in C++, so that a model can be traced and exported where nothing was compiled.
MOE_FFN = "Tensor x, Tensor router, Tensor bias, Tensor gate_up, Tensor down, int top_k, float route_scale"
# INT4 weights are tiles (../tiles_mobilemoe.py), whose last outputs may be padding.
OPERATORS = {
    "moe_ffn": f"{MOE_FFN}) -> Tensor",
    "moe_experts": "Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up, Tensor down) -> Tensor",
    "mlp": "Tensor x, Tensor[] weights) -> Tensor",
    # Two in one, because calling an operator costs as much as some of them take.
    "feed_forward": f"{MOE_FFN}, Tensor[] shared) -> Tensor",
    "attention_inputs": (
        "Tensor x, Tensor[] qkv, int num_heads, int num_kv_heads, Tensor cos, Tensor sin, float eps) -> "
        "(Tensor, Tensor, Tensor)"
    ),
    # The cache is written in place. What it returns has no meaning.
    "update_cache": "Tensor key, Tensor value, Tensor(a!) cache, SymInt start) -> Tensor",
    "attention": "Tensor query, Tensor cache, SymInt start) -> Tensor",
}
# What programs are made of: ExecuTorch has these alone, and writes into memory that it has planned.
PROGRAM_OPERATORS = {
    "int4_linear": "Tensor x, Tensor tiles, int out_features",
    "int4_embedding": "Tensor tokens, Tensor tiles, int num_embeddings",
    "rms_norm": "Tensor x, Tensor weight, float eps",
    # A norm, then query, key, value and output; a norm, then gate, up and down; router, bias and experts, or nothing.
    "decoder_layer": (
        "Tensor x, Tensor cos, Tensor sin, Tensor(a!) cache, SymInt start, Tensor[] attention, "
        "Tensor[] feed_forward, Tensor[] experts, int top_k, float route_scale, float eps"
    ),
}
definitions = torch.library.Library("mobilemoe", "DEF")
for name, arguments in OPERATORS.items():
    definitions.define(f"{name}({arguments}")
for name, arguments in PROGRAM_OPERATORS.items():
    definitions.define(f"{name}({arguments}) -> Tensor")
    definitions.define(f"{name}.out({arguments}, *, Tensor(z!) out) -> Tensor(z!)")


def _shape_of_x(x, *weights):
    return torch.empty_like(x)


for name in ("moe_ffn", "moe_experts", "mlp", "feed_forward", "attention", "rms_norm", "decoder_layer"):
    torch.library.register_fake(f"mobilemoe::{name}", _shape_of_x)


@torch.library.register_fake("mobilemoe::attention_inputs")
def _attention_inputs_shape(x, qkv, num_heads, num_kv_heads, cos, sin, eps):
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return tuple(x.new_empty(*x.shape[:-1], count, 2 * cos.shape[-1]) for count in heads)


@torch.library.register_fake("mobilemoe::update_cache")
def _update_cache_shape(key, value, cache, start):
    return key.new_empty(1)


@torch.library.register_fake("mobilemoe::int4_linear")
def _int4_linear_shape(x, tiles, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("mobilemoe::int4_embedding")
def _int4_embedding_shape(tokens, tiles, num_embeddings):
    return tokens.new_empty(*tokens.shape, 32 * tiles.shape[1], dtype=torch.float32)
