"""The `mobilemoe` command: plan, export, run, bench, eval and card."""

import argparse
import json
import os
import sys
import time
from pathlib import Path


# Modules of one extra; others are in that of the command.
EXTRAS = {"executorch": "export", "torchao": "export", "trl": "train", "gguf": "gguf"}
# What `export` takes for each runtime, beside --model and --output.
EXPORT_OPTIONS = {
    "pte": (
        "max_seq_len",
        "expert_bits",
        "moe_op",
        "weights",
        "embedding_bits",
        "kv_cache",
        "all_logits",
        "experts_file",
    ),
    "gguf": ("weights", "expert_weights"),
    "mlx": (),
    "glm4_moe": ("weights",),
}
WEIGHT_SUFFIXES = {".pte", ".ptd", ".gguf", ".safetensors"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mobilemoe", description="On-device mixture-of-experts language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_plan, add_export, add_run, add_bench, add_eval, add_card):
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.function(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"mobilemoe {arguments.command}: {error}")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name.partition(".")[0], arguments.extra)
        sys.exit(f"mobilemoe {arguments.command}: {error.name} is not installed. pip install 'mobilemoe[{extra}]'")


def add_plan(commands) -> None:
    plan = commands.add_parser("plan", help="the best shape for a memory, a training budget and a speed")
    plan.add_argument(
        "--memory-gb", type=float, required=True, help="for the program's weights and key-value cache, 1e9 bytes"
    )
    plan.add_argument("--context", type=int, default=8192, help="tokens that the cache holds")
    plan.add_argument("--tokens", type=float, help="training budget in tokens, or:")
    plan.add_argument("--flops", type=float, help="training budget in FLOPs")
    plan.add_argument("--inference-gflops", type=float, help="most GFLOPs per token, 2 x active parameters")
    plan.add_argument("--tokens-per-second", type=float, help="least decode speed at the full context")
    plan.add_argument("--device", help="JSON of measurements of a device")
    plan.add_argument("--bandwidth", type=float, help="or its memory bandwidth in GB/s")
    plan.add_argument("--rate", type=float, help="and its prefill rate in GFLOP/s")
    plan.add_argument("--kv-bits", type=int, choices=(8, 16, 32), help="of a cache entry (default: 32; the paper: 8)")
    plan.add_argument("--vocab-size", type=int, default=128256)
    plan.add_argument("--law", help="table of runs, .jsonl or .csv, to fit in place of the paper's law")
    plan.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE", help="rows of the table to take")
    plan.add_argument("--output", help="directory to write config.json and plan.json to")
    plan.add_argument("--plot", help="picture to write: predicted loss over memory")
    plan.add_argument("--json", action="store_true", help="print plan.json in place of tables")
    plan.set_defaults(function=run_plan, extra="plan")


def run_plan(arguments: argparse.Namespace) -> None:
    from .costs import PROGRAM_KV_BITS, Device, read_device
    from .plan import planner
    from .plan.fit import describe_fit, fit_law, read_table
    from .plan.law import PAPER_LAW

    if arguments.device and (arguments.bandwidth or arguments.rate):
        raise ValueError("--device and --bandwidth or --rate both say how fast the device is. Give one of them.")
    if arguments.rate is not None and arguments.bandwidth is None:
        raise ValueError("--rate alone says nothing about decoding. Give --bandwidth as well.")
    device = read_device(arguments.device) if arguments.device else None
    if arguments.bandwidth is not None:
        rate = None if arguments.rate is None else arguments.rate * 1e9
        device = Device(arguments.bandwidth * 1e9, rate, kv_bits=arguments.kv_bits or PROGRAM_KV_BITS)
    law = PAPER_LAW
    if arguments.law:
        conditions = dict(condition.partition("=")[::2] for condition in arguments.where)
        table = read_table(arguments.law, **conditions)
        law = fit_law(table)
        if not arguments.json:
            print(describe_fit(law, table), end="\n\n")
    request = planner.Request(
        memory=arguments.memory_gb * 1e9,
        context=arguments.context,
        tokens=arguments.tokens,
        flops=arguments.flops,
        inference_flops=None if arguments.inference_gflops is None else arguments.inference_gflops * 1e9,
        tokens_per_second=arguments.tokens_per_second,
        device=device,
        kv_bits=arguments.kv_bits or PROGRAM_KV_BITS,
        vocab_size=arguments.vocab_size,
    )
    result = planner.plan(request, law)
    if arguments.json:
        print(json.dumps(result.as_json, indent=2))
    else:
        planner.print_plan(result)
    if arguments.plot:
        planner.plot_plan(result, arguments.plot)
    if arguments.output:
        result.save(arguments.output)


def add_export(commands) -> None:
    export = commands.add_parser("export", help="checkpoint directory -> directory for ExecuTorch or another runtime")
    export.add_argument("--model", required=True, help="checkpoint directory or Hub id, packed or full precision")
    export.add_argument("--output", required=True, help="directory to create")
    export.add_argument(
        "--to",
        default="pte",
        choices=EXPORT_OPTIONS,
        help="pte: ExecuTorch (default); gguf: llama.cpp; mlx: mlx-lm; glm4_moe: transformers, vLLM",
    )
    export.add_argument("--max-seq-len", type=int, help="context of the program in tokens (default: the model's)")
    export.add_argument("--expert-bits", type=int, choices=(4, 8), help="default: 4 where that loses nothing, else 8")
    export.add_argument(
        "--moe-op",
        choices=("mobilemoe", "llama"),
        help="operator of the experts: ours, compiled on first use, or the stock one (default: ours where it can)",
    )
    export.add_argument(
        "--weights",
        help="pte: int4 (default), or fp32, bf16: quantise nothing, slow; gguf: f32, bf16, q4_0; glm4_moe: bf16, fp32 "
        "(default of the last two: what loses least)",
    )
    export.add_argument("--expert-weights", help="gguf: q8_0 (default) or bf16, of experts that q4_0 cannot hold")
    export.add_argument("--embedding-bits", type=int, choices=(4, 8), help="8: the same integers, wider")
    export.add_argument("--kv-cache", choices=("fp32", "int8"), help="default: fp32")
    export.add_argument("--all-logits", action="store_true", help="logits of every position, for evaluation")
    export.add_argument("--experts-file", action="store_true", help="put the experts into experts.ptd")
    export.set_defaults(function=run_export, extra="export")


def run_export(arguments: argparse.Namespace) -> None:
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
    output = export(arguments.model, arguments.output, **options)
    size = sum(path.stat().st_size for path in output.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    print(f"{output}: {size / 1e6:,.1f} MB of weights; more in export.json")


def add_run(commands) -> None:
    run = commands.add_parser("run", help="generate text from a checkpoint or a .pte directory")
    run.add_argument("--model", required=True, help="checkpoint directory, Hub id, or directory with model.pte")
    run.add_argument("--prompt", required=True, help="text, or the user's turn with --chat")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    run.add_argument("--max-new-tokens", type=int, default=128)
    run.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    run.add_argument("--top-p", type=float, default=1.0, help="draw from the tokens that reach this probability")
    run.add_argument("--seed", type=int, help="of the sampling")
    run.set_defaults(function=run_generation, extra="export")


def run_generation(arguments: argparse.Namespace) -> None:
    if (Path(arguments.model) / "model.pte").is_file():
        from .runtime import PteModel

        model = PteModel(arguments.model)
    else:
        from .runtime import CheckpointModel

        model = CheckpointModel(arguments.model)
    prompt = model.encode(arguments.prompt, chat=arguments.chat)
    started = time.perf_counter()
    first_token, tokens, text = None, [], ""
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": arguments.seed}
    for token in model.generate(prompt, arguments.max_new_tokens, **sampling):
        first_token = first_token or time.perf_counter()
        tokens.append(token)
        # Decoded as a whole: a character may span tokens, and until its last one the text ends in a replacement.
        grown = model.decode(tokens)
        if not grown.endswith("\ufffd"):
            print(grown[len(text) :], end="", flush=True)
            text = grown
    finished = time.perf_counter()
    print(model.decode(tokens)[len(text) :])
    if len(tokens) > 1:
        rate = (len(tokens) - 1) / (finished - first_token)
        print(
            f"[{len(prompt)} prompt tokens, first token after {first_token - started:.2f} s; "
            f"{len(tokens)} new tokens, {rate:.1f} tokens/s]",
            file=sys.stderr,
        )


def add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="speed and memory of models on this machine or on a phone")
    bench.add_argument(
        "--model",
        nargs="+",
        required=True,
        help="checkpoints, directories with model.pte, or S, M, L, MobileLLM-Pro: shapes with random weights",
    )
    bench.add_argument("--device", default="host", choices=("host", "adb"), help="this machine, or a phone")
    bench.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 512], help="in tokens")
    bench.add_argument("--new-tokens", type=int, default=48, help="to decode after each prompt")
    bench.add_argument("--repeats", type=int, default=5)
    bench.add_argument("--threads", type=int, help="default: all of this machine, 4 on a phone")
    bench.add_argument("--prompt-file", help="text to take prompts from (default: random tokens)")
    bench.add_argument(
        "--runtime",
        default="pte",
        choices=("pte", "pytorch"),
        help="of the shapes: a program in ExecuTorch, exported first, or PyTorch",
    )
    bench.add_argument("--profile", action="store_true", help="milliseconds by operator, of programs")
    bench.add_argument("--json", help="file to write the result to")
    bench.add_argument("--picture", help="file to draw the result in, such as bench.png")
    bench.add_argument("--paper", action="store_true", help="show the paper's phones in table and picture too")
    phone = bench.add_argument_group("--device adb", "an Android phone with USB debugging, see docs/phone.md")
    phone.add_argument("--serial", help="which of several devices, as in `adb devices`")
    phone.add_argument("--runner", choices=("own", "llama_main", "minibench"), help="what runs there (default: own)")
    phone.add_argument("--runner-binary", help="the runner, built for the phone")
    phone.add_argument("--max-celsius", type=float, help="let the battery cool down to this first (default: 35)")
    phone.add_argument("--sustained-seconds", type=int, help="then decode for so long, to see a hot phone")
    phone.add_argument("--keep", action="store_true", help="leave models there for the next run")
    bench.set_defaults(function=run_bench, extra="bench")


def run_bench(arguments: argparse.Namespace) -> None:
    from .bench.host import bench
    from .bench.report import draw, print_table

    phone_names = ("serial", "runner", "runner_binary", "max_celsius", "sustained_seconds", "keep")
    phone = {name: value for name in phone_names if (value := getattr(arguments, name))}
    if arguments.device == "adb":
        from .bench.phone import PhoneOptions, bench_phone

        if arguments.profile or arguments.runtime != "pte":
            raise ValueError(
                "--profile and --runtime are of this machine, and --device adb is a phone. Leave them out."
            )
        phone |= {} if arguments.threads is None else {"num_threads": arguments.threads}
        names = ("prompt_lengths", "new_tokens", "repeats", "prompt_file")
        options = PhoneOptions(**{name: getattr(arguments, name) for name in names}, **phone)
        result = bench_phone(arguments.model, options)
    else:
        if phone:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in phone)
            raise ValueError(f"{given}: of a phone, and this machine is measured. Leave out, or set --device adb.")
        result = bench(
            arguments.model,
            arguments.prompt_lengths,
            arguments.new_tokens,
            arguments.repeats,
            os.cpu_count() if arguments.threads is None else arguments.threads,
            arguments.prompt_file,
            arguments.runtime,
            arguments.profile,
        )
    # First what was measured: a table or a picture that fails must not cost it.
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    print_table(result, arguments.paper)
    if arguments.picture:
        draw(result, arguments.picture, arguments.paper)
    print(json.dumps(result))


def add_eval(commands) -> None:
    evaluation = commands.add_parser("eval", help="the paper's benchmarks for a checkpoint or a .pte directory")
    evaluation.add_argument("--model", help="checkpoint directory, Hub id, or directory with model.pte")
    add_suite_arguments(evaluation)
    evaluation.add_argument("--data-dir", help="made by `eval prepare`; without it the harness downloads the data")
    evaluation.add_argument("--output", help="directory for the report; finished tasks in it are kept")
    evaluation.add_argument("--limit", type=int, help="only the first documents of each task, for a try")
    evaluation.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    evaluation.add_argument("--tokens-per-batch", type=int, help="default: by device, less when memory runs out")
    evaluation.add_argument("--paper", help="show the paper's numbers of this model, as in S-Base")
    evaluation.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="run tasks that execute what the model wrote"
    )
    actions = evaluation.add_subparsers(dest="action")
    prepare = actions.add_parser("prepare", help="download a suite's data at the pinned revisions")
    add_suite_arguments(prepare)
    prepare.add_argument("--data-dir", required=True, help="directory for the data")
    compare = actions.add_parser("compare", help="reports side by side, with differences to the first")
    compare.add_argument("--results", required=True, nargs="+", help="directories that `mobilemoe eval` wrote")
    compare.add_argument("--output", required=True, help="directory for comparison.json and comparison.png")
    compare.add_argument("--paper", help="show the paper's numbers of this model, as in S-Base")
    check = actions.add_parser("check", help="bits per byte, agreement of two models, expert utilisation")
    check.add_argument("--model", required=True, help="checkpoint directory, Hub id, or directory with model.pte")
    check.add_argument("--reference", help="the model to compare with")
    check.add_argument("--text", required=True, nargs="+", metavar="DOMAIN=FILE", help="held-out text by domain")
    check.add_argument("--max-tokens", type=int, default=4096, help="read this many tokens of each text")
    check.add_argument("--json", help="write the result here too")
    evaluation.set_defaults(function=run_evaluation, extra="eval")


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", default="foundation", help="foundation (the default) or advanced")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the suite")


def run_evaluation(arguments: argparse.Namespace) -> None:
    if arguments.action == "prepare":
        from .eval.data import prepare_data

        prepare_data(arguments.suite, arguments.data_dir, arguments.tasks)
    elif arguments.action == "compare":
        from .eval.report import compare

        compare(arguments.results, arguments.output, arguments.paper)
    elif arguments.action == "check":
        from .eval.agreement import check_models

        check_models(arguments.model, arguments.reference, arguments.text, arguments.max_tokens, arguments.json)
    else:
        from .eval.report import paper_scores, print_table
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
            )
        except KeyboardInterrupt:
            sys.exit(
                f"mobilemoe eval: interrupted. Finished tasks are kept in {arguments.output}/tasks; "
                "the same command goes on behind them."
            )
        print_table({arguments.model: report}, arguments.paper)


def add_card(commands) -> None:
    card = commands.add_parser("card", help="a model card from a model's files and measured results")
    card.add_argument("--model", help="checkpoint directory, Hub id, or S, M, L: Meta's (default: what results name)")
    card.add_argument("--output", required=True, help="file to write, README.md for the Hub")
    card.add_argument(
        "--results",
        nargs="*",
        default=[],
        help="JSON files of eval, eval check, bench and export, or directories that hold report.json or export.json",
    )
    card.add_argument("--name", help="the model's id on the Hub (default: --model)")
    card.add_argument("--license", help="of your model, as the Hub calls it; needed except for S, M, L")
    card.add_argument("--license-name", help="with --license other")
    card.add_argument("--license-link", help="with --license other")
    card.add_argument("--base-model", nargs="+", default=[], help="Hub ids of what it was made from")
    card.add_argument("--recipe", help="YAML file that it was trained with: data sets and settings")
    card.add_argument("--overwrite", action="store_true", help="replace the output")
    # Nothing beside the package's own dependencies.
    card.set_defaults(function=run_card, extra="all")


def run_card(arguments: argparse.Namespace) -> None:
    from .card.card import write_card

    options = vars(arguments)
    names = "model output results name license license_name license_link base_model recipe overwrite".split()
    print(write_card(**{name: options[name] for name in names}))


if __name__ == "__main__":
    main()
