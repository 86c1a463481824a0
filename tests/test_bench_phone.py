"""
`mobilemoe bench --device adb`: the real adb client, and a device on loopback whose phone-like parts are scripts.

No phone was at hand. What is recorded here is in the formats of ExecuTorch's sources (extension/llm/runner/stats.h,
extension/benchmark/android).
"""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from device_daemon import Device, connect
from transformers import AutoConfig

from mobilemoe.bench import phone as bench_phone
from mobilemoe.bench.runners import PhoneOptions, parse_minibench, parse_observer
from mobilemoe.cli import main
from mobilemoe.costs import read_device
from mobilemoe.device.adb import find_adb_device, parse_battery
from mobilemoe.device.bundle import LOADER, RUNNER
from mobilemoe.shapes import published, published_speeds
from modeling_mobilemoe.kernels import build_runner


PLACE = "data/local/tmp/mobilemoe"
OBSERVER = (
    'PyTorchObserver {"prompt_tokens":12,"generated_tokens":7,"model_load_start_ms":1000,"model_load_end_ms":1500,'
    '"inference_start_ms":1600,"inference_end_ms":2600,"prompt_eval_end_ms":1900,"first_token_ms":1900,'
    '"aggregate_sampling_time_ms":3,"SCALING_FACTOR_UNITS_PER_SECOND":1000}'
)
MINIBENCH = json.dumps(
    [
        {"benchmarkModel": {"name": "model"}, "metric": metric, "actualValue": value, "targetValue": 0}
        for metric, value in (
            ("llm_model_load_time(ms)", 250.0),
            ("token_per_sec", 42.5),
            ("ram_pss_usage(mb)", 900.0),
            ("load_status", 0.0),
        )
    ]
)


def bench(*arguments: object) -> None:
    main(["bench", "--device", "adb", "--prompt-lengths", "8", "24", "--new-tokens", "4", *map(str, arguments)])


def fake_runner(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    return path


def left_behind(device: Device) -> list[str]:
    root = device.root / PLACE
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) if root.exists() else []


def check_result(result: dict, phone: Device, names: list[str], repeats: int) -> None:
    assert result["command"].startswith("mobilemoe bench --device adb")
    assert result["benchmark"] == "adb" and result["machine"] == {
        "cpu": "Test Phone 1 (QTI SM8750)",
        "cores": 2,
        "threads": 2,
    }
    described = result["phone"]
    assert described["memory_bytes"] == 11534336 * 1024 and described["max_mhz"] == [4320, 4320]
    assert (
        described["battery_celsius"] == 31.2 and described["thermal_status"] == 0 and described["abi"] == "arm64-v8a"
    )
    assert described["samples"] and described["samples"][0]["mhz"] == [1000, 1000]
    assert list(result["models"]) == names
    for model in result["models"].values():
        assert model["moe_operator"] == "mobilemoe::decoder_layer" and model["proven"]
        assert model["operator_calls"]["mobilemoe::decoder_layer.out"] > 0
        assert set(model["start_seconds"]) == {"cold", "warm"} and model["start_seconds"]["cold"]["first_token"] > 0
        assert model["peak_memory_bytes"] > 1e6 and model["pss_bytes"] > 1e5
        # As the host's result, see test_bench.py.
        assert list(model["lengths"]) == ["8", "24"]
        for row in model["lengths"].values():
            for key in ("prefill_tokens_per_s", "first_token_ms", "decode_tokens_per_s"):
                assert row[key]["repeats"] == repeats and row[key]["median"] > 0
    # Nothing is left, and what ran took turns, backwards in every second round.
    assert not (phone.root / PLACE).exists()
    runs = [command.split(" && ")[0].rpartition("/")[2] for command in phone.commands if " --model " in command]
    rounds = [names[:: -1 if repeat % 2 else 1] for repeat in range(-1, repeats)]
    assert runs == [name for names in rounds for name in names]


def test_whole_command(phone: Device, kernel_pte: Path, tmp_path: Path, capfd):
    other = shutil.copytree(kernel_pte, tmp_path / "other")
    files = ("--json", tmp_path / "phone.json", "--picture", tmp_path / "phone.png", "--paper", "--submit-row")
    options = ("--runner-binary", build_runner(), "--repeats", 2, "--threads", 2)
    bench("--model", kernel_pte, other, *options, *files)
    result = json.loads((tmp_path / "phone.json").read_text())
    check_result(result, phone, [kernel_pte.name, "other"], repeats=2)
    assert (tmp_path / "phone.png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert "Test Phone 1" in printed and "Galaxy S25" in printed and "{" not in printed
    assert re.search(r"^battery C +31.2 +31.2 +31.2$", printed, re.MULTILINE)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| Test Phone 1")]
    assert [row[:5] for row in rows] == [
        ["| Test Phone 1 (QTI SM8750)", "Android 15", "2", name, length]
        for name in (kernel_pte.name, "other")
        for length in ("8", "24")
    ]
    # As many cells as the table in docs/phone.md has columns, and nothing that names the phone or its owner.
    header = next(line for line in (ROOT / "docs/phone.md").read_text().splitlines() if line.startswith("| device |"))
    assert {len(row) for row in rows} == {len(header.split(" | "))}
    assert phone.address not in printed.partition("Nothing was sent")[2]
    # The planner reads it.
    device = read_device(tmp_path / "phone.json")
    assert device.name == "Test Phone 1 (QTI SM8750), 2 threads" and device.bandwidth > 0


def test_whole_command_without_a_runner(phone: Device, kernel_pte: Path, stub_bundle: Path, tmp_path: Path):
    """The runner is built, copied with what it needs, started by its own loader, and removed."""
    bench("--model", kernel_pte, "--repeats", 2, "--threads", 2, "--json", tmp_path / "phone.json")
    result = json.loads((tmp_path / "phone.json").read_text())
    check_result(result, phone, [kernel_pte.name], repeats=2)
    assert {f"bundle/{path.name}" for path in stub_bundle.iterdir()} < set(result["phone"]["copied"])
    place = "../bundle"
    (start,) = {line.split(" --model ")[0] for line in phone.commands if " --model " in line}
    assert start.endswith(f" && {place}/{LOADER} --library-path {place} {place}/{RUNNER}")


@pytest.mark.slow
def test_whole_command_with_arm_code(
    phone: Device, kernel_pte: Path, arm_bundle: Path, emulator: list[str], tmp_path: Path
):
    """As above, with the real bundle and an emulated processor."""
    phone.emulator = emulator
    bench("--model", kernel_pte, "--repeats", 2, "--threads", 2, "--json", tmp_path / "phone.json")
    result = json.loads((tmp_path / "phone.json").read_text())
    check_result(result, phone, [kernel_pte.name], repeats=2)
    assert result["models"][kernel_pte.name]["instruction_set"] in ("neon", "i8mm")


def test_shapes_are_exported_first(phone: Device, kernel_pte: Path, tmp_path: Path, monkeypatch, capsys):
    config = AutoConfig.from_pretrained(kernel_pte)
    monkeypatch.setattr(bench_phone, "shapes", lambda: {"tiny": config})
    monkeypatch.setattr(bench_phone, "is_shape", lambda name: name == "tiny")
    monkeypatch.chdir(tmp_path)
    made = []

    def write(config, path, max_seq_len):
        made.append(max_seq_len)
        shutil.copytree(kernel_pte, path)

    monkeypatch.setattr(bench_phone, "write_random_program", write)
    bench("--model", "tiny", "--runner-binary", build_runner(), "--repeats", 1, "--keep", "--json",
          "--sustained-seconds", 1)  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert made == [28] and result["models"]["tiny"]["sustained"][0]["decode_tokens_per_s"] > 0
    assert left_behind(phone) == ["kept", "runner", "tiny/model.pte", "tiny/tokenizer.json"]


def test_a_lost_copy_goes_on_behind_the_whole_files(phone: Device, kernel_pte: Path, capsys):
    options = ("--model", kernel_pte, "--runner-binary", build_runner(), "--repeats", 1)
    # The runner is the largest file, and comes last but for the tokens.
    assert (kernel_pte / "model.pte").stat().st_size < 300_000 < build_runner().stat().st_size
    phone.vanish_after = 300_000
    with pytest.raises(SystemExit, match="is gone during the copy of runner"):
        bench(*options)
    assert [name for name in left_behind(phone) if not name.endswith(".partial")] == [
        f"{kernel_pte.name}/model.pte",
        f"{kernel_pte.name}/tokenizer.json",
    ]
    phone.plug_in()
    phone.pushed = []
    connect(phone)
    bench(*options, "--json", "-")
    assert [path.rpartition("/")[2] for path in phone.pushed] == ["runner.partial", "tokens.txt.partial"]
    assert json.loads(capsys.readouterr().out)["phone"]["copied"] == [
        "runner",
        f"{kernel_pte.name}/tokens.txt",
    ]
    assert left_behind(phone) == []


def test_a_full_device_is_an_error(phone: Device, kernel_pte: Path):
    options = ("--model", kernel_pte, "--runner-binary", build_runner())
    phone.full_after = 300_000
    with pytest.raises(SystemExit, match="The device is full during the copy of runner"):
        bench(*options)
    assert left_behind(phone) == [f"{kernel_pte.name}/model.pte", f"{kernel_pte.name}/tokenizer.json"]
    phone.full_after, phone.pushed = None, []
    phone.script("df", 'printf "Filesystem 1K-blocks Used Available Use%% Mounted on\\n/dev/x 9 9 100 99%% /data\\n"')
    with pytest.raises(SystemExit, match="The device has 0 MB free in /data/local/tmp/mobilemoe and .* are needed"):
        bench(*options)
    assert phone.pushed == []


LOADED = '{"event":"loaded","load_s":0.1,"isa":"neon","num_rows":8,"rss_bytes":1,"pss_bytes":1}'


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (f"echo '{LOADED}'; exit 139", "runner` failed on .* with status 139"),
        (f"echo '{LOADED}'; echo '{{\"event\":\"meas'", "output is truncated or garbled"),
        (f"echo '{LOADED.replace('0.1', 'NaN')}'", "garbled: loaded.load_s is nan, expected a finite number"),
        ("""echo '{"event":"measure","repeat":0}'""", "garbled: the key measure.prompt_length is missing"),
        (
            """echo '{"event":"done","operators":{},"cores":[],"peak_rss_bytes":1,"pss_bytes":1}'""",
            "stopped before the end of",
        ),
        (f"echo '{LOADED}'", "stopped before the end of"),
        (
            """echo '{"event":"error","message":"no such operator"}'; exit 1""",
            "The runner failed on .*: no such operator",
        ),
        ("echo Segmentation fault >&2; exit 1", "Segmentation fault"),
    ],
)
def test_a_runner_that_fails_is_an_error(phone: Device, kernel_pte: Path, tmp_path: Path, script: str, message: str):
    runner = fake_runner(tmp_path / "runner", script)
    with pytest.raises(SystemExit, match=message):
        bench("--model", kernel_pte, "--runner-binary", runner)
    assert not [name for name in left_behind(phone) if name.endswith((".partial", "tokens.txt"))]


@pytest.fixture(scope="module")
def prompt(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text("def parse_args(self, args=None, namespace=None):\n    return args\n" * 20)
    return path


def test_llama_main(phone: Device, kernel_pte: Path, prompt: Path, tmp_path: Path, capsys):
    runner = fake_runner(tmp_path / "llama_main", f"echo \"$@\" >> calls\necho text\necho '{OBSERVER}'")
    bench("--model", kernel_pte, "--runner", "llama_main", "--runner-binary", runner, "--prompt-file", prompt,
          "--repeats", 1, "--threads", 4, "--keep", "--json")  # fmt: skip
    (model,) = json.loads(capsys.readouterr().out)["models"].values()
    # 12 tokens in 0.3 s, then 7 in 0.7 s.
    assert list(model["lengths"]) == ["12"]
    row = model["lengths"]["12"]
    assert row["prefill_tokens_per_s"]["median"] == 40 and row["first_token_ms"]["median"] == 300
    assert row["decode_tokens_per_s"]["median"] == 10 and model["start_seconds"]["warm"]["load"] == 0.5
    # What the export says, not what was seen.
    assert (model["moe_operator"], model["proven"]) == ("mobilemoe::decoder_layer", False)
    calls = (phone.root / PLACE / kernel_pte.name / "calls").read_text()
    assert "--temperature 0 --ignore_eos --cpu_threads 4 --max_new_tokens 4" in calls


def install_app(phone: Device, start: str) -> None:
    app = phone.root / "app/files"
    app.mkdir(parents=True)
    phone.script("pm", "echo package:org.pytorch.minibench")
    phone.script("run-as", f'shift; cd {phone.root}/app && exec "$@"')
    phone.script("am", start)
    phone.script("pidof", "exit 1")


def test_minibench(phone: Device, kernel_pte: Path, prompt: Path, capsys):
    result = phone.root / "app/files/benchmark_results.json"
    install_app(phone, f"[ $1 = start ] && cat > {result} <<'END'\n{MINIBENCH}\nEND\necho Status: ok")
    bench("--model", kernel_pte, "--runner", "minibench", "--prompt-file", prompt, "--repeats", 2, "--json")
    (model,) = json.loads(capsys.readouterr().out)["models"].values()
    assert model["lengths"] == {"24": {"decode_tokens_per_s": pytest.approx({"median": 42.5, "p10": 42.5, "p90": 42.5,
                                       "min": 42.5, "max": 42.5, "repeats": 2})}}  # fmt: skip
    assert model["pss_bytes"] == 900_000_000 and model["start_seconds"] == {"warm": {"load": 0.25}}
    (start, _) = [command for command in phone.commands if command.startswith("am start")]
    assert (
        f"--es model_dir /{PLACE}/{kernel_pte.name} " in start and "--ei num_iter 2 --ei num_warm_up_iter 0" in start
    )
    assert left_behind(phone) == []


def test_the_cable_is_pulled_while_a_result_is_read(phone: Device, kernel_pte: Path, prompt: Path, capsys):
    """Of the app, whose result is a file; our runner's comes line by line."""
    result = phone.root / "app/files/benchmark_results.json"
    install_app(phone, f"[ $1 = start ] && cat > {result} <<'END'\n{MINIBENCH}\nEND\necho Status: ok")
    options = ("--model", kernel_pte, "--runner", "minibench", "--prompt-file", prompt, "--repeats", 1, "--json")
    phone.vanish_at = "cat files/benchmark_results.json"
    with pytest.raises(SystemExit, match=r"^mobilemoe bench: \S+ is gone during .*run the same command again.$"):
        bench(*options)
    assert left_behind(phone) == [f"{kernel_pte.name}/{name}" for name in ("model.pte", "tokenizer.json")]
    phone.plug_in()
    connect(phone)
    phone.pushed = []
    bench(*options)
    assert "decode_tokens_per_s" in capsys.readouterr().out and phone.pushed == []
    assert not (phone.root / PLACE).exists() and not (phone.root / f"{PLACE}.lock").is_symlink()


def test_minibench_that_crashes_or_is_missing(phone: Device, kernel_pte: Path, prompt: Path):
    options = ("--model", kernel_pte, "--runner", "minibench", "--prompt-file", prompt, "--repeats", 1)
    phone.script("pm", "exit 0")
    with pytest.raises(SystemExit, match="The benchmark app org.pytorch.minibench is not on the device"):
        bench(*options)
    install_app(phone, "echo Status: ok")
    with pytest.raises(SystemExit, match="It crashed: the benchmark app on .* left no result"):
        bench(*options)
    phone.script("am", "echo Error type 3")
    with pytest.raises(SystemExit, match="The benchmark app did not start: Error type 3"):
        bench(*options)


def test_waiting_for_a_hot_phone_ends(phone: Device):
    phone.script("dumpsys", 'echo "  temperature: 450"; echo "Thermal Status: 2"')
    device = find_adb_device()
    options = PhoneOptions([8], runner_binary=__file__, cool_seconds=0.3)
    started = time.monotonic()
    bench_phone.cool_down(device, options)
    assert 0.3 <= time.monotonic() - started < 10
    phone.script("dumpsys", 'echo "  temperature: 300"; echo "Thermal Status: 0"')
    bench_phone.cool_down(device, PhoneOptions([8], runner_binary=__file__))


def test_a_32_bit_phone_is_an_error(phone: Device, kernel_pte: Path, stub_bundle: Path):
    phone.script("uname", "echo armv7l")
    with pytest.raises(
        SystemExit, match="has the processor or kernel armv7l, which is 32-bit, and the runner is 64-bit"
    ):
        bench("--model", kernel_pte)
    assert phone.pushed == [] and left_behind(phone) == []


def test_fast_cores_are_chosen_and_kept_to(phone: Device, kernel_pte: Path, stub_bundle: Path, tmp_path: Path):
    """The phone's second core is an efficiency core here, so that one of this machine's remains."""
    phone.write("/sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq", "1800000\n")
    bench("--model", kernel_pte, "--repeats", 1, "--threads", "auto", "--json", tmp_path / "phone.json")
    result = json.loads((tmp_path / "phone.json").read_text())
    assert result["machine"]["threads"] == 1 and result["phone"]["max_mhz"] == [4320, 1800]
    assert result["models"][kernel_pte.name]["cores"] == [0]
    assert all("--threads 1" in line and "--cores 0" in line for line in phone.commands if " --model " in line)


PHASES = ["space", "push", "cool-down", "run", "end"]


@pytest.mark.parametrize("phase", PHASES)
def test_the_cable_is_pulled(
    phone: Device, kernel_pte: Path, stub_bundle: Path, tmp_path: Path, monkeypatch, phase: str
):
    """In every phase: one line, and the same command resumes and leaves nothing."""
    options = ("--model", kernel_pte, "--repeats", 1, "--threads", 2, "--json", tmp_path / "phone.json")
    pull = {
        "cool-down": ("cool_down", "dumpsys"),
        "run": ("run_own", " --model "),
        "end": ("condition_after", "dumpsys"),
    }
    with monkeypatch.context() as patch:
        if phase == "push":
            phone.vanish_after = 300_000
        elif phase == "space":
            phone.vanish_at = "df -k"
        else:
            name, words = pull[phase]
            whole = vars(bench_phone)[name]

            def pulled(*arguments: object) -> object:
                phone.vanish_at = words
                return whole(*arguments)

            patch.setattr(bench_phone, name, pulled)
        if phase == "end":
            # What was measured is complete.
            bench(*options)
            assert json.loads((tmp_path / "phone.json").read_text())["phone"]["after"]["battery_celsius"] == 31.2
        else:
            with pytest.raises(
                SystemExit, match=r"^mobilemoe bench: \S+ is gone during .*run the same command again.$"
            ):
                bench(*options)
            assert not (tmp_path / "phone.json").exists()
    complete = [name for name in left_behind(phone) if not name.endswith((".partial", "tokens.txt"))]
    assert complete or phase == "space"
    phone.plug_in()
    connect(phone)
    bench(*options)
    result = json.loads((tmp_path / "phone.json").read_text())
    assert not set(complete) & set(result["phone"]["copied"])
    assert not (phone.root / PLACE).exists()


def test_no_device_unauthorised_and_several(adb_server, tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="No device is connected. Enable USB debugging in"):
        find_adb_device()
    first, second = (Device(tmp_path / name) for name in ("first", "second"))
    first.state = "unauthorized"
    connect(first, "unauthorized")
    with pytest.raises(ValueError, match="is unauthorized. The phone has not authorised this computer. Unlock it"):
        find_adb_device()
    connect(second)
    with pytest.raises(ValueError, match="2 devices are connected: .*Name one with --serial"):
        find_adb_device()
    assert find_adb_device(second.address).name == second.address
    with monkeypatch.context() as patch:
        patch.setenv("ANDROID_SERIAL", second.address)
        assert find_adb_device().name == second.address
    with pytest.raises(ValueError, match="serial=nothing is not connected; connected are: "):
        find_adb_device("nothing")
    subprocess.run(["adb", "disconnect"], capture_output=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="adb is not on the PATH.*Install Android's platform tools"):
        find_adb_device()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x", "--runner-binary", "y"], "runner_binary=y is not a file"),
        (["--model", "x", "--runner", "llama_main"], "runner='llama_main' is not built here. Set runner_binary to"),
        (["--model", "x", "--threads", "0"], "num_threads=0 leaves nothing to measure"),
        (["--model", "x", "--runner", "minibench", "--runner-binary", "y"], "it takes neither runner_binary nor"),
        (["--model", "x", "--runner-binary", __file__, "--new-tokens", "0"], "new_tokens=0 leaves nothing to measure"),
        (["--model", "x", "--runner-binary", __file__, "--profile"], "--profile and --runtime are of this machine"),
    ],
)
def test_bad_requests_need_no_device(arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        bench(*arguments)


def test_requests_that_a_program_cannot_meet(phone: Device, kernel_pte: Path, text_checkpoint: Path):
    runner = ("--runner-binary", __file__)
    with pytest.raises(SystemExit, match="holds no program: a device runs a .pte. Export one: mobilemoe export"):
        bench("--model", text_checkpoint, *runner)
    with pytest.raises(SystemExit, match="has a context of 64 tokens and 68 are needed. Give shorter prompt lengths"):
        bench("--model", kernel_pte, *runner, "--prompt-lengths", 64)
    for name in ("runner", "bundle", "kept"):
        with pytest.raises(SystemExit, match=f"elsewhere/{name}: on the device, .* has the name '{name}'. Rename"):
            bench("--model", f"elsewhere/{name}", *runner)
    with pytest.raises(SystemExit, match="two have the same name"):
        bench("--model", kernel_pte, kernel_pte, *runner)
    with pytest.raises(SystemExit, match="runner='llama_main' takes text. Give a prompt file"):
        bench("--model", kernel_pte, *runner, "--runner", "llama_main")
    assert phone.pushed == []


def test_options_of_a_phone_are_refused_for_this_machine():
    with pytest.raises(SystemExit, match="--serial, --keep, --submit-row: of a phone, and this machine is measured"):
        main(["bench", "--model", "S", "--serial", "x", "--keep", "--submit-row"])
    with pytest.raises(SystemExit, match="--threads auto reads a phone's cores, and this machine is measured"):
        main(["bench", "--model", "S", "--threads", "auto"])


def test_observer_of_llama_main():
    measured = parse_observer(f"I 00:00 log\nsome text\n{OBSERVER}\n")
    assert measured == {"prompt_tokens": 12, "new_tokens": 7, "load": 0.5, "first_token": pytest.approx(0.3),
                        "prefill": pytest.approx(0.3), "decode": pytest.approx(0.7)}  # fmt: skip
    with pytest.raises(ValueError, match="printed no PyTorchObserver line; it ended with:\nloading\nKilled"):
        parse_observer("loading\nKilled")
    for damaged in (OBSERVER[:80], OBSERVER.replace("generated_tokens", "tokens"), OBSERVER.replace("1500", '"x"')):
        with pytest.raises(ValueError, match="The PyTorchObserver line of llama_main is damaged"):
            parse_observer(damaged)
    for empty in ('"generated_tokens":0', '"generated_tokens":7,"inference_end_ms":1900'):
        line = OBSERVER.replace('"inference_end_ms":2600,', "") if "inference" in empty else OBSERVER
        with pytest.raises(ValueError, match="llama_main measured nothing"):
            parse_observer(line.replace('"generated_tokens":7', empty))


def test_results_of_minibench():
    assert parse_minibench(MINIBENCH)["token_per_sec"] == 42.5
    for damaged in (MINIBENCH[:-40], MINIBENCH.replace("actualValue", "value"), "cat: no such file"):
        with pytest.raises(ValueError, match="benchmark_results.json is damaged"):
            parse_minibench(damaged)
    with pytest.raises(ValueError, match="has no token_per_sec, so the app generated nothing"):
        parse_minibench(MINIBENCH.replace("token_per_sec", "other"))


def test_battery():
    text = "Current Battery Service state:\n  AC powered: false\n  level: 7\n  scale: 100\n  temperature: -35\n"
    assert parse_battery(text) == {"battery_percent": 7, "battery_celsius": -3.5}
    assert parse_battery("Can't find service: battery") == {"battery_percent": None, "battery_celsius": None}


def test_published_speeds_are_those_of_the_file():
    rows = {(device.split()[0], model, length): row for device, model, length, row in published_speeds()}
    # KR's table: S on the S25 at 1k, 2.01 s and 112.0 tokens/s.
    expected = {"first_token_ms": 2010.0, "prefill_tokens_per_s": 1024 / 2.01, "decode_tokens_per_s": 112.0}
    assert rows["Galaxy", "S", 1024] == pytest.approx(expected)
    assert len(rows) == sum(
        len({length for table in device.values() for length in table.get(model, {})})
        for device in published()["devices"].values()
        for model in ("S", "M", "L", "MobileLLM-Pro")
    )
