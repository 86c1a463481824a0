"""`mobilemoe train`: kinds of data, bad rows, the plan, and runs on a tiny model that resume and export."""

import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import datasets
import make_chats
import pytest
import record
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilemoe import cli
from mobilemoe.train import command
from mobilemoe.train.conversations import read_examples, split, write_examples
from mobilemoe.train.data import DataSource, Source
from mobilemoe.train.epochs import read_documents
from modeling_mobilemoe import MobileMoEConfig


QUESTIONS = [(f"What is {i} plus {i}?", f"It is {2 * i}, I think.") for i in range(24)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sharegpt(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# Kinds of data


def data_file(kind: str, directory: Path) -> str:
    rows = {
        "messages": [{"messages": chat(*pair), "id": i} for i, pair in enumerate(QUESTIONS)],
        "sharegpt": [{"conversations": sharegpt(*pair)} for pair in QUESTIONS],
        "pairs": [{"prompt": question, "completion": answer} for question, answer in QUESTIONS],
        "text": [{"text": f"{question} {answer}"} for question, answer in QUESTIONS],
    }
    name, _, suffix = kind.partition(".")
    path = directory / f"data.{suffix}"
    if suffix == "jsonl":
        return write_jsonl(path, rows[name])
    if suffix == "json":
        path.write_text(json.dumps(rows[name]))
    elif suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[name][0])
            writer.writeheader()
            writer.writerows(rows[name])
    else:
        datasets.Dataset.from_list(rows[name]).to_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("messages.jsonl", "chat"),
        ("messages.json", "chat"),
        ("messages.parquet", "chat"),
        ("sharegpt.jsonl", "chat"),
        ("sharegpt.parquet", "chat"),
        ("pairs.jsonl", "pair"),
        ("pairs.csv", "pair"),
        ("pairs.parquet", "pair"),
        ("text.jsonl", "text"),
        ("text.csv", "text"),
    ],
)
def test_every_kind_of_file_is_recognised(kind, expected, tmp_path, chat_tokenizer):
    examples = read_examples(data_file(kind, tmp_path), chat_tokenizer, 256)
    assert examples.kind == expected
    assert (len(examples.train), len(examples.validation)) == (22, 2)
    assert examples.unused_columns == (["id"] if kind.startswith("messages") else [])
    for example in examples.train:
        # Only an answer and its end are learnt, or all of a text.
        assert 0 < example.num_learnt < example.num_tokens or expected == "text"
    if expected == "chat":
        assert {message["role"] for example in examples.train for message in example.row["messages"]} == {
            "user",
            "assistant",
        }


def test_tools_reach_the_recipes_as_they_were_written(tmp_path, chat_tokenizer):
    """Arguments of another function in the same column add nothing to a call."""
    calls = [("add", {"a": 1}), ("find", {"text": "dedent", "exact": None})]
    rows = [
        {
            "messages": [
                *chat(question, "")[:1],
                {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            ],
            "tools": [{"type": "function", "function": {"name": name, name: {}}}],
        }
        for question, _ in QUESTIONS
        for name, arguments in calls
    ]
    examples = read_examples(write_jsonl(tmp_path / "tools.jsonl", rows), chat_tokenizer, 512)
    assert examples.unused_columns == []
    write_examples(examples.train, tmp_path / "train.jsonl")
    source = Source(DataSource("json", data_files=str(tmp_path / "train.jsonl")), chat_tokenizer, 512, 0)
    texts = [chat_tokenizer.decode(document.input_ids) for document in read_documents([source])]
    assert len(texts) == len(examples.train)
    for text in texts:
        is_add = '"name": "add"' in text
        call = (
            '{"name": "add", "arguments": {"a": 1}}' if is_add else '{"name": "find", "arguments": {"text": "dedent"}}'
        )
        assert f"<tool_call>\n{call}\n</tool_call><|eot|>" in text
        name = "add" if is_add else "find"
        definition = json.dumps({"type": "function", "function": {"name": name, name: {}}})
        assert f"<tools>\n{definition}\n</tools>" in text


def test_split_depends_on_nothing_but_the_examples(tmp_path, chat_tokenizer):
    rows = [{"messages": chat(*pair)} for pair in QUESTIONS]
    one = read_examples(write_jsonl(tmp_path / "a.jsonl", rows), chat_tokenizer, 256)
    # In another order, and every example twice.
    other = read_examples(write_jsonl(tmp_path / "b.jsonl", rows[::-1] + rows), chat_tokenizer, 256)
    validation = {json.dumps(example.row) for example in one.validation}
    assert validation == {json.dumps(example.row) for example in other.validation}
    assert validation.isdisjoint(json.dumps(example.row) for example in other.train)
    assert len(other.validation) == 4 and len(other.train) == 44
    assert split([]) == ([], [])


def test_hub_data_sets_are_read(tmp_path, chat_tokenizer, monkeypatch):
    rows = datasets.Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in QUESTIONS])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: rows if (name, split) == ("me/chats", "train") else 1 / 0
    )
    assert len(read_examples("me/chats", chat_tokenizer, 256).train) == 22


def test_long_and_empty_rows_are_counted(tmp_path, chat_tokenizer):
    rows = [{"messages": chat(*pair)} for pair in QUESTIONS]
    rows += [
        {"messages": chat("Hello?", "word " * 500)},
        {"messages": chat("Hello?", "")},
        {"messages": chat("a " * 600, "b")},
    ]
    examples = read_examples(write_jsonl(tmp_path / "a.jsonl", rows), chat_tokenizer, 256)
    assert (examples.num_cut, examples.num_empty) == (1, 2)
    assert max(example.num_tokens for example in examples.train + examples.validation) == 256


GOOD = json.dumps({"messages": chat("Hi?", "Hello.")})
BAD_ROWS = {
    "syntax": (GOOD + "\n{broken", "line 2 is not JSON"),
    "no object": (GOOD + "\n[1]", "line 2 is list, not an object"),
    "number": ("3", "line 1 is int, not an object.*Expected one of the columns `messages`"),
    "unknown columns": (
        '{"instruction": "a", "output": "b"}',
        "line 1 has the columns instruction, output. Expected one",
    ),
    "missing column": (GOOD + '\n\n{"text": "a"}', "line 3 cannot be trained on: it lacks the column messages"),
    "no answer": (
        GOOD + '\n{"messages": [{"role": "user", "content": "Hi"}]}',
        "line 2 .* no assistant turn to learn",
    ),
    "answer first": (
        GOOD + '\n{"messages": [{"role": "assistant", "content": "Hi"}]}',
        "line 2 .* begins with an assistant turn",
    ),
    "content": (
        GOOD + '\n{"messages": [{"role": "user", "content": 3}]}',
        "line 2 .* user message is int, not a string",
    ),
    "no role": (GOOD + '\n{"messages": [{"content": "a"}]}', r"line 2 .* keys \['content'\] and lacks role"),
    "messages in a string": ('{"messages": "Hi"}', "line 1 .* it has str instead of a list of messages"),
    "pair of numbers": ('{"prompt": 1, "completion": 2}', "line 1 .* it has int instead of a string"),
    "text that is none": ('{"text": "a"}\n{"text": 3}', "line 2 .* its text is int, not a string"),
    "one example": (GOOD, "holds 1 examples with something to learn, of which at least 2 must differ"),
    "equal examples": ("\n".join([GOOD] * 9), "holds 9 examples .* Add examples"),
    "nothing": ("", "holds no examples"),
    "only empty answers": ('{"prompt": "a", "completion": ""}\n' * 3, "holds 0 examples with something to learn"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named_and_nothing_is_written(name, tmp_path, float_text_checkpoint, capsys):
    text, message = BAD_ROWS[name]
    (tmp_path / "bad.jsonl").write_text(text)
    arguments = ["--data", str(tmp_path / "bad.jsonl"), "--model", str(float_text_checkpoint)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *arguments, "--output", str(tmp_path / "out")])
    assert re.search(message, str(stopped.value)), stopped.value
    assert str(stopped.value).startswith("mobilemoe train: ") and "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_bad_csv_and_parquet_are_named(tmp_path, chat_tokenizer):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,d,e\n")
    with pytest.raises(ValueError, match="a.csv, line 3 has not 2 values"):
        read_examples(str(tmp_path / "a.csv"), chat_tokenizer, 256)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="a.parquet cannot be read as Parquet"):
        read_examples(str(tmp_path / "a.parquet"), chat_tokenizer, 256)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="a.jsonl is not UTF-8 at byte 10"):
        read_examples(str(tmp_path / "a.jsonl"), chat_tokenizer, 256)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="a.txt has an unknown suffix"):
        read_examples(str(tmp_path / "a.txt"), chat_tokenizer, 256)
    with pytest.raises(OSError, match="there is no such file"):
        read_examples(str(tmp_path / "none.jsonl"), chat_tokenizer, 256)


# What cannot work


@pytest.fixture
def data(tmp_path):
    return data_file("messages.jsonl", tmp_path)


def refused(data, output, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--data", data, "--output", str(output), *map(str, arguments)])
    assert not Path(output).exists()
    return str(stopped.value)


def test_packed_model_trains_adapters_only(data, tmp_path, text_checkpoint):
    output = tmp_path / "out"
    assert "Add --lora attention or --lora dense" in refused(data, output, "--model", text_checkpoint)
    assert "Add --lora attention or --lora dense" in refused(data, output, "--model", text_checkpoint, "--lora", "all")
    for option in (["--qat"], ["--export", "gguf"]):
        message = refused(data, output, "--model", text_checkpoint, "--lora", "dense", *option)
        assert "nothing to quantise or export" in message


def test_models_and_settings_that_cannot_work(data, tmp_path, float_text_checkpoint, tiny_config):
    output, model = tmp_path / "out", float_text_checkpoint
    for option, value in (
        ("--epochs", "nan"),
        ("--epochs", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "-1"),
    ):
        assert f"{option} {float(value)} cannot work" in refused(data, output, "--model", model, option, value)
    assert "is not a licence" in refused(data, output, "--model", model, "--license", "mine")
    tiny_config.save_pretrained(tmp_path / "shape")
    assert "has no config.json with weights" in refused(data, output, "--model", tmp_path / "shape")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.pte").touch()
    with pytest.raises(SystemExit, match="holds an exported program"):
        cli.main(["train", "--data", data, "--model", str(model), "--output", str(tmp_path / "full")])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["model.pte"]


def test_model_that_does_not_fit_is_refused(data, tmp_path, float_text_checkpoint, monkeypatch):
    monkeypatch.setattr(command, "available_memory", lambda: 1000)
    message = refused(data, tmp_path / "out", "--model", float_text_checkpoint)
    assert re.search(r"needs 0\.0 GB for weights, gradients and optimizer, and 0\.0 GB are free. Add --lora", message)


# The example's data, and its recording


def test_example_conversations_can_be_trained_on(tmp_path, chat_tokenizer):
    make_chats.main(str(tmp_path / "chats.jsonl"))
    examples = read_examples(str(tmp_path / "chats.jsonl"), chat_tokenizer, 256)
    assert (len(examples.train), len(examples.validation), examples.num_cut) == (45, 5, 0)


def test_recording_is_drawn_as_it_was_printed(tmp_path, monkeypatch):
    events = [
        [0.0, "o", "$ run <this>\r\n"],
        [1.5, "o", "one\r"],
        [2.0, "o", "\x1b[1mtwo\x1b[0m"],
        [70.0, "o", "\r\nend\r\n"],
    ]
    assert record.screen_lines(events) == [(0.0, "$ run <this>", True), (2.0, "two", False), (70.0, "end", False)]
    assert len(record.screen_lines([[0.0, "o", "x" * 2 * record.COLUMNS + "y\r\n"]])) == 3
    cast, image = tmp_path / "a.cast", tmp_path / "a.svg"
    cast.write_text("".join(json.dumps(row) + "\n" for row in [{"version": 2}, *events]))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "CAST", cast)
    monkeypatch.setattr(record, "PICTURE", image)
    record.draw()
    texts = [text.text for text in ElementTree.parse(image).iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["0:00", "$ run <this>", "0:02", "two", "1:10", "end"]


# The plan


def test_learning_rate_follows_the_size():
    s, m = MobileMoEConfig(), MobileMoEConfig(hidden_size=1024, intermediate_size=1024)
    assert command.learning_rate(s, None) == 2e-5
    assert command.learning_rate(s, "attention") == 2e-4
    assert command.learning_rate(m, None) < 2e-5 or m.num_active_parameters < s.num_active_parameters


# Runs


def train(data, model, output, *options):
    cli.main(["train", "--data", data, "--model", str(model), "--output", str(output), "--epochs", "2", *options])


def test_command_ends_in_a_model_with_card_and_curves(data, tmp_path, float_text_checkpoint, capsys):
    output = tmp_path / "mine"
    train(data, float_text_checkpoint, output)
    printed = capsys.readouterr().out
    assert "22 conversations to train on, 2 to validate with" in printed
    assert re.search(r"fine-tuning: step (\d+)/\1  training loss .* validation loss", printed)
    kept, after, before = re.search(
        r"kept step (\d+), with .* loss of ([\d.]+); before training ([\d.]+)", printed
    ).groups()
    assert f"step {kept}/" in printed and float(after) < float(before) and "did not fall" not in printed
    assert f"mobilemoe run --model {output} --chat" in printed.splitlines()[-1]
    model = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(float_text_checkpoint)
    assert not torch.equal(model.model.norm.weight, before.model.norm.weight)
    assert AutoTokenizer.from_pretrained(output).chat_template
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "license: unknown" in (output / "README.md").read_text()
    assert list(output.glob("checkpoint-*")) == []
    # Once more: nothing is left to do.
    written = {path: path.read_bytes() for path in output.glob("*.safetensors")}
    train(data, float_text_checkpoint, output)
    assert "fine-tuning: step" not in capsys.readouterr().out
    assert written == {path: path.read_bytes() for path in output.glob("*.safetensors")}
    with pytest.raises(SystemExit, match="holds a run with other settings: lora was None"):
        train(data, float_text_checkpoint, output, "--lora", "dense")


def test_adapters_over_a_packed_model(data, tmp_path, text_checkpoint, capsys):
    output = tmp_path / "mine"
    train(data, text_checkpoint, output, "--lora", "dense")
    assert f"{output}/adapter holds the adapter" in capsys.readouterr().out
    assert (output / "adapter/adapter_model.safetensors").exists() and not (output / "model.safetensors").exists()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [[], ["--lora", "all"]], ids=["full", "lora"])
def test_interrupted_run_resumes_and_ends_the_same(
    data, tmp_path, float_text_checkpoint, monkeypatch, options, capsys
):
    train(data, float_text_checkpoint, tmp_path / "whole", *options)
    on_log = command.Report.on_log

    def interrupt(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs=logs, **kwargs)
        # At the last evaluation, before it is saved.
        if "eval_loss" in logs and state.global_step == state.max_steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Report, "on_log", interrupt)
    with pytest.raises(SystemExit, match="interrupted. The same command resumes from the last checkpoint"):
        train(data, float_text_checkpoint, tmp_path / "stopped", *options)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    capsys.readouterr()
    train(data, float_text_checkpoint, tmp_path / "stopped", *options)
    assert "fine-tuning: resuming from" in capsys.readouterr().out
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == other


@pytest.mark.slow
def test_command_goes_on_to_int4_and_exports(data, tmp_path, float_text_checkpoint, capsys):
    output = tmp_path / "mine"
    train(data, float_text_checkpoint, output, "--qat", "--export", "pte", "gguf")
    assert AutoModelForCausalLM.from_pretrained(output).config.quantization is not None
    assert AutoModelForCausalLM.from_pretrained(output / "full-precision").config.quantization is None
    assert (output / "pte/model.pte").exists() and len(list((output / "gguf").glob("*.gguf"))) == 1
    assert f"mobilemoe run --model {output}/pte --chat" in capsys.readouterr().out.splitlines()[-1]
    written = (output / "pte/model.pte").stat().st_mtime_ns
    train(data, float_text_checkpoint, output, "--qat", "--export", "pte", "gguf")
    assert "holds the export of these weights" in capsys.readouterr().out
    assert (output / "pte/model.pte").stat().st_mtime_ns == written
