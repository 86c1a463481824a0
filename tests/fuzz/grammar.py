"""Damage to values, texts and bytes, from a seeded random generator, with words for it."""

import copy
import json
import random
from typing import Any


WEIRD = (
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-40, 1e308, -1e9,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "nan", "1", "true", "../../../etc/passwd", "/dev/zero",
    "a/b\x00c", "ü" * 300, "%s%n{0}", [], {}, [None], [[]], [-1], {"a": {}}, {"": None},
)  # fmt: skip
NON_FINITE = (float("nan"), float("inf"), float("-inf"))


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """The paths of all nodes but the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, child in items for path in [(*prefix, key), *paths(child, (*prefix, key))]]


def damage_value(rng: random.Random, value: Any, keys: list[tuple] | None = None) -> tuple[Any, str]:
    """A copy of a JSON value with one node changed, of `keys` if given."""
    changed = copy.deepcopy(value)
    candidates = paths(changed) if keys is None else keys
    if not candidates:
        new = rng.choice(WEIRD)
        return new, f"all = {new!r}"[:200]
    path = rng.choice(candidates)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    where = ".".join(map(str, path))
    action = rng.choice(("replace",) * 6 + ("remove", "rename", "nest"))
    if action == "remove":
        del parent[path[-1]]
        return changed, f"{where} removed"
    if action == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}_"] = parent.pop(path[-1])
        return changed, f"{where} renamed"
    if action == "nest":
        parent[path[-1]] = [parent[path[-1]]]
        return changed, f"{where} in a list"
    new = rng.choice(WEIRD)
    parent[path[-1]] = new
    return changed, f"{where} = {new!r}"[:200]


def damage_json(rng: random.Random, value: Any) -> tuple[bytes, str]:
    """The text of a JSON file that is wrong in its values, or else in its text."""
    if rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value, words = damage_value(rng, value)
        return json.dumps(value).encode(), words
    return damage_text(rng, json.dumps(value, indent=2).encode())


def damage_text(rng: random.Random, text: bytes) -> tuple[bytes, str]:
    at = rng.randrange(max(1, len(text)))
    kinds = {
        f"cut at byte {at}": text[:at],
        "empty": b"",
        "null": b"null",
        "a number": b"1e999",
        "a list": b"[]",
        "deep": b"[" * 100_000,
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "UTF-16": text.decode(errors="replace").encode("utf-16"),
        f"0xff at byte {at}": text[:at] + b"\xff" + text[at + 1 :],
        f"NUL at byte {at}": text[:at] + b"\0" + text[at:],
        f"doubled at byte {at}": text[:at] + text[: at + 40] + text[at:],
        "twice": text + text,
    }
    words = rng.choice(sorted(kinds))
    return kinds[words], words


def damage_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Of a binary file. Most leave its size as it was."""
    size = len(content)
    at = rng.choice((rng.randrange(size), rng.randrange(min(size, 4096))))
    changed = bytearray(content)
    kind = rng.choice(("bits", "bits", "zeros", "ones", "cut", "longer", "empty", "swapped", "random"))
    if kind == "bits":
        places = [at, *(rng.randrange(size) for _ in range(rng.choice((0, 0, 7, 63))))]
        for place in places:
            changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed), f"{len(places)} bits flipped, the first in byte {at}"
    if kind in ("zeros", "ones"):
        end = min(size, at + rng.choice((1, 8, 64, 4096)))
        changed[at:end] = (b"\0" if kind == "zeros" else b"\xff") * (end - at)
        return bytes(changed), f"{kind} in bytes {at} to {end}"
    if kind == "cut":
        return content[:at], f"cut at byte {at}"
    if kind == "longer":
        return content + bytes(rng.choice((1, 100))), "longer"
    if kind == "swapped":
        half = size // 2
        return content[half:] + content[:half], "halves swapped"
    if kind == "random":
        return rng.randbytes(size), "random bytes of the same size"
    return b"", "empty"


def is_finite(value: Any) -> bool:
    """Whether all numbers in a JSON value are."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or abs(value) < float("inf")
