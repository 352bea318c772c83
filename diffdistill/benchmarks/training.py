"""The rates of the programs that train: a stage of every method, and the teacher at other sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffdistill import chain, plan, runner
from diffdistill.benchmarks import device, where
from diffdistill.config import Config, ConfigError
from diffdistill.evaluation import results
from diffdistill.methods.base import ARGUMENTS
from diffdistill.training import mesh as meshes
from diffdistill.training.loop import MAX_IN_FLIGHT

METHODS = {"teacher": "teacher", "guided": "guided", "halving": "progressive", "distillation": "diff_instruct"}
"""The method of the stage that a benchmark measures."""


def with_stage(config: Config, name: str) -> tuple[Config, chain.Stage]:
    """The stage of a benchmark, with a config that has it; its batch is the teacher's, to be compared with it.

    Raises ConfigError where the teacher of this config cannot be distilled so.
    """
    settings = {"batch_size": config.teacher.batch_size, "parts": config.teacher.parts}
    updates = config.teacher.num_updates
    if name == "guided":
        if not (config.model.conditional and config.teacher.label_dropout):
            raise ConfigError("--benchmarks=guided needs a teacher with a null class (config.teacher.label_dropout).")
        config = dataclasses.replace(config, guided=dataclasses.replace(config.guided, num_updates=updates, **settings))
    elif name == "halving":
        halving = dataclasses.replace(config.progressive, num_updates=updates, **settings)
        config = dataclasses.replace(config, progressive=halving)
    elif name == "distillation":
        alone = {part: dataclasses.replace(getattr(config, part), num_updates=0) for part in ("guided", "progressive")}
        one_step = dataclasses.replace(config.disback, num_updates=updates, path=0, start="teacher", **settings)
        config = dataclasses.replace(config, disback=one_step, **alone)
    return config, next(stage for stage in chain.plan(config) if stage.method == METHODS[name])


def measure(
    config: Config, stage: chain.Stage, facts: chain.DataFacts, mesh: Mesh, seconds: float, *, traced: int = 0
) -> results.Record:
    """The rate of the program that trains a stage, on random images that lie on the devices.

    traced: calls that are then watched for `where` their time goes.
    """
    method = chain.method_of(config, stage, facts)
    key, size = jax.random.key(0), stage.settings.batch_size
    starts, frozen = _networks(config, stage, facts, mesh)
    step = runner.compile_method(config, method, mesh, jax.eval_shape(method.init, key, starts))
    count = step.updates_per_call
    start, stop = meshes.process_slice(size)
    random = np.random.default_rng(jax.process_index())
    shape = (count, stop - start, *facts.image_shape)
    batches = {
        "image": random.integers(0, 256, shape, dtype=np.uint8),
        "label": random.integers(0, max(facts.num_classes, 1), shape[:2], dtype=np.int32),
    }
    batches = meshes.shard_batch(mesh, batches, axis=1)
    arguments = {name: np.int32(1) for name in ARGUMENTS}
    arguments |= {"num_steps": np.int32(max(stage.num_steps, 1)), "num_updates": np.int32(stage.num_updates)}
    arguments, key = meshes.replicate(mesh, (arguments, key))
    state = meshes.place(jax.jit(method.init)(key, starts), step.state_sharding)
    inputs = (batches, key, arguments, meshes.replicate(mesh, np.int32(count)), meshes.per_device_flag(mesh, False))
    program = device.compiled(step.function, state, frozen, *inputs)

    def call() -> Any:
        nonlocal state
        state, metrics, _ = program.run(state, frozen, *inputs)
        return metrics

    rate = device.calls_per_second(call, seconds, in_flight=MAX_IN_FLIGHT) * count
    watched = {"where": where.of_calls(program.run, call, traced, count)} if traced else {}
    return {
        "batch_size": size,
        "parts": stage.settings.parts,
        "parameters": chain.denoiser_of(config, stage, facts).num_parameters(),
        "updates_per_call": count,
        "images_per_second": rate * size,
        "seconds": 1 / rate,
        "flops": plan.flops_per_update(config, stage, facts),
        # Parts are passes of a loop, whose body the compiler counts once.
        "bytes": program.bytes_accessed if stage.settings.parts == 1 else None,
        "compile_seconds": program.compile_seconds,
        "compile_cached": program.cached,
        "program_memory": program.memory,
        **watched,
    }


def _networks(config: Config, stage: chain.Stage, facts: chain.DataFacts, mesh: Mesh) -> tuple[Any, Any]:
    """Random parameters for what a stage starts from, and for what its step reads."""
    starts, frozen = plan.roles(stage)
    if not starts:
        return {}, {}
    before = next(each for each in chain.plan(config) if each.name == stage.teacher)
    params = meshes.replicate(mesh, jax.jit(chain.denoiser_of(config, before, facts).init)(jax.random.key(0)))
    return dict.fromkeys(starts, params), dict.fromkeys(frozen, params)


Size = tuple[Config, chain.DataFacts, Mesh]


def _batches(config: Config, facts: chain.DataFacts, mesh: Mesh) -> list[Size]:
    """A quarter, half and all of the teacher's batch, where the devices and its parts divide it."""
    found = []
    for smaller in (config.teacher.batch_size // 4, config.teacher.batch_size // 2, config.teacher.batch_size):
        if smaller and smaller % mesh.size == 0 and smaller % config.teacher.parts == 0:
            teacher = dataclasses.replace(config.teacher, batch_size=smaller)
            found.append((dataclasses.replace(config, teacher=teacher), facts, mesh))
    return found


def _sides(config: Config, facts: chain.DataFacts, mesh: Mesh) -> list[Size]:
    """Half and twice the side of the teacher's images, where its levels divide it."""
    height, width, channels = facts.image_shape
    factor = 2 ** (len(config.model.multipliers) - 1)
    shapes = [(height // 2, width // 2, channels), (2 * height, 2 * width, channels)]
    fitting = [shape for shape in shapes if shape[0] and shape[0] % factor == 0 and shape[1] % factor == 0]
    return [(config, dataclasses.replace(facts, image_shape=shape), mesh) for shape in fitting]


def _devices(config: Config, facts: chain.DataFacts, mesh: Mesh) -> list[Size]:
    """1, 2, 4, ... (those that divide the batch) and all devices; all alone where there are several processes."""
    alone = jax.process_count() == 1
    fewer = [2**power for power in range((mesh.size - 1).bit_length())] if alone else []
    fewer = [count for count in fewer if config.teacher.batch_size % count == 0]
    return [(config, facts, each) for each in (*map(meshes.make_mesh, fewer), mesh)]


SIZES = {"batches": _batches, "sides": _sides, "devices": _devices}
"""The sizes at which each of these benchmarks measures the teacher."""
