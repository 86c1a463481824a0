"""The suites on stand-in data, through the command line and without network, against the harness's own back-end."""

import copy
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, build_tiny_model
from eval_stand_ins import ANTLR, bbh, openbookqa, write_stand_ins
from hub_server import HubServer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mobilemoe.artifacts import describe_model, write_json
from mobilemoe.cli import main
from mobilemoe.eval import run as evaluation
from mobilemoe.eval.data import (
    SITE,
    data_problem,
    select_tasks,
    suite_file,
    trim_card,
    write_record,
)
from mobilemoe.eval.models import CheckpointLM, PteLM
from mobilemoe.eval.report import mean_score
from mobilemoe.eval.run import group_file
from mobilemoe.generation import LanguageModel
from mobilemoe.results import Score
from mobilemoe.runtime import CheckpointModel
from modeling_mobilemoe import quantize


ROOT = Path(__file__).parents[1]
# One task per kind of request: choices of one token, of several, behind shared examples; generation.
FEW = ["boolq", "piqa", "winogrande", "nq"]
# 24 and 57 data sets: they take as long as all the others together.
GROUPS = ["bbh", "mmlu"]
OTHER_GROUPS = ("mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")
SINGLE = [name for name in select_tasks("foundation") if name not in GROUPS]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def eval_config(tiny_config):
    """Long enough for 25 examples. One id in 16 ends a text, so that random weights do not write on to the limit."""
    config = copy.deepcopy(tiny_config)
    config.max_position_embeddings = 8192
    config.bos_token_id, config.eos_token_id = 496, [497, 504, *range(100, 496, 16)]
    return config


@pytest.fixture(scope="module")
def checkpoints(eval_config, tokenizer, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    chat_tokenizer = copy.deepcopy(tokenizer)
    chat_tokenizer.chat_template = CHAT_TEMPLATE
    models = {"fp32": build_tiny_model(eval_config), "bf16": build_tiny_model(eval_config).bfloat16()}
    models["int4"] = quantize(build_tiny_model(eval_config))
    for name, model in models.items():
        model.save_pretrained(root / name)
        chat_tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def foundation_data(tmp_path_factory) -> Path:
    return write_stand_ins(tmp_path_factory.mktemp("foundation"), "foundation")


@pytest.fixture(scope="module")
def advanced_data(tmp_path_factory) -> Path:
    return write_stand_ins(tmp_path_factory.mktemp("advanced"), "advanced")


@pytest.fixture(scope="module")
def packed_pte(checkpoints, tmp_path_factory) -> Path:
    """As it would go to a phone, but for the logits of all positions."""
    pytest.importorskip("executorch.exir", reason="needs mobilemoe[export]")
    output = tmp_path_factory.mktemp("export") / "pte"
    options = ["--output", str(output), "--max-seq-len", "4096", "--all-logits"]
    main(["export", "--model", str(checkpoints["int4"]), *options])
    return output


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"A connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run_eval(model, output, data, *arguments) -> dict:
    main(["eval", "--model", str(model), "--output", str(output), "--data-dir", str(data), *map(str, arguments)])
    return json.loads((output / "report.json").read_text())


def failure(*arguments) -> str:
    with pytest.raises(SystemExit) as error:
        main(["eval", *map(str, arguments)])
    return str(error.value)


@pytest.fixture(scope="module")
def bf16_report(checkpoints, foundation_data, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("bf16")
    report = run_eval(checkpoints["bf16"], output, foundation_data, "--tasks", *SINGLE)
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    return report


def equals_the_harness(report: dict, model: Path, data: Path, work: Path) -> None:
    """Every number of the plain back-end, which loads the model by path, in batches and an order of its own."""
    tasks = {name: task for name, task in select_tasks("foundation").items() if name in report["tasks"]}
    for name, task in tasks.items():
        (work / f"{name}.yaml").write_text(yaml.safe_dump(group_file(task["task"], task, data)))
    folders = [Path(lm_eval.__file__).parent / "tasks" / task["folder"] for task in tasks.values()]
    manager = TaskManager(include_path=[*folders, work], include_defaults=False)
    plain = HFLM(pretrained=str(model), device="cpu", batch_size=4)
    for name, task in tasks.items():
        results = lm_eval.simple_evaluate(
            plain, tasks=[f"suite_{task['task']}"], task_manager=manager, log_samples=False, bootstrap_iters=1000
        )
        expected = results["results"][task["task"]]
        for metric, value in report["tasks"][name]["all_metrics"].items():
            assert value == expected[metric], (name, metric)
        assert set(results["n-shot"].values()) == {report["tasks"][name]["num_fewshot"]}
        counts = [count["effective"] for count in results["n-samples"].values()]
        assert report["tasks"][name]["num_documents"] == sum(counts)
    scores = [row["score"] for row in report["tasks"].values()]
    assert report["mean"] == pytest.approx(sum(scores) / len(scores))
    # Neither all wrong nor all right: equality would say little.
    assert len({score for score in scores if 0 < score < 1}) >= min(3, len(scores))


def test_scores_equal_the_harness_to_the_last_digit(bf16_report, checkpoints, foundation_data, tmp_path):
    equals_the_harness(bf16_report, checkpoints["bf16"], foundation_data, tmp_path)


@pytest.mark.slow
def test_groups_equal_the_harness_to_the_last_digit(checkpoints, foundation_data, tmp_path):
    report = run_eval(checkpoints["bf16"], tmp_path / "out", foundation_data, "--tasks", *GROUPS)
    subtasks = {name: task["subtasks"] for name, task in report["tasks"].items()}
    # 57 subjects in four groups.
    assert len(subtasks["bbh"]) == 24 and len(subtasks["mmlu"]) == 61 and "mmlu_stem" in subtasks["mmlu"]
    for name, metric in (("bbh", "acc_norm,none"), ("mmlu", "acc,none")):
        rows = [row for key, row in subtasks[name].items() if not key.startswith(OTHER_GROUPS)]
        weights = [row["sample_len"] for row in rows]
        mean = sum(row[metric] * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
        assert report["tasks"][name]["score"] == pytest.approx(mean)
    (tmp_path / "work").mkdir()
    equals_the_harness(report, checkpoints["bf16"], foundation_data, tmp_path / "work")


@pytest.mark.slow
def test_the_whole_suite_runs_for_int4_and_for_both_kinds_of_pte(
    checkpoints, packed_pte, foundation_data, tmp_path, capsys
):
    """FP32 scores agree between PyTorch and a `.pte`, whether it returns all logits or the last position's."""
    int4 = run_eval(checkpoints["int4"], tmp_path / "int4", foundation_data)
    assert list(int4["tasks"]) == list(select_tasks("foundation"))
    fp32 = run_eval(checkpoints["fp32"], tmp_path / "fp32", foundation_data)
    export = ["export", "--model", str(checkpoints["fp32"]), "--weights", "fp32", "--max-seq-len", "4096"]
    main([*export, "--output", str(tmp_path / "all-pte"), "--all-logits"])
    all_logits = run_eval(tmp_path / "all-pte", tmp_path / "all", foundation_data)
    assert all_logits["model"]["kind"] == "pte" and all_logits["model"]["export"]["all_logits"]
    for name, task in fp32["tasks"].items():
        assert all_logits["tasks"][name]["all_metrics"] == task["all_metrics"], name

    packed = run_eval(packed_pte, tmp_path / "packed", foundation_data)
    assert list(packed["tasks"]) == list(select_tasks("foundation"))
    main(["export", "--model", str(checkpoints["int4"]), "--output", str(tmp_path / "pte"), "--max-seq-len", "1024"])
    pte = run_eval(tmp_path / "pte", tmp_path / "last", foundation_data, "--tasks", *FEW)
    # Logits of one position at a time are those of all at once.
    for name in FEW:
        assert pte["tasks"][name]["all_metrics"] == packed["tasks"][name]["all_metrics"], name
    message = failure(
        "--model", tmp_path / "pte", "--output", tmp_path / "last", "--data-dir", foundation_data, "--tasks",
        "arc_challenge",
    )  # fmt: skip
    assert "the .pte was exported for 1024. Export it again with --max-seq-len" in message
    message = failure("--model", tmp_path / "pte", "--output", tmp_path / "last", "--dtype", "float32",
                      "--data-dir", foundation_data, "--tasks", "siqa")  # fmt: skip
    assert "the precision of a .pte is fixed" in message


def test_the_report_holds_what_repeats_it(bf16_report, checkpoints):
    assert bf16_report["model"]["kind"] == "checkpoint"
    assert len(bf16_report["model"]["sha256"]) == 64
    assert bf16_report["command"].startswith(f"mobilemoe eval --model {checkpoints['bf16']} --output ")
    assert bf16_report["model"]["sha256"] != describe_model(checkpoints["fp32"]).sha256
    assert bf16_report["settings"]["versions"]["lm_eval"] == suite_file()["lm_eval"]
    assert {"torch", "transformers", "datasets", "python"} <= set(bf16_report["settings"]["versions"])
    assert bf16_report["machine"]["cores"] == os.cpu_count()
    arc = bf16_report["tasks"]["arc_challenge"]
    assert (arc["num_fewshot"], arc["metric"]) == (25, "acc_norm")
    assert arc["data_revision"] == "210d026faf9955653af8916fad021475a3f00453"


def test_packed_int4_runs_and_is_compared(bf16_report, checkpoints, foundation_data, tmp_path, capsys):
    report = run_eval(checkpoints["int4"], tmp_path / "int4", foundation_data, "--tasks", *FEW, "--paper", "S-Base")
    assert report["model"]["kind"] == "int4"
    table = capsys.readouterr().out
    # PIQA of S-Base, Table 2 of the paper.
    assert "paper: S-Base" in table and "75.4" in table and max(map(len, table.splitlines())) <= 80
    few = {name: bf16_report["tasks"][name] for name in bf16_report["tasks"] if name in FEW}
    write_json(tmp_path / "bf16/report.json", bf16_report | {"tasks": few})
    output = str(tmp_path / "both")
    results = [str(tmp_path / "bf16"), str(tmp_path / "int4")]
    main(["eval", "compare", "--results", *results, "--output", output, "--paper", "S-Base"])
    compared = json.loads((tmp_path / "both/comparison.json").read_text())
    assert (tmp_path / "both/comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in FEW:
        difference = 100 * (report["tasks"][name]["score"] - bf16_report["tasks"][name]["score"])
        assert compared["rows"][name]["difference"][str(checkpoints["int4"])] == pytest.approx(difference)
    assert compared["rows"]["piqa"]["paper"] == 75.4
    # The stand-ins are few, so the models differ somewhere and the table says so.
    assert any(row["difference"][str(checkpoints["int4"])] for row in compared["rows"].values())

    # The paper's mean is over 14 tasks, not over these.
    assert compared["rows"]["mean"]["paper"] is None
    again = ("compare", "--results", *results, "--output", output)
    assert "no model 'XL'" in failure(*again, "--paper", "XL")
    changed = report | {"settings": report["settings"] | {"limit": 3}}
    (tmp_path / "int4/report.json").write_text(json.dumps(changed))
    assert "differ in limit" in failure(*again)


class Uncached(LanguageModel):
    """What a `.pte` does, said plainly: tokens overwrite positions, and everything up to them is read."""

    all_logits = None

    def __init__(self, checkpoint: CheckpointModel, max_seq_len: int):
        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer
        self.max_seq_len, self.eos_ids = max_seq_len, checkpoint.eos_ids
        self.positions: list[int] = []
        self.num_fed = 0

    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        assert start <= len(self.positions)
        self.positions = [*self.positions[:start], *tokens]
        self.num_fed += len(tokens)
        return self.checkpoint.all_logits(self.positions)[-num_positions:]


def mixed_requests() -> list[Instance]:
    """Choices of one and of several tokens, shared and repeated contexts, none, and one that is too long."""
    examples = "Q: How far does the heron walk? A: two steps.\n" * 12
    contexts = ["The otter walks", "", examples + "Q: The lynx? A:", examples + "Q: And the little newt? A:"]
    contexts += [examples + f"Q: Number {i}? A:" for i in range(4)] + ["walk " * 300]
    choices = [" A", " B", " three steps and back", " home.", " A"]
    return [
        Instance("loglikelihood", {}, (context, choice), index, ("t", number, 1))
        for number, context in enumerate(contexts)
        for index, choice in enumerate(choices)
    ]


@pytest.fixture(scope="module")
def fp32(checkpoints) -> CheckpointModel:
    return CheckpointModel(checkpoints["fp32"])


@pytest.fixture(scope="module")
def plain_answers(fp32) -> list[tuple[float, bool]]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=fp32.model, tokenizer=fp32.tokenizer, batch_size=1, max_length=512).loglikelihood(
        mixed_requests(), disable_tqdm=True
    )


def agree(answers, expected) -> None:
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in answers]),
        torch.tensor([value for value, _ in expected]),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("tokens_per_batch", [None, 64, 1])
def test_log_likelihoods_are_those_of_the_plain_back_end(fp32, plain_answers, tokens_per_batch):
    lm = CheckpointLM(fp32, tokens_per_batch)
    lm._max_length = 512
    agree(lm.loglikelihood(mixed_requests(), disable_tqdm=True), plain_answers)
    # The five choices behind the context of 300 words.
    assert lm.num_truncated == 5


def test_a_pte_feeds_only_what_differs(fp32, plain_answers):
    pte = Uncached(fp32, 1024)
    requests = mixed_requests()[:-5]
    agree(PteLM(pte).loglikelihood(requests, disable_tqdm=True), plain_answers[:-5])
    whole = sum(len(fp32.encode(request.args[0] + request.args[1])) for request in requests)
    assert pte.num_fed < whole / 4


def test_rolling_log_likelihoods_and_generation_agree_between_back_ends(fp32):
    pte, lm = PteLM(Uncached(fp32, 512)), CheckpointLM(fp32)
    lm._max_length = 512
    texts = ["The otter walks home. " * 40, "A"]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1)) for text in texts]
    torch.testing.assert_close(
        torch.tensor(pte.loglikelihood_rolling(rolling, disable_tqdm=True)),
        torch.tensor(lm.loglikelihood_rolling(rolling, disable_tqdm=True)),
    )
    settings = {"until": ["u"], "max_gen_toks": 24, "do_sample": False}
    prompts = ["The otter", "The otter walks", "def walk(steps):", "import", "x = 5 * "]
    generation = [Instance("generate_until", {}, (text, settings), 0, ("t", 0, 1)) for text in prompts]
    written = pte.generate_until(generation, disable_tqdm=True)
    assert written == lm.generate_until(generation, disable_tqdm=True)
    assert len(set(written)) > 1 and not any("u" in text for text in written)
    sampled = [Instance("generate_until", {}, ("A", settings | {"do_sample": True}), 0, ("t", 0, 1))]
    with pytest.raises(ValueError, match="Set do_sample to false"):
        pte.generate_until(sampled, disable_tqdm=True)


def test_a_context_too_long_for_the_pte_is_an_error_before_anything_runs(fp32):
    pte = Uncached(fp32, 512)
    with pytest.raises(
        ValueError, match=r"needs a context of \d+ tokens, but the .pte was exported for 512.*--max-seq"
    ):
        PteLM(pte).loglikelihood(mixed_requests(), disable_tqdm=True)
    settings = {"until": ["\n"], "max_gen_toks": 511, "do_sample": False}
    with pytest.raises(ValueError, match="needs a context of 51[34] tokens"):
        PteLM(pte).generate_until([Instance("generate_until", {}, ("A b", settings), 0, ("t", 0, 1))], True)
    assert pte.num_fed == 0


def test_a_batch_that_does_not_fit_is_halved(fp32, plain_answers, monkeypatch):
    lm = CheckpointLM(fp32)
    lm._max_length = 512
    score, sizes = CheckpointLM._score, []

    def limited(self, groups, *arguments):
        sizes.append(len(groups))
        if len(groups) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, groups, *arguments)

    monkeypatch.setattr(CheckpointLM, "_score", limited)
    limit, before = 1, lm.tokens_per_batch
    agree(lm.loglikelihood(mixed_requests(), disable_tqdm=True), plain_answers)
    assert max(sizes) > 1 and lm.tokens_per_batch < before
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        lm.loglikelihood(mixed_requests(), disable_tqdm=True)


def test_an_interrupted_run_goes_on_behind_its_last_task(checkpoints, foundation_data, tmp_path, monkeypatch):
    arguments = ["--tasks", *FEW, "--limit", 2]
    whole = run_eval(checkpoints["fp32"], tmp_path / "whole", foundation_data, *arguments)
    run_task, ran = evaluation.run_task, []

    def interrupted(lm, task, *others):
        if task["task"] == stop_at:
            raise KeyboardInterrupt
        ran.append(task["task"])
        return run_task(lm, task, *others)

    monkeypatch.setattr(evaluation, "run_task", interrupted)
    stop_at = "nq_open"
    with pytest.raises(SystemExit, match="interrupted. Finished tasks are kept in .*/parts/tasks"):
        run_eval(checkpoints["fp32"], tmp_path / "parts", foundation_data, *arguments)
    assert not (tmp_path / "parts/report.json").exists()
    assert ran == ["piqa", "winogrande", "boolq"]
    stop_at = None
    parts = run_eval(checkpoints["fp32"], tmp_path / "parts", foundation_data, *arguments)
    assert ran == ["piqa", "winogrande", "boolq", "nq_open"]
    same = {"seconds": 0, "command": ""}
    for name in FEW:
        assert parts["tasks"][name] | same == whole["tasks"][name] | same

    message = failure(
        "--model", checkpoints["bf16"], "--output", tmp_path / "parts", "--data-dir", foundation_data,
        *arguments,
    )  # fmt: skip
    assert "piqa.json is the result of another model" in message
    assert ran == ["piqa", "winogrande", "boolq", "nq_open"]


def test_errors_name_what_to_do_before_anything_is_written(
    checkpoints, foundation_data, advanced_data, base_checkpoint, tmp_path, monkeypatch
):
    def message(*arguments, model=checkpoints["fp32"], data=foundation_data):
        return failure("--model", model, "--output", tmp_path / "out", "--data-dir", data, *arguments)

    assert "no suite 'advance'. Choose one of: foundation, advanced" in message("--suite", "advance")
    assert "no task hellaswog. Choose from: bbh, gsm8k" in message("--tasks", "hellaswog")
    assert "limit=0 leaves nothing to run" in message("--limit", 0)
    assert "There is no directory nowhere. Name a checkpoint" in message("--tasks", "piqa", model="nowhere")
    assert "has neither model.pte nor config.json" in message("--tasks", "piqa", model=tmp_path)
    assert "no model 'XS'. Choose one of: S-Base" in message("--paper", "XS")
    code = message("--suite", "advanced", "--tasks", "humaneval", data=advanced_data)
    assert "executes code that the model wrote. Pass --confirm-run-unsafe-code" in code
    no_template = message("--suite", "advanced", "--tasks", "gpqa", model=base_checkpoint, data=advanced_data)
    assert "has no chat template" in no_template and "--suite foundation" in no_template
    assert "Give the model and a directory" in failure("--suite", "foundation")

    missing = message(data=tmp_path / "empty")
    for repo in {task["dataset"] for task in select_tasks("foundation").values()}:
        assert f"{repo} is missing" in missing
    assert f"mobilemoe eval prepare --suite foundation --data-dir {tmp_path / 'empty'}" in missing

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "langdetect" else find_spec(name))
    extra = message("--suite", "advanced", "--tasks", "ifeval", data=advanced_data)
    assert "ifeval needs langdetect: pip install 'mobilemoe[eval]'" in extra
    assert not (tmp_path / "out").exists()


def test_data_of_another_revision_or_size_is_refused(checkpoints, foundation_data, tmp_path):
    arguments = ("--model", checkpoints["fp32"], "--output", tmp_path / "out", "--data-dir", foundation_data)
    record = foundation_data / "baber/piqa.json"
    content = record.read_text()
    try:
        record.write_text(content.replace("142f6d", "000000"))
        message = failure(*arguments, "--tasks", "piqa")
        assert "baber/piqa is revision 000000" in message
        assert "frozen at 142f6d7367fd9877f0fb3b5734ea6a545f54cdd1" in message
        record.write_text(content.replace('"README.md": ', '"README.md": 1'))
        assert "baber/piqa is damaged: README.md" in failure(*arguments, "--tasks", "piqa")
    finally:
        record.write_text(content)
    assert not (tmp_path / "out").exists()


def test_every_setting_has_a_known_source_and_is_the_harness_own():
    sources = suite_file()["sources"]
    for suite in suite_file()["suites"].values():
        assert suite["apply_chat_template"][1] in sources
        for name, task in suite["tasks"].items():
            assert all(task[key][1] in sources for key in ("num_fewshot", "metric")), name
            revision = suite_file()["datasets"][task["dataset"]]["revision"]
            assert revision is None or len(bytes.fromhex(revision)) == 20
    # Table D.1 of the follow-up (sources: loop), in its order.
    published = {
        "bbh": 3, "gsm8k": 8, "arc_challenge": 25, "arc_easy": 0, "openbookqa": 0, "hellaswag": 0, "piqa": 0,
        "siqa": 0, "winogrande": 0, "boolq": 0, "drop": 3, "mmlu": 5, "nq": 5, "triviaqa": 5,
    }  # fmt: skip
    assert {name: task["num_fewshot"][0] for name, task in select_tasks("foundation").items()} == published
    # MobileMoE's Table 2 confirms the shots of these seven, and nothing else is confirmed.
    confirmed = {name for name, task in select_tasks("foundation").items() if sources[task["num_fewshot"][1]]["paper"]}
    assert confirmed == {"hellaswag", "piqa", "siqa", "winogrande", "arc_easy", "openbookqa", "boolq"}


def test_prepare_downloads_once_and_what_it_wrote_runs(checkpoints, tmp_path, monkeypatch):
    monkeypatch.undo()
    bbh(tmp_path / "hub")
    files = {str(path.relative_to(tmp_path / "hub")): path for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "mobilemoe.cli", "eval", "prepare", "--data-dir", tmp_path / "data"]

    def prepare(*tasks):
        environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*command, "--tasks", *tasks], env=os.environ | environment, capture_output=True, text=True
        )

    with HubServer() as hub:
        sha = hub.add("SaylorTwift/bbh", {name: path.read_bytes() for name, path in files.items()})
        first = prepare("bbh")
        assert first.returncode == 0, first.stderr
        assert f"SaylorTwift/bbh at {sha}" in first.stderr
        # The test Hub lacks the second one.
        second = prepare("bbh", "gsm8k")
        assert "SaylorTwift/bbh: complete" in second.stderr
        assert second.returncode == 1 and "openai/gsm8k" in second.stderr and "Traceback" not in second.stderr
    assert {path.name for path in (tmp_path / "data/SaylorTwift/bbh").iterdir() if path.is_file()} == {
        "README.md", ".gitattributes"
    }  # fmt: skip
    report = run_eval(checkpoints["fp32"], tmp_path / "out", tmp_path / "data", "--tasks", "bbh", "--limit", 1)
    assert report["tasks"]["bbh"]["data_revision"] == sha
    assert report["tasks"]["bbh"]["num_documents"] == 24


def test_a_card_names_only_what_was_downloaded(checkpoints, tmp_path):
    """As on the Hub: another configuration stands first in the card, and `prepare` leaves its files out."""
    pin = suite_file()["datasets"]["allenai/openbookqa"]
    folder = tmp_path / "data/allenai/openbookqa"
    openbookqa(folder, "additional", "main")
    before = (folder / "README.md").read_text()
    trim_card(folder)
    assert (folder / "README.md").read_text() == before
    assert pin["allow"] == ["main/*"]
    shutil.rmtree(folder / "additional")
    trim_card(folder)
    assert "additional" in before and "additional" not in (folder / "README.md").read_text()
    write_record(tmp_path / "data", "allenai/openbookqa", pin["revision"])
    assert data_problem(tmp_path / "data", "allenai/openbookqa", pin["revision"]) is None
    report = run_eval(checkpoints["fp32"], tmp_path / "out", tmp_path / "data", "--tasks", "openbookqa", "--limit", 2)
    assert report["tasks"]["openbookqa"]["num_documents"] == 2


def test_the_mean_of_the_advanced_suite_is_that_of_its_categories():
    tasks = select_tasks("advanced")
    results = [
        SimpleNamespace(category=task["category"], score=number / 10, stderr=0.01 * number)
        for number, task in enumerate(tasks.values())
    ]
    # MATH-500 | HumanEval, MBPP | IFEval | MMLU-Pro, GPQA.
    mean = mean_score(results)
    assert mean.score == pytest.approx((0.0 + (0.1 + 0.2) / 2 + 0.3 + (0.4 + 0.5) / 2) / 4)
    assert mean.stderr == pytest.approx((0.005**2 + 0.01**2 + 0.03**2 + 0.02**2 + 0.025**2) ** 0.5 / 4)
    unknown = [SimpleNamespace(category=name, score=1, stderr=None) for name in "ab"]
    assert mean_score(unknown) == Score(score=1, stderr=None)


def advanced(model, data, output, home, *arguments) -> dict:
    """In a process of its own: the harness loads the metric that runs code when it is imported."""
    command = [sys.executable, "-m", "mobilemoe.cli", "eval", "--suite", "advanced", "--model", model]
    command += ["--data-dir", data, "--output", output, *arguments]
    environment = os.environ | {"HF_HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((output / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "int4", "pte"])
def test_advanced_tasks_run_and_code_only_when_confirmed(kind, checkpoints, advanced_data, tmp_path, request):
    tasks = ["--tasks", "humaneval", "mbpp", "ifeval", "mmlu_pro", "gpqa", "--confirm-run-unsafe-code"]
    model = request.getfixturevalue("packed_pte") if kind == "pte" else checkpoints[kind]
    report = advanced(model, advanced_data, tmp_path / "out", tmp_path / "home", *tasks)
    assert report["model"]["kind"] == {"bf16": "checkpoint"}.get(kind, kind)
    assert set(report["tasks"]) == {"humaneval", "mbpp", "ifeval", "mmlu_pro", "gpqa"}
    assert report["tasks"]["mmlu_pro"]["num_documents"] == 14
    assert all(0 <= task["score"] <= 1 for task in report["tasks"].values())


def test_prepare_without_network_is_one_line(tmp_path):
    # Nothing listens there.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "mobilemoe.cli", "eval", "prepare", "--data-dir", str(tmp_path / "data")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and result.stdout == "" and not (tmp_path / "data").exists()
    assert re.match("mobilemoe eval: .* cannot be downloaded from the Hub: .*[Cc]onnect.* Check the network", line)


def test_math500_needs_a_grammar_that_prepare_puts_beside_the_data(checkpoints, advanced_data, tmp_path):
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("needs math_verify, which mobilemoe[eval] has")
    arguments = (
        "--model",
        checkpoints["int4"],
        "--output",
        tmp_path / "out",
        "--suite",
        "advanced",
        "--tasks",
        "math500",
    )
    if not (advanced_data / SITE).is_dir():
        message = failure(*arguments, "--data-dir", advanced_data)
        assert "antlr4-python3-runtime==4.11.0 is missing" in message and "mobilemoe eval prepare" in message
        message = failure(*arguments)
        assert "math500 needs antlr4-python3-runtime==4.11.0, which `mobilemoe eval prepare` puts into" in message
        pytest.skip(f"{ANTLR} does not exist: make setup fills it")
    report = advanced(checkpoints["int4"], advanced_data, tmp_path / "out", tmp_path / "home", "--tasks", "math500")
    assert report["tasks"]["math500"]["num_documents"] == 3
    assert {"math_verify,none", "exact_match,none"} <= set(report["tasks"]["math500"]["all_metrics"])
