"""Wrong options of every command, and wrong answers of a phone."""

import json
import os
import random
from pathlib import Path

from mobilemoe import cli
from mobilemoe.bench.runners import PhoneOptions, Program, run_own
from mobilemoe.device.adb import find_adb_device

from .grammar import WEIRD, damage_text, damage_value, is_finite
from .inputs import Inputs, command
from .server import Case, WrongResult


def command_line(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """Options of every command with values of every kind."""
    parsers = cli.make_parser()._subparsers._group_actions[0].choices
    verb = rng.choice(("plan", "run", "run", "card", "eval", "bench", "export"))
    required = {
        "plan": ["--memory-gb", "0.05", "--tokens", "1e9", "--context", "512", "--extrapolate"],
        "run": ["--model", inputs.packed, "--prompt", "import os", "--max-new-tokens", "3"],
        "card": ["--model", inputs.packed, "--license", "mit", "--output", directory / "README.md"],
        "eval": ["check", "--model", inputs.packed, "--text", f"code={inputs.packed / 'config.json'}"],
        # No process is started for a model that is not there.
        "bench": ["--model", directory / "none"],
        "export": ["--model", inputs.packed, "--output", directory / "out", "--to", "gguf"],
    }[verb]
    parser = parsers[verb]
    if verb == "eval":
        parser = parser._subparsers._group_actions[0].choices["check"]
    left_out = ("help", "text")
    actions = [action for action in parser._actions if action.option_strings and action.dest not in left_out]
    words = [str(word) for word in required]
    wrong = False
    for action in rng.sample(actions, rng.choice((1, 1, 2))):
        words.append(action.option_strings[0])
        if action.nargs == 0:
            continue
        # Commands also write files, so none may name one outside of the case's directory, which `run_case` enters.
        value = rng.choice([str(value).replace("\0", "") for value in WEIRD if not str(value).startswith(("/", "."))])
        words.append(value)
        # Every number of ours is finite and not negative.
        number = action.type in (int, float) and action.dest != "seed"
        wrong |= number and value in ("nan", "inf", "-inf", "-1", "-1000000000.0", str(-(2**63)))
    shown = " ".join(words).replace(str(directory), ".")
    return Case("command line", f"{verb} {shown}"[:300], command(verb, *words), wrong)


RUNNER_LINES = (
    {"event": "loaded", "isa": "neon", "load_s": 0.5, "num_rows": 8},
    {"event": "measure", "repeat": 0, "prompt_length": 16, "first_token_s": 0.1, "decode_s": [0.02, 0.02]},
    {
        "event": "done",
        "operators": {"llama::quantized_moe_ffn.out": 40},
        "cores": [4, 5],
        "peak_rss_bytes": 10**8,
        "pss_bytes": 10**8,
    },
)


ADB_ANSWERS = {
    "devices": "List of devices attached\nemulator-5554\tdevice\n\n",
    "getprop": "[ro.product.model]: [Pixel]\n[ro.soc.model]: [Tensor]\n[ro.product.cpu.abi]: [arm64-v8a]\n",
    "df": "Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/x 100000 50000 50000 50% /data\n",
    "meminfo": "MemTotal:  8000000 kB\n",
    "battery": "  level: 80\n  temperature: 301\n",
    "thermalservice": "Thermal Status: 0\n",
    "max_freq": "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq:1800000\n",
    "runner": "\n".join(map(json.dumps, RUNNER_LINES)) + "\n",
}


def adb_answer(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """What `adb` prints, and with which status: one answer is damaged."""
    answers = dict(ADB_ANSWERS)
    key = rng.choice((*answers, "runner", "runner"))
    if key == "runner" and rng.random() < 0.7:
        lines = list(RUNNER_LINES)
        place = rng.randrange(len(lines))
        lines[place], words = damage_value(rng, lines[place])
        answers["runner"] = "\n".join(map(json.dumps, lines)) + "\n"
    else:
        content, words = damage_text(rng, answers[key].encode())
        answers[key] = content.decode(errors="replace")
    for name, answer in answers.items():
        (directory / name).write_text(answer.replace("\0", ""))
    status = rng.choice((0, 0, 0, 1, 255))
    script = directory / "adb"
    script.write_text(
        f'#!/bin/sh\nfor name in {" ".join(answers)}; do case "$*" in *$name*) cat "{directory}/$name"; '
        f"test $name = {key} && exit {status}; exit 0;; esac; done; echo device\n"
    )
    script.chmod(0o755)

    def run() -> None:
        os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"
        device = find_adb_device()
        fingerprint, free = device.fingerprint(), device.free_bytes("/data")
        program = Program("model", inputs.program)
        options = PhoneOptions((16,), 2, 1, runner_binary=script)
        run_own(device, program, options, [3] * 18, 0)
        measured = json.loads(program.result().model_dump_json())
        if free < 0 or not is_finite(json.loads(fingerprint.model_dump_json())) or not is_finite(program.rows):
            raise WrongResult("accepted, and a number is negative or not finite")
        if any(value <= 0 for row in program.rows.values() for values in row.values() for value in values):
            raise WrongResult(f"accepted, and a speed is not positive: {program.rows}")
        if not measured["lengths"]:
            raise WrongResult("accepted, and nothing was measured")

    return Case("adb", f"{key}: {words}, status {status}", run)
