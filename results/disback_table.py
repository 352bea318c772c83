"""DisBack with paths of several lengths against Diff-Instruct (a path of 0) on the digits: one command, one table.

    python results/disback_table.py --teacher=runs/digits_edm --folder=runs/disback_table --jobs=2

--teacher is a finished run of configs/digits.py:edm, whose teacher all runs share; its students of one step, where it
has them, are printed beside. Each run is configs/disback.py:digits with its own seed and row of VARIANTS, all else
equal. Every kept checkpoint is measured; updates count those of the path. Killed, the same command continues. Fields of
config.disback for all runs stand at the end: -- num_updates=600 learning_rate=1e-3 (with a --folder of their own).
"""

import argparse
import ast
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffdistill import evaluate, runner, trajectory, workdir
from diffdistill.config import Config, resolve
from diffdistill.data.pipeline import in_memory
from diffdistill.evaluation import results
from diffdistill.training import mesh
from diffdistill.training.interrupt import catch_signals

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import disback

Records = list[results.Record]

BASELINE = "Diff-Instruct"
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {"path": 0},
    "path of 2": {"path": 2},
    "path of 5": {"path": 5},
    "path of 10": {"path": 10},
    # Beyond the paper, each beside the path of 5: targets by their loss, out of a finer record; targets left at will.
    "targets by loss": {"path": 20, "interval": 2, "path_share": 0.1},
    "adaptive walk": {"path": 5, "leg": 24, "walk": "adaptive", "walk_window": 4},
}


def config_of(variant: str, seed: int, changes: Mapping[str, Any]) -> Config:
    """The config of one run, with fields of config.disback for all of them."""
    settings = disback.get_config("digits")
    settings.name, settings.seed = name_of(variant, seed), seed
    settings.disback.update({**changes, **VARIANTS[variant]})
    return resolve(settings)


def name_of(variant: str, seed: int) -> str:
    """Of a run, and its folder."""
    return f"{variant.lower().replace(' ', '_').replace('-', '_')}_seed_{seed}"


def work(config: Config, folder: Path, teacher: Path) -> None:
    """Trains and measures one run."""
    if not (folder / "config.json").exists():
        source, facts = runner.open_data(config)
        workdir.create(folder, config, facts, source.fingerprint(), write=True)
    for part in ("evaluation/cache", "teacher"):  # the teacher last: without it the copy is not finished
        if (teacher / part).exists() and not (folder / part).exists():
            shutil.copytree(teacher / part, folder / f"{part}.copy", dirs_exist_ok=True)
            (folder / f"{part}.copy").rename(folder / part)
    with catch_signals() as interrupt:
        run = runner.prepare(config, str(folder))
        runner.train(run, interrupt)
        trajectory.measure(run.workdir, in_memory(run.source), interrupt)


def distances(records: Records) -> list[tuple[int, float]]:
    """(updates with those of the path, distance) along a run."""
    return [
        (entry["updates_before"] + entry["update"], entry["value"])
        for entry in records
        if entry["metric"] == "frechet_to_data"
    ]


def reached(records: Records, bound: float) -> int | None:
    """Updates, those of the path included, after which a run is at least as good as `bound`; None if it never is."""
    return next((updates for updates, distance in distances(records) if distance <= bound), None)


def table(runs: dict[str, dict[int, Records]]) -> str:
    """Markdown out of {variant: {seed: records}}: one row per variant."""
    lines = [
        "| generator | best distance | at update | class accuracy there | updates to the baseline's best | speed-up |",
        "|---" * 6 + "|",
    ]
    bests = {
        seed: min(distances(records), key=lambda point: point[1]) for seed, records in runs.get(BASELINE, {}).items()
    }
    for variant, seeds in runs.items():
        best = [min(distances(records), key=lambda point: point[1]) for records in seeds.values()]
        accuracy = [
            next(
                e["value"]
                for e in records
                if e["metric"] == "class_accuracy" and e["updates_before"] + e["update"] == updates
            )
            for records, (updates, _) in zip(seeds.values(), best, strict=True)
        ]
        when = {seed: reached(records, bests[seed][1]) for seed, records in seeds.items() if seed in bests}
        ratios = [bests[seed][0] / at for seed, at in when.items() if at is not None]
        cells = (
            variant,
            text([distance for _, distance in best], 3),
            text([float(updates) for updates, _ in best], 0),
            text(accuracy, 3),
            ", ".join("never" if at is None else str(at) for at in when.values()) or "no baseline",
            text(ratios, 2) if ratios else "-",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(values: Sequence[float], digits: int) -> str:
    """Mean and, of several, the standard deviation."""
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def beside(teacher: Path) -> str:
    """What the run of the teacher measured of its teacher in full and of its students of one step, without guidance."""
    found = {
        f"{entry['stage']} ({entry['sampler']}, {entry['num_steps']} steps)": entry["value"]
        for entry in results.read(teacher / evaluate.RESULTS)
        if entry["metric"] == "frechet_to_data"
        and not entry["w"]
        and (entry["stage"] == "teacher" or (entry["num_steps"] == 1 and entry["stage"].startswith("round_")))
    }
    return "\n".join(f"{name}: {value:.3f}" for name, value in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/disback_table"))
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated, of " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--only", default="", help="VARIANT,SEED: this one run, without a table")
    parser.add_argument("changes", nargs="*", help="FIELD=VALUE of config.disback, after --")
    arguments = parser.parse_args()
    if arguments.only:
        variant, seed = arguments.only.split(",")
        changes = {
            name: ast.literal_eval(value) for name, _, value in (each.partition("=") for each in arguments.changes)
        }
        config = config_of(variant, int(seed), changes)
        work(config, arguments.folder / name_of(variant, int(seed)), arguments.teacher)
        return
    variants, seeds = arguments.variants.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := set(variants) - VARIANTS.keys():
        parser.error(f"--variants: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")

    def start(one: tuple[str, int]) -> int:
        command = [sys.executable, __file__, f"--only={one[0]},{one[1]}", *sys.argv[1:]]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(arguments.jobs) as pool:
        failed = [code for code in pool.map(start, [(variant, seed) for seed in seeds for variant in variants]) if code]
    runs: dict[str, dict[int, Records]] = {}
    curves: list[Any] = []
    for variant in variants:
        for seed in seeds:
            records = results.read(arguments.folder / name_of(variant, seed) / trajectory.FILE)
            if records:
                runs.setdefault(variant, {})[seed] = records
                curves += trajectory.curve(records, variant)
    print(f"{mesh.describe(mesh.make_mesh())}\n{beside(arguments.teacher)}\n\n{table(runs)}")
    print(trajectory.save_plot(arguments.folder / "trajectory.png", curves))
    if failed:
        sys.exit(f"{len(failed)} runs did not end; the same command continues them.")


if __name__ == "__main__":
    main()
