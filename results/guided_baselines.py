"""The baselines of Meng et al. 2023 on the digits, beside the w-conditioned students, all from one teacher.

    python results/guided_baselines.py --folder=runs/guided_baselines

Runs configs/digits.py:full, then :single-0, -1, -2 and :separate with its teacher, each in a folder of its own and
each continued where it stopped, and prints one table: Frechet distances to the data and to the guided teacher in many
steps (features of a small classifier; not FID) by guidance weight and number of steps.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from diffdistill.evaluation import results, tables

ROOT = Path(__file__).resolve().parents[1]
ROWS = {  # (variant, method) -> how the table calls it
    ("full", "progressive"): "one student for all w",
    ("full", "stochastic"): "one student for all w, stochastic",
    ("single-0", "progressive"): "one student for each w",
    ("single-1", "progressive"): "one student for each w",
    ("single-2", "progressive"): "one student for each w",
    ("separate", "progressive"): "conditional and unconditional, combined, two evaluations a step",
    ("full", "teacher"): "teacher, two evaluations a step",
}
VARIANTS = tuple(dict.fromkeys(variant for variant, _ in ROWS))
METRICS = ("frechet_to_data", "frechet_to_teacher", "class_accuracy")


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/guided_baselines"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    first = options.folder / VARIANTS[0]
    for variant in VARIANTS:
        workdir = options.folder / variant
        if not workdir.exists() and variant != VARIANTS[0]:
            begun = options.folder / f"{variant}.part"  # renamed when it is whole: a kill leaves no half teacher
            shutil.rmtree(begun, ignore_errors=True)
            shutil.copytree(first / "teacher", begun / "teacher")
            shutil.copy(first / "config.json", begun)
            begun.rename(workdir)
        command = [sys.executable, "main.py", f"--config=configs/digits.py:{variant}", f"--workdir={workdir.resolve()}"]
        subprocess.run([*command, f"--config.seed={options.seed}"], cwd=ROOT, check=True)
    print(table(options.folder))


def table(folder: Path) -> str:
    """The Markdown table of what the runs in a folder have measured with DDIM and the stochastic sampler."""
    values: dict[tuple[str, float, str], dict[int, float]] = {}
    for variant in VARIANTS:
        for entry in results.read(folder / variant / "evaluation" / "results.jsonl"):
            name = ROWS.get((variant, entry["method"]))
            if name and entry["metric"] in METRICS and entry["sampler"] in ("ddim", "stochastic"):
                values.setdefault((entry["metric"], entry["w"], name), {})[entry["num_steps"]] = entry["value"]
    steps = sorted({step for row in values.values() for step in row})
    lines = []
    for metric in METRICS:
        known = tables.metric_of(metric)
        lines += [
            "",
            f"{known.title}:",
            "",
            f"| w | model | {' | '.join(map(str, steps))} |",
            "|---" * (len(steps) + 2) + "|",
        ]
        for w in sorted({place[1] for place in values}):
            for name in dict.fromkeys(ROWS.values()):
                row = values.get((metric, w, name))
                if row:
                    cells = [known.text(row[step]) if step in row else "-" for step in steps]
                    lines.append(f"| {w:g} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
