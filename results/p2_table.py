"""Baseline against P2 on small images: schedules, gammas, seeds and numbers of sampling steps; one command, one table.

    python results/p2_table.py --folder=runs/p2 --seeds=0,1,2 --jobs=2
    python results/p2_table.py --dataset=fashion --data=FOLDER --folder=runs/p2 --seeds=0,1,2

Each cell is a teacher of configs/p2.py, such as digits-linear-0.5, in a workdir of its own: trained, measured at every
number of steps with ancestral and DDIM sampling, Frechet distance to the data in features of a small classifier. The
table shows mean and standard deviation over the seeds. Killed, the same command continues; cells that are done cost
seconds. --jobs runs so many of them side by side, each in a process of its own.
"""

import argparse
import concurrent.futures
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from diffdistill import evaluate
from diffdistill.evaluation import results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs import p2  # noqa: E402

METRIC = "frechet_to_data"

Cell = tuple[str, str, int]  # schedule, gamma, seed
Column = tuple[str, int]  # sampler, steps


def workdir(folder: Path, dataset: str, cell: Cell) -> Path:
    """Where a cell is trained."""
    schedule, gamma, seed = cell
    return folder / f"{dataset}-{schedule}-{gamma}-{seed}"


def command(folder: Path, dataset: str, cell: Cell, overrides: Iterable[str]) -> list[str]:
    """The command that trains and measures a cell."""
    schedule, gamma, seed = cell
    return [
        sys.executable,
        str(ROOT / "main.py"),
        "--mode=run",
        f"--config={ROOT / 'configs' / 'p2.py'}:{dataset}-{schedule}-{gamma}",
        f"--workdir={workdir(folder, dataset, cell)}",
        f"--config.seed={seed}",
        *overrides,
    ]


def run(folder: Path, dataset: str, cell: Cell, overrides: Iterable[str]) -> str:
    """Trains and measures a cell, or finds that it is done; returns a line about it. RuntimeError where it failed."""
    place = workdir(folder, dataset, cell)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "output.txt").open("a") as output:
        done = subprocess.run(
            command(folder, dataset, cell, overrides), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        last = (place / "output.txt").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"{place} ended with code {done.returncode}: {''.join(last)}")
    return f"{place}: {', '.join(f'{v:.3g}' for v in measured(place).values())}"


def measured(place: Path) -> dict[Column, float]:
    """The teacher's distances in a workdir by sampler and steps, without the reference samples of the evaluation."""
    found: dict[Column, float] = {}
    for record in results.read(place / evaluate.RESULTS):
        if record["metric"] == METRIC and record["stage"] == "teacher":
            found[record["sampler"], record["num_steps"]] = record["value"]
    return {column: value for column, value in found.items() if column[0].startswith("respaced")}


def table(folder: Path, dataset: str, seeds: list[int]) -> str:
    """Markdown: a row per schedule and gamma, a column per sampler and number of steps; mean +- deviation."""
    rows = {
        (schedule, gamma): [measured(workdir(folder, dataset, (schedule, gamma, seed))) for seed in seeds]
        for schedule in p2.SCHEDULES
        for gamma in p2.GAMMAS
    }
    columns = sorted({column for found in rows.values() for one in found for column in one})
    names = [f"{'DDIM' if sampler.endswith('ddim') else 'ancestral'}, {steps} steps" for sampler, steps in columns]
    lines = ["| schedule | gamma | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for (schedule, gamma), found in rows.items():
        shown = " | ".join(text([one[column] for one in found if column in one]) for column in columns)
        lines.append(f"| {schedule} | {gamma} | {shown} |")
    return "\n".join(lines)


def text(values: list[float]) -> str:
    """Mean and, of several seeds, their standard deviation and number."""
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.2g} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=p2.SMALL, default="digits")
    parser.add_argument("--data", default="", help="folder of the IDX files, for fashion")
    parser.add_argument("--folder", type=Path, default=Path("runs/p2"))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--schedules", default=",".join(p2.SCHEDULES))
    parser.add_argument("--gammas", default=",".join(p2.GAMMAS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "overrides", nargs="*", help="fields of the config, after --, as --config.teacher.num_updates=9"
    )
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    overrides = ([f"--config.data.path={given.data}"] if given.data else []) + given.overrides
    cells = [
        (schedule, gamma, seed)
        for seed in seeds
        for schedule in given.schedules.split(",")
        for gamma in given.gammas.split(",")
    ]
    folder = given.folder.absolute()
    failures = []
    with concurrent.futures.ThreadPoolExecutor(max(1, given.jobs)) as pool:
        tasks = [pool.submit(run, folder, given.dataset, cell, overrides) for cell in cells]
        for task in concurrent.futures.as_completed(tasks):
            try:
                print(task.result(), flush=True)
            except RuntimeError as error:
                failures.append(str(error))
                print(error, flush=True)
    print("\n" + table(folder, given.dataset, seeds))
    sys.exit("\n".join(["", f"{len(failures)} cells failed.", *failures]) if failures else 0)


if __name__ == "__main__":
    main()
