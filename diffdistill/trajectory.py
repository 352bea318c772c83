"""How good a generator was along its training: kept checkpoints measured, against updates and wall time.

The stage that recorded its path counts: an update or a second of the generator is so many after the path's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffdistill import chain, evaluate, judges, runner
from diffdistill.chain import Stage
from diffdistill.data.contract import Source
from diffdistill.evaluation import plots, results
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.plots import Curve
from diffdistill.evaluation.stream import EvaluationInterrupted
from diffdistill.generator import SampleError
from diffdistill.judges.contract import Measurement
from diffdistill.sample import load_stage
from diffdistill.sample_files import save_grid
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.interrupt import Interrupt
from diffdistill.workdir import Workdir

FILE = "evaluation/trajectory.jsonl"
DISTANCES = ("frechet_to_data", "fid")
_METRICS = (*DISTANCES, "class_accuracy")


def measure(
    folder: Workdir,
    source: Source | None,
    interrupt: Interrupt,
    *,
    stage: str = "one_step",
    inception_weights: str = "",
    say: Callable[[str], Any] = print,
) -> list[results.Record]:
    """Measures every kept checkpoint of a stage that was not measured before; returns the records of all, in order.

    They are appended to evaluation/trajectory.jsonl as those of an evaluation, with "update", "average" (see
    config.sampling.average) and "seconds" of the stage and, in "updates_before" and "seconds_before", those of its
    path. Each checkpoint has a grid in grids/<stage>. Configs say with disback.keep_every which checkpoints are kept.

    Raises:
      SampleError: the run has no such stage or it has no checkpoint.
      EvaluationInterrupted: a signal arrived.
      DataError, WeightsError, StatisticsError: what is needed for the figures is not there.
    """
    chosen, updates = _checkpoints(folder, stage)
    judge = judges.make(folder, source, inception_weights, interrupt, say)
    if judge is None:
        return []
    # A checkpoint is the same whichever measurement of it is wanted: the first seed and weight of the config.
    evaluation = folder.config.evaluation
    seed = (*evaluation.seeds, evaluate.default_seed(folder.config.seed))[0]
    known = chain.guidance_range(folder.config, chosen)
    w = next((w for w in evaluation.guidance if known and known[0] <= w <= known[1]), known[0] if known else 0.0)
    before = _cost_before(folder, chosen)
    file, average = folder.path / FILE, folder.config.sampling.average
    measured = processes.on_main(lambda: _of(file, stage, average))
    for update in updates:
        if processes.any_process(interrupt.requested):
            raise EvaluationInterrupted(interrupt.reason)
        done = {entry["metric"] for entry in measured if entry["update"] == update}
        generator = load_stage(folder, chosen, update)
        item = Measurement(chosen, generator.num_steps, generator.sampler, w, seed)
        wanted = [name for name in judge.metrics(item, generator) if name in _METRICS and name not in done]
        if not wanted:
            continue
        model = evaluate.Model(folder, judge, generator, FILE)
        figures = judge.measure(item, generator, wanted, model.digest, interrupt)
        seconds = _seconds(folder, chosen, update)
        if not processes.is_main():
            continue
        place = f"{stage}-{average}" if average else stage
        save_grid(folder.path / "grids" / place / f"{update:08d}.png", figures.shown, generator, 10)
        facts: dict[str, Any] = {
            "network_evaluations": generator.network_evaluations(item.num_steps, w, item.sampler),
            "hardware": meshes.describe(meshes.make_mesh()),
            "wall_time": figures.seconds,
            "update": update,
            "average": average,
            "seconds": seconds,
            **before,
            **figures.facts,
        }
        results.append(file, [model.record(item, name, value=figures.values[name], **facts) for name in wanted])
        figures.written()
        say(f"{stage}, update {update}: " + ", ".join(f"{name} {figures.values[name]:.4g}" for name in wanted))
    return sorted(processes.on_main(lambda: _of(file, stage, average)), key=lambda entry: entry["update"])


def _of(file: Path, stage: str, average: int) -> list[results.Record]:
    return [e for e in results.read(file) if (e["stage"], e.get("average", 0)) == (stage, average)]


def curve(records: Iterable[Mapping[str, Any]], label: str) -> list[Curve]:
    """The distance of a stage's records, of any of DISTANCES, against updates and against minutes, path included."""
    measured = [entry for entry in records if entry["metric"] in DISTANCES]
    if not measured:
        return []
    minutes = [((e["seconds_before"] + e["seconds"]) / 60, e["value"]) for e in measured]
    updates = [(e["updates_before"] + e["update"], e["value"]) for e in measured]
    return [
        Curve(label, tuple(updates), plots.MEASURED, "updates, those of the path included"),
        Curve(label, tuple(minutes), plots.MEASURED, "minutes, those of the path included"),
    ]


def save_plot(path: Path, curves: list[Curve], title: str = "Frechet distance along the training") -> Path:
    """Writes a PNG of curves made by `curve`."""
    picture = plots.trajectory_plot(title, curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda stream: stream.write(picture))
    return path


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """Plain text: update, updates with the path's, minutes, and the figures of every checkpoint."""
    lines = [f"{'update':>10}{'with path':>12}{'minutes':>10}  figures"]
    rows: dict[int, list[Mapping[str, Any]]] = {}
    for entry in records:
        rows.setdefault(entry["update"], []).append(entry)
    for update, entries in rows.items():
        total, seconds = (entries[0][f"{name}_before"] + entries[0][one] for name, one in _COUNTS)
        figures = ", ".join(f"{entry['metric']} {entry['value']:.4g}" for entry in entries)
        lines.append(f"{update:>10}{total:>12}{seconds / 60:>10.2f}  {figures}")
    return "\n".join(lines)


_COUNTS = (("updates", "update"), ("seconds", "seconds"))


def _checkpoints(folder: Workdir, name: str) -> tuple[Stage, list[int]]:
    stages = {stage.name: stage for stage in chain.plan(folder.config)}
    updates = StageCheckpoints(folder.stage(name), read_only=True).all() if name in stages else []
    if not updates:
        raise SampleError(
            f"{folder.path} has no checkpoints of a stage {name!r}. Its stages are {', '.join(stages)}; one-step "
            "generators come from config.disback."
        )
    return stages[name], updates


def _cost_before(folder: Workdir, stage: Stage) -> dict[str, float]:
    path = next((each for each in runner.finished(folder) if each.name == stage.path), None)
    if path is None:
        return {"updates_before": 0, "seconds_before": 0.0}
    return {"updates_before": path.num_updates, "seconds_before": _seconds(folder, path, path.num_updates)}


def _seconds(folder: Workdir, stage: Stage, update: int) -> float:
    return StageCheckpoints(folder.stage(stage.name), read_only=True).meta(update).get("seconds", 0.0)
