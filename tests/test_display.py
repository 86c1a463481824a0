"""Tables that fit 80 columns and never break a number, and pictures."""

import matplotlib
import pytest

from mobilemoe.display import markdown, number, picture, show, table, with_spread


def lines_of(capsys, *parts) -> list[str]:
    show(*parts)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_numbers_are_short_and_have_no_exponent():
    values = {45.123: "45.1", 203.4: "203", 1240.4: "1240", 123456: "123000", 0.01234: "0.0123", 99.96: "100", 0: "0"}
    assert [number(value) for value in values] == list(values.values())
    assert with_spread(203.2, 187.1, 216.9) == "203 (187-217)"


def test_numbers_are_aligned_right_and_text_left(capsys):
    lines = lines_of(
        capsys, table(("name", "of the limit", "tokens/s"), [("a [b]", "7%", "9 (8-10)"), ("ab", None, 1000)])
    )
    assert lines == [
        "         of the",
        "name      limit  tokens/s",
        "─" * 25,
        "a [b]        7%  9 (8-10)",
        "ab                   1000",
    ]


def test_text_wraps_at_80_columns_and_numbers_stay_whole(capsys):
    cells = ["1240 (1190-1300)"] * 3
    lines = lines_of(capsys, "word " * 30, table(["path", *"abc"], [["/a/very/long/path" * 5, *cells]], "title"))
    assert max(map(len, lines)) <= 80
    assert " ".join(cells) in " ".join(" ".join(lines).split())
    # More numbers than fit: wider, not broken.
    lines = lines_of(capsys, table("abcdef", [["1240 (1190-1300)"] * 6]))
    assert lines[-1].split("  ") == ["1240 (1190-1300)"] * 6


def test_markdown():
    assert markdown(("a", "b"), [(1, "x")]) == "| a | b |\n|---|---|\n| 1 | x |"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_written_in_the_format_of_its_suffix(tmp_path, suffix):
    before = matplotlib.rcParams["axes.grid"], matplotlib.rcParams["font.size"]
    with picture(tmp_path / f"p.{suffix}", (4, 3), 1, 2) as axes:
        assert len(axes) == 2
        axes[0].plot([1, 2])
    assert (tmp_path / f"p.{suffix}").read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    # The style of whoever called stays.
    assert (matplotlib.rcParams["axes.grid"], matplotlib.rcParams["font.size"]) == before
