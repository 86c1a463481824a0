"""
The runner for 64-bit Arm as a directory that needs nothing else: the program, ExecuTorch's libraries, and Debian's C
and C++ libraries with their loader.

It is made of Debian's cross compiler and executorch's wheel for Arm Linux, without an NDK. A phone has its own C
library, but the kernel is Linux's, so the directory's own loader starts the program on a phone too.
"""

import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from modeling_mobilemoe.kernels import BuildError, build_hash, cache_directory, compile_target


logger = logging.getLogger(__name__)

TOOLS = "aarch64-linux-gnu-"
# Oldest C library that executorch's wheels for Arm support.
PLATFORM = "manylinux_2_28_aarch64"
LOADER = "ld-linux-aarch64.so.1"
RUNNER = "mobilemoe_runner"


def runner_command(directory: str) -> list[str]:
    """The command that runs the runner of a bundle in a directory, which may be relative."""
    return [f"{directory}/{LOADER}", "--library-path", directory, f"{directory}/{RUNNER}"]


def build_bundle() -> Path:
    """
    The directory, built on first use. It stays in the user's cache, under a hash of its sources and one of its files.

    Raises:
        ValueError: when the cross compiler, a library of it or executorch's wheel for Arm is missing. The message has
            the line that installs it.
        OSError: when the cache cannot be written to.
    """
    place = cache_directory() / "bundles"
    release = version("executorch").partition("+")[0]
    name = f"arm64-{build_hash('bundle', release)}"
    for path in sorted(place.glob(f"{name}-*")):
        if path.name == f"{name}-{hash_files(path)}":
            return path
        logger.warning(f"{path} is damaged and is built again.")
        shutil.rmtree(path)
    compiler = find_compiler()
    place.mkdir(parents=True, exist_ok=True)
    logger.warning("Compiling the runner for 64-bit Arm, once: up to a minute; kept in %s", place)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        bundle = Path(scratch, "bundle")
        bundle.mkdir()
        executorch = unpack_wheel(release, Path(scratch))
        options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
        # Libraries are found by --library-path; paths of this machine say nothing on another.
        options += [f"-DEXECUTORCH_ROOT={executorch}", "-DCMAKE_SKIP_BUILD_RPATH=ON"]
        try:
            made = compile_target(Path(scratch, "build"), RUNNER, *options, file=RUNNER)
        except BuildError as error:
            raise ValueError(f"The runner for a phone could not be built. {error}") from error
        shutil.copy2(made, bundle)
        copy_libraries(compiler, executorch / "lib", bundle)
        for path in bundle.iterdir():
            path.chmod(0o755)
        built = place / f"{name}-{hash_files(bundle)}"
        # Moved when complete. Another process may have made the same one meanwhile.
        if not built.is_dir():
            os.rename(bundle, built)
    return built


def hash_files(bundle: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(bundle.iterdir()):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    compiler = shutil.which(f"{TOOLS}g++")
    if compiler is None or shutil.which(f"{TOOLS}readelf") is None:
        raise ValueError(
            f"{TOOLS}g++ is not on the PATH, and the runner for a phone is compiled with it. Install it (Debian, "
            "Ubuntu: apt install g++-aarch64-linux-gnu), or give a runner built elsewhere with --runner-binary."
        )
    return compiler


def unpack_wheel(release: str, scratch: Path) -> Path:
    """Downloads executorch's wheel for Arm Linux, and returns its directory with headers and libraries."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--platform", PLATFORM]
    command.append(f"executorch=={release}")
    quiet = ["--quiet", "--disable-pip-version-check", "--dest", str(scratch)]
    result = subprocess.run([*command, *quiet], capture_output=True, text=True)
    wheels = list(scratch.glob("executorch-*.whl"))
    if result.returncode or not wheels:
        said = (result.stderr.strip().splitlines() or ["no file"])[-1]
        raise ValueError(
            f"executorch {release} for Arm Linux, whose libraries the runner for a phone needs, was not downloaded: "
            f"{said} Run `{shlex.join(command)}` to see why; pip also takes it from a directory that the variable "
            "PIP_FIND_LINKS names."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        parts = ("executorch/include/", "executorch/lib/", "executorch.libs/")
        wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(parts)])
    return scratch / "executorch"


def copy_libraries(compiler: str, executorch: Path, bundle: Path) -> None:
    """Copies the libraries that the runner needs, those that these need, and so on."""
    waiting = [bundle / RUNNER]
    while waiting:
        for name in needed_libraries(waiting.pop()):
            if (bundle / name).exists():
                continue
            shutil.copy2(find_library(compiler, executorch, name), bundle / name)
            waiting.append(bundle / name)


def needed_libraries(path: Path) -> list[str]:
    dynamic = subprocess.run([f"{TOOLS}readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)


def find_library(compiler: str, executorch: Path, name: str) -> Path:
    """In executorch's wheel, or among the libraries of the cross compiler."""
    for place in (executorch, executorch.parents[1] / "executorch.libs"):
        if (place / name).is_file():
            return place / name
    said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    path = Path(said.strip())
    # The compiler repeats the name of what it does not find.
    if not path.is_absolute():
        raise ValueError(
            f"The runner for a phone needs {name}, which {compiler} does not have. Install the cross compiler's "
            "libraries (Debian, Ubuntu: apt install libc6-arm64-cross libstdc++6-arm64-cross)."
        )
    return path


def copy_bundle(output: str | Path) -> Path:
    """
    Writes the bundle to a new directory, for a board that is not reached from here.

    Raises:
        ValueError: when the directory exists and is not empty, and as [`build_bundle`].
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty. Give a new directory to --build-runner.")
    return Path(shutil.copytree(build_bundle(), output, dirs_exist_ok=True))
