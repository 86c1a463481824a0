"""What a model card shows: results that belong to its model, as tables with the command and machine of each number."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig

from ..artifacts import describe_model, local_checkpoint, weights_sha256
from ..costs import int4_bytes, kv_cache_bytes
from ..eval.report import format_score
from ..eval.suites import suite_file
from ..shapes import published, shapes


NOT_MEASURED = "not measured"
# Of the paper's numbers: in no source that quotes it.
NOT_FOUND = "not found"
SIZES = ("S", "M", "L")
STAGES = ("Base", "SFT", "QAT")
# Kinds of results, and the keys that tell them.
KINDS = {
    "eval": {"model", "settings", "tasks"},
    "bench": {"benchmark", "machine", "models"},
    "export": {"weights_sha256", "moe_op", "parity"},
    "check": {"descriptions", "domains"},
}
# What has to be equal for two models to cost the same.
SHAPE = (
    "vocab_size hidden_size intermediate_size intermediate_size_mlp num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim num_local_experts num_experts_per_tok"
).split()


@dataclass(frozen=True)
class Subject:
    """
    What a card is of.

    Args:
        given (`str`): as the command line names it.
        label (`str`): as the card names it, in commands too.
        config (`MobileMoEConfig`): its shape.
        directory (`Path`, *optional*): with its weights; a released size, S, M or L, has none here.
    """

    given: str
    label: str
    config: MobileMoEConfig
    directory: Path | None

    @property
    def size(self) -> str | None:
        return self.given if self.directory is None else None

    @cached_property
    def sha256(self) -> str:
        return describe_model(self.directory)["sha256"]

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        return weights_sha256(self.directory)

    def is_described_by(self, description: dict) -> bool:
        """Whether `artifacts.describe_model` was about this model or a `.pte` of it; for a size, about Meta's."""
        if self.directory is None:
            return self.stage(description) is not None and self.has_shape_of(description.get("config", {}))
        exported = description.get("export", {}).get("weights_sha256")
        return description["sha256"] == self.sha256 or exported == self.weights_sha256

    def stage(self, description: dict) -> str | None:
        """Base, SFT or QAT, where a description is of that model of Meta's, or of a `.pte` of it."""
        name = source(description).rpartition("/")[2]
        return next((stage for stage in STAGES if name == f"MobileMoE-{self.size}-{stage}"), None)

    def has_shape_of(self, config: dict) -> bool:
        if config.get("model_type") != MobileMoEConfig.model_type:
            return False
        # Keys that a file leaves out have the values of S.
        other = {**vars(MobileMoEConfig()), **config}
        return all(vars(self.config)[name] == other[name] for name in SHAPE)


def source(description: dict) -> str:
    """Name of the model that was measured; of a `.pte`, of the one that it was made from."""
    return description.get("export", {}).get("model", description["name"])


def read_subject(model: str, name: str | None) -> Subject:
    """
    Raises:
        ValueError: when this is neither a checkpoint with weights nor S, M or L.
    """
    if model in SIZES and not Path(model).is_dir():
        return Subject(model, f"MobileMoE-{model}", shapes()[model], None)
    directory = local_checkpoint(model)
    if (directory / "model.pte").is_file():
        raise ValueError(
            f"{model} is an exported program, and a card is of a model. Name the checkpoint that it was made from "
            f"with --model, and {model} with --results."
        )
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise ValueError(f"{model} holds no config.json with weights. Name a checkpoint directory, or S, M or L.")
    config = json.loads((directory / "config.json").read_text())
    if config.get("model_type") != MobileMoEConfig.model_type:
        raise ValueError(f"{model} is a {config.get('model_type')} model. Name a checkpoint of a MobileMoE model.")
    return Subject(model, name or model, MobileMoEConfig.from_dict(config), directory)


def read_result(path: Path) -> tuple[str, dict]:
    """
    What a result is, a key of `KINDS`, and its content.

    Raises:
        ValueError: when it is none of them.
    """
    file = path
    if path.is_dir():
        files = [path / name for name in ("report.json", "export.json") if (path / name).is_file()]
        if len(files) != 1:
            raise ValueError(f"{path} holds {len(files)} of report.json and export.json. Name one file.")
        file = files[0]
    if not file.is_file():
        raise ValueError(f"There is no result {path}. Name a JSON that `mobilemoe eval`, `bench` or `export` wrote.")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}. It was cut off or is another file; measure again.") from error
    kinds = [kind for kind, keys in KINDS.items() if isinstance(content, dict) and keys <= set(content)]
    if not kinds:
        raise ValueError(
            f"{file} is no result that a card shows. It takes report.json of `mobilemoe eval`, export.json of "
            "`mobilemoe export`, and what `mobilemoe bench --json` and `mobilemoe eval check --json` write."
        )
    return kinds[0], content


def measured_model(found: Sequence[tuple[Path, str, dict]]) -> str:
    """
    The model that results are of; for a `.pte` the one that it was made from.

    Raises:
        ValueError: when they name none, or more than one.
    """
    names = set()
    for _, kind, content in found:
        if kind == "bench":
            models = content["models"].items()
            mobilemoe = {name for name, model in models if model["config"]["model_type"] == MobileMoEConfig.model_type}
            names |= {name for name in mobilemoe if not (Path(name) / "model.pte").is_file()}
        elif kind == "export":
            names.add(content["model"])
        else:
            description = content["model"] if kind == "eval" else content["descriptions"]["model"]
            names.add(source(description))
    if len(names) != 1:
        raise ValueError(
            f"The results are of {', '.join(sorted(names)) or 'no model'}. Say with --model which one the card is of."
        )
    return names.pop()


def check_result(subject: Subject, path: Path, kind: str, content: dict) -> None:
    """
    Raises:
        ValueError: for a result of another model.
    """
    if kind == "bench":
        if any(subject.has_shape_of(model["config"]) for model in content["models"].values()):
            return
        of, has = ", ".join(content["models"]), "another shape"
    elif kind == "export":
        if subject.size is not None:
            raise ValueError(f"{path} is of certain weights, and {subject.size} has none here. Leave it out.")
        if content["weights_sha256"] == subject.weights_sha256:
            return
        of, has = content["model"], "other weights"
    else:
        description = content["model"] if kind == "eval" else content["descriptions"]["model"]
        if subject.is_described_by(description):
            return
        of, has = description["name"], "other files, by their SHA-256"
        if subject.size:
            has = f"another name or shape than facebook/{subject.label}-{{{','.join(STAGES)}}}"
            raise ValueError(f"{path} is of {of}, which has {has}. Give it a card of its own with --model {of}.")
    raise ValueError(f"{path} is of {of}, which has {has} than {subject.given}. Measure that model, or leave it out.")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e7 else f"{count:,}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def with_spread(row: dict) -> str:
    return f"{number(row['median'])} ({number(row['p10'])}-{number(row['p90'])})"


def machine_text(machine: dict) -> str:
    """Of a result: its processor or phone first, then counts with their names."""
    words = [str(value) for value in machine.values() if isinstance(value, str)]
    words += [f"{value} {name}" for name, value in machine.items() if isinstance(value, int)]
    return ", ".join(words)


def versions_text(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def int4_size(config: MobileMoEConfig) -> str:
    try:
        return f"{sum(int4_bytes(config).values()) / 1e6:,.1f} MB (4.5 bits a weight, FP32 router)"
    except ValueError as error:
        return str(error)


def architecture_table(config: MobileMoEConfig) -> str:
    rows = [
        (
            "parameters",
            f"{config.num_total_parameters:,}, {config.num_active_parameters:,} of them active for a token",
        ),
        ("layers, width", f"{config.num_hidden_layers}, {config.hidden_size:,}"),
        (
            "attention heads",
            f"{config.num_attention_heads} for queries, {config.num_key_value_heads} for keys and values, "
            f"of {config.head_dim}",
        ),
        (
            "experts of a layer",
            f"{config.num_local_experts} of width {config.intermediate_size:,}, {config.num_experts_per_tok} of them "
            f"for a token; one shared of width {config.intermediate_size_mlp:,}",
        ),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("weights in INT4", int4_size(config)),
        ("weights in BF16", f"{2 * config.num_total_parameters / 1e6:,.1f} MB"),
        (
            "key-value cache of 1,024 tokens",
            f"{kv_cache_bytes(config, 1024, 32) / 1e6:,.1f} MB in FP32, "
            f"{kv_cache_bytes(config, 1024, 8) / 1e6:,.1f} MB in INT8",
        ),
    ]
    return table(("", "value"), rows)


def report_title(subject: Subject, report: dict) -> str:
    kind = {"pte": "`.pte`", "int4": "INT4, PyTorch", "checkpoint": "PyTorch"}[report["model"]["kind"]]
    kind += "" if report["settings"]["dtype"] == "auto" else f", {report['settings']['dtype']}"
    return f"{subject.stage(report['model'])}, {kind}" if subject.size else kind


def evaluation_section(subject: Subject, reports: Sequence[dict]) -> str:
    """A table per suite; both suites for a size, of which the paper has numbers, else those that were run."""
    suites = suite_file()["suites"]
    run = {report["settings"]["suite"] for report in reports}
    shown = [name for name in suites if subject.size or name in run] or ["foundation"]
    return "\n\n".join(suite_section(subject, name, suites[name], reports) for name in shown)


def suite_section(subject: Subject, name: str, suite: dict, reports: Sequence[dict]) -> str:
    reports = [report for report in reports if report["settings"]["suite"] == name]
    paper = suite_file()["paper"]
    columns: dict[str, dict[str, str]] = {}
    for stage in STAGES if subject.size else ():
        # The tasks of this suite are for fine-tuned models.
        if name == "advanced" and stage == "Base":
            continue
        if not any(subject.stage(report["model"]) == stage for report in reports):
            columns[stage] = {}
        scores = paper[f"{subject.size}-{stage}"]
        published_scores = {task: f"{score:.1f}" for task, score in scores.items()}
        columns[f"{stage}, paper"] = {"mean": published_scores.get(name, NOT_FOUND), **published_scores}
    for report in reports:
        scores = {task: format_score(row) for task, row in report["tasks"].items()}
        if set(scores) == set(suite["tasks"]):
            scores["mean"] = format_score({"score": report["mean"], "stderr": report["mean_stderr"]})
        columns[report_title(subject, report)] = scores
    if not columns:
        columns["score"] = {}
    rows = []
    for task, settings in [*suite["tasks"].items(), ("mean", None)]:
        title, metric = ("**mean**", "") if settings is None else (settings["title"], settings["metric"][0])
        shots = "" if settings is None else str(settings["num_fewshot"][0])
        empty = {column: NOT_FOUND if column.endswith(", paper") else NOT_MEASURED for column in columns}
        rows.append((title, shots, metric, *(scores.get(task, empty[key]) for key, scores in columns.items())))
    lines = [f"**{suite['title']}** (`{name}`), percent ± standard error", ""]
    if subject.size and name == "advanced":
        lines[0] += ". The paper's mean is over categories with benchmarks of its own, so it is not that of these rows"
    lines += [table(("benchmark", "shots", "metric", *columns), rows)]
    if reports:
        lines += ["", *(f"- {report_title(subject, report)}: {report_source(subject, report)}" for report in reports)]
    return "\n".join(lines)


def report_source(subject: Subject, report: dict) -> str:
    settings = report["settings"]
    command = ["mobilemoe", "eval", "--model", measured_label(subject, report["model"]), "--suite", settings["suite"]]
    if set(report["tasks"]) != set(suite_file()["suites"][settings["suite"]]["tasks"]):
        command += ["--tasks", *report["tasks"]]
    if settings["limit"] is not None:
        command += ["--limit", str(settings["limit"])]
    if settings["dtype"] != "auto":
        command += ["--dtype", settings["dtype"]]
    text = f"`{shlex.join([*command, '--data-dir', 'data', '--output', 'out/eval'])}`"
    text += f"; {machine_text(report['machine'])}; {versions_text(settings['versions'])}; {report['created']}; "
    text += f"files of SHA-256 {report['model']['sha256'][:16]}"
    if settings["limit"] is not None:
        text += f". **Only the first {settings['limit']} documents of each task: a try, not a score**"
    return text


def label(subject: Subject, name: str) -> str:
    """What a command of the card calls a model that a benchmark names."""
    return subject.label if name == subject.given and not subject.size else name


def measured_label(subject: Subject, description: dict) -> str:
    """The same for what `artifacts.describe_model` was about: where it is the card's model, whatever its path was."""
    return subject.label if subject.size is None and description["kind"] != "pte" else description["name"]


def check_section(subject: Subject, checks: Sequence[dict]) -> str:
    """Held-out loss and agreement, of `mobilemoe eval check`."""
    sections = []
    for check in checks:
        header = ["held-out text", "bits per byte"]
        compared = check["reference"] is not None
        header += [f"of `{check['reference']}`", "KL, nats", "same top token"] if compared else []
        rows = []
        for domain, row in check["domains"].items():
            cells = [domain, f"{row['bits_per_byte']:.4f}"]
            if compared:
                cells += [f"{row['reference_bits_per_byte']:.4f}", f"{row['kl']:.2e}", f"{row['top1']:.1%}"]
            rows.append(cells)
        command = ["mobilemoe", "eval", "check", "--model", measured_label(subject, check["descriptions"]["model"])]
        command += ["--reference", check["reference"]] if compared else []
        command += ["--text", *check["texts"], "--max-tokens", str(check["max_tokens"])]
        source = f"`{shlex.join(command)}`; {machine_text(check['machine'])}"
        sections.append(f"\n\n{table(header, rows)}\n\n{source}")
    return "".join(sections)


def speed_section(subject: Subject, benches: Sequence[dict]) -> str:
    """A table per benchmark, with models that it compares with; and the paper's phones for a size."""
    header = ("model", "prompt", "prefill, tokens/s", "first token, ms", "decode, tokens/s", "peak MB", "file MB")
    sections = []
    for bench in benches:
        rows = []
        for name, model in bench["models"].items():
            for length, row in model["lengths"].items():
                speeds = [row[key] for key in ("prefill_tokens_per_s", "first_token_ms", "decode_tokens_per_s")]
                bytes_used = (model["peak_memory_bytes"], model["file_bytes"])
                memory = [NOT_MEASURED if count is None else f"{count / 1e6:,.0f}" for count in bytes_used]
                rows.append(
                    (f"{label(subject, name)}, {model['runtime']}", length, *map(with_spread, speeds), *memory)
                )
        sections.append(f"{table(header, rows)}\n\n{bench_source(bench, subject)}")
    if not benches:
        sections.append(table(header, [(subject.label, *[NOT_MEASURED] * (len(header) - 1))]))
    if subject.size:
        sections.append(phone_table(subject.size))
    return "\n\n".join(sections)


def bench_source(bench: dict, subject: Subject) -> str:
    lengths = next(iter(bench["models"].values()))["lengths"]
    repeats = next(iter(lengths.values()))["decode_tokens_per_s"]["repeats"]
    command = ["mobilemoe", "bench", "--model", *(label(subject, name) for name in bench["models"])]
    command += [] if bench["benchmark"] == "host" else ["--device", bench["benchmark"]]
    command += ["--prompt-lengths", *lengths, "--new-tokens", str(bench["new_tokens"]), "--repeats", str(repeats)]
    command += ["--threads", str(bench["machine"]["threads"])] if "threads" in bench["machine"] else []
    command += [] if bench["prompt"] == "random tokens" else ["--prompt-file", bench["prompt"]]
    text = f"Median (10-90 %) of `{shlex.join(command)}`; {machine_text(bench['machine'])}; "
    text += f"{versions_text(bench['versions'])}; prompts: {bench['prompt']}."
    if set(bench["models"]) & set(shapes()):
        text += f" {', '.join(name for name in bench['models'] if name in shapes())}: random weights of that shape."
    return text


def phone_table(size: str) -> str:
    """The paper's measurements of a size and of the dense model that it compares with."""
    measures = {
        "decode_tokens_per_s": "decode, tokens/s",
        "prefill_tokens_per_s": "prefill, tokens/s",
        "first_token_s": "first token, s",
        "peak_memory_gb": "peak memory, GB",
    }
    found = [
        (device, title, model, values[model])
        for device, numbers in published()["devices"].items()
        for key, title in measures.items()
        if size in (values := numbers.get(key, {}))
        for model in (size, "MobileLLM-Pro")
        if model in values
    ]
    contexts = sorted({context for *_, values in found for context in values})
    rows = [
        (device, title, model, *(str(values.get(context, NOT_FOUND)) for context in contexts))
        for device, title, model, values in found
    ]
    weights = published()["int4_gb"]
    return (
        f"*Paper*, on phones by context in tokens: ExecuTorch with XNNPACK on the CPU, INT4 weights ({size} "
        f"{weights[size]} GB, MobileLLM-Pro {weights['MobileLLM-Pro']} GB), batch 1, prompts of real text. No command "
        f"here prints these.\n\n{table(('device', 'measure', 'model', *(f'{count:,}' for count in contexts)), rows)}"
    )


def export_section(subject: Subject, exports: Sequence[dict]) -> str:
    sections = []
    for export in exports:
        rows = [
            (title, f"{row['cosine_mean']:.6f}", f"{row['sqnr_db']:.1f}", f"{row['kl_nats']:.2e}",
             f"{row['top1_agreement']:.1%}")
            for title, row in (
                ("the checkpoint", export["parity"]["pte_to_checkpoint"]),
                ("PyTorch with the same roundings", export["parity"]["pte_to_pytorch_with_the_same_roundings"]),
            )
        ]  # fmt: skip
        size = export["pte_bytes"] + export.get("ptd_bytes", 0)
        text = f"`{export_command(subject, export)}` writes {size / 1e6:,.1f} MB with `{export['moe_op']}`, a context "
        text += f"of {export['max_seq_len']:,} tokens and an {export['kv_cache'].upper()} cache. Against PyTorch on "
        text += f"{export['parity']['positions']} positions ({versions_text(export['versions'])}):"
        header = (".pte and", "cosine", "signal to noise, dB", "KL, nats", "same top token")
        sections.append(f"{text}\n\n{table(header, rows)}")
    return "\n\n".join(sections)


def export_command(subject: Subject, export: dict) -> str:
    command = ["mobilemoe", "export", "--model", subject.label, "--output", "out/model/pte"]
    command += ["--max-seq-len", str(export["max_seq_len"])]
    if export["weights"] == "fp32":
        command += ["--weights", "fp32"]
    else:
        command += ["--moe-op", export["moe_op"].partition("::")[0]]
        if export["moe_op"].startswith("llama"):
            command += ["--expert-bits", str(export["expert_bits"])]
        command += ["--embedding-bits", "8"] if export["embedding_bits"] == 8 else []
    command += ["--kv-cache", export["kv_cache"]]
    command += ["--all-logits"] if export["all_logits"] else []
    command += ["--experts-file"] if export["experts_file"] else []
    return shlex.join(command)
