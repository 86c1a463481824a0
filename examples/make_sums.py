"""
Writes sums with a right and a wrong answer as JSONL, for the recipes after fine-tuning.

    python examples/make_sums.py out/sums.jsonl
"""

import json
import random
import sys
from pathlib import Path


def main() -> None:
    output, generator = Path(sys.argv[1]), random.Random(0)
    pairs = [(a, b) for a in range(10) for b in range(10)]
    generator.shuffle(pairs)
    rows = [
        {
            "prompt": f"What is {a} + {b}?",
            "chosen": f"{a + b}",
            "rejected": f"{a + b + generator.choice((-2, -1, 1, 2))}",
            "answer": f"{a + b}",
        }
        for a, b in pairs
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
