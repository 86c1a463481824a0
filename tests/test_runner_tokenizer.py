"""The runner's tokenizer splits text as the `tokenizers` library does."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from tokenizers import Regex, pre_tokenizers


SOURCES = ROOT / "modeling_mobilemoe/kernels/src"
CLASSES = {"kLetters": r"\p{L}", "kNumbers": r"\p{N}", "kSpaces": r"\s"}
# All characters but surrogates, which are none.
EVERY = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eot", "<|"]
PARTS = ["'s", "'S", "'\u017f", "'t", "'RE", "'ve", "'m", "'LL", "'d", "'x", "'", "''s", " ", "  ", "   ", "\t", "\n",
         "\r\n", "\n\n", " \n ", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x0b", "\0", "1", "12", "123",
         "1234567", "\u0663\u0664", "\u00bd", "\u2167", "def ", "return", "self", "na\u00efve", "\u4f60\u597d",
         "\U0001f44d\U0001f3fd", "e\u0301", "\u0915\u094d\u0937", "...", "!!\n", "(", ")", "=="]  # fmt: skip


def ranges(pattern: str) -> list[tuple[int, int]]:
    """The runs of code points that the library's regular expressions match."""
    # One that none of the classes has, so that each character is alone.
    text = "".join(f"{character}!" for character in EVERY)
    splitter = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    found = [ord(piece) for piece, _ in splitter.pre_tokenize_str(text)]
    runs: list[tuple[int, int]] = []
    for code in found:
        if runs and runs[-1][1] == code - 1:
            runs[-1] = (runs[-1][0], code)
        else:
            runs.append((code, code))
    return runs


def header() -> str:
    """`unicode_ranges.h`. To write it: python tests/test_runner_tokenizer.py"""
    parts = []
    for name, pattern in CLASSES.items():
        found = ranges(pattern)
        items = [f"{{{first:#x}, {last:#x}}}" for first, last in found]
        rows, row = [], ""
        for item in items:
            if len(row) + len(item) > 110:
                rows.append(row)
                row = ""
            row += f"{item}, "
        body = "\n".join(f"    {row.strip()}" for row in [*rows, row])
        parts.append(
            f"// {pattern}\ninline constexpr std::array<CodeRange, {len(found)}> {name} = {{{{\n{body}\n}}}};\n"
        )
    return (
        "// Code points of the classes in the Llama-3 split, as the regular expressions of `tokenizers` know them.\n"
        "// Generated: python tests/test_runner_tokenizer.py\n#pragma once\n\n#include <array>\n#include <cstdint>\n\n"
        "namespace mobilemoe {\n\nstruct CodeRange {\n  uint32_t first, last;\n};\n\n"
        + "\n".join(parts)
        + "\n}  // namespace mobilemoe\n"
    )


def random_texts(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    source = Path(random.__file__).read_text()
    for index in range(count):
        kind = index % 5
        if kind == 0:
            yield "".join(rng.choices(EVERY, k=rng.randint(0, 20)))
        elif kind == 1:
            yield "".join(rng.choices(PARTS, k=rng.randint(1, 20)))
        elif kind == 2:
            yield "".join(rng.choices([*PARTS, *SPECIAL], k=rng.randint(1, 10)))
        elif kind == 3:
            start = rng.randrange(len(source) - 80)
            yield source[start : start + rng.randint(1, 80)]
        else:
            # Characters of one script, where letters, marks and digits are neighbours.
            start = rng.randrange(0x3000)
            yield "".join(chr(start + rng.randrange(64)) for _ in range(rng.randint(1, 30)))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("driver") / "driver"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["c++", *options, "-I", SOURCES, ROOT / "tests/tokenizer_driver.cpp", "-o", program], check=True)
    return program


def compare(driver: Path, tokenizer, path: Path, texts: list[str]) -> None:
    backend = tokenizer.backend_tokenizer
    backend.save(str(path))
    lines = "".join(f"{json.dumps(text)}\n" for text in texts)
    result = subprocess.run([driver, path], input=lines, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr
    rows = result.stdout.splitlines()
    assert len(rows) == len(texts)
    special = "|".join(re.escape(token.content) for token in backend.get_added_tokens_decoder().values())
    for text, row, encoding in zip(texts, rows, backend.encode_batch(texts, add_special_tokens=False), strict=True):
        ids, _, content = row.partition("|")
        assert [int(token) for token in ids.split()] == encoding.ids, repr(text)
        assert bytes.fromhex(content).decode() == re.sub(special, "", text), repr(text)


def test_some_thousand_texts(driver: Path, tokenizer, tmp_path: Path):
    compare(driver, tokenizer, tmp_path / "tokenizer.json", list(random_texts(5000, seed=0)))


@pytest.mark.slow
def test_a_hundred_thousand_texts(driver: Path, tokenizer, tmp_path: Path):
    compare(driver, tokenizer, tmp_path / "tokenizer.json", list(random_texts(100_000, seed=1)))


def test_merges_that_are_ignored_and_the_older_format(driver: Path, tokenizer, tmp_path: Path):
    """As the released file: a piece that is a token is not merged."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = list(random_texts(2000, seed=2))
    # A token that no merges lead to.
    content["model"]["vocab"]["zqxj"] = 600
    for ignore in (True, False):
        content["model"]["ignore_merges"] = ignore
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"] if len(pair) == 2]
        changed = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
        other = type(tokenizer)(tokenizer_object=changed)
        compare(driver, other, tmp_path / "tokenizer.json", [*texts, "zqxj", "zqxj zqxj"])
        assert (changed.encode("zqxj", add_special_tokens=False).ids == [600]) == ignore
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        result = subprocess.run(
            [driver, tmp_path / "tokenizer.json"], input='"zqxj"\n', capture_output=True, text=True
        )
        assert result.stdout.startswith("600 |") == ignore
        content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"model": content["model"]}


def test_the_classes_are_those_of_the_library():
    assert (SOURCES / "unicode_ranges.h").read_text() == header(), "run python tests/test_runner_tokenizer.py"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["model"].update(type="Unigram"), "is no byte-level BPE"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "is no byte-level BPE"),
        (
            lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=" "),
            "no byte-level BPE",
        ),
        (lambda content: content["model"]["vocab"].pop("a"), "is not|has no token for byte 97"),
        (lambda content: content["model"]["vocab"].update(a=-1), "has an id that is no number"),
        (lambda content: content["model"]["vocab"].update({"\u4f60": 7}), "has a token that is not made of bytes"),
        (lambda content: content["model"]["merges"].append(["qqqq", "a"]), "has a merge whose tokens are not in"),
        (lambda content: content["added_tokens"][0].update(lstrip=True), "matched in a way that is not known"),
    ],
)
def test_other_tokenizers_are_refused(driver: Path, tokenizer, tmp_path: Path, change, message: str):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    result = subprocess.run([driver, tmp_path / "tokenizer.json"], input='"a"\n', capture_output=True, text=True)
    assert result.returncode == 1 and re.search(f"^error: .*({message})", result.stdout)


@pytest.mark.parametrize("text", ["", "{", '{"model": }', '"\\u12"', "[" * 1000, '{"model": tru', '"a'])
def test_damaged_files_are_refused(driver: Path, tmp_path: Path, text: str):
    (tmp_path / "tokenizer.json").write_text(text)
    result = subprocess.run([driver, tmp_path / "tokenizer.json"], input='"a"\n', capture_output=True, text=True)
    assert result.returncode == 1 and re.match("error: (no JSON at byte|cannot be read)", result.stdout)


if __name__ == "__main__":
    (SOURCES / "unicode_ranges.h").write_text(header())
