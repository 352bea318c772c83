"""Mean over several runs (seeds) of what their evaluations measured, as a Markdown table, and the quick start's bars.

    python results/mean_of_runs.py runs/digits_seed0 runs/digits_seed1 runs/digits_seed2

Each argument is a workdir or a results.jsonl. Prints every single value too (--all), so that the spread can be seen.
"""

import argparse
import statistics
from pathlib import Path

from diffdistill.evaluation import results
from diffdistill.evaluation.tables import row_label

METRICS = ("frechet_to_data", "frechet_to_teacher", "paired_rmse_to_teacher", "class_accuracy")
TEACHER, GUIDED, STUDENT = "teacher", "guided student", "distilled students"

Cell = tuple[str, float, str, int]


def collect(paths: list[str]) -> tuple[dict[Cell, list[float]], int]:
    """(metric, w, model, steps) -> one value per run, and the teacher's full number of steps."""
    cells: dict[Cell, list[float]] = {}
    full = 0
    for path in paths:
        file = Path(path)
        last: dict[Cell, float] = {}
        for entry in results.read(file / "evaluation" / "results.jsonl" if file.is_dir() else file):
            model = row_label(entry["stage"], entry["num_steps"])
            last[entry["metric"], entry["w"], model, entry["num_steps"]] = entry["value"]
            full = max(full, entry["num_steps"])
        for cell, value in last.items():
            cells.setdefault(cell, []).append(value)
    return cells, full


def table(cells: dict[Cell, list[float]], show_all: bool) -> str:
    """Markdown: one row per metric, w and model, one column per number of steps."""
    steps = sorted({cell[3] for cell in cells})
    lines = [
        "| metric | w | model | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "|---" * (3 + len(steps)) + "|",
    ]
    for metric in METRICS:
        for w in sorted({cell[1] for cell in cells}):
            for model in (TEACHER, GUIDED, STUDENT):
                values = [cells.get((metric, w, model, n)) for n in steps]
                if any(values):
                    shown = " | ".join(_text(value, metric, show_all) for value in values)
                    lines.append(f"| {metric} | {w:g} | {model} | {shown} |")
    return "\n".join(lines)


def bars(cells: dict[Cell, list[float]], full: int) -> list[str]:
    """The demands on the quick start, each with both figures and whether it holds for the mean."""

    def mean(metric: str, w: float, model: str, steps: int) -> float:
        return statistics.mean(cells[metric, w, model, steps])

    lines = []

    def check(text: str, student: float, bound: float) -> None:
        lines.append(f"{'holds' if student < bound else 'FALLS SHORT'}: {text}: {student:.4g} against {bound:.4g}")

    for n in (1, 2, 4, 8):
        factor = 2 if n == 4 else 1
        check(
            f"w = 0, frechet_to_data, student at {n} below teacher DDIM at {n}" + (" by a factor of 2" * (n == 4)),
            mean(METRICS[0], 0.0, STUDENT, n),
            mean(METRICS[0], 0.0, TEACHER, n) / factor,
        )
    check(
        f"w = 0, frechet_to_data, student at 8 within 1.5 times of the teacher at {full}",
        mean(METRICS[0], 0.0, STUDENT, 8),
        1.5 * mean(METRICS[0], 0.0, TEACHER, full),
    )
    for w in sorted({cell[1] for cell in cells}):
        for metric in METRICS[1:3]:
            for n in (1, 2, 4):
                text = f"w = {w:g}, {metric}, student at {n} below teacher DDIM at {n}"
                check(text, mean(metric, w, STUDENT, n), mean(metric, w, TEACHER, n))
    accuracy = mean(METRICS[3], 1.0, STUDENT, 4)
    lines.append(f"{'holds' if accuracy > 0.95 else 'FALLS SHORT'}: w = 1, accuracy at 4 steps {100 * accuracy:.1f} %")
    return lines


def _text(values: list[float] | None, metric: str, show_all: bool) -> str:
    if not values:
        return ""
    show = (lambda v: f"{100 * v:.1f} %") if metric == "class_accuracy" else (lambda v: f"{v:.3g}")
    text = show(statistics.mean(values))
    return text + (f" ({', '.join(show(v) for v in values)})" if show_all and len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--all", action="store_true", help="show every run's value beside the mean")
    given = parser.parse_args()
    found, full_steps = collect(given.runs)
    print(table(found, given.all), end="\n\n")
    print("\n".join(bars(found, full_steps)))
