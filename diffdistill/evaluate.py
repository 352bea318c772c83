"""Measures the finished stages of a run beside their teacher, and writes results, grids and the report.

Every model is sampled with the same seeds, so that image k of a student and image k of the teacher start from the
same noise. Distances live in the features of a small classifier of the same data (evaluation.features): they compare
models of one data set with each other and are not FID.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffdistill import chain, runner
from diffdistill.chain import Stage
from diffdistill.data.contract import DataError, Source
from diffdistill.evaluation import features, images, metrics, results
from diffdistill.sample import Generator, load_stage, save_grid
from diffdistill.training import mesh as meshes
from diffdistill.training.interrupt import Interrupt
from diffdistill.workdir import Workdir

RESULTS = "evaluation/results.jsonl"
SHOWN = 200  # samples kept of each measurement, for pictures
METRICS = ("frechet_to_data", "frechet_to_teacher", "paired_rmse_to_teacher", "class_accuracy")


class EvaluationInterrupted(Exception):
    """A signal arrived; what was measured before is kept."""


@dataclass(frozen=True)
class Measurement:
    """One thing to measure: a stage sampled with so many steps and this guidance weight."""

    stage: Stage
    num_steps: int
    w: float
    is_reference: bool


def measurements(folder: Workdir, stages: tuple[Stage, ...]) -> Iterator[Measurement]:
    """What the config asks for, reference first for each w: teacher, guided student, rounds at their own step count."""
    config = folder.config
    full = chain.full_steps(config)
    guided = any(stage.conditioned_on_guidance for stage in stages)
    teacher_can = bool(folder.config.model.conditional and config.teacher.label_dropout)
    for w in config.evaluation.guidance if guided or teacher_can else (0.0,):
        low, high = (config.guided.w_min, config.guided.w_max) if guided else (w, w)
        for stage in stages:
            if stage.name == "teacher":
                yield Measurement(stage, full, w, True)
            if stage.conditioned_on_guidance and not low <= w <= high:
                continue
            if w and not stage.conditioned_on_guidance and stage.name != "teacher":
                continue  # a chain without w distils the plain conditional model
            # A round is measured at its own number of steps, whatever the list says.
            for num_steps in (stage.num_steps,) if stage.num_steps else config.evaluation.num_steps:
                if not (stage.name == "teacher" and num_steps == full):
                    yield Measurement(stage, num_steps, w, False)


def evaluate(folder: Workdir, source: Source, interrupt: Interrupt, say: Callable[[str], Any] = print) -> None:
    """Measures everything that was not measured before and appends it to evaluation/results.jsonl.

    Args:
      folder: of a run with at least its teacher finished.
      source: the run's data, decoded in memory where it fits.
      interrupt: looked at between two measurements.

    Raises:
      EvaluationInterrupted: a signal arrived.
      ValueError: the data has too few images or classes for domain features.
    """
    stages = tuple(runner.finished(folder))
    if not folder.config.evaluation.num_samples or not stages:
        return
    if source.num_classes < 2:
        say(f"evaluation: left out, since domain features need classes and {source.name} has {source.num_classes}")
        return
    network, data_moments = _feature_network(folder, source, say)
    todo = list(measurements(folder, stages))
    done = results.finished(results.read(folder.path / RESULTS))
    bar = _Bar(len(todo))
    generators: dict[str, tuple[Generator, str]] = {}
    reference: dict[float, tuple[np.ndarray, metrics.Moments]] = {}
    try:
        wanted = {item: _unmeasured(folder, item, generators, done) for item in todo}
        open_items = {item for item in todo if wanted[item] or not _pictures_exist(folder, item)}
        # The teacher's samples at its full number of steps are needed for whatever else is missing at the same w.
        open_items |= {item for item in todo if item.is_reference and item.w in {other.w for other in open_items}}
        # Of several processes the main one decides: sampling needs all of them, at the same measurement.
        opened = meshes.from_main(np.array([item in open_items for item in todo], np.int32))
        for item, is_open in zip(todo, opened, strict=True):
            if meshes.any_process(interrupt.requested):
                raise EvaluationInterrupted(
                    f"Evaluation stopped by {interrupt.reason}; what was measured is kept. "
                    "Start the same command again to continue."
                )
            bar.show(item)
            if is_open:
                _measure(folder, network, data_moments, item, *generators[item.stage.name], wanted[item], reference)
            bar.advance()
    finally:
        bar.close()


def _unmeasured(
    folder: Workdir, item: Measurement, generators: dict[str, tuple[Generator, str]], done: set[results.Key]
) -> list[str]:
    """The metrics of one measurement that no earlier evaluation of these parameters has written."""
    if item.stage.name not in generators:
        generator = load_stage(folder, item.stage)
        generators[item.stage.name] = (generator, params_hash(generator.params))
    generator, digest = generators[item.stage.name]
    names = {"frechet_to_data"}
    if generator.denoiser.num_classes:
        names.add("class_accuracy")
    if not item.is_reference:
        names.add("frechet_to_teacher")
        if _sampler(generator, item) == "ddim":
            names.add("paired_rmse_to_teacher")  # pairs need two deterministic samplers
    return [name for name in METRICS if name in names and _key(folder, generator, item, name, digest) not in done]


def _sampler(generator: Generator, item: Measurement) -> str:
    """The reference is deterministic, so that pairs with it mean something; the rest is sampled as the config says."""
    return "ddim" if item.is_reference else generator.sampler


def _grid_of(folder: Workdir, item: Measurement) -> Path:
    """Where the grid of samples of one measurement lies."""
    return folder.path / "grids" / f"w{item.w:g}" / f"{item.stage.name}_sampled_{item.num_steps:04d}.png"


def _pictures_exist(folder: Workdir, item: Measurement) -> bool:
    kept = samples_path(folder, item.stage.name, item.num_steps, item.w)
    return _grid_of(folder, item).exists() and kept.exists()


def samples_path(folder: Workdir, stage: str, num_steps: int, w: float) -> Path:
    """Where the first SHOWN samples of one measurement lie: images, labels, seeds."""
    return folder.path / "evaluation" / "samples" / f"w{w:g}" / f"{stage}_sampled_{num_steps:04d}.npz"


def params_hash(params: Any) -> str:
    """12 hexadecimal digits that change with any parameter."""
    content = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        content.update(jax.tree_util.keystr(path).encode())
        content.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return content.hexdigest()[:12]


def _feature_network(
    folder: Workdir, source: Source, say: Callable[[str], Any]
) -> tuple[features.FeatureNetwork, metrics.Moments]:
    from diffdistill.data.pipeline import gather

    # Enough for the statistics; a larger set is thinned out evenly.
    chosen = np.linspace(0, len(source) - 1, min(len(source), 10_000)).astype(np.int64)
    data = gather(source, chosen)
    try:
        network = features.train_or_load(
            data["image"], data["label"], source.num_classes, source.fingerprint(), folder.path / "evaluation" / "cache"
        )
    except ValueError as error:
        raise DataError(f"evaluation of {source.name}: {error}. Set config.evaluation.num_samples=0.") from error
    accuracy = network.record.get("hold_out_accuracy")
    if isinstance(accuracy, float):
        say(f"evaluation: features of a classifier with {100 * accuracy:.1f} % held-out accuracy")
    return network, metrics.moments_of(network.features(data["image"]))


def _seed(folder: Workdir) -> int:
    return 1_000_000 * (folder.config.seed % 1000)


def _key(folder: Workdir, generator: Generator, item: Measurement, metric: str, digest: str) -> results.Key:
    return results.key(
        {
            "stage": item.stage.name,
            "num_steps": item.num_steps,
            "sampler": _sampler(generator, item),
            "w": item.w,
            "metric": metric,
            "num_samples": folder.config.evaluation.num_samples,
            "seed": _seed(folder),
            "params_hash": digest,
            "protocol": _protocol(generator),
        }
    )


def _protocol(generator: Generator) -> str:
    """What else a figure depends on: the recipe of the feature network and the sampler's settings."""
    clip = "clip" if generator.clip else "no clip"
    return f"domain features {features.RECIPE}, {clip}, variance fraction {generator.variance_fraction:g}"


def _measure(
    folder: Workdir,
    network: features.FeatureNetwork,
    data_moments: metrics.Moments,
    item: Measurement,
    generator: Generator,
    digest: str,
    wanted: list[str],
    reference: dict[float, tuple[np.ndarray, metrics.Moments]],
) -> None:
    start = time.monotonic()
    config = folder.config
    sampler = _sampler(generator, item)
    samples = generator.sample(
        config.evaluation.num_samples, seed=_seed(folder), w=item.w, num_steps=item.num_steps, sampler=sampler
    )
    seconds = time.monotonic() - start
    sampled, predicted = network.measure(samples.images)
    moments = metrics.moments_of(sampled)
    if item.is_reference:
        reference[item.w] = (samples.images, moments)
    teacher_images, teacher_moments = reference[item.w]

    def distance(other: metrics.Moments) -> float:
        return metrics.frechet_distance(moments.mean(), moments.covariance(), other.mean(), other.covariance())

    compute: dict[str, Callable[[], float]] = {
        "frechet_to_data": lambda: distance(data_moments),
        "frechet_to_teacher": lambda: distance(teacher_moments),
        "paired_rmse_to_teacher": lambda: metrics.paired_rmse(samples.images, teacher_images),
        "class_accuracy": lambda: metrics.class_accuracy(predicted, samples.labels),
    }
    if not meshes.is_main():
        return
    save_grid(_grid_of(folder, item), samples, generator, config.evaluation.grid_columns)
    kept = slice(0, SHOWN)
    images.save_npz(
        samples_path(folder, item.stage.name, item.num_steps, item.w),
        samples.images[kept],
        samples.labels[kept],
        samples.seeds[kept],
    )
    results.append(
        folder.path / RESULTS,
        [
            results.record(
                stage=item.stage.name,
                num_steps=item.num_steps,
                network_evaluations=samples.network_evaluations,
                sampler=sampler,
                w=item.w,
                metric=name,
                value=compute[name](),
                num_samples=config.evaluation.num_samples,
                seed=_seed(folder),
                hardware=meshes.describe(meshes.make_mesh()),
                wall_time=seconds,
                params_hash=digest,
                protocol=_protocol(generator),
            )
            for name in wanted
        ],
    )


class _Bar:
    """Progress of the evaluation: a bar on a terminal, a line every few measurements elsewhere."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc="evaluation",
            unit="measurement",
            disable=None if meshes.is_main() else True,
            dynamic_ncols=True,
        )
        self._lines = meshes.is_main() and self._bar.disable
        self._start = self._last = time.monotonic()
        self._done = 0

    def show(self, item: Measurement) -> None:
        text = f"{item.stage.name} at {item.num_steps} steps, w {item.w:g}"
        self._bar.set_postfix_str(text)
        now = time.monotonic()
        if self._lines and now - self._last > 10:
            print(f"evaluation: {self._done}/{self._bar.total}  {text}", flush=True)
            self._last = now

    def advance(self) -> None:
        self._done += 1
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
