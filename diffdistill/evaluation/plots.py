"""Plots of the report, drawn with matplotlib's Agg backend into PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffdistill.evaluation.tables import Block, Row, Weight, weight_text


@dataclass(frozen=True)
class Theme:
    """Colours of a plot: of the page behind it, of text and lines, and of the curves by row label."""

    background: str
    text: str
    faint: str
    teacher: str
    guided: str
    distilled: str
    others: tuple[str, ...]


LIGHT = Theme("#ffffff", "#24292f", "#e3e6ea", "#6e7781", "#bf6a02", "#1f5fd0", ("#8250df", "#1a7f5a", "#cf222e"))
DARK = Theme("#161b22", "#d5dbe3", "#30363d", "#9aa4b0", "#e3a13c", "#6ba4ff", ("#b794f6", "#4cc38a", "#ff7b72"))
DISTANCE_WIDTH, LOSS_WIDTH = 500, 340  # CSS pixels; the files have more, for sharp screens
_MARKS = {"teacher": "s", "guided": "^", "distilled": "o"}


def distance_plot(w: Weight, block: Block, theme: Theme = LIGHT) -> bytes:
    """One metric against the number of sampling steps at one guidance weight, both axes logarithmic: PNG bytes."""
    figure = _figure(4.6, 3.3, theme)
    axes = figure.subplots()
    _style(axes, theme)
    _curves(axes, block, block.steps, theme)
    axes.set_title(f"{block.metric.title}, {weight_text(w)}", fontsize=10, color=theme.text, loc="left")
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.text)
    return _png(figure)


def overview_plot(arranged: Mapping[Weight, Sequence[Block]], metrics: Sequence[str], theme: Theme = LIGHT) -> bytes:
    """All weights side by side, one row of panels per metric: PNG bytes. Empty panels say that nothing was measured."""
    figure = _figure(3.4 * max(1, len(arranged)), 2.9 * len(metrics) + 0.5, theme)
    panels = figure.subplots(len(metrics), max(1, len(arranged)), squeeze=False, sharey="row", sharex=True)
    legend: dict[str, Any] = {}
    steps = sorted({step for blocks in arranged.values() for block in blocks for step in block.steps})
    for row, name in enumerate(metrics):
        for column, (w, blocks) in enumerate(arranged.items()):
            axes = panels[row][column]
            _style(axes, theme)
            block = next((block for block in blocks if block.metric.name == name), None)
            if block is None:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=theme.text, fontsize=9)
                continue
            legend |= _curves(axes, block, steps, theme)
            axes.set_xlabel("sampling steps" if row == len(metrics) - 1 else "", fontsize=9)
            axes.tick_params(labelbottom=row == len(metrics) - 1)
            if column == 0:
                axes.set_ylabel(block.metric.title, fontsize=9, color=theme.text)
            if row == 0:
                axes.set_title(weight_text(w), fontsize=10, color=theme.text)
    if legend:
        figure.legend(
            legend.values(),
            legend.keys(),
            loc="outside upper center",
            ncols=len(legend),
            frameon=False,
            fontsize=9,
            labelcolor=theme.text,
        )
    return _png(figure)


def loss_plot(stage: str, steps: np.ndarray, losses: np.ndarray, theme: Theme = LIGHT) -> bytes:
    """The training loss of one stage, every value faint and a running median strong: PNG bytes."""
    figure = _figure(3.4, 2.3, theme)
    axes = figure.subplots()
    _style(axes, theme)
    colour = theme.teacher if stage == "teacher" else theme.guided if stage == "guided" else theme.distilled
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.7)
    # A median over bins of the axis: as legible for thirty values as for a million.
    bins = np.array_split(np.arange(len(steps)), min(-(-len(steps) // 3), 60)) if len(steps) else []
    axes.plot(
        [np.median(steps[chosen]) for chosen in bins],
        [np.median(losses[chosen]) for chosen in bins],
        color=colour,
        linewidth=1.5,
    )
    if len(losses) and losses.min() > 0:
        _decimal_log(axes, "y")
    axes.set_title(stage, fontsize=9, color=theme.text, loc="left")
    axes.set_xlabel("update", fontsize=8)
    return _png(figure)


def loss_curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lines of metrics.jsonl -> {stage: (steps, losses)} in order of appearance; lines without a loss are left out."""
    curves: dict[str, dict[int, float]] = {}
    for line in lines:
        if isinstance(line.get("loss"), int | float) and "step" in line:
            curves.setdefault(str(line.get("stage", "")), {})[int(line["step"])] = float(line["loss"])
    return {
        stage: (np.array(sorted(curve)), np.array([curve[step] for step in sorted(curve)]))
        for stage, curve in curves.items()
    }


def _curves(axes: Any, block: Block, steps: Sequence[int], theme: Theme) -> dict[str, Any]:
    """Draws the rows of a block and returns its lines by label."""
    lines = {}
    others = 0
    for row in block.rows:
        values = _drawable(row)
        kind = row.label.split(" ")[0]
        colour = getattr(theme, kind) if kind in _MARKS else theme.others[others % len(theme.others)]
        others += kind not in _MARKS
        (lines[row.label],) = axes.plot(
            list(values),
            list(values.values()),
            label=row.label,
            color=colour,
            marker=_MARKS.get(kind, "D"),
            markersize=4.5,
            linewidth=1.6,
            linestyle="--" if kind == "teacher" else "-",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("sampling steps", fontsize=9)
    if any(_drawable(row) for row in block.rows):
        _decimal_log(axes, "y")
    return lines


def _drawable(row: Row) -> dict[int, float]:
    return {step: value for step, value in row.values.items() if value > 0}  # a logarithmic axis has no zero


def _decimal_log(axes: Any, which: str) -> None:
    """A logarithmic axis with plain decimal numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim()
    subdivisions = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 3 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(base=10, subs=subdivisions))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _figure(width: float, height: float, theme: Theme) -> Any:
    # The object interface with an explicit canvas: no global pyplot state, no display, no figures left open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Any, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(True, color=theme.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.faint)
    axes.tick_params(colors=theme.text, labelsize=8, length=0)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
