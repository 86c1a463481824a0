"""
Records the road from fifty conversations to one's own INT4 model, and draws the recording.

    python examples/record.py            # after `make demo`: runs the commands, writes docs/train.cast, draws it
    python examples/record.py --draw     # draws docs/train.cast anew as docs/train.svg

The commands run in a pseudo-terminal. The cast is an asciicast, https://docs.asciinema.org/manual/asciicast/v2/, with
true times; the picture shows them at its left edge, and shortens waiting.
"""

import argparse
import html
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pexpect


ROOT = Path(__file__).parents[1]
CAST, PICTURE = ROOT / "docs/train.cast", ROOT / "docs/train.svg"
COLUMNS, ROWS = 96, 34
MODEL = "out/my-model"
QUESTION = "What does `textwrap.dedent` do?"
COMMANDS = [
    "python examples/make_chats.py out/chats.jsonl",
    f"mobilemoe train --data out/chats.jsonl --model out/demo/2-midtrain --output {MODEL} --qat --export pte gguf",
    f"mobilemoe run --model {MODEL}/pte --chat --prompt {shlex.quote(QUESTION)} --max-new-tokens 40",
]
# Longest wait that is shown, in seconds.
LONGEST_WAIT = 0.6
# Pixels of a character and of a line.
WIDTH, HEIGHT = 7.8, 17
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def record() -> None:
    """Runs the commands and writes what they print, with times in seconds."""
    shutil.rmtree(ROOT / MODEL, ignore_errors=True)
    started, events = time.time(), []

    def show(text: str) -> None:
        events.append([round(time.time() - started, 3), "o", text])
        print(text, end="", flush=True)

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    for command in COMMANDS:
        show(f"$ {command}\r\n")
        shell = pexpect.spawn(
            "/bin/bash", ["-c", command], cwd=str(ROOT), env=environment, dimensions=(ROWS, COLUMNS), timeout=1200,
            encoding="utf-8",
        )  # fmt: skip
        while shell.expect([r".+", pexpect.EOF]) == 0:
            show(shell.after)
        shell.close()
        if shell.exitstatus:
            raise SystemExit(f"{command} ended with {shell.exitstatus}.")
        show("\r\n")
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "timestamp": int(started)}
    CAST.write_text("".join(json.dumps(row) + "\n" for row in [header, *events]))


def screen_lines(events: list[list]) -> list[tuple[float, str, bool]]:
    """The lines on the terminal, broken at its width: the time of the last change, text, whether it is a command."""
    lines: list[tuple[float, str, bool]] = []
    when, line = 0.0, ""
    for at, _, text in events:
        for piece in re.split(r"(\r\n|\r|\n)", ESCAPE.sub("", text)):
            if piece in ("\r\n", "\n"):
                # An empty line appears at once, another one when it changed last.
                rest = [line[start : start + COLUMNS] for start in range(0, max(1, len(line)), COLUMNS)]
                lines += [(when if line else at, part, line.startswith("$ ")) for part in rest]
                line = ""
            elif piece == "\r":
                line = ""
            elif piece:
                when, line = at, line + piece
    return lines[:-1] if lines and not lines[-1][1] else lines


def draw() -> None:
    """Draws the cast: lines that appear, scrolling, and the true time at the left."""
    header, *events = (json.loads(row) for row in CAST.read_text().splitlines())
    lines = screen_lines(events)
    shown, clock, before = [], 0.0, 0.0
    for at, *_ in lines:
        clock += min(LONGEST_WAIT, max(0.08, at - before))
        before = at
        shown.append(clock)
    gutter = 48
    width, height = gutter + COLUMNS * WIDTH + 12, ROWS * HEIGHT + 20
    rows, scrolls, second = [], ["0%{transform:translateY(0)}"], -1
    for index, ((at, text, is_command), delay) in enumerate(zip(lines, shown, strict=True)):
        y = 22 + index * HEIGHT
        style = "c" if is_command else "o"
        time_text = "" if int(at) == second or not text.strip() else f"{int(at) // 60}:{int(at) % 60:02d}"
        second = int(at) if text else second
        rows.append(
            f'<g class="l" style="animation-delay:{delay:.2f}s"><text class="t" x="40" y="{y}">{time_text}</text>'
            f'<text class="{style}" x="{gutter}" y="{y}">{html.escape(text)}</text></g>'
        )
        if index >= ROWS:
            offset = (index - ROWS + 1) * HEIGHT
            scrolls.append(f"{100 * delay / clock:.3f}%{{transform:translateY(-{offset}px)}}")
    last = max(0, len(lines) - ROWS) * HEIGHT
    style = (
        "text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre}"
        ".t{fill:#6e7681;text-anchor:end;font-size:11px}.o{fill:#c9d1d9}.c{fill:#7ee787;font-weight:bold}"
        "@keyframes a{from{opacity:0}}.l{animation:a 1ms backwards}"
        f"@keyframes s{{{''.join(scrolls)}100%{{transform:translateY(-{last}px)}}}}"
        f".s{{transform:translateY(-{last}px);animation:s {clock:.2f}s step-end both}}"
    )
    PICTURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}"><style>{style}</style>'
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>'
        f'<clipPath id="v"><rect y="6" width="{width:.0f}" height="{height - 12}"/></clipPath>'
        f'<g clip-path="url(#v)"><g class="s">{"".join(rows)}</g></g></svg>\n'
    )
    print(f"{PICTURE.relative_to(ROOT)}: {len(lines)} lines, {lines[-1][0]:.0f} s, shown in {clock:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--draw", action="store_true", help="draw the recording that is there")
    if not parser.parse_args().draw:
        record()
    draw()
