"""
Small made-up data sets in the schemas and file formats of the ones that the suites name.

Columns and types are those of the repositories on the Hub as the harness reads them. Each is written as a copy of its
repository would lie in a data directory, with the record that `mobilemoe eval prepare` leaves.
"""

import json
import shutil
import sys
from pathlib import Path

import lm_eval
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value

from mobilemoe.eval.data import CODE_EVAL, PUNKT, SITE, select_tasks, suite_file, write_record


# What `prepare` installs beside the data of the advanced suite; `make setup` puts it here.
ANTLR = Path(sys.prefix) / "antlr4-4.11"
HARNESS_TASKS = Path(lm_eval.__file__).parent / "tasks"
TEXT, INT, TEXTS = Value("string"), Value("int32"), List(Value("string"))
ANIMALS = ["heron", "otter", "lynx", "newt", "wren", "shrew", "adder", "perch"]


def harness_files(pattern: str) -> list[dict]:
    """The harness's task files, without the functions that they name."""

    class Loader(yaml.SafeLoader): ...

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return [yaml.load(path.read_text(), Loader) for path in sorted(HARNESS_TASKS.glob(pattern))]  # noqa: S506


def sentence(i: int) -> str:
    return f"The {ANIMALS[i % 8]} walks {i} steps and meets the {ANIMALS[(i * 3 + 1) % 8]}."


def choice_row(i: int, name: str) -> dict:
    choices = {"text": [f"{(i + k) * 2} steps" for k in range(4)], "label": list("ABCD")}
    return {"id": f"{name}-{i}", "choices": choices, "answerKey": "ABCD"[i % 4]}


CHOICES = {"id": TEXT, "choices": {"text": TEXTS, "label": TEXTS}, "answerKey": TEXT}
DATE = {"day": TEXT, "month": TEXT, "year": TEXT}


def drop_row(i: int) -> dict:
    nothing = {"day": "", "month": "", "year": ""}
    answer = {"number": str(i), "date": nothing, "spans": [], "worker_id": "w", "hit_id": "h"}
    validated = {"number": [str(i), ""], "date": [nothing] * 2, "spans": [[], [ANIMALS[i % 8]]]}
    return {
        "section_id": f"nature_{i}",
        "query_id": f"q{i}",
        "passage": sentence(i) + " " + sentence(i + 1),
        "question": "How many steps are walked first?",
        "answer": answer,
        "validated_answers": validated | {"worker_id": ["w", "w"], "hit_id": ["h", "h"]},
    }


def trivia_row(i: int) -> dict:
    animal = ANIMALS[i % 8]
    return {
        "question": f"Which animal walks {i} steps",
        "question_id": f"tc_{i}",
        "question_source": "http://example.org/",
        "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
        "search_results": {
            "description": [],
            "filename": [],
            "rank": [],
            "title": [],
            "url": [],
            "search_context": [],
        },
        "answer": {
            "aliases": [animal, animal.upper()],
            "normalized_aliases": [animal],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": animal,
            "type": "WikipediaEntity",
            "value": animal,
        },
    }


TRIVIA = {
    "question": TEXT,
    "question_id": TEXT,
    "question_source": TEXT,
    "entity_pages": dict.fromkeys(("doc_source", "filename", "title", "wiki_context"), TEXTS),
    "search_results": dict.fromkeys(("description", "filename", "title", "url", "search_context"), TEXTS)
    | {"rank": List(INT)},
    "answer": {
        "aliases": TEXTS,
        "normalized_aliases": TEXTS,
        "matched_wiki_entity_name": TEXT,
        "normalized_matched_wiki_entity_name": TEXT,
        "normalized_value": TEXT,
        "type": TEXT,
        "value": TEXT,
    },
}


def write_parquet(root: Path, configs: dict[str, dict[str, list[dict]]], features: dict) -> None:
    """A repository of Parquet files, one folder per configuration, with the README that names them."""
    cards = []
    for config, splits in configs.items():
        folder = "data" if config == "default" else config
        (root / folder).mkdir(parents=True)
        files = []
        for split, rows in splits.items():
            name = f"{folder}/{split}-00000-of-00001.parquet"
            Dataset.from_list(rows, features=Features(features)).to_parquet(root / name)
            files.append({"split": split, "path": f"{folder}/{split}-*"})
        cards.append({"config_name": config, "data_files": files})
    (root / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': cards})}---\n")


def several(row, *splits: str, number: int = 6) -> dict[str, list[dict]]:
    return {split: [row(100 * k + i) for i in range(number)] for k, split in enumerate(splits)}


def bbh(root: Path) -> None:
    configs = {}
    for task in harness_files("leaderboard/bbh_mc/[a-z]*.yaml"):
        choices = task["doc_to_choice"]
        rows = [{"input": f"{sentence(i)} Is it so?", "target": choices[i % len(choices)]} for i in range(2)]
        configs[task["dataset_name"]] = {"test": rows}
    write_parquet(root, configs, {"input": TEXT, "target": TEXT})


def gsm8k(root: Path) -> None:
    def row(i):
        return {"question": f"{sentence(i)} How many?", "answer": f"It walks <<{i}+0={i}>>{i} steps.\n#### {i}"}

    write_parquet(root, {"main": several(row, "train", "test")}, {"question": TEXT, "answer": TEXT})


def arc(root: Path) -> None:
    def row(i):
        return {"question": f"{sentence(i)} How far?"} | choice_row(i, "Mercury")

    # 25 examples stand in front of a question, none of them the question itself.
    splits = several(row, "train", number=26) | several(row, "validation", "test", number=5)
    write_parquet(root, {"ARC-Challenge": splits, "ARC-Easy": splits}, {"question": TEXT} | CHOICES)


def openbookqa(root: Path, *configs: str) -> None:
    def row(i):
        return {"question_stem": f"An animal that walks {i} steps walks"} | choice_row(i, "7")

    splits = several(row, "train", "validation", "test")
    write_parquet(root, dict.fromkeys(configs or ["main"], splits), {"question_stem": TEXT} | CHOICES)


def hellaswag(root: Path) -> None:
    def row(i):
        return {
            "ind": i,
            "activity_label": "Walking [step]",
            "ctx_a": sentence(i),
            "ctx_b": "the other",
            "ctx": sentence(i) + " the other",
            "endings": [f"turns {'left' if k else 'right'} [title] and walks {i + k} steps." for k in range(4)],
            "source_id": f"activitynet~v_{i}",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        }

    texts = ("activity_label", "ctx_a", "ctx_b", "ctx", "source_id", "split", "split_type", "label")
    features = {"ind": INT, "endings": TEXTS} | dict.fromkeys(texts, TEXT)
    write_parquet(root, {"default": several(row, "train", "test", "validation")}, features)


def piqa(root: Path) -> None:
    def row(i):
        return {"goal": sentence(i), "sol1": f"Walk {i} steps.", "sol2": "Fly.", "label": i % 2}

    features = {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": ClassLabel(names=["0", "1"])}
    write_parquet(root, {"default": several(row, "train", "validation")}, features)


def siqa(root: Path) -> None:
    def row(i):
        answers = {f"answer{letter}": f"{animal}s" for letter, animal in zip("ABC", ANIMALS[i % 5 :], strict=False)}
        return {"context": sentence(i), "question": "Who walks?", **answers, "label": str(i % 3 + 1)}

    keys = ("context", "question", "answerA", "answerB", "answerC", "label")
    write_parquet(root, {"default": several(row, "train", "validation")}, dict.fromkeys(keys, TEXT))


def winogrande(root: Path) -> None:
    def row(i):
        options = {"option1": ANIMALS[i % 8], "option2": ANIMALS[(i + 1) % 8]}
        return {"sentence": f"{sentence(i)} Then the _ sleeps for {i} hours.", **options, "answer": str(i % 2 + 1)}

    keys = ("sentence", "option1", "option2", "answer")
    splits = several(row, "train", "test", "validation")
    write_parquet(root, {"winogrande_xl": splits}, dict.fromkeys(keys, TEXT))


def boolq(root: Path) -> None:
    def row(i):
        return {"question": "do they meet", "passage": sentence(i), "idx": i, "label": i % 2}

    features = {"question": TEXT, "passage": TEXT, "idx": INT, "label": ClassLabel(names=["False", "True"])}
    write_parquet(root, {"boolq": several(row, "train", "validation", "test")}, features)


def drop(root: Path) -> None:
    shared = {"worker_id", "hit_id"}
    features = dict.fromkeys(("section_id", "query_id", "passage", "question"), TEXT)
    features["answer"] = {"number": TEXT, "date": DATE, "spans": TEXTS} | dict.fromkeys(shared, TEXT)
    features["validated_answers"] = {"number": TEXTS, "date": List(DATE), "spans": List(TEXTS)} | dict.fromkeys(
        shared, TEXTS
    )
    write_parquet(root, {"default": several(drop_row, "train", "validation", number=5)}, features)


def mmlu(root: Path) -> None:
    def row(i):
        choices = [f"{i + k} steps" for k in range(4)]
        return {"question": f"{sentence(i)} How far?", "subject": "x", "choices": choices, "answer": i % 4}

    subjects = [task["dataset_name"] for task in harness_files("mmlu/default/mmlu_*.yaml")]
    splits = several(row, "test", number=2) | several(row, "validation", "dev", number=5)
    features = {"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": ClassLabel(names=list("ABCD"))}
    write_parquet(root, dict.fromkeys(subjects, splits), features)


def nq_open(root: Path) -> None:
    def row(i):
        return {"question": f"who walks {i} steps", "answer": [ANIMALS[i % 8], "nobody"]}

    write_parquet(root, {"nq_open": several(row, "train", "validation")}, {"question": TEXT, "answer": TEXTS})


def trivia_qa(root: Path) -> None:
    write_parquet(root, {"rc.nocontext": several(trivia_row, "train", "validation", "test")}, TRIVIA)


def math500(root: Path) -> None:
    rows = [
        {
            "problem": f"What is ${i}+1$?",
            "solution": f"It is $\\boxed{{{i + 1}}}$.",
            "answer": str(i + 1),
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": f"test/prealgebra/{i}.json",
        }
        for i in range(3)
    ]
    write_lines(root / "test.jsonl", rows)


def humaneval(root: Path) -> None:
    def row(i):
        return {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add_{i}(x):\n    """Adds {i}."""\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
            "entry_point": f"add_{i}",
        }

    keys = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    write_parquet(root, {"openai_humaneval": several(row, "test", number=2)}, dict.fromkeys(keys, TEXT))


def mbpp(root: Path) -> None:
    def row(i):
        return {
            "task_id": i,
            "text": f"Write a function that adds {i}.",
            "code": f"def add(x):\r\n    return x + {i}",
            "test_list": [f"assert add({k}) == {i + k}" for k in range(3)],
            "test_setup_code": "",
            "challenge_test_list": [],
        }

    features = {"task_id": INT, "text": TEXT, "code": TEXT, "test_list": TEXTS, "test_setup_code": TEXT}
    splits = several(row, "train", "test", "validation", "prompt", number=2)
    write_parquet(root, {"full": splits}, features | {"challenge_test_list": TEXTS})


def ifeval(root: Path) -> None:
    rows = [
        {
            "key": i,
            "prompt": f"Write about the {ANIMALS[i]}. Use no commas and at least {i} words.",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"relation": "at least", "num_words": i}],
        }
        for i in range(3)
    ]
    write_lines(root / "ifeval_input_data.jsonl", rows)


def mmlu_pro(root: Path) -> None:
    subjects = [
        task["task"].removeprefix("mmlu_pro_").replace("_", " ") for task in harness_files("mmlu_pro/mmlu_pro_*.yaml")
    ]

    def rows(number, first):
        return [
            {
                "question_id": first + i,
                "question": f"{sentence(i)} How far?",
                "options": [f"{i + k} steps" for k in range(10)],
                "answer": "ABCDEFGHIJ"[i % 10],
                "answer_index": i % 10,
                "cot_content": "A: Let's think step by step. The answer is (B).",
                "category": subject,
                "src": "ori_mmlu",
            }
            for subject in subjects
            for i in range(number)
        ]

    features = {"question_id": Value("int64"), "options": TEXTS, "answer_index": Value("int64")}
    features |= dict.fromkeys(("question", "answer", "cot_content", "category", "src"), TEXT)
    write_parquet(root, {"default": {"test": rows(1, 0), "validation": rows(5, 900)}}, features)


def gpqa(root: Path) -> None:
    root.mkdir(parents=True)
    columns = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {k}" for k in (1, 2, 3)), "Subdomain"]
    lines = [[f"rec{i}", sentence(i), *(f"{i + k} steps [title]" for k in range(4)), "Zoology"] for i in range(4)]
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in [columns, *lines])
    (root / "gpqa_main.csv").write_text(text + "\n")
    card = {"configs": [{"config_name": "gpqa_main", "data_files": "gpqa_main.csv"}]}
    (root / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# As `evaluate-metric/code_eval` for one candidate per problem: it runs the program in a process of its own.
CODE_EVAL_SCRIPT = """
import os
import subprocess
import sys

import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="runs code", citation="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, k=[1]):
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("HF_ALLOW_CODE_EVAL is not set")
        programs = [candidates[0] + "\\n" + test for candidates, test in zip(predictions, references)]
        passed = [not subprocess.run([sys.executable, "-c", x], capture_output=True).returncode for x in programs]
        return {"pass@1": sum(passed) / len(passed)}, {}
"""

WRITERS = {
    "SaylorTwift/bbh": bbh,
    "openai/gsm8k": gsm8k,
    "allenai/ai2_arc": arc,
    "allenai/openbookqa": openbookqa,
    "Rowan/hellaswag": hellaswag,
    "baber/piqa": piqa,
    "lighteval/siqa": siqa,
    "allenai/winogrande": winogrande,
    "aps/super_glue": boolq,
    "EleutherAI/drop": drop,
    "cais/mmlu": mmlu,
    "google-research-datasets/nq_open": nq_open,
    "mandarjoshi/trivia_qa": trivia_qa,
    "HuggingFaceH4/MATH-500": math500,
    "openai/openai_humaneval": humaneval,
    "google-research-datasets/mbpp": mbpp,
    "google/IFEval": ifeval,
    "TIGER-Lab/MMLU-Pro": mmlu_pro,
    "Idavidrein/gpqa": gpqa,
}


def write_stand_ins(data_dir: Path, suite: str) -> Path:
    """A data directory as `prepare` would leave it."""
    for repo in {task["dataset"]: None for task in select_tasks(suite).values()}:
        WRITERS[repo](data_dir / repo)
        write_record(data_dir, repo, suite_file()["datasets"][repo]["revision"] or "0" * 40)
    if suite == "advanced":
        (data_dir / CODE_EVAL).mkdir(parents=True)
        (data_dir / CODE_EVAL / "code_eval.py").write_text(CODE_EVAL_SCRIPT)
        write_record(data_dir, CODE_EVAL, "0" * 40)
        if ANTLR.is_dir():
            shutil.copytree(ANTLR, data_dir / SITE)
        # The files of nltk's sentence splitter: what it has learnt about English is nothing here.
        folder = data_dir / "nltk" / PUNKT / "english"
        folder.mkdir(parents=True)
        for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
            (folder / name).write_text("")
    return data_dir
