"""
The `mobilemoe` command: parsers, and what each verb calls.

Importing this file and parsing arguments imports neither torch nor transformers: a verb's modules come when it runs.
"""

import argparse
import json
import os
import shlex
import sys
from typing import Any

from . import __version__
from .console import PrintCompletion, ends_cleanly, log_to_stderr
from .train_verb import add_train


# Modules of one extra; others are in that of the command.
EXTRAS = {
    "executorch": "export",
    "torchao": "export",
    "trl": "train",
    "gguf": "gguf",
    "mlx_lm": "mlx",
    "llguidance": "chat",
    "prompt_toolkit": "chat",
}
# What `export` takes for each runtime, beside --model and --output.
EXPORT_OPTIONS = {
    "pte": "max_seq_len expert_bits moe_op weights embedding_bits kv_cache all_logits experts_file".split(),
    "gguf": ["weights", "expert_weights"],
    "mlx": [],
    "glm4_moe": ["weights"],
}
WEIGHT_SUFFIXES = {".pte", ".ptd", ".gguf", ".safetensors"}
MODEL_HELP = "checkpoint directory, Hub id, or directory with model.pte"
RUN_HELP = "checkpoint directory, Hub id, directory with model.pte or model.gguf, or GGUF file"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with ends_cleanly():
        run_command(argv)


def run_command(argv: list[str]) -> None:
    arguments = make_parser().parse_args(argv)
    # For the JSON files that a verb writes.
    arguments.command_line = shlex.join(["mobilemoe", *argv])
    try:
        check_outputs(vars(arguments))
        with log_to_stderr(arguments.command):
            arguments.function(arguments)
    except BrokenPipeError:
        # `ends_cleanly` knows whether it is that of the output.
        raise
    except (ValueError, OSError) as error:
        sys.exit(f"mobilemoe {arguments.command}: {error}")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0], arguments.extra)
        sys.exit(f"mobilemoe {arguments.command}: {error.name} is not installed. pip install 'mobilemoe[{extra}]'")


def check_outputs(options: dict[str, Any]) -> None:
    """Before anything is measured, which would be lost."""
    from .artifacts import check_writable

    for name in ("json", "picture", "plot"):
        if options.get(name) not in (None, "-"):
            check_writable(options[name])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mobilemoe", description="On-device mixture-of-experts language models.")
    parser.add_argument("--version", action="version", version=f"mobilemoe {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh"),
        help='print a completion script for the shell; eval "$(mobilemoe --print-completion bash)" turns it on',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_plan, add_train, add_export, add_run, add_chat, add_serve, add_bench, add_eval, add_card):
        add(commands)
    return parser


def add_json(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help=f"write {what} there; without FILE, or with -, print that and nothing else",
    )


def write_result(result: dict[str, Any], file: str | None) -> bool:
    """Writes what --json asks for. Returns whether it was printed, in place of a table."""
    from .artifacts import write_json

    if file == "-":
        print(json.dumps(result, indent=2))
    elif file is not None:
        try:
            write_json(file, result)
        except OSError:
            # It may have taken hours.
            print(json.dumps(result, indent=2))
            raise
    return file == "-"


def add_plan(commands) -> None:
    plan = commands.add_parser("plan", help="find the best model shape for a memory, a training budget and a speed")
    limits = plan.add_argument_group("limits")
    limits.add_argument("--memory-gb", type=float, required=True, help="for weights and key-value cache, 1e9 bytes")
    limits.add_argument("--context", type=int, default=8192, help="tokens in the key-value cache (default: 8192)")
    limits.add_argument("--inference-gflops", type=float, help="largest GFLOPs per token, 2 x active parameters")
    limits.add_argument("--tokens-per-second", type=float, help="lowest decode speed at the full context (default: 8)")
    limits.add_argument(
        "--kv-bits", type=int, choices=(8, 16, 32), help="bits of a cache entry (default: 8, as the paper)"
    )
    limits.add_argument("--vocab-size", type=int, default=128256, help="of the tokenizer (default: 128256)")
    budget = plan.add_argument_group("training budget, one of")
    budget.add_argument("--tokens", type=float, help="training tokens")
    budget.add_argument("--flops", type=float, help="training FLOPs")
    device = plan.add_argument_group("device, for speeds: its measurements or its rates")
    device.add_argument(
        "--device",
        metavar="NAME_OR_FILE",
        help="a known device (default: galaxy-s25), or a JSON of `mobilemoe bench --json`",
    )
    device.add_argument("--bandwidth", type=float, help="memory bandwidth in GB/s")
    device.add_argument("--rate", type=float, help="prefill rate in GFLOP/s, with --bandwidth")
    law = plan.add_argument_group("scaling law, of your runs in place of the paper's")
    law.add_argument("--law", metavar="FILE", help="table of runs to fit, .jsonl or .csv")
    law.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE", help="use these rows of the table")
    law.add_argument("--extrapolate", action="store_true", help="also for sizes and tokens outside those of its runs")
    output = plan.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="write config.json and plan.json there")
    output.add_argument("--plot", metavar="FILE", help="draw predicted loss over memory")
    add_json(output, "plan.json, which has every shape")
    plan.set_defaults(function=run_plan, extra="plan")


def run_plan(arguments: argparse.Namespace) -> None:
    from .costs import PROGRAM_KV_BITS, Device, read_device
    from .display import show
    from .plan import planner, report, search
    from .plan.fit import fit_law
    from .plan.table import read_table

    if arguments.device and (arguments.bandwidth or arguments.rate):
        raise ValueError("--device and --bandwidth or --rate both say how fast the device is. Give one of them.")
    if arguments.rate is not None and arguments.bandwidth is None:
        raise ValueError("--rate alone says nothing about decoding. Give --bandwidth as well.")
    device = read_device(arguments.device or search.DEVICE)
    if arguments.bandwidth is not None:
        rate = None if arguments.rate is None else arguments.rate * 1e9
        device = Device(arguments.bandwidth * 1e9, rate, kv_bits=arguments.kv_bits or PROGRAM_KV_BITS)
    fit, parts = None, []
    if arguments.law:
        conditions = dict(condition.partition("=")[::2] for condition in arguments.where)
        runs = read_table(arguments.law, **conditions)
        fit = fit_law(runs)
        parts.append(report.fit_table(fit, runs))
    request = search.Request(
        memory=arguments.memory_gb * 1e9,
        context=arguments.context,
        tokens=arguments.tokens,
        flops=arguments.flops,
        inference_flops=None if arguments.inference_gflops is None else arguments.inference_gflops * 1e9,
        tokens_per_second=search.TOKENS_PER_SECOND
        if arguments.tokens_per_second is None
        else arguments.tokens_per_second,
        device=device,
        kv_bits=arguments.kv_bits or PROGRAM_KV_BITS,
        vocab_size=arguments.vocab_size,
        extrapolate=arguments.extrapolate,
    )
    result = planner.plan(request, fit)
    if not write_result(result.as_json, arguments.json):
        show(*parts, *report.plan_report(result))
    if arguments.plot:
        report.plot_plan(result, arguments.plot)
    if arguments.output:
        result.save(arguments.output)


def add_export(commands) -> None:
    export = commands.add_parser("export", help="turn a checkpoint into a directory for ExecuTorch or another runtime")
    export.add_argument("--model", required=True, metavar="MODEL", help="checkpoint directory or Hub id")
    export.add_argument("--output", required=True, metavar="DIR", help="directory to create")
    export.add_argument(
        "--to",
        default="pte",
        choices=EXPORT_OPTIONS,
        help="pte: ExecuTorch (default); gguf: llama.cpp; mlx: mlx-lm; glm4_moe: transformers, vLLM, SGLang",
    )
    # Defaults are those of the exporters, so that an option that was set is known from one that was not.
    program = export.add_argument_group("program, for --to pte")
    program.add_argument("--max-seq-len", type=int, help="context in tokens (default: the model's)")
    program.add_argument(
        "--kv-cache", choices=("fp32", "bf16", "int8"), help="default: int8 with our operators, else fp32"
    )
    program.add_argument("--all-logits", action="store_true", help="return logits of every position, for evaluation")
    program.add_argument("--experts-file", action="store_true", help="put the experts into experts.ptd")
    program.add_argument(
        "--moe-op",
        choices=("mobilemoe", "llama"),
        help="operator of the experts: ours, compiled on first use, or ExecuTorch's (default: ours where possible)",
    )
    program.add_argument("--expert-bits", type=int, choices=(4, 8), help="default: 4 where that loses nothing, else 8")
    program.add_argument(
        "--embedding-bits", type=int, choices=(4, 8), help="8 stores the same integers wider (default: 4)"
    )
    weights = export.add_argument_group("weights")
    weights.add_argument(
        "--weights",
        choices=("int4", "fp32", "bf16", "f32", "q4_0"),
        help="pte: int4 (default), or fp32, bf16: no quantization, slow; gguf: f32, bf16 or q4_0; glm4_moe: bf16 or "
        "fp32 (default of these two: nothing is rounded where that is possible)",
    )
    weights.add_argument(
        "--expert-weights",
        choices=("q8_0", "bf16"),
        help="gguf: type of INT4 experts grouped along their output, which q4_0 cannot hold (default: q8_0)",
    )
    export.set_defaults(function=run_export, extra="export")


def run_export(arguments: argparse.Namespace) -> None:
    from .artifacts import EXPORT_FILE, Export, RuntimeExport
    from .display import show
    from .export.report import export_report

    names = set().union(*EXPORT_OPTIONS.values())
    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    options = {name: value for name, value in given.items() if name in names}
    foreign = [f"--{name.replace('_', '-')}" for name in options if name not in EXPORT_OPTIONS[arguments.to]]
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: of another format than --to {arguments.to}. Leave it out.")
    if arguments.to == "gguf":
        from .export.gguf import export_gguf as export
    elif arguments.to == "mlx":
        from .export.mlx import export_mlx as export
    elif arguments.to == "glm4_moe":
        from .export.glm4_moe import export_glm4_moe as export
    else:
        from .export.exporter import export_checkpoint as export
    output = export(arguments.model, arguments.output, **options, command=arguments.command_line)
    kind = Export if arguments.to == "pte" else RuntimeExport
    show(*export_report(kind.load(output / EXPORT_FILE)))
    size = sum(path.stat().st_size for path in output.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    print(f"{output}: {size / 1e6:,.1f} MB of weights; more in export.json")


def add_run(commands) -> None:
    run = commands.add_parser("run", help="generate text with a checkpoint, a .pte or a GGUF")
    run.add_argument("--model", required=True, metavar="MODEL", help=RUN_HELP)
    run.add_argument("--prompt", required=True, help="text, or the user's turn with --chat; - reads standard input")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    run.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    run.add_argument("--verify", action="store_true", help="first compare all bytes of a program with its export.json")
    add_generation_arguments(run, max_new_tokens=128)
    run.set_defaults(function=run_generation, extra="export")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="of a checkpoint: cpu, cuda, cuda:1 (default: a GPU if there is one); of a .pte, for run and chat: adb "
        "or ssh:HOST, a phone or a board",
    )


def add_generation_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"default: {max_new_tokens}")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--prompt-lookup",
        action=argparse.BooleanOptionalAction,
        help="verify several tokens at once where the text repeats itself (default: where the text stays the same)",
    )
    add_device(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy decoding")
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1, all tokens)")
    sampling.add_argument("--seed", type=int, help="of the random numbers")
    structure = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    structure.add_argument("--json-schema", metavar="FILE", help="answer with JSON that this schema allows")
    structure.add_argument("--regex", help="answer with text that matches this regular expression")


def add_chat(commands) -> None:
    chat = commands.add_parser("chat", help="talk with a checkpoint, a .pte or a GGUF")
    chat.add_argument("--model", required=True, metavar="MODEL", help=RUN_HELP)
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--tools", metavar="FILE", help="JSON list of functions that the model may call")
    add_generation_arguments(chat, max_new_tokens=512)
    chat.set_defaults(function=run_chat, extra="export")


def run_chat(arguments: argparse.Namespace) -> None:
    check_model(arguments.model)
    from .chat import chat

    chat(arguments)


def run_generation(arguments: argparse.Namespace) -> None:
    check_model(arguments.model)
    if arguments.verify:
        from .integrity import verify_model

        verify_model(arguments.model)
    from .chat import run

    run(arguments)


def check_model(model: str) -> None:
    """Before what takes seconds to import: the name may have a typing error."""
    from .artifacts import find_gguf, local_checkpoint

    if find_gguf(model) is None:
        local_checkpoint(model)


def add_serve(commands) -> None:
    serve = commands.add_parser("serve", help="serve a model over HTTP, as OpenAI's API")
    serve.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add_device(serve)
    serve.add_argument("--name", help="of the model in requests (default: the last part of --model)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--api-key", help="that requests must carry (default: the variable MOBILEMOE_API_KEY)")
    limits = serve.add_argument_group("limits")
    limits.add_argument("--max-prompt-tokens", type=int, help="of one request (default: the context)")
    limits.add_argument("--max-tokens", type=int, help="new tokens of one request (default: the context)")
    limits.add_argument("--max-body-bytes", type=int, default=2**20, help="of one request (default: 1048576)")
    limits.add_argument("--max-waiting", type=int, default=32, help="requests in the queue (default: 32)")
    serve.set_defaults(function=run_server, extra="serve")


def run_server(arguments: argparse.Namespace) -> None:
    check_model(arguments.model)
    from .serve.main import serve

    names = "model device host port name api_key max_prompt_tokens max_tokens max_body_bytes max_waiting".split()
    serve(**{name: vars(arguments)[name] for name in names})


def add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="measure speed and memory of models on this machine or on a phone")
    bench.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help="checkpoints, directories with model.pte, or S, M, L, MobileLLM-Pro: shapes with random weights",
    )
    bench.add_argument(
        "--device",
        default="host",
        type=bench_device,
        help="host: this machine (default); adb: a phone; ssh:HOST: an Arm board with Linux",
    )
    bench.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 512], help="tokens (default: 128 512)")
    bench.add_argument("--new-tokens", type=int, default=48, help="to decode after each prompt (default: 48)")
    bench.add_argument("--repeats", type=int, default=5, help="of every measurement (default: 5)")
    bench.add_argument(
        "--threads",
        type=thread_count,
        help="default: all of this machine, 4 on a phone; auto: its fast cores, at most 4, and only these",
    )
    bench.add_argument("--prompt-file", metavar="FILE", help="take prompts from this text (default: random tokens)")
    bench.add_argument(
        "--runtime",
        default="pte",
        choices=("pte", "pytorch"),
        help="for the built-in shapes: export a program for ExecuTorch first (default), or PyTorch",
    )
    bench.add_argument(
        "--verify", action="store_true", help="first compare all bytes of the programs with their export.json"
    )
    bench.add_argument("--profile", action="store_true", help="also time every operator of a program")
    output = bench.add_argument_group("output")
    add_json(output, "the result")
    output.add_argument("--picture", metavar="FILE", help="draw the result there, as in bench.png")
    output.add_argument("--paper", action="store_true", help="show the phones of the paper too")
    phone = bench.add_argument_group(
        "--device adb, ssh:HOST", "an Android phone with USB debugging, or a board; see docs/phone.md"
    )
    phone.add_argument("--serial", help="which device, as in `adb devices`, if there are several")
    phone.add_argument("--runner", choices=("own", "llama_main", "minibench"), help="what runs there (default: own)")
    phone.add_argument("--runner-binary", metavar="FILE", help="a runner for the device (default: ours, built here)")
    phone.add_argument("--build-runner", metavar="DIR", help="only write our runner for 64-bit Arm to this directory")
    phone.add_argument("--max-celsius", type=float, help="first wait until it is this cool (default of a phone: 35)")
    phone.add_argument("--sustained-seconds", type=int, help="then decode for so long, to measure a hot phone")
    phone.add_argument(
        "--submit-row", action="store_true", help="also print the rows for the table of results; nothing is sent"
    )
    phone.add_argument("--keep", action="store_true", help="keep the models there for the next run")
    bench.set_defaults(function=run_bench, extra="bench")


def bench_device(name: str) -> str:
    from .device.find import is_device

    if name != "host" and not is_device(name):
        raise argparse.ArgumentTypeError(f"{name!r} is none of host, adb and ssh:HOST")
    return name


def thread_count(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run_bench(arguments: argparse.Namespace) -> None:
    if arguments.build_runner is not None:
        from .device.bundle import copy_bundle, runner_command

        output = copy_bundle(arguments.build_runner)
        size = sum(path.stat().st_size for path in output.iterdir())
        print(f"{output}: {size / 1e6:,.1f} MB; in it, start: {shlex.join(runner_command('.'))}")
        return
    if not arguments.model:
        raise ValueError("--model is needed. Give models, or --build-runner for the runner alone.")
    from .bench.host import bench
    from .bench.report import draw, submitted_rows, tables
    from .display import show

    if arguments.verify:
        from .artifacts import is_shape
        from .integrity import verify_model

        for model in arguments.model:
            if not is_shape(model):
                verify_model(model)
    values = vars(arguments)
    phone_names = ("serial", "runner", "runner_binary", "max_celsius", "sustained_seconds", "keep")
    phone = {name: value for name in phone_names if (value := values[name]) is not None and value is not False}
    if arguments.device != "host":
        from .bench.phone import bench_phone
        from .bench.runners import PhoneOptions

        if arguments.profile or arguments.runtime != "pte":
            raise ValueError("--profile and --runtime are of this machine, and --device is another. Leave them out.")
        phone |= {} if arguments.threads is None else {"num_threads": arguments.threads}
        names = ("prompt_lengths", "new_tokens", "repeats", "prompt_file")
        options = PhoneOptions(**{name: values[name] for name in names}, device=arguments.device, **phone)
        result = bench_phone(arguments.model, options, arguments.command_line)
    else:
        phone |= {"submit_row": True} if arguments.submit_row else {}
        if phone:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in phone)
            raise ValueError(f"{given}: of a phone, and this machine is measured. Leave out, or set --device adb.")
        if arguments.threads == "auto":
            raise ValueError("--threads auto reads a phone's cores, and this machine is measured. Give a number.")
        result = bench(
            arguments.model,
            arguments.prompt_lengths,
            arguments.new_tokens,
            arguments.repeats,
            os.cpu_count() or 1 if arguments.threads is None else arguments.threads,
            arguments.prompt_file,
            arguments.runtime,
            arguments.profile,
            arguments.command_line,
        )
    # First what was measured: a table or a picture that fails must not cost it.
    if not write_result(result.as_dict(), arguments.json):
        show(*tables(result, arguments.paper))
    if arguments.submit_row:
        note = "For the table under Results in docs/phone.md, in a pull request. Nothing was sent."
        print(f"{note}\n\n{submitted_rows(result)}", file=sys.stderr if arguments.json == "-" else sys.stdout)
    if arguments.picture:
        draw(result, arguments.picture, arguments.paper)


def add_eval(commands) -> None:
    evaluation = commands.add_parser("eval", help="run the paper's benchmarks on a checkpoint or a .pte directory")
    evaluation.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    add_suite_arguments(evaluation)
    evaluation.add_argument(
        "--data-dir", metavar="DIR", help="made by `eval prepare`; without it the harness downloads the data"
    )
    evaluation.add_argument("--limit", type=int, help="only so many documents of each task, for a quick try")
    evaluation.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="also run tasks that execute code the model wrote"
    )
    output = evaluation.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="directory of the report; finished tasks in it are kept")
    output.add_argument("--paper", help="show the paper's scores of this model, such as S-Base")
    speed = evaluation.add_argument_group("speed")
    speed.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    speed.add_argument("--tokens-per-batch", type=int, help="default: by device, reduced when memory runs out")
    actions = evaluation.add_subparsers(dest="action")
    prepare = actions.add_parser("prepare", help="download a suite's data at the pinned revisions")
    add_suite_arguments(prepare)
    prepare.add_argument("--data-dir", required=True, metavar="DIR", help="directory for the data")
    compare = actions.add_parser("compare", help="show reports side by side, with differences to the first")
    compare.add_argument(
        "--results", required=True, nargs="+", metavar="DIR", help="directories that `mobilemoe eval` wrote"
    )
    compare.add_argument(
        "--output", required=True, metavar="DIR", help="directory for comparison.json and comparison.png"
    )
    compare.add_argument("--paper", help="show the paper's scores of this model, such as S-Base")
    check = actions.add_parser("check", help="measure bits per byte, agreement of two models, expert utilisation")
    check.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    check.add_argument("--reference", metavar="MODEL", help="the model to compare with")
    check.add_argument("--text", required=True, nargs="+", metavar="DOMAIN=FILE", help="held-out text by domain")
    check.add_argument("--max-tokens", type=int, default=4096, help="of each text (default: 4096)")
    add_json(check, "the result")
    evaluation.set_defaults(function=run_evaluation, extra="eval")


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", default="foundation", help="foundation (the default) or advanced")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the suite")


def run_evaluation(arguments: argparse.Namespace) -> None:
    if arguments.action == "prepare":
        from .eval.data import prepare_data

        prepare_data(arguments.suite, arguments.data_dir, arguments.tasks)
    elif arguments.action == "compare":
        from .display import show
        from .eval.report import compare

        show(compare(arguments.results, arguments.output, arguments.paper, arguments.command_line))
    elif arguments.action == "check":
        from .eval.agreement import check_lines, check_models

        texts, command = arguments.text, arguments.command_line
        check = check_models(arguments.model, arguments.reference, texts, arguments.max_tokens, command)
        if not write_result(check.as_dict(), arguments.json):
            print("\n".join(check_lines(check)))
    else:
        from .display import show
        from .eval.report import paper_scores, report_table
        from .eval.run import evaluate

        if arguments.model is None or arguments.output is None:
            raise ValueError("--model and --output are needed. Give the model and a directory for the report.")
        paper_scores(arguments.paper)
        try:
            report = evaluate(
                arguments.model,
                arguments.suite,
                arguments.output,
                data_dir=arguments.data_dir,
                tasks=arguments.tasks,
                limit=arguments.limit,
                dtype=arguments.dtype,
                tokens_per_batch=arguments.tokens_per_batch,
                run_unsafe_code=arguments.confirm_run_unsafe_code,
                command=arguments.command_line,
            )
        except KeyboardInterrupt:
            sys.exit(
                f"mobilemoe eval: interrupted. Finished tasks are kept in {arguments.output}/tasks; "
                "the same command resumes after them."
            )
        show(report_table({arguments.model: report}, arguments.paper))


def add_card(commands) -> None:
    card = commands.add_parser("card", help="write a model card from a model's files and measured results")
    card.add_argument(
        "--model",
        metavar="MODEL",
        help="checkpoint directory, Hub id, or Meta's S, M, L (default: what results name)",
    )
    card.add_argument("--output", required=True, metavar="FILE", help="file to write, README.md for the Hub")
    card.add_argument("--overwrite", action="store_true", help="replace the output")
    card.add_argument(
        "--results",
        nargs="*",
        default=[],
        metavar="FILE",
        help="JSON files of eval, eval check, bench and export, or directories that hold report.json or export.json",
    )
    card.add_argument("--recipe", metavar="FILE", help="YAML file that it was trained with: data sets and settings")
    metadata = card.add_argument_group("metadata")
    metadata.add_argument("--name", help="the model's id on the Hub (default: --model)")
    metadata.add_argument("--base-model", nargs="+", default=[], help="Hub ids of the models that it was made from")
    metadata.add_argument("--license", help="of your model, as the Hub calls it; needed except for S, M, L")
    metadata.add_argument("--license-name", help="with --license other")
    metadata.add_argument("--license-link", help="with --license other")
    # Nothing beside the package's own dependencies.
    card.set_defaults(function=run_card, extra="all")


def run_card(arguments: argparse.Namespace) -> None:
    from .card.card import write_card

    options = vars(arguments)
    names = "model output results name license license_name license_link base_model recipe overwrite".split()
    print(write_card(**{name: options[name] for name in names}))


if __name__ == "__main__":
    main()
