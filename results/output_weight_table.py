"""The twelve cells of table 1 of Salimans & Ho 2022, outputs times loss weights, on the digits: one command, one table.

    python results/output_weight_table.py --folder=runs/cells --seeds=0,1 --jobs=6

Each cell is a teacher of configs/digits.py with that output and weight, sampled with DDIM and ancestrally. A cell whose
loss or gradient stops being finite counts as diverged, and so does one whose samples are farther from the data than
uniform noise is. Every cell is a process of its own, --jobs of them at a time, each on its share of the cores. Killed,
the same command continues: finished cells are kept, unfinished ones resume. --report prints what is there.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from diffdistill.evaluation.files import write_atomically
from diffdistill.terminal import EXIT_NOT_FINITE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.progressive import OUTPUTS, WEIGHTS

SAMPLERS = ("ancestral", "ddim")
CELL = "cell.json"
SETTINGS = ("updates", "samples", "steps")
DIVERGES, NOT_THERE = "diverges", "-"


def measure(options: argparse.Namespace, folder: Path) -> int:
    """Trains and measures the one cell of `options`, writes CELL into its folder, and returns the exit code."""
    import numpy as np

    from configs import digits
    from diffdistill import evaluate, runner
    from diffdistill.config import resolve
    from diffdistill.data.pipeline import in_memory
    from diffdistill.evaluation import metrics, moments, results
    from diffdistill.evaluation.stream import EvaluationInterrupted
    from diffdistill.judges import domain
    from diffdistill.training.errors import Interrupted, NonFiniteLoss
    from diffdistill.training.interrupt import catch_signals

    output, weight, seed = options.cell.split(",")
    settings = digits.get_config()
    settings.name, settings.seed = f"digits-{output}-{weight}", int(seed)
    settings.model.prediction, settings.teacher.weight = output, weight
    settings.teacher.num_updates = options.updates
    settings.guided.num_updates = settings.progressive.num_updates = 0
    settings.evaluation.samplers, settings.evaluation.num_steps = SAMPLERS, (options.steps,)
    settings.evaluation.guidance, settings.evaluation.num_samples = (0.0,), options.samples
    run = runner.prepare(resolve(settings), str(folder))
    found: dict[str, float | str] = {}
    code = 0
    try:
        with catch_signals() as interrupt:
            runner.train(run, interrupt)
            source = in_memory(run.source)
            evaluate.evaluate(run.workdir, source, interrupt)
    except NonFiniteLoss as error:
        print(error)
        found, code = {sampler: DIVERGES for sampler in SAMPLERS}, EXIT_NOT_FINITE
    except (Interrupted, EvaluationInterrupted) as stop:
        print(stop)
        return 128 + signal.SIGTERM
    else:
        judge = domain.make(run.workdir, source, print)
        noise = np.random.default_rng(0).integers(0, 256, (options.samples, *source.image_shape), dtype=np.uint8)
        own = moments.moments_of(judge.network.features(noise))
        limit = metrics.frechet_distance(own.mean(), own.covariance(), judge.data.mean(), judge.data.covariance())
        for record in results.read(folder / evaluate.RESULTS):
            if record["metric"] == "frechet_to_data" and record["num_steps"] == options.steps:
                # What no model that learnt anything reaches; also where a sample is not a number.
                near = record["value"] < limit
                found[record["sampler"]] = record["value"] if near else DIVERGES
    record = {"settings": settings_of(options), **found}
    write_atomically(folder / CELL, lambda file: file.write(json.dumps(record).encode()))
    return code


def shares(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """The cores of each of `jobs` processes, as even as can be; with more jobs than cores they are shared."""
    if jobs >= len(cores):
        return [[cores[job % len(cores)]] for job in range(jobs)]
    return [list(cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs]) for job in range(jobs)]


def run_cells(options: argparse.Namespace, cells: Sequence[tuple[str, str, int]]) -> bool:
    """Measures the cells that are not finished, and returns whether it was left to end by itself."""
    waiting = [cell for cell in cells if not is_finished(options, *cell)]
    idle = shares(sorted(os.sched_getaffinity(0)), options.jobs)
    running: dict[subprocess.Popen, tuple[list[int], tuple[str, str, int]]] = {}
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    while (waiting and not stopped) or running:
        while waiting and idle and not stopped:
            cell, cores = waiting.pop(0), idle.pop()
            running[start(options, cell, cores)] = cores, cell
        for process in [process for process in running if process.poll() is not None]:
            cores, cell = running.pop(process)
            idle.append(cores)
            print(
                f"{time.strftime('%H:%M:%S')} {', '.join(map(str, cell))}: exit code {process.returncode}", flush=True
            )
        if stopped == [1]:
            for process in running:
                process.send_signal(signal.SIGTERM)
            stopped.append(2)
        time.sleep(0.2)
    return not stopped


def settings_of(options: argparse.Namespace) -> dict[str, int]:
    """What a cell's figures depend on."""
    return {name: getattr(options, name) for name in SETTINGS}


def is_finished(options: argparse.Namespace, output: str, weight: str, seed: int) -> bool:
    """Whether a cell was measured with these settings; ends the program where it was with others."""
    path = folder_of(options, output, weight, seed) / CELL
    if not path.exists():
        return False
    made = json.loads(path.read_text())["settings"]
    if made != settings_of(options):
        sys.exit(f"Error: {path} was made with {made}, not {settings_of(options)}. Give the same, or another --folder.")
    return True


def start(options: argparse.Namespace, cell: tuple[str, str, int], cores: list[int]) -> subprocess.Popen:
    """The process of one cell on these cores, its output in a file of its folder."""
    folder = folder_of(options, *cell)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, f"--folder={options.folder}", f"--cell={','.join(map(str, cell))}"]
    command += [f"--{name}={getattr(options, name)}" for name in SETTINGS]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(len(cores))}
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    os.sched_setaffinity(process.pid, cores)  # at once: the pools of threads are sized by it when they start
    return process


def folder_of(options: argparse.Namespace, output: str, weight: str, seed: int) -> Path:
    return options.folder / f"{output}-{weight}-{seed}"


def table(options: argparse.Namespace, seeds: Sequence[int]) -> str:
    """Markdown: a row for each output and weight, a column for each sampler."""
    rows = [
        f"Frechet distance to the data after {options.updates} updates, {options.steps} steps, {options.samples} "
        f"samples, seeds {', '.join(map(str, seeds))}",
        "",
        "| output | weight | " + " | ".join(SAMPLERS) + " |",
        "|---" * (2 + len(SAMPLERS)) + "|",
    ]
    for output in OUTPUTS:
        for weight in WEIGHTS:
            done = [seed for seed in seeds if is_finished(options, output, weight, seed)]
            found = [json.loads((folder_of(options, output, weight, seed) / CELL).read_text()) for seed in done]
            shown = " | ".join(text([values.get(sampler) for values in found]) for sampler in SAMPLERS)
            rows.append(f"| {output} | {weight} | {shown} |")
    return "\n".join(rows)


def text(values: Sequence[float | str | None]) -> str:
    """Mean over seeds and, of several, their standard deviation; how many of them diverge, if any."""
    kept = [value for value in values if isinstance(value, float)]
    lost = values.count(DIVERGES)
    if not kept:
        return DIVERGES if lost else NOT_THERE
    spread = f" +- {statistics.stdev(kept):.2g}" if len(kept) > 1 else ""
    return f"{statistics.mean(kept):.3g}{spread}" + (f" ({lost} of {len(values)} diverge)" if lost else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/cells"))
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--updates", type=int, default=1500, help="of each teacher")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=256, help="of the samplers")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--report", action="store_true", help="print the table of what is there")
    parser.add_argument("--cell", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.cell:
        sys.exit(measure(options, folder_of(options, *options.cell.split(","))))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    cells = [(output, weight, seed) for seed in seeds for output in OUTPUTS for weight in WEIGHTS]
    finished = options.report or run_cells(options, cells)
    print("\n" + table(options, seeds))
    sys.exit(0 if finished else 128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
