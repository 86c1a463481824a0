"""
Benchmarks speed and memory of programs on a phone or a board: `mobilemoe bench --device adb`, `--device ssh:HOST`.

The result has the same format as on the host (host.py), so tables, figures, cards and the planner can read it. Its
field `phone` describes the device and its condition before, during and after the measurement. runners.py has the
programs that run there.
"""

import dataclasses
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from ..artifacts import is_shape
from ..device.cores import fast_cores
from ..device.device import Device, DeviceLost
from ..device.find import find_device
from ..device.runner import BINARY, LOADER_PATH, bundle_files
from ..export.random_program import write_random_program
from ..results import Benchmark, BenchmarkMachine, Phone, PhoneCondition, PhoneFingerprint, PhoneSample
from ..shapes import shapes
from .runners import APP, PhoneOptions, Program, read_inputs, run_llama_main, run_minibench, run_own


def bench_phone(models: Sequence[str], options: PhoneOptions, command: str | None = None) -> Benchmark:
    """
    Measures `.pte` directories, interleaved, on the connected device.

    Args:
        models (`Sequence[str]`): directories that `mobilemoe export` wrote, or the shapes S, M, L and MobileLLM-Pro,
            which are exported first with random weights.
        options (`PhoneOptions`): what to run.
        command (`str`, *optional*): the command line, recorded in the result.

    Returns:
        `Benchmark`: as from [`~bench.host.run_benchmark`], with `phone` set.

    Raises:
        ValueError: for invalid requests, and when another command uses the device, before anything is copied.
        OSError: when the device is lost or full, or a program fails on it. Completely copied files stay for the next
            run; everything else is removed.
    """
    names = [Path(model).resolve().name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models={list(models)}: two have the same name. Rename a directory.")
    device = find_device(options.device, options.serial)
    with device.lock(), tempfile.TemporaryDirectory() as scratch:
        paths = {
            name: Path(scratch, name) if is_shape(model) else Path(model)
            for name, model in zip(names, models, strict=True)
        }
        # Errors first: building the runner and exporting a shape take a while.
        made = [name for name, model in zip(names, models, strict=True) if is_shape(model)]
        programs = {name: Program(name, path) for name, path in paths.items() if name not in made}
        for program in programs.values():
            check_context(program, options)
        if options.num_threads == "auto":
            cores = fast_cores(device.cores())
            options = dataclasses.replace(options, num_threads=len(cores), cores=cores)
        if options.uses_bundle:
            device.check_runs_arm64()
            bundle_files()
        for name in made:
            write_random_program(shapes()[name], paths[name], options.context)
            programs[name] = Program(name, paths[name])
        return run_programs(device, [programs[name] for name in names], options, command)


def check_context(program: Program, options: PhoneOptions) -> None:
    if options.context > program.report.max_seq_len:
        raise ValueError(
            f"{program.name} has a context of {program.report.max_seq_len} tokens and {options.context} are needed. "
            "Give shorter prompt lengths."
        )


def run_programs(device: Device, programs: list[Program], options: PhoneOptions, command: str | None) -> Benchmark:
    """The part of [`bench_phone`] after the exports, with a number of threads."""
    fingerprint = device.fingerprint()
    if options.runner == "minibench" and f"package:{APP}" not in device.shell("pm", "list", "packages", APP):
        raise ValueError(f"The benchmark app {APP} is not on the device. docs/phone.md says how to build it.")
    inputs = {program.name: read_inputs(program, options) for program in programs}
    finished = False
    try:
        copied = copy_files(device, programs, options, inputs)
        samples = run_rounds(device, programs, options, inputs)
        after = condition_after(device, samples)
        finished = True
    finally:
        with suppress(OSError):
            clean_up(device, programs, options, finished)
    return Benchmark(
        command=command,
        benchmark=options.device.partition(":")[0],
        prompt="random tokens" if options.prompt_file is None else str(options.prompt_file),
        new_tokens=options.new_tokens,
        machine=phone_machine(fingerprint, options.num_threads),
        versions={"executorch": programs[0].report.versions.get("executorch", version("executorch"))},
        phone=Phone(
            **fingerprint.model_dump(),
            serial=device.name,
            runner=options.runner,
            copied=copied,
            after=after,
            samples=samples,
        ),
        models={program.name: program.result() for program in programs},
    )


def phone_machine(fingerprint: PhoneFingerprint, num_threads: int) -> BenchmarkMachine:
    cores = len(fingerprint.max_mhz) or None
    soc = f" ({fingerprint.soc})" if fingerprint.soc != "unknown" else ""
    return BenchmarkMachine(cpu=f"{fingerprint.model}{soc}", cores=cores, threads=num_threads)


def copy_files(
    device: Device, programs: list[Program], options: PhoneOptions, inputs: dict[str, list[int] | str]
) -> list[str]:
    """Copies programs, inputs and the runner to the device; returns the names of the copied files."""
    files = {name: path for program in programs for name, path in program.files.items()}
    start = None
    if options.uses_bundle:
        files |= bundle_files()
        start = LOADER_PATH
    elif options.runner_binary is not None:
        files[BINARY] = Path(options.runner_binary)
        start = BINARY
    with tempfile.TemporaryDirectory() as scratch:
        for name, tokens in inputs.items() if options.runner == "own" else ():
            path = files[f"{name}/tokens.txt"] = Path(scratch, name)
            path.write_text(" ".join(map(str, tokens)))
        return device.push(files, start)


def condition_after(device: Device, samples: list[PhoneSample]) -> PhoneCondition:
    """The condition after the rounds, or the last one that is known: what was measured is complete by now."""
    try:
        return device.condition()
    except DeviceLost:
        if not samples:
            raise
        return PhoneCondition(**samples[-1].model_dump(exclude={"seconds"}))


def run_rounds(
    device: Device, programs: list[Program], options: PhoneOptions, inputs: dict[str, list[int] | str]
) -> list[PhoneSample]:
    """Runs every program once per round; returns samples of the device's condition during the rounds."""
    run = {"own": run_own, "llama_main": run_llama_main, "minibench": run_minibench}[options.runner]
    with sampling(device) as samples:
        # Round -1 measures the cold start, not the speed.
        for repeat in tqdm(range(-1, options.repeats), desc="rounds", leave=False):
            for program in programs[:: -1 if repeat % 2 else 1]:
                cool_down(device, options)
                run(device, program, options, inputs[program.name], repeat)
    return samples


def cool_down(device: Device, options: PhoneOptions) -> None:
    """Waits until the device has cooled down, at most `options.cool_seconds`."""
    deadline = time.monotonic() + options.cool_seconds
    with tqdm(desc="cooling down", unit=" checks", leave=False, delay=2) as bar:
        while time.monotonic() < deadline:
            condition = device.condition()
            battery, status = condition.battery_celsius, condition.thermal_status
            celsius = max(condition.zones_celsius.values(), default=None) if battery is None else battery
            if (celsius is None or celsius <= options.max_celsius) and not status:
                return
            bar.set_postfix_str(f"{celsius} C, thermal status {status}")
            bar.update()
            time.sleep(min(5.0, max(0.0, deadline - time.monotonic())))


@contextmanager
def sampling(device: Device, every_seconds: float = 5.0) -> Generator[list[PhoneSample]]:
    """Samples temperatures and clocks in a background thread."""
    samples: list[PhoneSample] = []
    stop = threading.Event()
    started = time.monotonic()

    def sample() -> None:
        with suppress(OSError):
            while True:
                seconds = round(time.monotonic() - started, 1)
                samples.append(PhoneSample(seconds=seconds, **device.condition().model_dump()))
                if stop.wait(every_seconds):
                    return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def clean_up(device: Device, programs: list[Program], options: PhoneOptions, finished: bool) -> None:
    """
    Removes our files from the device, those of earlier runs too, unless they are to be kept. After a failure, complete
    files stay, and the next run resumes after them.
    """
    if options.runner == "minibench":
        device.shell("am", "force-stop", APP, check=False)
    if finished and not options.keep:
        device.shell("rm", "-rf", device.directory)
        return
    if options.keep:
        device.keep()
    device.shell("find", device.directory, "-name", "*.partial", "-exec", "rm", "-f", "{}", "+", check=False)
    device.shell("rm", "-f", *(device.path(f"{program.name}/tokens.txt") for program in programs), check=False)
