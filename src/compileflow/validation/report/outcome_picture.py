"""One picture of a report, for places that show a picture but no page: latency, and use of the limits."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from compileflow.validation.report.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# They keep their contrast on white; the picture has no dark form.
_INK, _SOFT, _PASS, _FAIL, _FRONT, _REST = "#1c2330", "#5b6676", "#1a7f4b", "#b3261e", "#2563a8", "#8a95a5"
_MOST_GATES = 12
_WIDTH_INCHES = 9.0
_ROW_INCHES = 0.32
_BAR = 0.38


def outcome_picture(report: Report) -> bytes:
    """Draw the latencies of both models, and the share of each gate's limit that the differences take, as PNG."""
    from matplotlib.figure import Figure

    gates = [gate for gate in report.verdict.gates if gate.margin is not None][:_MOST_GATES]
    rows = max(2 * len(report.latencies), len(gates), 3)
    figure = Figure(
        figsize=(_WIDTH_INCHES, 1.3 + _ROW_INCHES * rows), dpi=110, layout="constrained", facecolor="white"
    )
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{report.verdict.outcome}: {report.subject.target} {report.subject.precision}",
        color=_PASS if report.verdict.outcome == "pass" else _FAIL if report.verdict.outcome == "fail" else _INK,
    )
    _draw_latencies(left, report)
    right.set_title("accuracy: share of the limit that is used", color=_SOFT, fontsize=10)
    right.barh(
        [gate.gate for gate in gates],
        [max(0.0, 1 - (gate.margin or 0.0)) for gate in gates],
        color=[_FAIL if (gate.margin or 0.0) < 0 else _PASS for gate in gates],
    )
    right.axvline(1.0, color=_SOFT, linestyle="--", linewidth=1)
    right.set_xlim(0, 1.15 if all((gate.margin or 0.0) >= 0 for gate in gates) else None)
    right.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_latencies(axes: Axes, report: Report) -> None:
    busy = any(latency.busy for latency in report.latencies)
    axes.set_title("latency, ms" + (" (busy machine: not used)" if busy else ""), color=_SOFT, fontsize=10)
    if not report.latencies:
        axes.text(0.5, 0.5, "not timed", ha="center", transform=axes.transAxes, color=_SOFT)
        axes.set_axis_off()
        return
    for offset, label, colour, values in (
        (-_BAR / 2, "eager", _REST, [latency.reference_p50_ms for latency in report.latencies]),
        (_BAR / 2, "compiled", _FRONT, [latency.candidate_p50_ms for latency in report.latencies]),
    ):
        bars = axes.barh(
            [row + offset for row in range(len(values))], values, height=_BAR, label=label, color=colour
        )
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8, color=_INK)
    axes.set_yticks(range(len(report.latencies)), [latency.shape for latency in report.latencies])
    axes.margins(x=0.15)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
