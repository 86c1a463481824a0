"""
Draws one decoder layer of MobileMoE-S, for the README.

    python benchmarks/decoder_layer.py [--output docs/decoder_layer.svg]

The sizes are those of `MobileMoEConfig()`. The background is opaque, since GitHub shows the same image in its light
and dark themes.
"""

import argparse
import html
from pathlib import Path

from modeling_mobilemoe import MobileMoEConfig


WIDTH, HEIGHT = 960, 664
# Fill and border colour by kind of box.
COLORS = {
    "norm": ("#f6f8fa", "#8c959f"),
    "attention": ("#ddf4ff", "#218bff"),
    "router": ("#fff1e5", "#e16f24"),
    "expert": ("#dafbe1", "#2da44e"),
}
STYLE = """
text { font-family: -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-size: 17px; font-weight: 600; }
.name { font-size: 15px; font-weight: 600; text-anchor: middle; }
.note { font-size: 13px; fill: #4d5761; text-anchor: middle; }
.label { text-anchor: start; }
.stream { stroke: #1f2328; stroke-width: 3; fill: none; marker-end: url(#end); }
.flow { stroke: #4d5761; stroke-width: 1.5; fill: none; marker-end: url(#arrow); }
"""


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" class="{style}">{html.escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, name: str, *notes: str) -> str:
    """A rectangle with a name and lines of notes, centred."""
    fill, border = COLORS[kind]
    middle, first = x + width / 2, y + height / 2 + 5 - 8.5 * len(notes)
    lines = [text(middle, first + 18 * (row + 1), note, "note") for row, note in enumerate(notes)]
    rectangle = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{border}" '
    return "\n".join([rectangle + 'stroke-width="1.5"/>', text(middle, first, name, "name"), *lines])


def path(points: str, style: str = "flow") -> str:
    return f'<path d="{points}" class="{style}"/>'


def marker(name: str, size: float, tip: float, color: str) -> str:
    """An arrowhead, in units of the line's width."""
    attributes = f'viewBox="0 0 8 8" refX="{tip}" refY="4" markerWidth="{size}" markerHeight="{size}" orient="auto"'
    return f'<marker id="{name}" {attributes}><path d="M0,0.5 L7.5,4 L0,7.5 Z" fill="{color}"/></marker>'


def node(x: float, y: float, sign: str) -> str:
    """A circle with a plus or a times sign."""
    plus = f"M{x - 6},{y} H{x + 6} M{x},{y - 6} V{y + 6}"
    times = f"M{x - 4.5},{y - 4.5} l9,9 M{x - 4.5},{y + 4.5} l9,-9"
    return (
        f'<circle cx="{x}" cy="{y}" r="12" fill="#ffffff" stroke="#1f2328" stroke-width="2"/>\n'
        f'<path d="{plus if sign == "+" else times}" stroke="#1f2328" stroke-width="2"/>'
    )


def attention(config: MobileMoEConfig) -> list[str]:
    """The upper half: the stream along y = 78, queries, keys and values below it."""
    queries, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return [
        path("M76,78 V192"),
        box(24, 194, 104, 44, "norm", "RMSNorm"),
        path("M128,216 H146 V152 H164"),
        path("M128,216 H164"),
        path("M146,216 V280 H164"),
        box(166, 128, 124, 48, "attention", "q_proj", f"{queries} heads of {size}"),
        box(166, 192, 124, 48, "attention", "k_proj", f"{keys} heads of {size}"),
        box(166, 256, 124, 48, "attention", "v_proj", f"{keys} heads of {size}"),
        path("M290,152 H320"),
        path("M290,216 H320"),
        path("M290,280 H602"),
        box(322, 128, 116, 112, "attention", "RoPE", "rotates adjacent", "channel pairs", "(2i, 2i + 1)"),
        path("M438,152 H466"),
        path("M438,216 H466"),
        box(468, 128, 112, 112, "norm", "RMS norm", "of every head,", "no weights"),
        path("M580,152 H602"),
        path("M580,216 H602"),
        box(
            604,
            128,
            150,
            176,
            "attention",
            "attention",
            "causal,",
            "grouped-query:",
            f"{queries // keys} query heads share",
            "one head of keys",
            "and values",
        ),
        path("M754,216 H782"),
        box(784, 194, 92, 44, "attention", "o_proj"),
        path("M830,194 V92"),
        node(830, 78, "+"),
    ]


def squares(config: MobileMoEConfig, x: float, y: float) -> list[str]:
    """One square per routed expert; the selected ones are filled."""
    columns, step, visited = 15, 16, (4, 26, 32, 58)
    parts = []
    for expert in range(config.num_local_experts):
        fill, border = ("#ffffff", "#8fcea0")
        if expert in visited[: config.num_experts_per_tok]:
            fill = border = COLORS["expert"][1]
        left, top = x + step * (expert % columns), y + step * (expert // columns)
        parts.append(f'<rect x="{left}" y="{top}" width="12" height="12" rx="2.5" fill="{fill}" stroke="{border}"/>')
    return parts


def experts(config: MobileMoEConfig) -> list[str]:
    """The lower half: the stream along y = 376; router, routed experts and the shared expert below it."""
    routed, top_k = config.num_local_experts, config.num_experts_per_tok
    fill, border = COLORS["expert"]
    return [
        path("M76,376 V516"),
        box(24, 518, 104, 44, "norm", "RMSNorm"),
        path("M128,540 H146 V468 H164"),
        path("M128,540 H484"),
        path("M146,540 V616 H484"),
        box(166, 410, 110, 116, "router", "router", "in FP32:", f"{routed} sigmoid", "scores"),
        path("M276,433 H304"),
        path("M276,503 H304"),
        box(306, 410, 146, 46, "router", "weights", f"scores / sum × {config.routed_scaling_factor}"),
        box(306, 480, 146, 46, "router", f"top {top_k}", "by score + bias"),
        path("M379,480 V458"),
        path("M452,503 H484"),
        path("M452,433 H466 V398 H784 V472"),
        f'<rect x="486" y="410" width="258" height="152" rx="7" fill="{fill}" stroke="{border}" stroke-width="1.5"/>',
        text(615, 437, f"{top_k} of {routed} routed experts", "name"),
        *squares(config, 497, 457),
        text(615, 546, f"SwiGLU of width {config.intermediate_size}", "note"),
        path("M744,486 H770"),
        node(784, 486, "×"),
        path("M796,486 H816"),
        node(830, 486, "+"),
        box(486, 588, 258, 56, "expert", "shared expert", f"SwiGLU of width {config.intermediate_size_mlp:,}"),
        path("M744,616 H830 V500"),
        path("M830,474 V390"),
        node(830, 376, "+"),
    ]


def draw(config: MobileMoEConfig) -> str:
    title = f"One of the {config.num_hidden_layers} decoder layers of MobileMoE-S"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
            f"<style>{STYLE}</style>",
            "<defs>",
            marker("arrow", size=7, tip=7, color="#4d5761"),
            marker("end", size=4.5, tip=6, color="#1f2328"),
            "</defs>",
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" fill="#ffffff" stroke="#d0d7de"/>',
            text(24, 36, title, "title"),
            text(146, 68, f"residual stream, width {config.hidden_size}", "note label"),
            # From the right edge of the upper half back to the left edge of the lower half.
            path("M24,78 H912 Q936,78 936,102 V314 Q936,338 912,338 H43 Q24,338 24,357 Q24,376 43,376 H934", "stream"),
            *attention(config),
            *experts(config),
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("docs/decoder_layer.svg"))
    output = parser.parse_args().output
    output.write_text(draw(MobileMoEConfig()))
    print(output)


if __name__ == "__main__":
    main()
