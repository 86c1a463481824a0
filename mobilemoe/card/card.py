"""Writes model cards: Hub metadata, and measured results with their commands and machines.

    mobilemoe card --model out/demo/4-qat --license apache-2.0 --results out/eval out/pte bench.json --output README.md

Numbers come from JSON files that this package wrote about the same model, or are marked as the paper's.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig

from .. import artifacts
from ..artifacts import Export, ModelDescription
from ..costs import int4_bytes, kv_cache_bytes, parameter_counts
from ..eval.report import format_score
from ..eval.suites import suite_file
from ..results import Benchmark, Check, Evaluation, read_result
from ..shapes import published, shapes


STAGES = ("Base", "SFT", "QAT")
META_LICENSE = "fair-noncommercial-research-license"
META_MODELS = ("facebook/MobileMoE-", "ml-resources/MobileMoE-")
# The identifiers of https://huggingface.co/docs/hub/repositories-licenses that suit model weights. `huggingface_hub`
# has no list; the Hub validates at upload. For other licences use `other` with a name and a link.
LICENSES = """apache-2.0 mit bsd-2-clause bsd-3-clause isc mpl-2.0 gpl-2.0 gpl-3.0 lgpl-3.0 agpl-3.0 cc0-1.0 cc-by-4.0
    cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 openrail openrail++ bigcode-openrail-m
    odc-by cdla-permissive-2.0 openmdw-1.0 pddl unlicense unknown other fair-noncommercial-research-license""".split()
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Subject:
    """The model of a card: its name as given and as shown, its config, and its directory or, for Meta's, its size."""

    given: str
    label: str
    config: MobileMoEConfig
    directory: Path | None = None
    size: str | None = None

    def stage(self, description: ModelDescription) -> str | None:
        """Base, SFT or QAT, if a result is of that model of Meta's or of a `.pte` of it; otherwise `None`."""
        name = description.source.rpartition("/")[2]
        return next((stage for stage in STAGES if name == f"MobileMoE-{self.size}-{stage}"), None)

    def has_shape_of(self, config: dict) -> bool:
        if config.get("model_type") != MobileMoEConfig.model_type:
            return False
        configs = (self.config, MobileMoEConfig.from_dict(config))
        ours, other = (parameter_counts(each) | {"active": each.num_active_parameters} for each in configs)
        return ours == other

    def check_result(self, path: str | Path, result: Benchmark | Check | Evaluation | Export) -> None:
        """Raises `ValueError` when a result is of another model."""
        target, what = self.given, "other weights or files, by their SHA-256,"
        if isinstance(result, Benchmark):
            what = "another shape"
            belongs = any(self.has_shape_of(model.config) for model in result.models.values())
        elif not self.size:
            belongs = result.is_of(self.directory)
        elif isinstance(result, Export):
            raise ValueError(f"{path} is of specific weights, and {self.size} is only a shape. Leave it out.")
        else:
            target, what = f"facebook/{self.label}-{{{','.join(STAGES)}}}", "another name or shape"
            belongs = bool(self.stage(result.description)) and self.has_shape_of(result.description.config)
        if not belongs:
            of = ", ".join(result.sources)
            raise ValueError(
                f"{path} is of {of}, which has {what} than {target}. Write a separate card, or measure that model."
            )


def read_subject(model: str, name: str | None) -> Subject:
    """Finds the model of a card. Raises `ValueError` unless it is a checkpoint with weights, or S, M or L."""
    if artifacts.is_shape(model) and model in artifacts.SIZES:
        return Subject(model, f"MobileMoE-{model}", shapes()[model], size=model)
    directory = artifacts.local_checkpoint(model)
    if artifacts.is_pte(directory):
        raise ValueError(
            f"{model} is an exported program, and a card is of a model. Name the checkpoint it was exported from "
            f"with --model, and {model} with --results."
        )
    if not artifacts.is_checkpoint(directory):
        raise ValueError(f"{model} holds no config.json with weights. Name a checkpoint directory, or S, M or L.")
    config = artifacts.read_config(directory)
    if config.get("model_type") != MobileMoEConfig.model_type:
        raise ValueError(f"{model} is a {config.get('model_type')} model. Name a checkpoint of a MobileMoE model.")
    return Subject(model, name or model, MobileMoEConfig.from_dict(config), directory)


def write_card(
    model: str | None,
    output: str | Path,
    results: Sequence[str | Path] = (),
    name: str | None = None,
    base_model: Sequence[str] = (),
    recipe: str | Path | None = None,
    overwrite: bool = False,
    **licence: str | None,
) -> Path:
    """
    Writes a model card atomically. The arguments are the options of `mobilemoe card`; `licence` has `license`,
    `license_name` and `license_link`. Without `model`, the card is of the model that the results name.

    Raises:
        ValueError: for a result that is unknown or of another model, a licence that is missing or not allowed, or an
            output that exists.
    """
    check_free(Path(output), overwrite)
    found = [read_result(path) for path in results]
    sources = sorted({source for result in found for source in result.sources})
    if model is None and len(sources) != 1:
        of = ", ".join(sources) or "no model"
        raise ValueError(f"The results are of {of}. Say with --model which one the card is of.")
    subject = read_subject(sources[0] if model is None else model, name)
    training = read_recipe(recipe)
    if not base_model and str(training.get("model", "")).startswith(META_MODELS):
        base_model = [training["model"]]
    origins = [origin for origin in (subject.given, *base_model) if origin.startswith(META_MODELS)]
    if subject.size and (any(licence.values()) or base_model or recipe or name):
        raise ValueError(
            f"{subject.given} is Meta's model, whose licence and origin are known: --name, --license, --base-model "
            "and --recipe are for a model of your own. Leave them out, or name its directory with --model."
        )
    if not subject.size:
        check_license(origins, **licence)
    for path, result in zip(results, found, strict=True):
        subject.check_result(path, result)
    kinds = {"evals": Evaluation, "benches": Benchmark, "exports": Export, "checks": Check}
    contents = {key: [result for result in found if isinstance(result, kind)] for key, kind in kinds.items()}
    card = ModelCard.from_template(
        metadata(subject, contents, base_model, training, licence),
        template_path=str(Path(__file__).with_name("template.md")),
        **contents | licence | published() | {"subject": subject, "base_model": base_model, "origins": origins},
        chat=subject.directory is None or (subject.directory / "chat_template.jinja").is_file(),
        recipe=recipe and f"`{recipe}`, where options did not change it:\n\n```yaml\n{Path(recipe).read_text()}```",
        suites=suite_file()["suites"],
        scores=suite_scores,
        title=report_title,
        int4_bytes=int4_bytes,
        kv_cache_bytes=kv_cache_bytes,
        random=[name for bench in contents["benches"] for name in bench.models if name in artifacts.SHAPES],
        files=", ".join(f"`{path}`" for path in results),
    )
    artifacts.write_text(output, f"{str(card).rstrip()}\n")
    return Path(output)


def check_free(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise ValueError(f"{output} is a directory. Name the file, {output / 'README.md'} for the Hub.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists, and manual changes to it would be lost. Pass --overwrite.")


def read_recipe(path: str | Path | None) -> dict:
    recipe = yaml.safe_load(Path(path).read_text()) if path else {"data": []}
    if not isinstance(recipe, dict) or not isinstance(recipe.get("data"), list):
        raise ValueError(f"{path} has no list `data`, so it is not a recipe. Name the YAML of the training.")
    return recipe


def check_license(
    origins: list[str], license: str | None = None, license_name: str | None = None, license_link: str | None = None
) -> None:
    """Raises `ValueError` for a licence that is missing, unknown to the Hub, or not allowed by the base models."""
    if license is None:
        raise ValueError(
            "The card needs the licence of your model, which only you can choose. Set --license, as in --license "
            f"apache-2.0; models derived from Meta's weights need {META_LICENSE}."
        )
    if license not in LICENSES:
        hint = "".join(f"Did you mean {name}? " for name in difflib.get_close_matches(license, LICENSES, n=1))
        raise ValueError(
            f"--license {license} is not a licence for weights that the Hub knows. {hint}Set one of "
            f"{', '.join(LICENSES)}; with other also --license-name and --license-link."
        )
    if [license == "other"] * 2 != [bool(license_name), bool(license_link)]:
        raise ValueError(
            "--license other needs both --license-name and --license-link, and only other takes them. Set all three, "
            "or an identifier alone."
        )
    if license != META_LICENSE and origins:
        raise ValueError(
            f"--license {license} is not allowed: {', '.join(origins)} and models derived from it may be distributed "
            f"under Meta's licence only. Set --license {META_LICENSE}."
        )


def metadata(subject: Subject, contents: dict, base_model: Sequence[str], recipe: dict, licence: dict):
    """Metadata for the Hub. `datasets` are those of the recipe; Meta's own data is not public."""
    if bad := [origin for origin in base_model if not HUB_ID.fullmatch(origin)]:
        raise ValueError(f"--base-model {bad[0]} is not a Hub id. Give one such as you/model, or leave it out.")
    packed, extra = subject.config.quantization is not None, ["executorch"] * bool(contents["exports"])
    paths = dict.fromkeys(source["path"] for source in recipe["data"])
    datasets = [path for path in paths if HUB_ID.fullmatch(path) and not Path(path).exists()]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=suite_file()["suites"][report.settings.suite]["tasks"][name]["dataset"],
            dataset_name=row.title,
            # Distinguishes two tasks of the same repository.
            dataset_config=row.task,
            dataset_revision=row.data_revision,
            dataset_args={"num_few_shot": row.num_fewshot},
            metric_type=row.metric.partition(",")[0],
            metric_value=round(100 * row.score, 2),
            metric_name=f"{row.metric}, {report_title(subject, report)}",
        )
        for report in contents["evals"]
        for name, row in report.tasks.items()
        # A score on the first documents only would look like a score on the whole task.
        if report.settings.limit is None
    ]
    return ModelCardData(
        **licence | ({"language": "en", "license": META_LICENSE} if subject.size else {}),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mobilemoe", "mixture-of-experts", "on-device", *["int4"] * packed, *extra],
        base_model=list(base_model) or None,
        base_model_relation=("quantized" if packed else "finetune") if base_model else None,
        datasets=datasets or None,
        model_name=subject.label.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def report_title(subject: Subject, report: Evaluation) -> str:
    kind = {"pte": "`.pte`", "int4": "INT4, PyTorch", "checkpoint": "PyTorch"}[report.model.kind]
    stage, dtype = subject.stage(report.model) if subject.size else None, report.settings.dtype
    return ", ".join(filter(None, (stage, kind, dtype if dtype != "auto" else None)))


def suite_scores(subject: Subject, suite: str, evals: Sequence[Evaluation]) -> tuple[dict[str, dict[str, str]], str]:
    """Scores by column and task, the paper's before the measured ones, and the means over complete suites."""
    tasks, columns = suite_file()["suites"][suite]["tasks"], {}
    keys = {name: name for name in tasks} | {"mean": suite}
    for stage in STAGES if subject.size else ():
        row = suite_file()["paper"][f"{subject.size}-{stage}"]
        columns[f"{stage}, paper"] = {name: str(row[key]) for name, key in keys.items() if key in row}
    for report in (report for report in evals if report.settings.suite == suite):
        names = list(keys) if set(report.tasks) == set(tasks) else report.tasks
        columns[report_title(subject, report)] = {name: format_score(report.result(name)) for name in names}
    means = [f"{column.pop('mean')} ({title})" for title, column in columns.items() if "mean" in column]
    return {title: column for title, column in columns.items() if column}, ", ".join(means)
