"""Plots of the report, drawn with matplotlib's Agg backend into PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
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
_MANY = ("#1f5fd0", "#bf6a02", "#1a7f5a", "#cf222e", "#8250df", "#6e7781", "#0aa2c0", "#9a3a8c")
MEASURED = "measured"
DISTANCE_WIDTH, LOSS_WIDTH = 500, 340  # CSS pixels; the files have more, for sharp screens
_MARKS = {"teacher": "s", "guided": "^", "distilled": "o"}


@dataclass(frozen=True)
class Curve:
    """A line of a comparison.

    Attributes:
      label: what it is of; curves of one label have one colour.
      points: (x, y).
      origin: MEASURED here, or where the figures come from otherwise.
      panel: the panel that it belongs to.
      names: written beside the points, where given.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    origin: str
    panel: str = ""
    names: tuple[str, ...] = ()


def guidance_curve(label: str, origin: str, panel: str, by_w: Mapping[float, Mapping[str, float]]) -> Curve | None:
    """The curve for `guidance_plot` out of {w: {"fid": ..., "is": ...}}; None for fewer than two complete weights."""
    both = {w: values for w, values in sorted(by_w.items()) if {"fid", "is"} <= values.keys()}
    if len(both) < 2:
        return None
    points = tuple((values["is"], values["fid"]) for values in both.values())
    return Curve(label, points, origin, panel, tuple(f"{w:g}" for w in both))


def steps_plot(title: str, curves: Sequence[Curve]) -> bytes:
    """FID against sampling steps, both axes logarithmic, one panel per guidance weight: PNG bytes."""

    def finish(axes: Any, chosen: Sequence[Curve]) -> None:
        steps = sorted({int(x) for curve in chosen for x, _ in curve.points})
        axes.set_xscale("log", base=2)
        shown = steps if len(steps) < 9 else [2**power for power in range(0, max(steps).bit_length(), 2)]
        axes.set_xticks(shown, [str(step) for step in shown])
        axes.minorticks_off()
        _decimal_log(axes, "y")
        axes.set_xlabel("sampling steps", fontsize=9)
        axes.set_ylabel("FID", fontsize=9)

    return _comparison(title, curves, finish)


def guidance_plot(title: str, curves: Sequence[Curve], theme: Theme = LIGHT) -> bytes:
    """FID against inception score, one curve per number of steps, a point per guidance weight (its name): PNG bytes."""

    def finish(axes: Any, chosen: Sequence[Curve]) -> None:
        del chosen
        _decimal_log(axes, "y")
        axes.set_xlabel("inception score (higher is better)", fontsize=9, color=theme.text)
        axes.set_ylabel("FID (lower is better)", fontsize=9, color=theme.text)

    return _comparison(title, curves, finish, theme)


def trajectory_plot(title: str, curves: Sequence[Curve]) -> bytes:
    """A distance, logarithmic, along trainings, one panel per axis that the curves name: PNG bytes."""

    def finish(axes: Any, chosen: Sequence[Curve]) -> None:
        _decimal_log(axes, "y")
        axes.set_xlabel(chosen[0].panel, fontsize=9)
        axes.set_ylabel("Frechet distance", fontsize=9)

    return _comparison(title, curves, finish)


def _comparison(
    title: str, curves: Sequence[Curve], finish: Callable[[Any, Sequence[Curve]], None], theme: Theme = LIGHT
) -> bytes:
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    labels = list(dict.fromkeys(curve.label for curve in curves))
    figure = new_figure(4.2 * len(panels) + 0.4, 3.9 + 0.25 * -(-len(labels) // (2 * len(panels))), theme)
    legend: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        style_axes(axes, theme)
        chosen = [curve for curve in curves if curve.panel == panel]
        for curve in chosen:
            colour = _MANY[labels.index(curve.label) % len(_MANY)]
            style = {"linestyle": "-"} if curve.origin == MEASURED else {"linestyle": "--", "markerfacecolor": "none"}
            xs, ys = zip(*curve.points, strict=True)
            (line,) = axes.plot(xs, ys, color=colour, marker="o", markersize=5, linewidth=1.4, **style)
            legend[f"{curve.label}, {curve.origin}"] = line
            # Neighbouring curves lie close together: the first and the last are enough to tell the weights.
            for name, x, y in zip(curve.names if curve in (chosen[0], chosen[-1]) else (), xs, ys, strict=False):
                place = {"xytext": (4, 4), "textcoords": "offset points"}
                axes.annotate(f"w {name}", (x, y), fontsize=7, color=theme.text, **place)
        finish(axes, chosen)
        axes.set_title(panel, fontsize=9, color=theme.text, loc="left")
    figure.suptitle(title, fontsize=11, color=theme.text)
    columns = max(1, min(len(legend), 2 * len(panels)))
    style = {"frameon": False, "fontsize": 8, "labelcolor": theme.text}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, **style)
    return png_bytes(figure)


def distance_plot(w: Weight, block: Block, theme: Theme = LIGHT) -> bytes:
    """One metric against the number of sampling steps at one guidance weight, both axes logarithmic: PNG bytes."""
    figure = new_figure(4.6, 3.3, theme)
    axes = figure.subplots()
    style_axes(axes, theme)
    _curves(axes, block, block.steps, theme)
    axes.set_title(f"{block.metric.title}, {weight_text(w)}", fontsize=10, color=theme.text, loc="left")
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.text)
    return png_bytes(figure)


def overview_plot(arranged: Mapping[Weight, Sequence[Block]], metrics: Sequence[str], theme: Theme = LIGHT) -> bytes:
    """All weights side by side, one row of panels per metric: PNG bytes. Empty panels say that nothing was measured."""
    figure = new_figure(3.4 * max(1, len(arranged)), 2.9 * len(metrics) + 0.5, theme)
    panels = figure.subplots(len(metrics), max(1, len(arranged)), squeeze=False, sharey="row", sharex=True)
    legend: dict[str, Any] = {}
    steps = sorted({step for blocks in arranged.values() for block in blocks for step in block.steps})
    for row, name in enumerate(metrics):
        for column, (w, blocks) in enumerate(arranged.items()):
            axes = panels[row][column]
            style_axes(axes, theme)
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
            ncols=min(len(legend), max(2, int(1.4 * len(arranged)))),
            frameon=False,
            fontsize=9,
            labelcolor=theme.text,
        )
    return png_bytes(figure)


def loss_plot(stage: str, steps: np.ndarray, losses: np.ndarray, theme: Theme = LIGHT) -> bytes:
    """The training loss of one stage, every value faint and a running median strong: PNG bytes."""
    figure = new_figure(3.4, 2.3, theme)
    axes = figure.subplots()
    style_axes(axes, theme)
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
    return png_bytes(figure)


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
    seen: dict[str, int] = {}  # rows of one kind differ in their sampler: one colour, other marks and dashes
    for row in block.rows:
        values = _drawable(row)
        kind = row.label.split(" ")[0]
        colour = getattr(theme, kind) if kind in _MARKS else theme.others[others % len(theme.others)]
        others += kind not in _MARKS
        again = seen.get(kind, 0) if kind in _MARKS else 0
        seen[kind] = again + 1
        (lines[row.label],) = axes.plot(
            list(values),
            list(values.values()),
            label=row.label,
            color=colour,
            marker=_MARKS.get(kind, "D"),
            markersize=4.5,
            markerfacecolor=colour if again == 0 else theme.background,
            linewidth=1.6 if again == 0 else 1.1,
            linestyle=("--" if kind == "teacher" else "-", ":", "-.")[min(again, 2)],
        )
    axes.set_xscale("log", base=2)
    ticks: list[int] = []
    for step in sorted(steps):
        if not ticks or step >= 1.3 * ticks[-1]:  # the names of closer ones would overlap
            ticks.append(step)
    axes.set_xticks(ticks, [str(step) for step in ticks])
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


def new_figure(width: float, height: float, theme: Theme) -> Any:
    """An empty matplotlib figure of that many inches."""
    # The object interface with an explicit canvas: no global pyplot state, no display, no figures left open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Any, theme: Theme) -> None:
    """Grid, colours and sizes that all plots share."""
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


def png_bytes(figure: Any) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
