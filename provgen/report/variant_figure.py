"""The figure of a table of variants: lines over what varies, or a row of dots for each variant.

Matplotlib's object API, as in `figures`.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from provgen.report.variant_lines import plot_lines
from provgen.report.variant_report import Row, numbers_of
from provgen.report.variant_rows import plot_rows


def plot_variants(
    rows: Sequence[Row], metrics: Sequence[str], *, x: str | None, lines: Sequence[str]
) -> Figure:
    """Plot metrics with 95 % t intervals over seeds, and dashed what each is measured against.

    Args:
        rows: One per run, in the order of the variants, with `variant`, `seed`, the keys that vary and metrics.
        metrics: A panel each; what no row has gets none, unless no row has any.
        x: Key on the x axis; None draws a row of dots for each variant.
        lines: Keys whose values get a line each.
    """
    shown = [metric for metric in metrics if numbers_of(rows, metric)] or list(metrics)[:1]
    return plot_rows(rows, shown) if x is None else plot_lines(rows, shown, x, lines)
