"""Structured output: masks against a naive search, and answers of models against the schema or expression."""

import json
import random
import re

import jsonschema
import pytest
import torch

from mobilemoe.grammar import Grammars, read_schema
from mobilemoe.runtime import CheckpointModel, PteModel


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["walk", "run"]}, "steps": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["name", "steps"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(text_checkpoint):
    return CheckpointModel(text_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def pte(kernel_pte):
    return PteModel(kernel_pte)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars.of(tokenizer, [497, 504])


def allowed(grammar, num_logits: int = 512) -> set[int]:
    masked = grammar.mask(torch.zeros(num_logits))
    assert masked.shape == (num_logits,) and set(masked.tolist()) <= {0.0, -torch.inf}
    return set(masked.isfinite().nonzero().flatten().tolist())


def test_masks_are_those_of_a_naive_search(grammars, tokenizer):
    """Against all texts of a small language; a random walk through it, then every text that it ended with."""
    texts = {"".join(letters) for letters in re.findall(r"[^|]+", "import|imports|in|int|def|default|=|==|import re")}
    pieces = {token: tokenizer.decode([token]) for token in range(496)}
    generator = random.Random(0)
    reached = set()
    for _ in range(40):
        grammar, text = grammars.regex("imports?|int?|def(ault)?|==?|import re"), ""
        while True:
            follow = {token for token, piece in pieces.items() if any(t.startswith(text + piece) for t in texts)}
            ends = {497, 504} if text in texts else set()
            # Where the next letters are certain, only one of the tokens that begin them is allowed.
            found = allowed(grammar)
            assert found <= follow | ends and (found == follow | ends or len(found) == 1)
            assert grammar.is_matched == (text in texts) and grammar.is_complete == (not follow)
            if grammar.is_complete or found & ends and generator.random() < 0.3:
                break
            token = generator.choice(sorted(found - ends))
            grammar.append(token)
            text += pieces[token]
        reached.add(text)
    assert reached == texts


def test_logits_without_a_token_are_never_chosen(grammars):
    assert max(allowed(grammars.regex("[^a]*"), 600)) < 512


def random_schema(generator: random.Random, depth: int = 2) -> dict:
    """Everything in it is bounded, so that an answer is."""
    kinds = ["string", "integer", "boolean", "enum", "pattern", "null", *(["object", "array"] * 2 if depth else [])]
    kind = generator.choice(kinds)
    if kind == "object":
        names = generator.sample(["name", "steps", "is_open", "x", "given"], generator.randrange(1, 4))
        properties = {name: random_schema(generator, depth - 1) for name in names}
        required = [name for name in names if generator.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = generator.randrange(2)
        return {
            "type": "array",
            "items": random_schema(generator, depth - 1),
            "minItems": least,
            "maxItems": least + generator.randrange(1, 3),
        }
    return {
        "string": {"type": "string", "maxLength": generator.randrange(1, 8)},
        "integer": {"type": "integer", "minimum": -generator.randrange(100), "maximum": generator.randrange(1, 5000)},
        "boolean": {"type": "boolean"},
        "enum": {"enum": generator.sample(["red", "green", 3, None, True, "é"], 3)},
        "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
        "null": {"type": "null"},
    }[kind]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_are_what_random_schemas_allow(checkpoint, temperature):
    generator = random.Random(0)
    prompt = checkpoint.encode("def walk(steps):\n")
    answers = []
    for seed in range(40):
        schema = random_schema(generator)
        grammar = checkpoint.grammars.json_schema(schema)
        tokens = list(checkpoint.generate(prompt, 230, temperature=temperature, seed=seed, grammar=grammar))
        assert grammar.is_matched
        answers.append(checkpoint.decode(tokens))
        jsonschema.validate(json.loads(answers[-1]), schema)
        # On one line, written as by json.dumps.
        assert answers[-1].count("\n") == 0
    assert len(set(answers)) > 15


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompt_lookup_and_forced_tokens_change_nothing(pte, temperature, monkeypatch):
    assert pte.is_exact
    prompt, grammar = pte.encode("import os"), pte.grammars.json_schema(SCHEMA)
    calls, forward = [], pte._forward
    monkeypatch.setattr(pte, "_forward", lambda tokens, *rest: calls.append(len(tokens)) or forward(tokens, *rest))

    def answer(**options) -> tuple[list[int], int]:
        calls.clear()
        return list(pte.generate(prompt, 40, temperature=temperature, seed=2, grammar=grammar, **options)), len(calls)

    expected, num_calls = answer(prompt_lookup=False)
    jsonschema.validate(json.loads(pte.decode(expected)), SCHEMA)
    found, fewer_calls = answer()
    assert found == expected
    # The keys of the schema take one call, not one for each token.
    assert num_calls == len(expected) and fewer_calls < 0.7 * num_calls


def test_an_answer_ends_where_it_matches(checkpoint):
    prompt = checkpoint.encode("def walk(steps):\n")
    pattern = "(yes|no), [a-z]{3,8}[.]"
    grammar = checkpoint.grammars.regex(pattern)
    answer = checkpoint.decode(list(checkpoint.generate(prompt, 40, temperature=1.0, seed=1, grammar=grammar)))
    assert re.fullmatch(pattern, answer)
    # The same grammar again, cut off.
    assert len(list(checkpoint.generate(prompt, 2, grammar=grammar))) == 2
    assert not grammar.is_matched
    # No answer at all, and one that only an end token ends.
    empty = checkpoint.grammars.regex("")
    assert list(checkpoint.generate(prompt, 4, grammar=empty)) == [] and empty.is_matched
    open_ended = checkpoint.grammars.regex("[a-z]+")
    tokens = list(checkpoint.generate(prompt, 100, temperature=5.0, seed=0, grammar=open_ended))
    assert len(tokens) < 100 and re.fullmatch("[a-z]+", checkpoint.decode(tokens))


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"type": "strin"}, "Invalid type: strin. Change it"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "http://localhost/schema"}, "does not fetch"),
        ([{"type": "string"}], "not an object"),
        (True, "not an object"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(grammars, schema, error):
    with pytest.raises(ValueError, match=f"(?s)The JSON schema .*{error}"):
        grammars.json_schema(schema)


@pytest.mark.parametrize("pattern", ["(", "a{2", "(?=a)b", r"(a)\1"])
def test_expressions_that_cannot_be_followed_are_refused(grammars, pattern):
    with pytest.raises(ValueError, match=r"(?s)The regular expression .* cannot be followed: .*Change it"):
        grammars.regex(pattern)


def test_schema_files_are_read(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert read_schema(path) == SCHEMA
    path.write_text("{")
    with pytest.raises(ValueError, match="does not hold JSON: .*Give a file with a JSON schema"):
        read_schema(path)
    with pytest.raises(OSError):
        read_schema(tmp_path / "none.json")
