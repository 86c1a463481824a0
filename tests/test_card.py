"""Model cards: metadata that the Hub takes, results of the same model only, errors before a file is written."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import ROOT
from eval_stand_ins import write_stand_ins
from huggingface_hub import ModelCard
from stand_ins import bench_result

from mobilemoe.bench.worker import shapes
from mobilemoe.card.card import LICENSES, META_LICENSE
from mobilemoe.cli import main
from mobilemoe.eval.run import suite_file
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM


# A report without the numbers that a card checks.
EXPORT = {
    "model": "", "weights_sha256": {}, "versions": {}, "moe_op": None, "expert_axis": None, "weights": "int4",
    "experts_rounded_twice": False, "expert_rounding_sqnr_db": None, "max_seq_len": 8, "expert_bits": 4,
    "embedding_bits": 4, "kv_cache": "fp32", "all_logits": False, "eos_ids": [], "experts_file": None, "operators": [],
    "pte_bytes": 1,
}  # fmt: skip
CARDS = ROOT / "model_cards"
TEXT = "def add(first, second):\n    return first + second\n" * 8


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def card(*arguments: object) -> str:
    """The text of the card that the command writes; `--output` comes first."""
    main(["card", "--output", *map(str, arguments)])
    return Path(arguments[0]).read_text()


def failure(*arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        main(["card", "--output", *map(str, arguments)])
    return str(error.value)


def rows(text: str, first: str | tuple[str, ...]) -> list[list[str]]:
    """Cells of the table rows that begin so."""
    begins = tuple(f"| {word}" for word in ([first] if isinstance(first, str) else first))
    lines = [line for line in text.splitlines() if line.startswith(begins)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def check_metadata(text: str) -> dict:
    """
    What the Hub demands of the YAML block (https://github.com/huggingface/hub-docs, modelcard.md), and that
    `huggingface_hub` reads back what it wrote.
    """
    parsed = ModelCard(text)
    data = yaml.safe_load(text.split("---\n")[1])
    assert parsed.data.to_dict() == data
    assert data["license"] in LICENSES
    if data["license"] == "other":
        assert re.fullmatch(r"[a-z0-9.-]+", data["license_name"])
        assert re.match(r"https?://|[A-Za-z0-9_.-]+$", data["license_link"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    repository = r"[\w.-]+/[\w.-]+"
    assert all(re.fullmatch(repository, name) for key in ("base_model", "datasets") for name in data.get(key, []))
    assert data.get("base_model_relation") in (None, "quantized", "finetune")
    assert all(isinstance(tag, str) for tag in data["tags"])
    for model in data.get("model-index", []):
        assert model["name"]
        for result in model["results"]:
            assert result["task"]["type"] == "text-generation"
            assert re.fullmatch(repository, result["dataset"]["type"]) and result["dataset"]["name"]
            for metric in result["metrics"]:
                assert isinstance(metric["type"], str) and 0 <= metric["value"] <= 100
    return data


@pytest.fixture(scope="module")
def results(text_checkpoint, float_text_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Measured by the commands, on the packed tiny model."""
    root = tmp_path_factory.mktemp("results")
    data = write_stand_ins(root / "data", "foundation")
    (root / "code.py").write_text(TEXT)
    model = ["--model", str(text_checkpoint)]
    # The tiny model's context holds only these.
    tasks = ["--tasks", "piqa", "winogrande"]
    main(["eval", *model, "--data-dir", str(data), "--output", str(root / "eval"), *tasks])
    texts = ["--text", f"code={root / 'code.py'}", "--json", str(root / "check.json")]
    main(["eval", "check", *model, "--reference", str(float_text_checkpoint), *texts])
    return {"eval": root / "eval", "check": root / "check.json"}


def test_committed_cards_are_what_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for size in "sml":
        results = sorted(path for who in ("all", size) for path in Path("model_cards/results").glob(f"{who}-*.json"))
        options = ["--results", *results] if results else []
        written = card(tmp_path / f"{size}.md", "--model", size.upper(), *options)
        assert written == (CARDS / f"mobilemoe-{size}.md").read_text(), "Run: make cards"


@pytest.mark.parametrize("size", ["S", "M", "L"])
def test_card_of_a_size_has_its_licence_shape_and_published_numbers(size, tmp_path):
    text = card(tmp_path / "card.md", "--model", size)
    data = check_metadata(text)
    assert data["license"] == META_LICENSE and data["language"] == "en"
    # Meta's data is not public, and what our recipes name is not what their weights were trained on.
    assert "datasets" not in data and "model-index" not in data and "base_model" not in data
    config = shapes()[size]
    assert f"- {config.num_total_parameters:,} parameters, {config.num_active_parameters:,} of them active" in text
    paper = suite_file()["paper"]
    means = ", ".join(f"{paper[f'{size}-{stage}']['foundation']} ({stage}, paper)" for stage in ("Base", "SFT", "QAT"))
    assert f"\nMean: {means}.\n" in text
    titles = [row["title"] for suite in suite_file()["suites"].values() for row in suite["tasks"].values()]
    shown = {row[0]: row[2] for title in titles for row in rows(text, f"{title} |")}
    expected = {"S": {"PIQA": "75.4", "SIQA": "46.8"}, "M": {}, "L": {"MATH-500": "32.2", "HumanEval": "65.2"}}[size]
    assert expected.items() <= shown.items() and len(shown) == {"S": 7, "M": 0, "L": 3}[size]
    decode = {tuple(row[1:3]): row for row in rows(text, "Galaxy S25")}
    fastest = {"S": "138.1", "M": "83.6", "L": "53.4"}[size]
    assert decode["decode, tokens/s", "256"][3:] == [fastest, "61.3"]
    # No cell of a size's own is empty, and no table is of what nobody measured.
    assert all(row[3] for row in rows(text, ("Galaxy", "iPhone"))) and "not measured" not in text
    assert "Nothing in this card was measured with Meta's weights" in text and "FAIR Noncommercial" in text


def test_results_of_the_right_shape_enter_the_card_of_a_size(tmp_path):
    bench = bench_result(**{name: shapes()[name] for name in ("S", "MobileLLM-Pro")})
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    # Without --model: the only model of the family that the result has.
    text = card(tmp_path / "card.md", "--results", tmp_path / "bench.json")
    assert text.startswith("---\n") and "\n# MobileMoE-S\n" in text
    (row, _) = rows(text, "S, pytorch")
    assert row == ["S, pytorch", "128", "100 (90-120)", "1,600 (1,500-1,700)", "21.5 (20.25-22)", "1,000", "714"]
    assert len(rows(text, "MobileLLM-Pro, pytorch")) == 2
    source = f"`{bench['command']}`; 48 new tokens; Test CPU, 2 cores, 1 threads; torch 2.13.0"
    assert f"Median (10-90 %); {source}" in text
    assert "S, MobileLLM-Pro: random weights of that shape." in text
    message = failure(tmp_path / "other.md", "--model", "M", "--results", tmp_path / "bench.json")
    assert "bench.json is of S, which has another shape than M. Write a separate card, or measure that" in message
    assert not (tmp_path / "other.md").exists()


def test_scores_of_metas_models_stand_beside_the_papers(results, tmp_path):
    report = json.loads((results["eval"] / "report.json").read_text())
    report["model"] |= {"name": "facebook/MobileMoE-S-QAT", "config": shapes()["S"].to_dict()}
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = card(tmp_path / "card.md", "--model", "S", "--results", tmp_path)
    assert rows(text, "benchmark")[0][2:] == ["Base, paper", "QAT, INT4, PyTorch"]
    (piqa,) = rows(text, "PIQA")
    assert piqa[2] == "75.4" and piqa[3].startswith(f"{100 * report['tasks']['piqa']['score']:.1f}")
    assert f"QAT, INT4, PyTorch: `{report['command']}`; {report['machine']['processor']}" in text
    names = [metric["name"] for row in check_metadata(text)["model-index"][0]["results"] for metric in row["metrics"]]
    assert names == ["acc_norm, QAT, INT4, PyTorch", "acc, QAT, INT4, PyTorch"]
    assert "Nothing in this card was measured with Meta's weights" not in text


def test_card_of_a_fine_tune_shows_what_was_measured(results, text_checkpoint, float_text_checkpoint, tmp_path):
    recipe = ROOT / "recipes/qat.yaml"
    checkpoint = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "bench.json").write_text(json.dumps(bench_result(here=MobileMoEConfig.from_pretrained(checkpoint))))
    options = ["--model", checkpoint, "--license", "mit", "--name", "you/tiny-qat", "--base-model", "you/tiny-sft"]
    measured = [results["eval"], results["check"], tmp_path / "bench.json"]
    text = card(tmp_path / "new/README.md", *options, "--recipe", recipe, "--results", *measured)
    data = check_metadata(text)
    assert (data["license"], data["base_model"], data["base_model_relation"]) == ("mit", ["you/tiny-sft"], "quantized")
    assert "nvidia/OpenMathInstruct-2" in data["datasets"] and "int4" in data["tags"]
    report = json.loads((results["eval"] / "report.json").read_text())
    (index,) = data["model-index"]
    assert index["name"] == "tiny-qat"
    assert {(row["dataset"]["type"], row["metrics"][0]["value"]) for row in index["results"]} == {
        (suite_file()["suites"]["foundation"]["tasks"][name]["dataset"], round(100 * task["score"], 2))
        for name, task in report["tasks"].items()
    }
    (piqa,) = rows(text, "PIQA")
    assert piqa[2] == f"{100 * report['tasks']['piqa']['score']:.1f} ± {100 * report['tasks']['piqa']['stderr']:.1f}"
    # What was not run has no row, and a part of a suite no mean.
    assert not rows(text, "MMLU") and "Mean: " not in text
    assert report["command"].startswith(f"mobilemoe eval --model {text_checkpoint} ")
    assert f"INT4, PyTorch: `{report['command']}`; {report['machine']['processor']}" in text
    check = json.loads(results["check"].read_text())
    code = check["domains"]["code"]
    assert f"\nHeld-out text: `{check['command']}`; " in text
    assert f"\n- code: {code['bits_per_byte']:.4f} bits per byte, of `{float_text_checkpoint}` " in text
    assert f" {code['reference_bits_per_byte']:.4f}; KL {code['kl']:.2e} nats" in text
    assert f"With the recipe `{recipe}`" in text and recipe.read_text().rstrip() in text
    assert "mobilemoe export --model you/tiny-qat --output out/model/pte" in text
    assert "licence" not in text.lower()
    # The same from the results alone, but for the names.
    inferred = card(tmp_path / "inferred.md", "--license", "mit", "--results", results["eval"], results["check"])
    assert f"\n# {text_checkpoint}\n" in inferred


def test_a_try_on_few_documents_is_no_score(results, text_checkpoint, tmp_path):
    report = json.loads((results["eval"] / "report.json").read_text())
    report["settings"]["limit"] = 2
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = card(tmp_path / "card.md", "--model", text_checkpoint, "--license", "mit", "--results", tmp_path)
    assert "model-index" not in check_metadata(text)
    assert "Only the first 2 documents of each task" in text


@pytest.mark.slow
def test_card_shows_an_exported_program(text_checkpoint, pte_directory, tmp_path):
    arguments = ["--model", text_checkpoint, "--license", "mit", "--results", pte_directory]
    text = card(tmp_path / "card.md", *arguments)
    assert "executorch" in check_metadata(text)["tags"]
    export = json.loads((pte_directory / "export.json").read_text())
    command = f"mobilemoe export --model {text_checkpoint} --output {pte_directory} --max-seq-len 64 --moe-op llama"
    assert f" MB: `{command}`; python " in text
    assert f"positions: cosine {export['parity']['pte_to_checkpoint']['cosine_mean']:.6f}, KL" in text
    assert "is an exported program" in failure(tmp_path / "other.md", "--model", pte_directory, "--license", "mit")


def test_results_of_another_model_are_refused(results, text_checkpoint, float_text_checkpoint, tmp_path):
    output = tmp_path / "card.md"
    for result, of in ((results["eval"], text_checkpoint), (results["check"], text_checkpoint)):
        message = failure(output, "--model", float_text_checkpoint, "--license", "mit", "--results", result)
        assert (
            f"{result} is of {of}, which has other weights or files, by their SHA-256, than {float_text_checkpoint}"
            in message
        )
        message = failure(output, "--model", "S", "--results", result)
        assert "another name or shape than facebook/MobileMoE-S-{Base,SFT,QAT}. Write a separate card," in message
    export = EXPORT | {"weights_sha256": {"model.safetensors": "0" * 64}, "model": "elsewhere"}
    (tmp_path / "export.json").write_text(json.dumps(export))
    message = failure(output, "--model", text_checkpoint, "--license", "mit", "--results", tmp_path / "export.json")
    assert "is of elsewhere, which has other weights" in message
    assert "S is only a shape. Leave it out" in failure(output, "--model", "S", "--results", tmp_path / "export.json")
    two = [results["eval"], tmp_path / "export.json"]
    assert "Say with --model which one" in failure(output, "--license", "mit", "--results", *two)
    assert "holds no config.json with weights" in failure(output, "--license", "mit", "--model", "")
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no result"),
        ("{", "is not JSON"),
        ("[1]", "its content is [1], expected an object"),
        ('{"benchmark": "law", "trials": 3}', "is not a result. Name report.json of `mobilemoe eval`"),
        ('{"benchmark": "host", "models": {}}', "does not hold a benchmark of models: the key prompt is missing"),
    ],
)
def test_unknown_results_are_refused(content, message, tmp_path):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    assert message in failure(tmp_path / "card.md", "--model", "S", "--results", path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs the licence of your model, which only you can choose. Set --license"),
        (["--license", "apache2.0"], "Did you mean apache-2.0?"),
        (["--license", "other"], "needs both --license-name and --license-link"),
        (
            ["--license", "mit", "--license-name", "mine"],
            "--license other needs both --license-name and --license-link",
        ),
        (["--license", "mit", "--base-model", "you/one", "facebook/MobileMoE-S-SFT"], f"Set --license {META_LICENSE}"),
    ],
)
def test_licences_that_cannot_be_are_refused(options, message, text_checkpoint, tmp_path):
    assert message in failure(tmp_path / "card.md", "--model", text_checkpoint, *options)
    assert list(tmp_path.iterdir()) == []


def test_licences_of_ones_own_and_of_what_came_from_meta(float_text_checkpoint, tmp_path):
    model = ["--model", float_text_checkpoint]
    own = ["--license", "other", "--license-name", "my-licence", "--license-link", "https://example.org/licence"]
    text = card(tmp_path / "own.md", *model, *own)
    assert check_metadata(text)["license_name"] == "my-licence"
    # The recipe says where it came from.
    recipe = yaml.safe_load((ROOT / "recipes/sft.yaml").read_text()) | {"model": "facebook/MobileMoE-S-SFT"}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    derived = [*model, "--recipe", tmp_path / "sft.yaml", "--license"]
    assert "under Meta's licence only" in failure(tmp_path / "derived.md", *derived, "apache-2.0")
    text = card(tmp_path / "derived.md", *derived, META_LICENSE)
    data = check_metadata(text)
    assert (data["base_model"], data["base_model_relation"]) == (["facebook/MobileMoE-S-SFT"], "finetune")
    assert "under that licence only, with a copy of it" in text


def test_a_model_that_cannot_be_packed_has_a_card(tiny_config, tmp_path):
    config = copy.deepcopy(tiny_config)
    config.intermediate_size = 24
    MobileMoEForCausalLM(config).save_pretrained(tmp_path / "model")
    text = card(tmp_path / "card.md", "--model", tmp_path / "model", "--license", "mit")
    assert re.search(r"- weights: [\d,]+ MB in BF16\n", text)


def test_other_requests_that_cannot_be(text_checkpoint, tmp_path):
    output = tmp_path / "card.md"
    assert "Leave them out" in failure(output, "--model", "S", "--license", "mit")
    assert "is not a recipe" in failure(
        output, "--model", text_checkpoint, "--license", "mit", "--recipe", ROOT / "recipes/accelerate/ddp.yaml"
    )
    own = ["--model", text_checkpoint, "--license", "mit"]
    assert "is not a Hub id" in failure(output, *own, "--base-model", "out/demo/3-sft")
    assert "holds no config.json with weights" in failure(output, "--model", ROOT / "recipes/tiny", "--license", "mit")
    assert f"Name the file, {tmp_path / 'README.md'}" in failure(tmp_path, "--model", "S")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_on_request_only(tmp_path, monkeypatch):
    output = tmp_path / "card.md"
    output.write_text("by hand")
    assert "Pass --overwrite" in failure(output, "--model", "S")
    assert output.read_text() == "by hand"
    # A disk that fills up while it writes.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        assert "No space left" in failure(output, "--model", "S", "--overwrite")
    assert output.read_text() == "by hand" and list(tmp_path.iterdir()) == [output]
    assert "# MobileMoE-S" in card(output, "--model", "S", "--overwrite")


def test_no_extra_is_needed(tmp_path, monkeypatch):
    for module in ("lm_eval", "trl", "peft", "datasets", "executorch", "torchao", "rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in [name for name in sys.modules if name.startswith("mobilemoe.card.card")]:
        monkeypatch.delitem(sys.modules, module)
    assert "# MobileMoE-L" in card(tmp_path / "card.md", "--model", "L")
