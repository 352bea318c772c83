"""The rates of every sampler, as `--mode=sample` runs it on a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffdistill import chain, plan, samplers
from diffdistill.benchmarks import device
from diffdistill.config import Config, ConfigError
from diffdistill.data.pipeline import Batch
from diffdistill.evaluation import results
from diffdistill.generator import Generator, SampleError
from diffdistill.training import mesh as meshes

STEPS = (1, 4, 18)


def measure(
    config: Config,
    facts: chain.DataFacts,
    mesh: Mesh,
    seconds: float,
    say: Callable[[str], Any],
    *,
    steps: Sequence[int] = STEPS,
    sampler: str = "",
) -> Iterator[results.Record]:
    """A record for every sampler that this teacher can be sampled with, or one, and each of `steps`; without guidance.

    What it cannot be sampled with is said, and why.
    """
    generator, refusal = _generator(config, facts, mesh), None
    measured = False
    for name in [sampler] if sampler else samplers.SAMPLERS:
        fresh = True  # a program serves every number of steps, but for samplers that need it as a plain number
        refused = []
        for num_steps in steps:
            try:
                record = _measured(config, facts, generator, name, num_steps, seconds, fresh)
            except SampleError as error:  # a sampler of discrete times, or of one step alone
                refusal = error
                refused.append(str(num_steps))
                continue
            fresh, measured = name in samplers.FIXED_STEPS, True
            yield record
        if refused:
            say(f"Left out: {name} in {', '.join(refused)} steps: {refusal}")
    if not measured:
        raise ConfigError(f"No sampler suits this teacher: {refusal}")


def _generator(config: Config, facts: chain.DataFacts, mesh: Mesh) -> Generator:
    stage = chain.plan(config)[0]
    denoiser = chain.denoiser_of(config, stage, facts)
    generator = Generator(
        name=stage.name,
        denoiser=denoiser,
        params=meshes.replicate(mesh, jax.jit(denoiser.init)(jax.random.key(0))),
        schedule=chain.sampling_schedule_of(config.process, config.model.prediction),
        num_steps=max(STEPS),
        settings=dataclasses.asdict(config.sampling),
        batch_size=config.sampling.batch_size,
    )
    if denoiser.task is None:
        return generator
    size = generator.chunk_size(config.sampling.batch_size)
    pixels = np.random.default_rng(0).integers(0, 256, (size, *facts.image_shape), dtype=np.uint8)
    shown = lambda seeds: Batch(image=pixels[: len(seeds)], label=np.zeros(len(seeds), np.int32))  # noqa: E731
    return dataclasses.replace(generator, examples=shown)


def _measured(
    config: Config,
    facts: chain.DataFacts,
    generator: Generator,
    sampler: str,
    num_steps: int,
    seconds: float,
    fresh: bool,
) -> results.Record:
    size = generator.chunk_size(config.sampling.batch_size)
    stage = chain.plan(config)[0]

    def call() -> None:
        for chunk in generator.stream(size, num_steps=num_steps, sampler=sampler):
            jax.block_until_ready(chunk.images)

    first, cached = device.first_call(call)
    rate = device.calls_per_second(call, seconds, untimed=0)
    evaluations = generator.network_evaluations(num_steps, 0.0, sampler)
    return {
        "sampler": sampler,
        "num_steps": num_steps,
        "network_evaluations": evaluations,
        "batch_size": size,
        "images_per_second": rate * size,
        "seconds": 1 / rate,
        "flops": size * evaluations * plan.flops_per_evaluation(config, stage, facts),
        "compile_seconds": max(0.0, first - 1 / rate) if fresh else None,  # the first call makes a batch as well
        "compile_cached": cached if fresh else None,
    }
