"""
Rows in the schemas of the data sets that the recipes name, so that a recipe's data runs without the Hub; and a result
of a benchmark that was not run.

`{i}` in a string becomes the number of the copy. The column names are those of the data set cards and of public code
that reads the sets (see recipes/README.md); the contents are made up.
"""

import json
from pathlib import Path

from mobilemoe.machine import spread


def chat(question: str, answer: str, system: str | None = None, **extra) -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [turn | extra for turn in turns]


def nemotron(category: str, question: str, answer: str) -> dict:
    return {
        "uuid": "0b9f8a{i}",
        "license": "CC BY 4.0",
        "generator": "Qwen3-235B-A22B",
        "version": "1.0.0",
        "category": category,
        "reasoning": "off",
        # Every message has the field, also where no tool is called.
        "messages": chat(question, answer, tool_calls=[]),
        "metadata": "{}",
    }


def dolma(source: str, text: str) -> dict:
    return {"id": "{i}", "text": text, "added": "2024-03-26", "created": "2023-10-01", "source": source}


def web_page(text: str) -> dict:
    return {"text": text, "id": "<urn:uuid:{i}>", "dump": "CC-MAIN-2024-10", "url": "https://example.org/{i}"}


def llama_nemotron(question: str, answer: str) -> dict:
    return {
        # A list of messages, while the answer is a string.
        "input": [{"role": "user", "content": question}],
        "output": answer,
        "category": "safety",
        "license": "cc-by-4.0",
        "reasoning": "off",
        "generator": "Mixtral-8x22B-Instruct-v0.1",
        "used_in_training": "yes",
        "version": "v1",
        "system_prompt": "detailed thinking off",
    }


def natural_reasoning(question: str, answer: str) -> dict:
    responses = [{"response_model": "Llama3.3-70B-Instruct", "response": "Step by step: " + answer}]
    return {"question": question, "reference_answer": answer, "responses": responses}


def function_call(question: str, call: str, result: str, answer: str) -> dict:
    return {
        "id": "fc-{i}",
        "conversations": [
            {"from": "system", "value": "You may call one of the functions inside <tools></tools> tags."},
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"<tool_call>\n{call}\n</tool_call>"},
            {"from": "tool", "value": f"<tool_response>\n{result}\n</tool_response>"},
            {"from": "gpt", "value": answer},
        ],
        "category": "Weather",
        "subcategory": "Forecast",
        "task": "Look up number {i}",
    }


STAND_INS = {
    "AI-MO/NuminaMath-CoT": [
        {"source": "cn_k12", "problem": problem, "solution": solution, "messages": chat(problem, solution)}
        for problem, solution in (
            ("What is {i} plus 1?", "Add one to {i}. The answer is \\boxed{{i}+1}."),
            ("What is twice {i}?", "Two times {i} is \\boxed{2\\cdot{i}}."),
            ("Is {i} times two even?", "Twice an integer is even: \\boxed{\\text{yes}}."),
        )
    ],
    "AmazonScience/FalseReject": [
        {"prompt": prompt, "instruct_response": answer, "cot_response": "Think first. " + answer, "category": "3"}
        for prompt, answer in (
            ("How do I kill process {i} on Linux?", "Run `kill {i}`, and `kill -9 {i}` if it does not stop."),
            ("How do I shoot photograph {i} at night?", "Use a tripod, a low ISO and an exposure of {i} seconds."),
            ("How do I blow up picture {i} to a poster?", "Scale it with an interpolation such as Lanczos."),
        )
    ],
    "HuggingFaceFW/finepdfs": [
        web_page(text) | {"language": "eng_Latn", "token_count": 40}
        for text in (
            "# Report {i}\n\nThe committee met and agreed on item {i}. Minutes follow on page two.",
            "Chapter {i}. Soil and water. Rain that falls on clay runs off; on sand it sinks in.",
            "Manual for pump {i}. Close the valve before the housing is opened.",
        )
    ],
    "HuggingFaceFW/fineweb-edu": [
        web_page(text) | {"score": 3.1, "int_score": 3, "token_count": 40}
        for text in (
            "Photosynthesis, lesson {i}. Leaves take in light and carbon dioxide and give off oxygen.",
            "The year {i} in history: a short overview for pupils, with a map and three questions.",
            "Why is the sky blue? Short waves scatter more than long ones. Example {i}.",
        )
    ],
    "HuggingFaceTB/finemath": [
        {"url": "https://example.org/{i}", "text": text, "token_count": 30, "score": 4.2, "int_score": 4}
        for text in (
            "Problem {i}. Solve $x + {i} = 10$. Subtract {i} from both sides.",
            "The area of a square with side {i} is ${i}^2$. Draw it and count.",
            "Proof {i}: the sum of two even numbers is even, because $2a + 2b = 2(a + b)$.",
        )
    ],
    "HuggingFaceTB/smollm-corpus": [
        # A text set with a `prompt` column of its own.
        {"prompt": "Write a textbook section about {i}.", "text": text, "token_length": 30, "audience": "general"}
        for text in (
            "Section {i}. A lever makes a small force large: the longer the arm, the larger the force.",
            "Section {i}. Bread rises because yeast makes gas, and the dough holds it.",
            "Section {i}. A map is a picture of the ground from above, drawn to scale.",
        )
    ],
    "HuggingFaceTB/smoltalk": [
        {"messages": messages, "source": "smol-magpie-ultra"}
        for messages in (
            chat("Give me a name for ship number {i}.", "Call it the Heron {i}."),
            chat("And in one word?", "Heron.", system="You answer briefly. Session {i}."),
            chat(
                '<tools>[{"name": "forecast", "parameters": {"day": "int"}}]</tools>\nWeather on day {i}?',
                '<tool_call>[{"name": "forecast", "arguments": {"day": {i}}}]</tool_call>',
                system="You call functions.",
            ),
        )
    ],
    "LLM360/MegaMath": [
        {"text": text, "url": "https://example.org/{i}", "timestamp": "2024-01-01"}
        for text in (
            "Theorem {i}. Every bounded monotone sequence converges. Proof: take the supremum.",
            "Question {i}: what is the derivative of $x^{i}$? Lower the exponent by one and multiply.",
            "Forum post {i}: I get a different determinant. Did you swap two rows?",
        )
    ],
    "NousResearch/hermes-function-calling-v1": [
        function_call(
            "Will it rain in town {i}?",
            '{"name": "forecast", "arguments": {"town": {i}}}',
            '{"rain": true}',
            "Yes, take an umbrella to town {i}.",
        ),
        function_call(
            "Add {i} and 2.",
            '{"name": "add", "arguments": {"a": {i}, "b": 2}}',
            '{"sum": "{i}+2"}',
            "It is {i} plus 2.",
        ),
        function_call("What time is it in zone {i}?", '{"name": "now"}', '{"time": "12:{i}"}', "It is noon or later."),
    ],
    "OpenCoder-LLM/opc-annealing-corpus": [
        {"text": text, "lang": "python"}
        for text in (
            "def add_{i}(value):\n    return value + {i}\n",
            "# Binary search, variant {i}\ndef search(values, wanted):\n    low, high = 0, len(values)\n",
            "Question {i}: how do I reverse a list?\nAnswer: `values[::-1]`, or `values.reverse()` in place.",
        )
    ],
    "OpenCoder-LLM/opc-fineweb-code-corpus": [
        {"text": text, "url": "https://example.org/{i}", "tag": "code"}
        for text in (
            "Tutorial {i}: open a file with `with open(path) as stream:` so that it is closed again.",
            "How I fixed bug {i}: the loop stopped one element early. Use `<=`.",
            "Release notes {i}: the flag `--fast` is gone; it is the default now.",
        )
    ],
    "OpenCoder-LLM/opc-sft-stage2": [
        {"seq_id": "{i}", "instruction": instruction, "output": output}
        for instruction, output in (
            ("Write a function that adds {i}.", "```python\ndef add(value):\n    return value + {i}\n```"),
            ("Write a test for `add`.", "```python\nassert add(1) == 1 + {i}\n```"),
            ("Explain line {i} of the program.", "It opens the file and reads its first {i} bytes."),
        )
    ],
    "allenai/coconot": [
        {"id": "coconot-{i}", "category": "Incomplete requests", "subcategory": "false presuppositions"}
        | {"prompt": prompt, "response": answer}
        for prompt, answer in (
            ("Who won the race in the year 3{i}?", "That year has not come yet, so nobody has won it."),
            ("What did I eat on day {i}?", "I cannot know what you ate. What do you remember?"),
            ("Fix the bug in file {i}.", "I do not see the file. Could you paste it here?"),
        )
    ],
    "allenai/dolmino-mix-1124": [
        dolma("flan", "Question {i}: which is heavier, iron or wood?\n\nAnswer: iron."),
        dolma("wiki", "Town {i} is a town on a river. It has a bridge and a market."),
        dolma("stackexchange", "Q: Why does command {i} fail?\n\nA: The path has a space. Quote it."),
    ],
    "allenai/olmo-mix-1124": [
        dolma("pes2o", "Abstract. We measure quantity {i} in twelve samples and find no trend."),
        dolma("starcoder", "int add_{i}(int value) {\n    return value + {i};\n}\n"),
        dolma("arxiv", "\\section{Introduction} Let $X_{i}$ be a compact space."),
    ],
    "allenai/tulu-3-sft-mixture": [
        {"id": "tulu-{i}", "messages": messages, "source": "ai2-adapt-dev/oasst1_converted"}
        for messages in (
            chat("Name {i} fruits.", "Apple, pear, plum and so on, {i} in all."),
            chat("Translate 'house {i}' to French.", "Maison {i}."),
            chat("Hello.", "Hello.") + chat("Count to {i}.", "One, two, three, up to {i}."),
        )
    ],
    "facebook/natural_reasoning": [
        natural_reasoning("Why does body {i} float?", "It displaces more water than it weighs."),
        natural_reasoning("What limits growth in case {i}?", "Nitrogen."),
        # 18 % of the rows have no reference answer.
        natural_reasoning("Discuss the consequences of policy {i}.", ""),
        natural_reasoning("What is the period of pendulum {i}?", "$2\\pi\\sqrt{l/g}$ with $l = {i}$ metres."),
    ],
    "mlfoundations/dclm-baseline-1.0": [
        {"text": text, "url": "https://example.org/{i}", "language_id_whole_page_fasttext": {"en": 0.97}}
        for text in (
            "Ten things to see on island {i}. The first is the lighthouse, built on a rock.",
            "Recipe {i}: boil the potatoes, drain them, add butter and salt.",
            "I bought chair {i} last year and the left leg broke. The shop sent a new one.",
        )
    ],
    "nvidia/Llama-Nemotron-Post-Training-Dataset": [
        llama_nemotron("How do I pick lock {i} of my neighbour?", "I cannot help to enter a home without consent."),
        llama_nemotron("Is mushroom {i} safe to eat?", "Do not eat it before an expert has seen it."),
        llama_nemotron("Write an insult about person {i}.", "I would rather not. Shall we word a complaint?"),
    ],
    "nvidia/Nemotron-Post-Training-Dataset-v1": [
        nemotron("math", "What is {i} squared?", "{i} times {i}."),
        nemotron("stem", "Which gas do plants take in? (a) O2 (b) CO2. Item {i}.", "The answer is (b)."),
        nemotron("chat", "Suggest a title for chapter {i}.", "The Long Way Down."),
    ],
    "nvidia/OpenCodeInstruct": [
        {
            "id": "{i}",
            "input": question,
            "output": answer,
            "domain": "generic",
            "generation_algorithm": "self-instruct",
        }
        | {"llm_judgement": "{}", "unit_tests": "[]", "tests_execution_status": "[]", "average_test_score": "1"}
        for question, answer in (
            ("Return the sum of a list and {i}.", "```python\ndef total(values):\n    return sum(values) + {i}\n```"),
            ("Count the vowels of a word.", "```python\nsum(letter in 'aeiou' for letter in word)  # {i}\n```"),
            ("Sort pairs by their second entry.", "```python\nsorted(pairs, key=lambda pair: pair[1])  # {i}\n```"),
        )
    ],
    "nvidia/OpenCodeReasoning": [
        {"id": "{i}", "input": question, "output": answer, "source": "codeforces", "license": "cc-by-4.0"}
        | {"dataset": "code_contests", "split": "train", "difficulty": "7", "solution": "print({i})"}
        for question, answer in (
            ("Print {i}.", "<think>\nOne line will do.\n</think>\n```python\nprint({i})\n```"),
            ("Read n and print n + {i}.", "<think>\nParse, add.\n</think>\n```python\nprint(int(input()) + {i})\n```"),
            (
                "The larger of n and {i}.",
                "<think>\nmax.\n</think>\n```python\nprint(max(int(input()), {i}))\n```",
            ),
        )
    ],
    "nvidia/OpenMathInstruct-2": [
        {"problem": problem, "generated_solution": solution, "expected_answer": "{i}", "problem_source": "gsm8k"}
        for problem, solution in (
            ("Ann has {i} apples and buys 2. How many has she?", "She has {i} + 2 apples. \\boxed{{i}+2}"),
            ("A train goes {i} km in one hour. How far in 3?", "3 times {i} km. \\boxed{3\\cdot{i}}"),
            ("Half of {i} eggs break. How many are left?", "The other half. \\boxed{{i}/2}"),
        )
    ],
}


def number(value, i: int):
    """The copy `i` of a row."""
    if isinstance(value, str):
        return value.replace("{i}", str(i))
    if isinstance(value, list):
        return [number(entry, i) for entry in value]
    if isinstance(value, dict):
        return {key: number(entry, i) for key, entry in value.items()}
    return value


def localize(sources: list[dict], directory: Path, num_rows: int = 200) -> list[dict]:
    """
    The sources of a recipe with their stand-ins in place of the Hub: `num_rows` rows as JSON lines for each.

    What says where on the Hub the rows are (`name`, `revision`, `data_dir`, `split`) goes; `weight`, `columns` and
    `streaming` stay.
    """
    local = []
    for position, source in enumerate(sources):
        rows = STAND_INS[source["path"]]
        path = Path(directory) / f"{position:02d}-{source['path'].replace('/', '--')}.jsonl"
        lines = [json.dumps(number(rows[i % len(rows)], i)) for i in range(num_rows)]
        path.write_text("\n".join(lines) + "\n")
        kept = {key: value for key, value in source.items() if key in ("weight", "columns", "streaming")}
        local.append({"path": "json", "data_files": str(path)} | kept)
    return local


def bench_result(**configs: object) -> dict:
    """In the form of `mobilemoe bench --json`, with numbers of no machine."""
    models = {
        name: {
            "runtime": "pytorch",
            "file_bytes": 713_916_240,
            "start_seconds": {"warm": {"load": 0.5, "first_token": 0.1}},
            "weight_bytes_per_token": 156_413_952,
            "kv_bits": 16,
            "config": config.to_dict(),
            "peak_memory_bytes": 10**9,
            "lengths": {
                str(length): {
                    "prefill_tokens_per_s": spread([90.0, 100.0, 120.0]),
                    "first_token_ms": spread([1500.0, 1600.0, 1700.0]),
                    "decode_tokens_per_s": spread([20.25, 21.5, 22.0]),
                }
                for length in (128, 512)
            },
        }
        for name, config in configs.items()
    }
    machine = {"cpu": "Test CPU", "cores": 2, "threads": 1}
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    return {
        "command": "mobilemoe bench --model S --threads 1",
        "benchmark": "host", "prompt": "random tokens", "new_tokens": 48, "machine": machine, "versions": versions,
        "models": models,
    }  # fmt: skip
