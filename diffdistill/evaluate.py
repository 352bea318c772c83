"""Measures the finished stages of a run: what to measure, what was measured before, results and pictures.

What a figure is (distances in domain features, FID and its relatives) is the business of the judges.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffdistill import chain, judges, likelihood, runner, samplers
from diffdistill.chain import Stage
from diffdistill.data.contract import Source
from diffdistill.data.pipeline import gather
from diffdistill.evaluation import images, results
from diffdistill.evaluation.stream import EvaluationInterrupted
from diffdistill.generator import Generator, Samples
from diffdistill.judges.contract import SHOWN, Judge, Measurement
from diffdistill.sample import NOT_SHOWN, load_stage, samplers_for
from diffdistill.sample_files import save_grid
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.progress import make_progress
from diffdistill.workdir import Workdir

RESULTS = "evaluation/results.jsonl"


def measurements(
    folder: Workdir, stages: tuple[Stage, ...], with_reference: bool, *, full_length: bool = True
) -> Iterator[Measurement]:
    """What the config asks for: teacher, guided student, rounds at their own step count.

    with_reference: for each w and seed the teacher's full-length DDIM samples come first, whatever else is asked for.
    full_length: whether the teacher is then measured at that length with the other samplers too.
    """
    config, evaluation = folder.config, folder.config.evaluation
    full = chain.full_steps(config)
    guided = any(stage.conditioned_on_guidance for stage in stages)
    teacher_can = bool(config.model.conditional and config.teacher.label_dropout)
    chosen = [stage for stage in stages if not evaluation.stages or stage.name in evaluation.stages]
    # Encoders: see --mode=transfer. What a degradation knows is measured when asked for.
    chosen = [stage for stage in chosen if stage.method not in NOT_SHOWN or stage.name in evaluation.stages]
    chosen = [stage for stage in chosen if stage.method != "encoder"]
    samplers = evaluation.samplers or (config.sampling.sampler,)
    for w in evaluation.guidance if guided or teacher_can else (0.0,):
        for seed in evaluation.seeds or (default_seed(config.seed),):
            reference = None
            if with_reference:
                # Deterministic, so that pairs with it mean something; the rest is sampled as the config says.
                reference = Measurement(stages[0], full, "ddim", w, seed)
                yield dataclasses.replace(reference, is_reference=True)
            for stage in chosen:
                if w and not stage.conditioned_on_guidance and not chain.has_null_class(config, stage):
                    continue  # a chain without w distils the plain conditional model
                known = chain.guidance_range(config, stage)
                if known and not known[0] <= w <= known[1]:
                    continue
                # A round is measured at its own number of steps, whatever the list says.
                steps = (stage.num_steps,) if stage.num_steps else evaluation.num_steps
                if stage.method == "stochastic" and stage.num_steps == 2:
                    steps = (2, 1)  # which its single step needs no round of its own for
                steps = (full, *steps) if stage.name == "teacher" and with_reference and full_length else steps
                asked = [
                    Measurement(stage, num_steps, sampler, w, seed)
                    for sampler in samplers_for(stage, samplers)
                    for num_steps in steps
                ]
                yield from (item for item in dict.fromkeys(asked) if item != reference)


def default_seed(seed: int) -> int:
    """The number of the first image of a run: runs with other seeds are measured on other noise."""
    return 1_000_000 * (seed % 1000)


def evaluate(
    folder: Workdir,
    source: Source | None,
    interrupt: Interrupt,
    *,
    inception_weights: str = "",
    into: str = RESULTS,
    say: Callable[[str], Any] = print,
) -> None:
    """Measures everything that was not measured before and appends it to evaluation/results.jsonl.

    Args:
      folder: of a run with at least its teacher finished.
      source: the run's data; None where its figures need none.
      interrupt: looked at between two measurements, and within long ones.
      inception_weights: path of the Inception network; empty: the environment variable or the cache.
      into: another file of the run for the results, which are then not the report's, and without pictures.

    Raises:
      EvaluationInterrupted: a signal arrived.
      ConfigError: a stage is asked for that the run does not have.
      DataError, WeightsError, StatisticsError: what is needed for the figures is not there.
    """
    evaluation = folder.config.evaluation
    judges.check(folder.config, inception_weights)
    stages = tuple(runner.finished(folder))
    unfinished = set(evaluation.stages) - {stage.name for stage in stages}
    if unfinished:
        say(f"evaluation: not finished, so not measured: {', '.join(sorted(unfinished))}")
    if not evaluation.num_samples or not stages:
        return
    judge = judges.make(folder, source, inception_weights, interrupt, say)
    if judge is None:
        return
    todo = list(measurements(folder, stages, judge.needs_reference, full_length=into == RESULTS))
    done = _finished(folder, into)
    models = {
        stage.name: Model(folder, judge, with_examples(load_stage(folder, stage), source), into)
        for stage in dict.fromkeys(item.stage for item in todo)  # on all processes in the same order
    }
    wanted = {item: models[item.stage.name].unmeasured(item, done) for item in todo}
    open_items = {item for item in todo if wanted[item] or (into == RESULTS and not _pictures_exist(folder, item))}
    # The reference is needed for whatever else is missing at the same w and seed.
    places = {(item.w, item.seed) for item in open_items}
    open_items |= {item for item in todo if item.is_reference and (item.w, item.seed) in places}
    # Of several processes the main one decides: sampling needs all of them, at the same measurement.
    opened = processes.from_main(np.array([item in open_items for item in todo], np.int32))
    bar = make_progress("evaluation", 0, len(todo), unit="measurement")
    try:
        for number, (item, is_open) in enumerate(zip(todo, opened, strict=True)):
            if processes.any_process(interrupt.requested):
                raise EvaluationInterrupted(interrupt.reason)
            if is_open:
                models[item.stage.name].measure(item, wanted[item], interrupt)
            bar.advance(number + 1, {})
    finally:
        bar.close()
    if source is not None:
        _measure_bits(folder, source, [stage for stage in stages if likelihood.wanted(folder.config, stage)])


def _finished(folder: Workdir, file: str) -> set[results.Key]:
    """What was measured before, as the main process finds it."""
    return processes.on_main(lambda: results.finished(results.read(folder.path / file)))


def _measure_bits(folder: Workdir, source: Source, stages: Sequence[Stage]) -> None:
    """Writes the variational bound of images of the data by each of the stages, unless it was measured before."""
    config = folder.config
    done = _finished(folder, RESULTS)
    for stage in stages:
        generator = load_stage(folder, stage)
        images, labels = likelihood.chosen(source, config.evaluation.bits_images)
        known: dict[str, Any] = {
            "stage": stage.name,
            "num_steps": config.process.num_train_steps,
            "network_evaluations": config.process.num_train_steps,
            "sampler": "bound",
            "w": 0.0,
            "metric": "bits_per_dim",
            "num_samples": len(images),
            "seed": config.seed,
            "params_hash": params_hash(generator.params),
            "protocol": generator.settings_text("ancestral"),
        }
        if results.key(known) in done:
            continue
        found = likelihood.bound(generator, images, labels, seed=config.seed)
        if processes.is_main():
            record = results.record(
                **known,
                value=float(found.total.mean()),
                spread=float(found.total.std()),
                hardware=meshes.describe(meshes.make_mesh()),
                wall_time=found.seconds,
                config=config.name,
                dataset=config.data.dataset or config.data.source,
            )
            results.append(folder.path / RESULTS, [record])


def with_examples(generator: Generator, source: Source | None) -> Generator:
    """A model from image to image is shown image seed modulo their number of the data; any other stays as it is."""
    if generator.denoiser.task is None or source is None:
        return generator
    return dataclasses.replace(generator, examples=lambda seeds: gather(source, seeds % len(source)))


@dataclass(frozen=True)
class Model:
    """A stage that is being measured."""

    folder: Workdir
    judge: Judge
    generator: Generator
    into: str

    @functools.cached_property
    def digest(self) -> str:
        return params_hash(self.generator.params)

    def unmeasured(self, item: Measurement, done: set[results.Key]) -> list[str]:
        """The metrics of one measurement that no earlier evaluation of these parameters has written."""
        known = {"value": 0.0, "network_evaluations": 0, "hardware": "", "wall_time": 0.0}
        return [
            name
            for name in self.judge.metrics(item, self.generator)
            if results.key(self.record(item, name, **known)) not in done
        ]

    def measure(self, item: Measurement, wanted: Sequence[str], interrupt: Interrupt) -> None:
        """Measures, and writes pictures and results."""
        figures = self.judge.measure(item, self.generator, wanted, self.digest, interrupt)
        if not processes.is_main():
            return
        if item.seed == _first_seed(self.folder) and self.into == RESULTS:
            self.show(item, figures.shown)
        known = {
            "network_evaluations": self.generator.network_evaluations(item.num_steps, item.w, item.sampler),
            "hardware": meshes.describe(meshes.make_mesh()),
            "wall_time": figures.seconds,
        }
        records = []
        for name in wanted:
            more = dict(figures.facts)
            if name in figures.spreads:
                more["spread"] = figures.spreads[name]
            records.append(self.record(item, name, value=figures.values[name], **known, **more))
        results.append(self.folder.path / self.into, records)
        figures.written()

    def show(self, item: Measurement, samples: Samples) -> None:
        """Writes the grid and keeps the first samples."""
        save_grid(_grid_of(self.folder, item), samples, self.generator, self.folder.config.evaluation.grid_columns)
        kept = slice(0, SHOWN)
        path = samples_path(self.folder, item.stage.name, item.num_steps, item.w, item.sampler)
        images.save_npz(path, samples.images[kept], samples.labels[kept], samples.seeds[kept])

    def record(self, item: Measurement, metric: str, **more: Any) -> results.Record:
        """One line of the results: what identifies a measurement, and what a table of a paper asks about it."""
        config = self.folder.config
        return results.record(
            stage=item.stage.name,
            num_steps=item.num_steps,
            sampler=item.sampler,
            sampler_settings=dict(samplers.settings_of(item.sampler, self.generator.settings)),
            w=item.w,
            metric=metric,
            num_samples=config.evaluation.num_samples,
            seed=item.seed,
            params_hash=self.digest,
            protocol=self.judge.protocol(item, self.generator),
            config=config.name,
            dataset=config.data.dataset or config.data.source,
            conditional=config.model.conditional,
            method=item.stage.method,
            guidance_range=chain.guidance_range(config, item.stage),
            prediction=config.model.prediction,
            weight=item.stage.settings.weight,
            weight_settings=chain.weight_settings(item.stage.settings),
            **more,
        )


def _grid_of(folder: Workdir, item: Measurement) -> Path:
    """Where the grid of samples of one measurement lies."""
    return (
        folder.path / "grids" / f"w{item.w:g}" / f"{_picture_name(item.stage.name, item.num_steps, item.sampler)}.png"
    )


def samples_path(folder: Workdir, stage: str, num_steps: int, w: float, sampler: str = "ddim") -> Path:
    """Where the first samples of one measurement lie: images, labels, seeds."""
    return folder.path / "evaluation" / "samples" / f"w{w:g}" / f"{_picture_name(stage, num_steps, sampler)}.npz"


def _picture_name(stage: str, num_steps: int, sampler: str) -> str:
    return f"{stage}_sampled_{num_steps:04d}" + (f"_{sampler}" if sampler != "ddim" else "")


def _first_seed(folder: Workdir) -> int:
    return (*folder.config.evaluation.seeds, default_seed(folder.config.seed))[0]


def _pictures_exist(folder: Workdir, item: Measurement) -> bool:
    kept = samples_path(folder, item.stage.name, item.num_steps, item.w, item.sampler)
    return item.seed != _first_seed(folder) or (_grid_of(folder, item).exists() and kept.exists())


def params_hash(params: Any) -> str:
    """12 hexadecimal digits that change with any parameter."""
    content = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        content.update(jax.tree_util.keystr(path).encode())
        content.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return content.hexdigest()[:12]
