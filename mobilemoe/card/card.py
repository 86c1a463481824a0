"""Model cards: Hub metadata, architecture, commands, and measured numbers with the command and machine of each.

    mobilemoe card --model S --results model_cards/results/*.json --output model_cards/mobilemoe-s.md
    mobilemoe card --model out/demo/4-qat --license apache-2.0 --results out/eval out/pte bench.json --output README.md

A number is read from a JSON that this package wrote about the same model, or is the paper's and says so
(`published.yaml`, `suites.yaml`).
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..eval.suites import suite_file
from .results import (
    KINDS,
    STAGES,
    Subject,
    architecture_table,
    check_result,
    check_section,
    evaluation_section,
    export_section,
    measured_model,
    millions,
    published,
    read_result,
    read_subject,
    report_title,
    speed_section,
    table,
)


TEMPLATE = Path(__file__).with_name("template.md")
META_LICENSE = "fair-noncommercial-research-license"
META_MODELS = ("facebook/MobileMoE-", "ml-resources/MobileMoE-")
# What the Hub accepts as `license`, https://huggingface.co/docs/hub/repositories-licenses
LICENSES = set(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
    """.split()
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Keys of the trainer's log.
ROUTING_ROWS = (
    ("busiest expert over the mean, worst layer, at the end", "load_imbalance", ".2f"),
    ("assignments dropped, at the end", "dropped_tokens", ".1%"),
)


def write_card(
    model: str | None,
    output: str | Path,
    results: Sequence[str | Path] = (),
    name: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: Sequence[str] = (),
    recipe: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes a model card, whole or not at all.

    Args:
        model (`str`, *optional*): checkpoint directory or Hub id; or S, M, L, for the card of that size of Meta's.
            What the results are of, when absent.
        output (`str` or `Path`): the file, `README.md` for the Hub.
        results (`Sequence`, *optional*): what `mobilemoe eval`, `eval check --json`, `bench --json` and `export` wrote
            about this model: files, or the directories that hold `report.json` or `export.json`.
        name (`str`, *optional*): the model's id on the Hub, for title and commands; `model` when absent.
        license (`str`, *optional*): identifier that the Hub knows, or "other". Needed except for S, M, L.
        license_name, license_link (`str`, *optional*): of a license "other".
        base_model (`Sequence[str]`, *optional*): Hub ids of what the model was made from.
        recipe (`str` or `Path`, *optional*): YAML file that it was trained with; gives data sets and settings.
        overwrite (`bool`, defaults to `False`): replace an existing file.

    Raises:
        ValueError: for a result that is unknown or of another model, a licence that is missing or cannot be, or an
            output that exists. Nothing is written then.
    """
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a directory. Name the file, {output / 'README.md'} for the Hub.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists, and what was added to it by hand would be lost. Pass --overwrite.")
    found = [(path, *read_result(path)) for path in map(Path, results)]
    subject = read_subject(model or measured_model(found), name)
    recipe_fields = read_recipe(recipe)
    if not base_model and str(recipe_fields.get("model", "")).startswith(META_MODELS):
        base_model = [recipe_fields["model"]]
    if subject.size is None:
        check_license(license, license_name, license_link, [subject.given, *base_model])
    elif license or license_name or license_link or base_model or recipe or name:
        raise ValueError(
            f"{subject.given} is Meta's model, whose licence and origin are known: --name, --license, --base-model "
            "and --recipe are for a model of your own. Leave them out, or name its directory with --model."
        )
    for origin in base_model:
        if not HUB_ID.fullmatch(origin):
            raise ValueError(f"--base-model {origin} is no id on the Hub. Give one as in you/model, or leave it out.")
    for path, kind, content in found:
        check_result(subject, path, kind, content)
    contents = {kind: [content for _, other, content in found if other == kind] for kind in KINDS}

    card = ModelCard.from_template(
        metadata(subject, contents, license, license_name, license_link, base_model, recipe_fields),
        template_path=str(TEMPLATE),
        **context(subject, contents, license_text(license, license_name, license_link, [subject.given, *base_model])),
        **training_context(subject, recipe),
        base=" and ".join(f"`{name}`" for name in base_model),
        sources=", ".join(f"`{path}`" for path in results),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def read_recipe(path: str | Path | None) -> dict:
    """
    Raises:
        ValueError: for a file that is no recipe.
    """
    if path is None:
        return {}
    recipe = yaml.safe_load(Path(path).read_text())
    if not isinstance(recipe, dict) or not isinstance(recipe.get("data"), list):
        raise ValueError(
            f"{path} has no list `data`, so it is no recipe. Name the YAML file that the model trained with."
        )
    return recipe


def check_license(
    license: str | None, license_name: str | None, license_link: str | None, origins: Sequence[str]
) -> None:
    """
    Raises:
        ValueError: for a licence that is missing, that the Hub does not know, or that what the model was made from
            does not allow.
    """
    if license is None:
        raise ValueError(
            "The card needs the licence of your model, which only you can choose. Set --license, as in --license "
            f"apache-2.0; for what is made from Meta's weights it is {META_LICENSE}."
        )
    if license not in LICENSES:
        hint = difflib.get_close_matches(license, LICENSES, n=1)
        raise ValueError(
            f"The Hub does not know the licence {license!r}. "
            + (f"Did you mean {hint[0]}? " if hint else "")
            + "Set an identifier of https://huggingface.co/docs/hub/repositories-licenses, or other with "
            "--license-name and --license-link."
        )
    if (license == "other") != bool(license_name and license_link) or bool(license_name) != bool(license_link):
        raise ValueError(
            "--license-name and --license-link belong to --license other, and that needs both of them. Set all three, "
            "or an identifier alone."
        )
    origins = [name for name in origins if name.startswith(META_MODELS)]
    if license != META_LICENSE and origins:
        raise ValueError(
            f"--license {license} cannot be: {', '.join(origins)} may be passed on, also changed, under Meta's "
            f"licence only. Set --license {META_LICENSE}."
        )


def metadata(
    subject: Subject,
    contents: dict[str, list[dict]],
    license: str | None,
    license_name: str | None,
    license_link: str | None,
    base_model: Sequence[str],
    recipe: dict,
) -> ModelCardData:
    """What the Hub reads. `datasets` are what a recipe names; Meta's own data is not public."""
    packed = subject.config.quantization is not None
    tags = ["mobilemoe", "mixture-of-experts", "on-device"]
    tags += ["int4"] * packed + ["executorch"] * bool(contents["export"])
    paths = [source["path"] for source in recipe.get("data", [])]
    datasets = [path for path in paths if HUB_ID.fullmatch(path) and not Path(path).exists()]
    results = [result for report in contents["eval"] for result in eval_results(subject, report)]
    return ModelCardData(
        language="en" if subject.size else None,
        license=META_LICENSE if subject.size else license,
        license_name=license_name,
        license_link=license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=list(base_model) or None,
        base_model_relation=("quantized" if packed else "finetune") if base_model else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=subject.label.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def eval_results(subject: Subject, report: dict) -> Iterable[EvalResult]:
    """Scores of a whole run; one of the first documents only would stand beside others as if it were whole."""
    if report["settings"]["limit"] is not None:
        return
    tasks = suite_file()["suites"][report["settings"]["suite"]]["tasks"]
    for name, row in report["tasks"].items():
        yield EvalResult(
            task_type="text-generation",
            dataset_type=tasks[name]["dataset"],
            dataset_name=row["title"],
            # Two tasks of one repository are told apart by it.
            dataset_config=row["task"],
            dataset_revision=row["data_revision"],
            dataset_args={"num_few_shot": row["num_fewshot"]},
            metric_type=row["metric"].partition(",")[0],
            metric_value=round(100 * row["score"], 2),
            metric_name=f"{row['metric']}, {report_title(subject, report)}",
        )


def context(subject: Subject, contents: dict[str, list[dict]], licence: str) -> dict:
    """What the template shows, but for training."""
    config, size = subject.config, subject.size
    chat = size is not None or subject.directory.joinpath("chat_template.jinja").is_file()
    lower = size and size.lower()
    packed = config.quantization is not None
    return {
        "title": subject.label,
        "size": size,
        "label": subject.label,
        "load": f"facebook/MobileMoE-{size}-QAT" if size else subject.label,
        "tune": f"facebook/MobileMoE-{size}-SFT" if size else subject.label,
        "out": f"out/mobilemoe-{lower}" if size else "out/model",
        "stages": ", ".join(f"`facebook/MobileMoE-{size}-{stage}`" for stage in STAGES),
        "active": millions(config.num_active_parameters),
        "total": millions(config.num_total_parameters),
        "precision": "packed in INT4" if packed else "in full precision",
        "packed": packed,
        "chat": chat,
        "context": f"{config.max_position_embeddings:,}",
        "architecture": architecture_table(config),
        "exports": export_section(subject, contents["export"]),
        "evaluation": evaluation_section(subject, contents["eval"]) + check_section(subject, contents["check"]),
        "evaluated": contents["eval"] or contents["check"],
        "speed": speed_section(subject, contents["bench"]),
        "on_phone": any(result["benchmark"] != "host" for result in contents["bench"]),
        "int4_cost": published()["int4_cost"].get(size),
        "licence": licence,
    }


def training_context(subject: Subject, recipe: str | Path | None) -> dict:
    """What the recipe's `trainer_state.json` and YAML file say."""
    shown: dict[str, str] = {}
    if subject.directory is None:
        return shown
    state = subject.directory / "trainer_state.json"
    if state.is_file():
        state = json.loads(state.read_text())
        logs = state["log_history"]
        losses = [row["loss"] for row in logs if "loss" in row]
        rows = [("optimizer steps", f"{state['global_step']:,}")]
        for title, key, number_format in (("tokens", "num_tokens", ",.0f"), *ROUTING_ROWS):
            values = [row[key] for row in logs if key in row]
            rows += [(title, f"{values[-1]:{number_format}}")] if values else []
        if losses:
            rows.append(("training loss, nats per token, first and last logged", f"{losses[0]:.3f}, {losses[-1]:.3f}"))
        shown["training"] = table(("", "value"), rows)
    if recipe is not None:
        # Only one of the three ends in a packed checkpoint, and only pre- and mid-training without a chat template.
        chat = subject.directory.joinpath("chat_template.jinja").is_file()
        script = "qat" if subject.config.quantization is not None else "sft" if chat else "pretrain"
        shown["recipe_command"] = f"python recipes/{script}.py --config {recipe}"
        shown["recipe_text"] = Path(recipe).read_text().rstrip()
    return shown


def license_text(
    license: str | None, license_name: str | None, license_link: str | None, origins: Sequence[str]
) -> str:
    if license is None:
        return ""
    text = f"[{license_name}]({license_link})" if license == "other" else f"`{license}`"
    origins = [name for name in origins if name.startswith(META_MODELS)]
    if origins:
        text = "[FAIR Noncommercial Research License]"
        text += f"(https://huggingface.co/{origins[0]}), Meta's: it was made from their weights. What is made from "
        text += "it may be passed on under that licence only, with a copy of it"
    return f"{text}."
