"""
Stock tools, typed as people type them, on directories that `save_pretrained` wrote.

Each runs where our package can be imported and where it cannot, in BF16 and packed INT4. `docs/works_with.py` makes
`docs/works-with.md` from the tests that carry the mark `works_with`.
"""

import copy
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_with_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from modeling_mobilemoe import packed_mobilemoe


BIN = Path(sys.executable).parent
WEIGHTS = ("BF16", "INT4")
ENVIRONMENTS = ("package", "remote code")
MESSAGES = [{"role": "user", "content": "import argparse"}]
# Started before anything else in a process: there are no packages of ours, as where nobody has installed them.
WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mobilemoe", "modeling_mobilemoe"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

needs_serve = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
every_weights = pytest.mark.parametrize("weights", WEIGHTS)
every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS)


@pytest.fixture(scope="module")
def directories(trained_model, text_checkpoint, tokenizer, tmp_path_factory) -> dict[str, Path]:
    bf16 = tmp_path_factory.mktemp("stock") / "bf16"
    save_with_tokenizer(copy.deepcopy(trained_model).bfloat16(), tokenizer, bf16)
    return {"BF16": bf16, "INT4": text_checkpoint}


@pytest.fixture(scope="module")
def process_options(tmp_path_factory) -> dict[str, dict]:
    """Arguments of `subprocess` by environment."""
    directory = tmp_path_factory.mktemp("environments")
    (directory / "sitecustomize.py").write_text(WITHOUT_THE_PACKAGE)
    # What this process has beside its environment is kept.
    inherited = os.environ.get("PYTHONPATH", "")
    options = {}
    for environment, path in (("package", ROOT), ("remote code", directory)):
        variables = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(path), inherited))),
            # Where transformers copies remote code to.
            "HF_HOME": str(directory / environment),
            "HF_HUB_OFFLINE": "1",
        }
        options[environment] = {"env": variables, "cwd": directory, "text": True, "stdin": subprocess.DEVNULL}
    return options


def run(command: list, options: dict, **more) -> str:
    """Standard output of a command that succeeds."""
    completed = subprocess.run(
        [str(part) for part in command], **options | {"capture_output": True, "timeout": 300} | more
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    return completed.stdout


def greedy(directory: Path, num_tokens: int, environment: str) -> str:
    """What the model answers to `MESSAGES`, by `generate` in this process."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with pytest.MonkeyPatch.context() as patch:
        if environment == "remote code":
            # The code of a checkpoint comes without the kernels.
            patch.setattr(packed_mobilemoe, "has_cpu_kernels", bool)
        output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


TOKENIZE = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert "modeling_mobilemoe" not in sys.modules
print(tokenizer("import os").input_ids)
"""


@pytest.mark.works_with("AutoTokenizer, without import or trust", "transformers")
@every_weights
@every_environment
def test_a_directory_gives_its_tokenizer(directories, process_options, weights, environment):
    printed = run([sys.executable, "-c", TOKENIZE, directories[weights]], process_options[environment])
    # Without a terminal transformers' question about remote code stands in front.
    ids = AutoTokenizer.from_pretrained(directories[weights])("import os").input_ids
    assert printed.strip().endswith(str(ids))


@contextmanager
def serving(directory: Path, options: dict, *flags: str):
    """The address of `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BIN / "transformers", "serve", directory, "--trust-remote-code", "--device", "cpu", "--port", port]
    log = options["cwd"] / f"serve-{port}.log"
    with open(log, "w") as output:
        server = subprocess.Popen(
            [str(part) for part in (*command, *flags)], **options, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def post(url: str, **body) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=120).read())


def answers(address: str, directory: Path) -> str:
    reply = post(
        f"{address}/v1/chat/completions",
        model=str(directory),
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        stream=False,
    )
    return reply["choices"][0]["message"]["content"]


@pytest.mark.slow
@pytest.mark.works_with("transformers serve --trust-remote-code, transformers chat", "transformers")
@needs_serve
@every_weights
@every_environment
def test_serve_and_chat(directories, process_options, weights, environment):
    directory, options = directories[weights], process_options[environment]
    expected = greedy(directory, 8, environment)
    assert expected
    with serving(directory, options) as address:
        assert answers(address, directory) == expected
        chat = [BIN / "transformers", "chat", directory, address, "do_sample=False", "max_new_tokens=8"]
        # The "n" answers whether to go on after the token limit. Offline, huggingface_hub forbids these requests.
        online = options["env"] | {"HF_HUB_OFFLINE": "0"}
        shown = run(chat, options, stdin=None, input="import argparse\nn\n!exit\n", env=online)
    # The terminal shows it as Markdown.
    assert "".join(filter(str.isalnum, expected)) in "".join(filter(str.isalnum, shown))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("conversations")
    rows = [
        {"messages": [*MESSAGES, {"role": "assistant", "content": f"parser = argparse.ArgumentParser({i})"}]}
        for i in range(16)
    ]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def train_adapter(method: str, model: Path, data: Path, output: Path, options: dict, *flags: object) -> list[dict]:
    """The log of three steps of a method of TRL, with the adapter that PEFT makes when it is told no targets."""
    command = [BIN / "trl", method, "--model_name_or_path", model, "--trust_remote_code", "--dataset_name", data]
    command += ["--use_peft", "--max_steps", 3, "--learning_rate", 0.01, "--output_dir", output, "--save_steps", 3]
    command += ["--bf16", "false", "--gradient_checkpointing", "false", "--logging_steps", 1, "--report_to", "none"]
    run([*command, "--use_cpu", *flags], options)
    log = json.loads((output / "checkpoint-3/trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]


@pytest.mark.slow
@pytest.mark.works_with("trl sft --use_peft --assistant_only_loss", "trl", "peft")
@every_weights
@every_environment
def test_trl_sft_with_peft(directories, process_options, conversations, weights, environment, tmp_path):
    flags = ["--assistant_only_loss", "--dtype", "float32"]
    log = train_adapter("sft", directories[weights], conversations, tmp_path, process_options[environment], *flags)
    assert len(log) == 3 and log[-1]["loss"] < log[0]["loss"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    # The adapter is whole and changes the model.
    base = AutoModelForCausalLM.from_pretrained(directories[weights], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path)
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = model(input_ids).logits
        with model.disable_adapter():
            assert (adapted - model(input_ids).logits).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.works_with("trl dpo --use_peft", "trl", "peft")
@every_weights
@every_environment
def test_trl_dpo_with_peft(directories, process_options, weights, environment, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pair = {"chosen": "parser = argparse.ArgumentParser()", "rejected": "def number(self): return"}
    row = {"prompt": MESSAGES} | {key: [{"role": "assistant", "content": text}] for key, text in pair.items()}
    (data / "train.jsonl").write_text((json.dumps(row) + "\n") * 24)
    # In BF16, where packed models have kernels of another arithmetic.
    log = train_adapter(
        "dpo", directories[weights], data, tmp_path, process_options[environment], "--dtype", "bfloat16"
    )
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log[-1]["loss"] < 0.9 * math.log(2) and log[-1]["rewards/accuracies"] == 1


REWARD = """
def variety(completions, **kwargs):
    return [float(len(set(completion[0]["content"]))) for completion in completions]
"""


@pytest.mark.slow
@pytest.mark.works_with("trl grpo --use_peft", "trl", "peft")
@every_weights
@every_environment
def test_trl_grpo_with_peft(directories, process_options, weights, environment, tmp_path):
    data, options = tmp_path / "data", process_options[environment]
    data.mkdir()
    (data / "train.jsonl").write_text((json.dumps({"prompt": MESSAGES}) + "\n") * 8)
    (options["cwd"] / "rewards_of_a_user.py").write_text(REWARD)
    flags = ["--reward_funcs", "rewards_of_a_user.variety", "--num_generations", 4, "--beta", 0.1]
    flags += ["--per_device_train_batch_size", 4, "--max_completion_length", 12, "--dtype", "bfloat16"]
    log = train_adapter("grpo", directories[weights], data, tmp_path, options, *flags)
    assert all(row["reward"] > 0 and row["reward_std"] > 0 for row in log)
    # The policy starts as its reference: both are computed in one arithmetic.
    assert log[0]["kl"] == 0 < log[-1]["kl"]


TASK = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
"""
# No token reaches from a context into its target.
DOCUMENTS = [("def function", " = value"), ("    return", " self.parser"), ("import", " argparse")]


@torch.no_grad()
def log_likelihood(directory: Path, context: str, target: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    start, ids = len(tokenizer(context).input_ids), tokenizer(context + target, return_tensors="pt").input_ids
    scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return scores.gather(-1, ids[0, start:, None]).sum().item()


@pytest.mark.slow
@pytest.mark.works_with("lm_eval run --model hf --model_args pretrained=DIR,trust_remote_code=True", "lm-eval")
@every_weights
@every_environment
def test_lm_eval(directories, process_options, weights, environment, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the `eval` extra")
    directory, tasks, output = directories[weights], tmp_path / "tasks", tmp_path / "results"
    tasks.mkdir()
    rows = [json.dumps({"context": context, "target": target}) for context, target in DOCUMENTS]
    (tasks / "documents.jsonl").write_text("\n".join(rows))
    (tasks / "next_word.yaml").write_text(TASK % (tasks / "documents.jsonl"))
    model_args = f"pretrained={directory},trust_remote_code=True,dtype=float32"
    command = [BIN / "lm_eval", "run", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", "next_word", "--include_path", tasks, "--output_path", output]
    run(command, process_options[environment])
    (file,) = output.rglob("results_*.json")
    perplexity = json.loads(file.read_text())["results"]["next_word"]["perplexity,none"]
    expected = sum(log_likelihood(directory, *document) for document in DOCUMENTS) / len(DOCUMENTS)
    assert math.log(perplexity) == pytest.approx(-expected, abs=1e-3)


# In Python people import the package where they have it, and trust the directory's code where they have not.
IMPORT = """
import sys
trust_remote_code = sys.argv.pop() == "remote code"
if not trust_remote_code:
    import modeling_mobilemoe
"""
PIPELINE = """
import json
from transformers import pipeline
options = {"trust_remote_code": trust_remote_code, "dtype": "auto", "device": "cpu"}
generator = pipeline("text-generation", model=sys.argv[1], **options)
(answer,) = generator(json.loads(sys.argv[2]), max_new_tokens=8, do_sample=False)
print(json.dumps(answer["generated_text"][-1]["content"]))
"""


@pytest.mark.works_with("pipeline('text-generation')", "transformers")
@every_weights
@every_environment
def test_pipeline(directories, process_options, weights, environment):
    directory = directories[weights]
    command = [sys.executable, "-c", IMPORT + PIPELINE, directory, json.dumps(MESSAGES), environment]
    printed = run(command, process_options[environment])
    assert json.loads(printed.splitlines()[-1]) == greedy(directory, 8, environment) != ""


OFFLOAD = """
from transformers import AutoModelForCausalLM
directory, folder, *ids = sys.argv[1:]
options = {"trust_remote_code": trust_remote_code, "dtype": "float32"}
device_map = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
model = AutoModelForCausalLM.from_pretrained(
    directory, device_map=device_map | {"model.layers": "disk"}, offload_folder=folder, **options
)
assert any(tensor.is_meta for tensor in model.state_dict().values())
inputs = model.dummy_inputs["input_ids"].new_tensor([list(map(int, ids))])
offloaded = model(inputs).logits
assert offloaded.equal(AutoModelForCausalLM.from_pretrained(directory, **options)(inputs).logits)
print(type(model).__module__, offloaded.sum().item())
"""


@pytest.mark.slow
@pytest.mark.works_with("from_pretrained(device_map=...) with layers on disk", "accelerate")
@every_weights
@every_environment
def test_disk_offload(directories, process_options, weights, environment, tmp_path):
    ids = range(3, 30)
    command = [sys.executable, "-c", IMPORT + OFFLOAD, directories[weights], tmp_path, *ids, environment]
    module, total = run(command, process_options[environment]).split()[-2:]
    assert module.startswith("transformers_modules.") == (environment == "remote code")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directories[weights], dtype=torch.float32)
        assert float(total) == pytest.approx(model(torch.tensor([list(ids)])).logits.sum().item(), rel=1e-3)
