"""What `export.json` says, as a table and a sentence."""

from typing import TYPE_CHECKING

from ..artifacts import Export, Parity, RuntimeExport
from ..display import table


if TYPE_CHECKING:
    from rich.console import Group


def parity_table(parity: Parity) -> "Group":
    """The program beside PyTorch, and what every rounding costs."""
    measured = {
        ".pte to the checkpoint": parity.pte_to_checkpoint,
        **{f"- {source} alone, in PyTorch": row for source, row in parity.sources.items()},
        ".pte to PyTorch, same roundings": parity.pte_to_pytorch_with_the_same_roundings,
        "prefill to token by token": parity.prefill_to_token_by_token,
    }
    rows = [
        (
            name,
            f"{row.cosine_mean:.6f}",
            f"{row.cosine_min:.6f}",
            f"{row.sqnr_db:.1f}",
            f"{row.kl_nats:.2e}",
            f"{row.top1_agreement:.3f}",
        )
        for name, row in measured.items()
    ]
    equal, total = parity.greedy_tokens_equal, parity.greedy_tokens
    caption = f"{parity.positions} positions; greedy: {equal} of {total} tokens equal until the first difference"
    return table(("logits", "cosine", "lowest", "SQNR dB", "KL nats", "top-1"), rows, caption=caption)


def export_report(report: Export | RuntimeExport) -> "list[str | Group]":
    """The comparison with PyTorch, and what the weights lost on the way."""
    if isinstance(report, RuntimeExport):
        return [rounding_table(report)]
    parts = [parity_table(report.parity)]
    if report.experts_rounded_twice:
        parts.append(
            f"Experts: from groups along the output to INT{report.expert_bits} along the input, "
            f"{report.expert_rounding_sqnr_db} dB of signal to rounding noise in the weights"
        )
    return parts


def rounding_table(report: RuntimeExport) -> "Group":
    """What an export to another runtime rounded, and how its logits compare."""
    caption = f"logits {report.not_compared}"
    if report.parity is not None:
        caption = (
            f"logits beside PyTorch: cosine {report.parity.cosine_mean:.6f}, lowest {report.parity.cosine_min:.6f}, "
            f"SQNR {report.parity.sqnr_db:.1f} dB, top-1 {report.parity.top1_agreement:.3f}"
        )
    return table(("weights", "signal to rounding noise"), list(report.rounding.items()), caption=caption)
