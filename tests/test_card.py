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


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the table rows that begin so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first}")]
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
    assert f"| parameters | {config.num_total_parameters:,}, {config.num_active_parameters:,} of them active" in text
    (mean, _) = rows(text, "**mean**")
    paper = suite_file()["paper"]
    assert mean[3:] == [
        cell
        for stage in ("Base", "SFT", "QAT")
        for cell in ("not measured", str(paper[f"{size}-{stage}"]["foundation"]))
    ]
    decode = {tuple(row[:3]): row for row in rows(text, "Galaxy S25")}
    device = "Galaxy S25 (Snapdragon 8 Elite), 4 threads"
    fastest = {"S": "138.1", "M": "83.6", "L": "53.4"}[size]
    assert decode[device, "decode, tokens/s", size][3] == fastest
    assert set(rows(text, f"MobileMoE-{size}")[0][1:]) == {"not measured"}
    assert not re.search(r"\| *\|", text.partition("## Evaluation")[2].replace("| **mean** |  |  |", ""))


def test_results_of_the_right_shape_enter_the_card_of_a_size(tmp_path):
    bench = bench_result(**{name: shapes()[name] for name in ("S", "MobileLLM-Pro")})
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    # Without --model: the only model of the family that the result has.
    text = card(tmp_path / "card.md", "--results", tmp_path / "bench.json")
    assert text.startswith("---\n") and "\n# MobileMoE-S\n" in text
    (row, _) = rows(text, "S, pytorch")
    assert row == ["S, pytorch", "128", "100 (90-120)", "1,600 (1,500-1,700)", "21.5 (20.25-22)", "1,000", "714"]
    assert len(rows(text, "MobileLLM-Pro, pytorch")) == 2
    command = (
        "mobilemoe bench --model S MobileLLM-Pro --prompt-lengths 128 512 --new-tokens 48 --repeats 3 --threads 1"
    )
    assert f"Median (10-90 %) of `{command}`; Test CPU, 2 cores, 1 threads; torch 2.13.0" in text
    assert "S, MobileLLM-Pro: random weights of that shape." in text
    message = failure(tmp_path / "other.md", "--model", "M", "--results", tmp_path / "bench.json")
    assert "bench.json is of S, MobileLLM-Pro, which has another shape than M. Measure that model" in message
    assert not (tmp_path / "other.md").exists()


def test_scores_of_metas_models_stand_beside_the_papers(results, tmp_path):
    report = json.loads((results["eval"] / "report.json").read_text())
    report["model"] |= {"name": "facebook/MobileMoE-S-QAT", "config": shapes()["S"].to_dict()}
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = card(tmp_path / "card.md", "--model", "S", "--results", tmp_path)
    header = rows(text, "benchmark")[0][3:]
    assert header == ["Base", "Base, paper", "SFT", "SFT, paper", "QAT, paper", "QAT, INT4, PyTorch"]
    (piqa,) = rows(text, "PIQA")
    assert piqa[3:5] == ["not measured", "75.4"] and piqa[8].startswith(
        f"{100 * report['tasks']['piqa']['score']:.1f}"
    )
    assert "`mobilemoe eval --model facebook/MobileMoE-S-QAT --suite foundation --tasks piqa winogrande" in text
    names = [metric["name"] for row in check_metadata(text)["model-index"][0]["results"] for metric in row["metrics"]]
    assert names == ["acc_norm, QAT, INT4, PyTorch", "acc, QAT, INT4, PyTorch"]
    assert "Nothing in this card was measured with Meta's weights" not in text


def test_card_of_a_fine_tune_shows_what_was_measured(results, text_checkpoint, float_text_checkpoint, tmp_path):
    recipe = ROOT / "recipes/qat.yaml"
    state = {
        "global_step": 3,
        "log_history": [{"loss": 5.5}, {"loss": 4.25, "num_tokens": 6144.0, "load_imbalance": 1.5}],
    }
    checkpoint = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
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
    assert piqa[3] == f"{100 * report['tasks']['piqa']['score']:.1f} ± {100 * report['tasks']['piqa']['stderr']:.1f}"
    assert rows(text, "MMLU")[0][3] == "not measured" and rows(text, "**mean**")[0][3] == "not measured"
    # By its name, although it was measured elsewhere.
    command = "mobilemoe eval --model you/tiny-qat --suite foundation --tasks piqa winogrande --data-dir data"
    assert command in text and report["machine"]["processor"] in text
    check = json.loads(results["check"].read_text())["domains"]["code"]
    (code,) = rows(text, "code")
    assert code[1:3] == [f"{check['bits_per_byte']:.4f}", f"{check['reference_bits_per_byte']:.4f}"]
    assert rows(text, "training loss")[0][1] == "5.500, 4.250" and rows(text, "tokens")[0][1] == "6,144"
    assert "python recipes/qat.py --config" in text and recipe.read_text().rstrip() in text
    assert "mobilemoe export --model you/tiny-qat --output out/model/pte" in text
    assert "the licence" not in text.lower() and "## Licence\n\n`mit`." in text
    # The same from the results alone, but for the names.
    inferred = card(tmp_path / "inferred.md", "--license", "mit", "--results", results["eval"], results["check"])
    assert f"\n# {text_checkpoint}\n" in inferred


def test_a_try_on_few_documents_is_no_score(results, text_checkpoint, tmp_path):
    report = json.loads((results["eval"] / "report.json").read_text())
    report["settings"]["limit"] = 2
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = card(tmp_path / "card.md", "--model", text_checkpoint, "--license", "mit", "--results", tmp_path)
    assert "model-index" not in check_metadata(text)
    assert "--limit 2" in text and "Only the first 2 documents of each task" in text


@pytest.mark.slow
def test_card_shows_an_exported_program(text_checkpoint, pte_directory, tmp_path):
    arguments = ["--model", text_checkpoint, "--license", "mit", "--results", pte_directory]
    text = card(tmp_path / "card.md", *arguments)
    assert "executorch" in check_metadata(text)["tags"]
    export = json.loads((pte_directory / "export.json").read_text())
    parity = export["parity"]["pte_to_checkpoint"]
    assert rows(text, "the checkpoint")[0][1] == f"{parity['cosine_mean']:.6f}"
    command = f"mobilemoe export --model {text_checkpoint} --output out/model/pte --max-seq-len 64 --moe-op llama"
    assert f"`{command} --expert-bits 8` writes {export['pte_bytes'] / 1e6:,.1f} MB" in text
    assert "is an exported program" in failure(tmp_path / "other.md", "--model", pte_directory, "--license", "mit")


def test_results_of_another_model_are_refused(results, text_checkpoint, float_text_checkpoint, tmp_path):
    output = tmp_path / "card.md"
    for result, of in ((results["eval"], text_checkpoint), (results["check"], text_checkpoint)):
        message = failure(output, "--model", float_text_checkpoint, "--license", "mit", "--results", result)
        assert f"{result} is of {of}, which has other files, by their SHA-256 than {float_text_checkpoint}" in message
        message = failure(output, "--model", "S", "--results", result)
        assert "another name or shape than facebook/MobileMoE-S-{Base,SFT,QAT}. Give it a card of its own" in message
    export = {"weights_sha256": {"model.safetensors": "0" * 64}, "moe_op": "", "parity": {}, "model": "elsewhere"}
    (tmp_path / "export.json").write_text(json.dumps(export))
    message = failure(output, "--model", text_checkpoint, "--license", "mit", "--results", tmp_path / "export.json")
    assert "is of elsewhere, which has other weights than" in message
    assert "S has none here. Leave it out" in failure(output, "--model", "S", "--results", tmp_path / "export.json")
    two = [results["eval"], tmp_path / "export.json"]
    assert "Say with --model which one" in failure(output, "--license", "mit", "--results", *two)
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no result"),
        ("{", "is not JSON"),
        ("[1]", "is no result that a card shows"),
        ('{"benchmark": "law", "trials": 3}', "is no result that a card shows"),
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
        (["--license", "other"], "that needs both of them"),
        (["--license", "mit", "--license-name", "mine"], "belong to --license other"),
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
    assert "## Licence\n\n[my-licence](https://example.org/licence)." in text
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
    (row,) = rows(text, "weights in INT4")
    assert "is not divisible by the INT4 group of 32, so the model cannot be packed" in row[1]


def test_other_requests_that_cannot_be(text_checkpoint, tmp_path):
    output = tmp_path / "card.md"
    assert "Leave them out" in failure(output, "--model", "S", "--license", "mit")
    assert "is no recipe" in failure(
        output, "--model", text_checkpoint, "--license", "mit", "--recipe", ROOT / "recipes/accelerate/ddp.yaml"
    )
    own = ["--model", text_checkpoint, "--license", "mit"]
    assert "is no id on the Hub" in failure(output, *own, "--base-model", "out/demo/3-sft")
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
