"""The report of a run: one self-contained HTML page, readable on a phone, light and dark, and its plots as PNG files.

Input is plain data, so that any chain can be reported:

- results: records of results.py; read here are stage, num_steps, w, metric, value, sampler, seed, network_evaluations;
- losses: lines of metrics.jsonl with stage, step and loss; other lines are ignored; loss_by_log_snr, where there is
  one, holds the mean loss of equal bins of log-SNR over LOG_SNR_RANGE (null: no example);
- grids: {"path", "stage", "num_steps", "w"}, optionally "caption";
- facts: name -> value, shown as text;
- costs: {"stage", "updates", "flops", "wall_seconds"} in the order of the chain; further fields become columns;
- transfers: records that transfer_files.evaluate writes.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdistill.evaluation import page, plots, tables, transfer_section
from diffdistill.evaluation.drawings import Drawings
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.tables import Block, Entry, Weight

LOG_SNR_RANGE = (-20.0, 20.0)
INCEPTION = ("fid", "sfid", "is", "kid", "precision", "recall")
PLOTTED = ("fid", *tables.DOMAIN)
COST_COLUMNS = {"updates": "updates", "flops": "FLOP", "wall_seconds": "wall time"}
EXPLANATION = (
    "Frechet distances are measured in the features of a small classifier trained on the same data; they compare "
    "models of one data set with each other and are not FID. The distance to the teacher is taken against the "
    "teacher's own samples at its full number of steps with the same guidance weight: what distillation must "
    "preserve, since guidance moves away from the data by design. Paired RMSE starts both models from the same noise "
    "and is in units of the [-1, 1] pixel range. The best value of a column is shaded."
)
EXPLANATION_FID = (
    "FID and its relatives compare the samples with reference statistics in the features of the Inception network; "
    "evaluation/results.jsonl says with every figure which protocol, weights and reference it belongs to. "
    "The best value of a column is shaded."
)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    results: Sequence[Entry] = (),
    losses: Iterable[Entry] = (),
    grids: Sequence[Entry] = (),
    facts: Mapping[str, Any] | None = None,
    costs: Sequence[Entry] = (),
    transfers: Sequence[Entry] = (),
) -> Path:
    """Writes the page to `path`, and beside it distance.png (all guidance weights) and plots/*.png (one each).

    Plots whose figures have not changed are not drawn again. Whatever is missing is shown as missing. Returns the path
    of the page; raises OSError where it cannot be written.
    """
    path = Path(path)
    folder = path.parent
    losses = list(losses)
    drawings = Drawings(folder / "plots", [list(map(dict, results)), list(map(dict, losses))])
    arranged = tables.arrange(results)
    if arranged:
        present = {block.metric.name for blocks in arranged.values() for block in blocks}
        plotted = [name for name in PLOTTED if name in present]
        if plotted:
            drawings.png("../distance.png", plots.overview_plot, arranged, plotted)
    weights: list[Weight] = list(arranged)
    weights += [w for w in dict.fromkeys(_weight(grid) for grid in grids) if w not in arranged]
    sections = [
        page.section(
            f"weight-{index}",
            tables.weight_text(w),
            _distances(drawings, w, arranged.get(w, [])),
            _results_table(arranged.get(w, []), _evaluations(results, w)),
            _grids(folder, [grid for grid in grids if _weight(grid) == w], opened=index == 0),
        )
        for index, w in enumerate(weights)
    ]
    if not sections:
        sections = [page.section("results", "Results", page.missing("No results yet."))]
    links = [(f"weight-{index}", tables.weight_text(w)) for index, w in enumerate(weights)]
    guidance = _guidance(drawings, arranged)
    if guidance:
        sections.append(page.section("guidance", "FID against inception score over w", guidance))
        links.append(("guidance", "FID against IS"))
    if transfers:
        sections += transfer_section.sections(folder / "evaluation" / "transfer", transfers)
        links.append(("transfers", "transfer"))
    links += [("costs", "cost"), ("losses", "losses"), ("run", "run")]
    content = [
        f"<header><h1>{page.escape(title)}</h1>",
        *map(page.paragraph, _explanations(results)),
        page.tiles(_highlights(costs)),
        "</header>",
        *sections,
        page.section("costs", "What each stage cost", _costs(costs)),
        page.section("losses", "Training losses", _losses(drawings, losses)),
        page.section("run", "The run", _facts(facts or {})),
    ]
    drawings.finished()
    return write_atomically(path, lambda file: file.write(page.page(title, links, content).encode()))


def _explanations(results: Sequence[Entry]) -> list[str]:
    texts = {EXPLANATION if entry["metric"] not in INCEPTION else EXPLANATION_FID: None for entry in results}
    return [*texts, *(remark for remark in tables.remarks(results) if remark != tables.NOT_FID)]


def _distances(drawings: Drawings, w: Weight, blocks: Sequence[Block]) -> str:
    chosen = [block for block in blocks if block.metric.name in PLOTTED]
    if not chosen:
        return page.missing("No distances measured at this guidance weight.")
    content = []
    for block in chosen:
        name = f"{block.metric.name}_w{'none' if w is None else f'{w:g}'}.png"
        light = drawings.png(name, plots.distance_plot, w, block)
        dark = drawings.png(f"dark/{name}", plots.distance_plot, w, block, plots.DARK)
        alt = f"{block.metric.title} against sampling steps, {tables.weight_text(w)}"
        content.append(page.figure(light, alt, dark=dark, width=plots.DISTANCE_WIDTH))
    return page.figures(content)


def _guidance(drawings: Drawings, arranged: Mapping[Weight, Sequence[Block]]) -> str:
    """One curve per number of steps, a point per guidance weight; empty where not both were measured at two weights."""
    found: dict[tuple[str, int], dict[float, dict[str, float]]] = {}
    for w, blocks in arranged.items():
        for block in blocks:
            if w is None or block.metric.name not in ("fid", "is"):
                continue
            for row in block.rows:
                for step, value in row.values.items():
                    found.setdefault((row.label, step), {}).setdefault(w, {})[block.metric.name] = value
    curves = [
        plots.guidance_curve(tables.steps_text(step), plots.MEASURED, label, by_w)
        for (label, step), by_w in found.items()
    ]
    drawn = [curve for curve in curves if curve is not None]
    if not drawn:
        return ""
    light = drawings.png("fid_is.png", plots.guidance_plot, "", drawn)
    dark = drawings.png("dark/fid_is.png", plots.guidance_plot, "", drawn, plots.DARK)
    width = plots.DISTANCE_WIDTH * len({curve.panel for curve in drawn})
    return page.figures([page.figure(light, "FID against inception score over w", dark=dark, width=width)])


def _results_table(blocks: Sequence[Block], evaluations: Sequence[tables.Row]) -> str:
    if not blocks:
        return page.missing("No results at this guidance weight.")
    steps = sorted({step for block in blocks for step in block.steps})
    rows = []
    for block in blocks:
        better = "lower is better" if block.metric.lower_is_better else "higher is better"
        rows.append(page.group(block.metric.title, better, len(steps) + 1))
        rows += [
            page.row(
                [row.label, *(block.text(row, step, page.ABSENT) for step in steps)],
                best=[row in block.best(step) for step in steps],
            )
            for row in block.rows
        ]
    if evaluations:
        rows.append(page.group("Network evaluations", "per image", len(steps) + 1))
        rows += [
            page.row([row.label, *(f"{row.values[step]:g}" if step in row.values else page.ABSENT for step in steps)])
            for row in evaluations
        ]
    return page.table(["sampling steps", *map(str, steps)], rows)


def _evaluations(results: Sequence[Entry], w: Weight) -> Sequence[tables.Row]:
    """Network evaluations per image, arranged like a metric."""
    entries = [
        {**entry, "metric": "network_evaluations", "value": entry["network_evaluations"]}
        for entry in results
        if _weight(entry) == w and entry.get("network_evaluations") is not None
    ]
    return tables.arrange(entries)[w][0].rows if entries else ()


def _grids(folder: Path, grids: Sequence[Entry], opened: bool) -> str:
    if not grids:
        return page.missing("No sample grids at this guidance weight.")
    content = []
    for steps in sorted({int(grid["num_steps"]) for grid in grids}):
        content.append(f"<h3>{steps} step{'' if steps == 1 else 's'}</h3>")
        chosen = [grid for grid in grids if int(grid["num_steps"]) == steps]
        content.append(page.figures([_grid(folder, grid) for grid in chosen], "grids"))
    return f"<details{' open' if opened else ''}><summary>Samples</summary>{''.join(content)}</details>"


def _grid(folder: Path, grid: Entry) -> str:
    caption = grid.get("caption") or tables.row_label(str(grid["stage"]), int(grid["num_steps"]))
    path = folder / grid["path"]  # an absolute path stays what it is
    try:
        png = path.read_bytes()
    except OSError:
        return f"<figure>{page.missing(f'{caption}: {path} is missing')}</figure>"
    return page.figure(png, f"samples: {caption}, {grid['num_steps']} steps", caption=caption)


def _losses(drawings: Drawings, losses: Sequence[Entry]) -> str:
    curves = plots.loss_curves(losses)
    if not curves:
        return page.missing("No loss curves recorded.")
    content = []
    for stage, (steps, values) in curves.items():
        name = f"loss_{re.sub(r'[^A-Za-z0-9_]', '_', stage)[:100] or 'unnamed'}.png"  # it may say anything
        light = drawings.png(name, plots.loss_plot, stage, steps, values)
        dark = drawings.png(f"dark/{name}", plots.loss_plot, stage, steps, values, plots.DARK)
        content.append(page.figure(light, f"training loss of {stage}", dark=dark, width=plots.LOSS_WIDTH))
    return page.figures(content, "small") + _losses_by_log_snr(losses)


def _losses_by_log_snr(losses: Iterable[Entry]) -> str:
    """Where on the way from noise (left) to data (right) each stage still errs, at its last logged update."""
    last = {entry["stage"]: entry["loss_by_log_snr"] for entry in losses if entry.get("loss_by_log_snr")}
    if not last:
        return ""
    count = max(len(values) for values in last.values())
    low, high = LOG_SNR_RANGE
    edges = [low + (high - low) * index / count for index in range(count + 1)]
    head = ["loss by log-SNR", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges))]
    rows = [
        page.row([stage, *(page.ABSENT if value is None else tables.three_digits(value) for value in values)])
        for stage, values in last.items()
    ]
    return page.table(head, rows)


def _costs(costs: Sequence[Entry]) -> str:
    if not costs:
        return page.missing("No stage costs recorded.")
    more = dict.fromkeys(name for cost in costs for name in cost if name not in ("stage", *COST_COLUMNS))
    columns = {**COST_COLUMNS, **{name: name.replace("_", " ") for name in more}}
    rows = [page.row([str(cost.get("stage")), *(tables.cost_text(name, cost) for name in columns)]) for cost in costs]
    ratios = tables.cost_ratios(costs)
    remark = page.missing(
        "The ratio of distillation to teacher training needs the costs of the teacher and of a student."
    )
    if ratios:
        texts = [f"{ratios[name]:.2f}" if name in ratios else page.ABSENT for name in columns]
        rows.append(page.row(["distillation / teacher", *texts], kind="sum"))
        remark = page.paragraph(
            "Salimans & Ho (2022) state that the whole of progressive distillation takes no longer than the training "
            "of its teacher: a ratio of at most about 1."
        )
    return page.table(["stage", *columns.values()], rows) + remark


def _highlights(costs: Sequence[Entry]) -> list[tuple[str, str]]:
    ratios = tables.cost_ratios(costs)
    names = {"flops": "FLOP of distillation / teacher", "wall_seconds": "time of distillation / teacher"}
    values = [(f"{ratios[name]:.2f}", label) for name, label in names.items() if name in ratios]
    seconds = [cost.get("wall_seconds") for cost in costs]
    known = [float(value) for value in seconds if value is not None]
    if known and len(known) == len(seconds):
        values.append((tables.duration(sum(known)), "training in all"))
    return values


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return page.missing("No facts recorded.")
    items = (f"<div><dt>{page.escape(str(k))}</dt><dd>{page.escape(str(v))}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def _weight(entry: Entry) -> Weight:
    w = entry.get("w")
    return None if w is None else float(w)
