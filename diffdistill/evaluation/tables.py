"""Results arranged for reading: one table per guidance weight, rows are models, columns are step counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffdistill.weights import fetch

Weight = float | None
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a metric is named and read; `text` writes a value of it."""

    name: str
    title: str
    lower_is_better: bool = True
    percent: bool = False
    scale: float = 1.0

    def text(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else three_digits(self.scale * value)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("frechet_to_data", "Frechet distance to data"),
        Metric("frechet_to_teacher", "Frechet distance to teacher"),
        Metric("paired_rmse_to_teacher", "Paired RMSE to teacher"),
        Metric("class_accuracy", "Class accuracy", lower_is_better=False, percent=True),
        Metric("fid", "FID"),
        Metric("sfid", "sFID"),
        Metric("is", "Inception score", lower_is_better=False),
        Metric("kid", "KID x 1000", scale=1000.0),
        Metric("precision", "Precision", lower_is_better=False),
        Metric("recall", "Recall", lower_is_better=False),
        Metric("bits_per_dim", "Bits per dimension"),
    )
}
DOMAIN = ("frechet_to_data", "frechet_to_teacher")
NOT_FID = "Frechet distances are in the features of a small classifier of the same data and are not FID."
DISTILLED, STOCHASTIC = "distilled students", "stochastic students"
_SAMPLERS = {
    "ddim": "DDIM",
    "heun": "Heun",
    "euler": "Euler",
    "bound": "variational bound",
    "one_step": "one step",
}
_ROUND = re.compile(r"(round|stochastic)_\d+_steps_(\d+)")


@dataclass(frozen=True)
class Row:
    """One line of a table or a plot: values of one model (or of the students of one chain) by number of steps."""

    label: str
    values: dict[int, float]


@dataclass(frozen=True)
class Block:
    """One metric at one guidance weight."""

    metric: Metric
    rows: tuple[Row, ...]

    @property
    def steps(self) -> list[int]:
        return sorted({step for row in self.rows for step in row.values})

    def best(self, step: int) -> tuple[Row, ...]:
        """The rows with the best value at this number of steps, as far as the printed digits tell them apart."""
        rows = [row for row in self.rows if step in row.values]
        sign = 1 if self.metric.lower_is_better else -1
        ranked = sorted(rows, key=lambda row: sign * row.values[step])
        first = [row for row in ranked if self.text(row, step) == self.text(ranked[0], step)]
        return tuple(first) if len(first) < len(rows) else ()

    def text(self, row: Row, step: int, absent: str = "-") -> str:
        return self.metric.text(row.values[step]) if step in row.values else absent


def arrange(results: Iterable[Entry]) -> dict[Weight, list[Block]]:
    """Results by guidance weight, then by metric in the order of `METRICS`, then by model: teacher first.

    A halving student is measured at its own number of steps; the students of a chain share one row. Of repeated
    measurements the last counts; other seeds of the same parameters, protocol and number of samples are averaged.
    """
    results = list(results)
    many_samplers = len({entry.get("sampler") for entry in results}) > 1
    cells: dict[Weight, dict[str, dict[str, dict[int, dict[Any, Any]]]]] = {}
    for entry in results:
        named = (many_samplers or entry["stage"] == "teacher") and entry.get("sampler") != "stochastic"
        label = row_label(entry["stage"], int(entry["num_steps"]), entry.get("sampler") if named else None)
        row = cells.setdefault(_weight(entry), {}).setdefault(entry["metric"], {}).setdefault(label, {})
        kind = tuple(entry.get(name) for name in ("params_hash", "protocol", "num_samples"))
        seeds = row.setdefault(int(entry["num_steps"]), {})
        if seeds.get("kind") != kind:
            seeds.clear()
        seeds |= {"kind": kind, entry.get("seed"): float(entry["value"])}
    known = list(METRICS)
    arranged: dict[Weight, list[Block]] = {}
    for w in sorted(cells, key=lambda w: -math.inf if w is None else w):
        names = sorted(cells[w], key=lambda name: known.index(name) if name in known else len(known))
        arranged[w] = [
            Block(
                metric_of(name),
                tuple(
                    Row(label, {step: _mean(seeds) for step, seeds in sorted(row.items())})
                    for label, row in sorted(cells[w][name].items(), key=lambda item: _rank(item[0]))
                ),
            )
            for name in names
        ]
    return arranged


def _mean(seeds: Mapping[Any, Any]) -> float:
    values = [value for seed, value in seeds.items() if seed != "kind"]
    return sum(values) / len(values)


def row_label(stage: str, num_steps: int, sampler: str | None = None) -> str:
    """teacher, guided student, distilled students (a round at its own number of steps), or the stage's name."""
    match = _ROUND.fullmatch(stage)
    if match:
        students = DISTILLED if match[1] == "round" else STOCHASTIC
        own = int(match[2]) == num_steps or (students == STOCHASTIC and (int(match[2]), num_steps) == (2, 1))
        base = students if own else stage
    else:
        base = {"guided": "guided student", "one_step": "one-step generator"}.get(stage, stage)
    return f"{base} ({_SAMPLERS.get(sampler, sampler)})" if sampler else base


def weight_text(w: Weight) -> str:
    """Heading of one guidance weight."""
    return "without guidance weight" if w is None else f"w = {w:g}"


def terminal_table(results: Iterable[Entry]) -> str:
    """Plain text for a terminal: per w and metric one row per model, one column per step count, the best starred."""
    results = list(results)
    arranged = arrange(results)
    if not arranged:
        return "no results yet\n"
    steps = sorted({step for blocks in arranged.values() for block in blocks for step in block.steps})
    labels = [row.label for blocks in arranged.values() for block in blocks for row in block.rows]
    margin = max(len(label) for label in (*labels, "sampling steps")) + 4
    lines = []
    for w, blocks in arranged.items():
        lines += [weight_text(w), "  sampling steps".ljust(margin) + "".join(f"{step:>9} " for step in steps)]
        for block in blocks:
            better = "lower" if block.metric.lower_is_better else "higher"
            lines.append(f"  {block.metric.title} ({better} is better)")
            for row in block.rows:
                cells = []
                for step in steps:
                    cells.append(f"{block.text(row, step):>9}" + ("*" if row in block.best(step) else " "))
                lines.append(("    " + row.label).ljust(margin) + "".join(cells))
        lines.append("")
    lines.append(" ".join(["* best of its column.", *remarks(results)]))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def remarks(results: Iterable[Entry]) -> list[str]:
    """What a reader could take for a published FID and is none."""
    results = list(results)
    own = {entry["weights_sha256"][:12] for entry in results if not fetch.is_inception(entry.get("weights_sha256"))}
    found = [NOT_FID] if any(entry["metric"] in DOMAIN for entry in results) else []
    mixed = [
        words
        for name, words in (("num_samples", "numbers of samples"), ("protocol", "protocols"))
        if len({entry.get(name) for entry in results if entry["metric"] not in DOMAIN}) > 1
        and any(entry["metric"] == "fid" for entry in results)
    ]
    if mixed:
        found.append(f"Several {' and '.join(mixed)} are among these figures; results.jsonl says which is whose.")
    if own:
        found.append(f"Figures of the feature network {', '.join(sorted(own))} are not those of the published one.")
    return found


def metric_of(name: str) -> Metric:
    """How the metric of a record is written; one that is not in METRICS goes by its own name."""
    return METRICS.get(name, Metric(name, name))


def cost_ratios(costs: Sequence[Entry], reference: str = "teacher") -> dict[str, float]:
    """What all stages but the reference cost, in units of the reference: by "updates", "flops", "wall_seconds".

    A quantity that a stage lacks has no ratio.
    """
    ratios = {}
    for name in ("updates", "flops", "wall_seconds"):
        values = [(cost.get("stage"), cost.get(name)) for cost in costs]
        base = sum(value for stage, value in values if stage == reference and value is not None)
        if base and len(costs) > 1 and all(value is not None for _, value in values):
            ratios[name] = sum(value for stage, value in values if stage != reference and value is not None) / base
    return ratios


def terminal_costs(costs: Sequence[Entry]) -> str:
    """Plain text: what each stage cost, and the distillation in units of the teacher's training."""
    if not costs:
        return "no stage costs recorded\n"
    width = max(len(str(cost.get("stage"))) for cost in costs) + 2
    width = max(width, len("distillation / teacher") + 2)
    lines = ["stage".ljust(width) + f"{'updates':>10}{'FLOP':>12}{'wall time':>14}"]
    for cost in costs:
        cells = f"{cost_text('updates', cost):>10}{cost_text('flops', cost):>12}{cost_text('wall_seconds', cost):>14}"
        lines.append(str(cost.get("stage")).ljust(width) + cells)
    ratios = cost_ratios(costs)
    if ratios:
        texts = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in ("updates", "flops", "wall_seconds")]
        lines.append("distillation / teacher".ljust(width) + f"{texts[0]:>10}{texts[1]:>12}{texts[2]:>14}")
    return "\n".join(lines) + "\n"


def cost_text(name: str, cost: Entry) -> str:
    """One field of a stage's cost as text, "-" where it is missing."""
    value = cost.get(name)
    if value is None:
        return "-"
    if name == "flops":
        return si(float(value))
    if name == "wall_seconds":
        return duration(float(value))
    if isinstance(value, float):
        return three_digits(value)
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def steps_text(number: int) -> str:
    """A number of sampling steps in words."""
    return f"{number} step{'s' * (number > 1)}"


def three_digits(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    scientific = f"{value:.2e}"
    if not math.isfinite(value):
        return scientific
    exponent = int(scientific.split("e")[1])  # of the rounded number: 9.996 is 10.0, not 10.00
    return f"{value:.{max(0, 2 - exponent)}f}" if -3 <= exponent < 6 else scientific


def si(value: float) -> str:
    """A count with an SI prefix: 1.23e15 -> "1.23 P"."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{three_digits(value / factor)} {prefix}"
    return three_digits(value)


def duration(seconds: float) -> str:
    """Seconds as a person says them: "9.5 s", "2 min 05 s", "3 h 12 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _weight(entry: Entry) -> Weight:
    w = entry.get("w")
    return None if w is None else float(w)


def _rank(label: str) -> tuple[int, str]:
    for rank, start in enumerate(("teacher", "guided student", DISTILLED, STOCHASTIC)):
        if label.startswith(start):
            return rank, label
    return 4, label
