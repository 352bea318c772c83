"""Walks a plan: skips stages that are finished, resumes the one that is not, starts the next."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffdistill import chain, data_checks, targets, workdir
from diffdistill.chain import DataFacts, Stage
from diffdistill.config import Config, ConfigError, DisbackConfig, to_dict
from diffdistill.data.contract import Source
from diffdistill.data.latents import scaled
from diffdistill.data.pipeline import Batches, in_memory
from diffdistill.data.sources import open_source
from diffdistill.methods import Method
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.loop import CompiledStep, compile_step, fit, resume_or_start
from diffdistill.training.metrics import MetricWriter
from diffdistill.training.progress import make_progress
from diffdistill.workdir import Workdir


@dataclass(frozen=True)
class Run:
    """A run that is ready to train: everything was checked."""

    workdir: Workdir
    source: Source
    mesh: Mesh
    stages: tuple[Stage, ...]

    @property
    def config(self) -> Config:
        return self.workdir.config

    @property
    def facts(self) -> DataFacts:
        return self.workdir.facts


def open_data(config: Config) -> tuple[Source, DataFacts]:
    """The images of a config and what networks need to know of them. Raises DataError or ConfigError."""
    source = open_images(config)
    latents = source.dtype != np.uint8
    facts = DataFacts(source.image_shape, source.num_classes, tuple(source.class_names), latents)
    data_checks.check_data(config, facts)
    if latents:
        source = scaled(source, config.data.latent_shift, config.data.latent_scale)
    return source, facts


def open_images(config: Config) -> Source:
    """The images of a config, whether its network fits them or not. Raises DataError or ConfigError."""
    data = config.data
    if data.source != "digits" and not data.path:
        raise ConfigError(
            f"config.data.path is empty: config.data.source={data.source!r} needs one, such as "
            "--config.data.path=FOLDER."
        )
    return open_source(
        source=data.source,
        path=data.path or None,
        split=data.split,
        image_size=data.image_size or None,
        channels=data.channels or None,
    )


def prepare(config: Config, path: str) -> Run:
    """Opens data and workdir and checks what can be checked before training starts.

    Raises:
      DataError, ConfigError, WorkdirError, ProcessesDisagree: with a message for the person who started the run.
    """
    source, facts = open_data(config)
    mesh = meshes.make_mesh()
    stages = chain.plan(config)
    for stage in stages:
        try:
            meshes.process_slice(stage.settings.batch_size // stage.settings.parts)
            chain.denoiser_of(config, stage, facts).shapes()
            chain.updater_of(stage)
        except ValueError as error:
            raise ConfigError(f"Stage {stage.name} cannot be built: {error}") from error
    processes.assert_same(json.dumps(to_dict(config), sort_keys=True), "the config")
    source = in_memory(source)  # a damaged image is found here, before anything is written
    processes.assert_same(source.fingerprint(), "the images")
    opened = workdir.create(path, config, facts, source.fingerprint())
    return Run(opened, source, mesh, stages)


def train(run: Run, interrupt: Interrupt, say: Any = print) -> None:
    """Trains every stage of the plan that is not finished.

    Raises:
      Interrupted: a signal arrived; everything up to the update it names is saved.
      NonFiniteLoss, CheckpointError: training or saving failed; earlier checkpoints are intact.
      WorkdirError: another program trains in the folder.
    """
    compiled: dict[Method, CompiledStep] = {}
    with contextlib.ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(workdir.alone(run.workdir.path)))
        for index, stage in enumerate(run.stages):
            with_checkpoints = _checkpoints(run, stage)
            try:
                _train_stage(run, index, stage, with_checkpoints, compiled, interrupt, say)
            finally:
                with_checkpoints.close()


def finished(folder: Workdir) -> Iterator[Stage]:
    """The finished stages of a run, in order."""
    for stage in chain.plan(folder.config):
        if StageCheckpoints(folder.stage(stage.name), read_only=True).latest() == stage.num_updates:
            yield stage


def read_params(folder: Workdir, stage: Stage, mesh: Mesh, update: int = 0, average: str = "") -> Any:
    """The parameters that a stage hands on (its moving average where it has one), on every device of `mesh`.

    update: number of the checkpoint; 0: the newest. average: the name of a further average, instead.

    Raises:
      CheckpointError: no complete checkpoint, or one of another network.
    """
    denoiser = chain.denoiser_of(folder.config, stage, folder.facts)
    like = meshes.abstract(denoiser.shapes(), meshes.replicated(mesh))
    return StageCheckpoints(folder.stage(stage.name), read_only=True).restore_params(
        like, step=update or None, average=average
    )


def _checkpoints(run: Run, stage: Stage) -> StageCheckpoints:
    """The checkpoints of a stage, open for writing; those that are to stay are also the ones that are written."""
    training = run.config.training
    keep_every = stage.settings.keep_every if isinstance(stage.settings, DisbackConfig) else 0
    return StageCheckpoints(
        run.workdir.stage(stage.name), keep_every or training.save_every, training.keep, keep_every=keep_every
    )


def _inputs(run: Run, stage: Stage, say: Any) -> tuple[dict[str, Any], Any, int]:
    """(what a stage starts from, what its step reads and never changes, parameters by role; number of its targets)."""
    stages = {each.name: each for each in run.stages}
    settings = stage.settings

    def read(name: str, update: int = 0) -> Any:
        return read_params(run.workdir, stages[name], run.mesh, update)

    if not isinstance(settings, DisbackConfig):
        sources = {"teacher": read(stage.teacher)} if stage.teacher else {}
        return sources, sources, 1
    if stage.method == "degradation":
        return {"teacher": read(stage.teacher)}, {"generator": read(stage.generator)}, 1

    relay, count = targets.relay(run.workdir, stage, run.mesh, read, say)
    return {"generator": read(stage.generator), "fake": read(stage.path or stage.teacher)}, relay, count


def compile_method(config: Config, method: Method, mesh: Mesh, state: Any) -> CompiledStep:
    """The step of a method as a config wants it compiled; state: its shapes."""
    spread = meshes.state_sharding(mesh, state) if config.training.shard_state else None
    return compile_step(method.step, mesh, config.training.updates_per_call or None, spread)


def _train_stage(
    run: Run,
    index: int,
    stage: Stage,
    checkpoints: StageCheckpoints,
    compiled: dict[Method, CompiledStep],
    interrupt: Interrupt,
    say: Any,
) -> None:
    done = checkpoints.latest() or 0
    if done == stage.num_updates:
        say(f"{stage.name}: finished before ({done} updates)")
        return
    say(
        f"{stage.name}: "
        + (f"resumed at update {done} of {stage.num_updates}" if done else f"{stage.num_updates} updates")
    )
    config = run.config
    method = chain.method_of(config, stage, run.facts)
    stage_key = jax.random.fold_in(jax.random.key(config.seed), index)
    # Streams of an update are numbered from 0: the key of the initialisation lies beyond any update.
    init_key = jax.random.fold_in(stage_key, np.uint32(2**32 - 1))
    starts, frozen, num_targets = _inputs(run, stage, say)
    if method not in compiled:
        compiled[method] = compile_method(config, method, run.mesh, jax.eval_shape(method.init, init_key, starts))
    # A state that is to be spread must never lie on one device whole.
    placed = {"out_shardings": compiled[method].state_sharding} if config.training.shard_state else {}
    init_key = meshes.replicate(run.mesh, init_key) if placed else init_key
    init = functools.partial(jax.jit(method.init, **placed), init_key, starts)
    state, meta = resume_or_start(checkpoints, compiled[method], init)
    del starts, init  # memory that a generator needs

    start, stop = meshes.process_slice(stage.settings.batch_size)
    data_seed = int(np.random.SeedSequence((config.seed, index)).generate_state(1)[0])
    batches = Batches(run.source, stage.settings.batch_size, data_seed, config.data.flip, start, stop)
    writer = MetricWriter(run.workdir.path, stage.name, done)
    try:
        fit(
            compiled[method],
            state,
            frozen,
            {"num_steps": max(stage.num_steps, 1), "num_updates": stage.num_updates, "num_targets": num_targets},
            stage=stage.name,
            batches=batches,
            stage_key=stage_key,
            num_updates=stage.num_updates,
            checkpoints=checkpoints,
            writer=writer,
            progress=make_progress(stage.name, done, stage.num_updates),
            log_every=config.training.log_every,
            meta={"stage": stage.name, "seconds": meta.get("seconds", 0.0)},
            interrupt=interrupt,
            stop_at_non_finite=stage.settings.non_finite == "stop",
        )
    finally:
        writer.close()
