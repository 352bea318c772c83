"""How fast a config's programs run on these devices, and how much of what the devices can do that is."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from diffdistill import chain, plan, samplers
from diffdistill.benchmarks import device, inputs, sampling, training, where
from diffdistill.benchmarks.table import line
from diffdistill.config import Config, ConfigError
from diffdistill.evaluation import program, results
from diffdistill.fields import one_of
from diffdistill.training import mesh as meshes

BENCHMARKS = (*training.METHODS, *training.SIZES, "sampling", "inputs", "features")
ONCE = ("inputs", "features")  # which do not depend on the type, or hardly
DTYPES = ("float32", "bfloat16")


def run(
    config: Config,
    say: Callable[[str], Any],
    *,
    benchmarks: Sequence[str] = ("teacher",),
    dtypes: Sequence[str] = DTYPES,
    seconds: float = 20.0,
    traced: int = 0,
    steps: Sequence[int] = sampling.STEPS,
    sampler: str = "",
) -> Iterator[results.Record]:
    """Runs a config's programs on random images and parameters for a while, and says the rates.

    Args:
      config: network, batch, parts, updates per call and batch of samples are those of its teacher.
      say: receives a line for each record, and what is left out.
      benchmarks: some of BENCHMARKS. teacher, guided, halving, distillation: updates of a stage of that kind, with the
        teacher's batch. batches, sides, devices: the teacher at parts of its batch, at half and twice the side of its
        images, on 1, 2, 4, ... and all devices. sampling: every sampler that suits the teacher, without guidance.
        inputs: reading, mirroring, augmenting, and how long training waits for batches. features: the networks that
        judge images, in float32. The last two are measured with the first type alone.
      dtypes: some of DTYPES.
      seconds: of measuring for each record, after compilation and one call; two calls at least.
      traced: further calls of each stage that trains, which the profiler watches; a table says where their time goes.
      steps: numbers of steps that samplers are measured in.
      sampler: the only one to measure; empty: all.

    Yields:
      A record as soon as it is measured: images_per_second, seconds (of an update or a batch), compile_seconds,
      compile_cached (whether the compilation cache had the program), program_memory (bytes on one device, as the
      compiler has planned it), peak_memory (the most bytes that a device has held since the process began, where it
      says so and this measurement has raised it; None otherwise), wall_seconds (since this function was called).
      rates: what a matrix product of that type and a copy of a large array reach on one device, measured before and
      after; matmul_flops_per_second and memory_bytes_per_second are their means, of all devices that take part. Where
      the FLOPs are known: flops_per_second, share_of_matmul, share_of_published (None where no data sheet is known or
      the type is not bfloat16), and seconds_of_flops, what the FLOPs would take at the rate of the product. Where the
      compiler counts the bytes: seconds_of_bytes, what they would take at the rate of the copy; no lower bound, since
      caches are faster than that. gap: the seconds in units of the larger of the two. Of the other stages
      cost_of_teacher, the time of an update in updates of the teacher (None unless that was measured just before).
      With `traced`, where: seconds of an update by part of the network and direction, on one device.

    Raises:
      ConfigError: a benchmark, a type, a sampler or a number of steps that is not known, or a stage that this teacher
        cannot have; before anything is measured.
    """
    begun = time.monotonic()
    check(config, benchmarks, dtypes, steps, sampler)
    mesh = meshes.make_mesh()
    facts, _ = plan.data_facts(config)
    for dtype in dtypes:
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        teacher = None
        for name in BENCHMARKS:
            if name not in benchmarks or (name in ONCE and dtype != dtypes[0]):
                continue
            if name == "sampling":
                measurements = sampling.measure(changed, facts, mesh, seconds, say, steps=steps, sampler=sampler)
            else:
                measurements = _measurements(name, changed, facts, mesh, seconds, traced)
            exact = name == "features"
            rates = functools.partial(device.rates, mesh, "float32" if exact else dtype, exact=exact)
            before, held = rates(), device.peak_memory(mesh)
            for measured in measurements:
                peak = device.risen(mesh, held)
                measured = {"image_shape": list(facts.image_shape), "devices": mesh.size, **measured}
                after = rates()
                record = {
                    "benchmark": name,
                    "config": config.name,
                    "dtype": dtype,
                    **measured,
                    **_roofline(measured, before, after),
                    "peak_memory": peak,
                    "wall_seconds": time.monotonic() - begun,
                    "hardware": meshes.describe(mesh),
                    "date": time.strftime("%Y-%m-%d"),
                    "revision": program.revision(),
                    "jax": program.versions()["jax"],
                }
                if name == "teacher":
                    teacher = record["seconds"]
                elif name in training.METHODS:
                    record["cost_of_teacher"] = record["seconds"] / teacher if teacher else None
                say(line(record))
                if "where" in record:
                    say(where.table(record["where"]))
                yield record
                before, held = after, device.peak_memory(mesh)


def check(
    config: Config,
    benchmarks: Sequence[str],
    dtypes: Sequence[str] = DTYPES,
    steps: Sequence[int] = sampling.STEPS,
    sampler: str = "",
) -> None:
    """Refuses what `run` cannot measure: ConfigError."""
    for name in benchmarks:
        one_of("--benchmarks", name, list(BENCHMARKS))
    for dtype in dtypes:
        one_of("--dtypes", dtype, list(DTYPES))
    if sampler:
        one_of("--sampler", sampler, list(samplers.SAMPLERS))
    if not steps or min(steps) < 1:
        raise ConfigError(f"--benchmark_steps is {list(steps)}; give numbers of at least 1.")
    for name in benchmarks:
        if name in training.METHODS:
            training.with_stage(config, name)


def _roofline(measured: results.Record, before: device.Rates, after: device.Rates) -> results.Record:
    """What arithmetic and memory traffic alone would take, and how far above the larger one the time is."""
    seconds, flops, moved = measured["seconds"], measured.get("flops"), measured.get("bytes")
    products, copies = (before.matmul, after.matmul), (before.memory, after.memory)
    matmul, memory = sum(products) / 2, sum(copies) / 2
    of_flops = flops / (matmul * measured["devices"]) if flops else None
    of_bytes = moved / memory if moved else None  # the compiler counts those of one device
    larger = max((each for each in (of_flops, of_bytes) if each is not None), default=None)
    published = before.published
    return {
        "flops_per_second": flops / seconds if flops else None,
        "matmul_flops_per_second": matmul * measured["devices"],
        "memory_bytes_per_second": memory * measured["devices"],
        "rates": {"matmul": list(products), "memory": list(copies)},
        "share_of_matmul": of_flops / seconds if of_flops else None,
        "share_of_published": of_flops / seconds * matmul / published if of_flops and published else None,
        "seconds_of_flops": of_flops,
        "seconds_of_bytes": of_bytes,
        "gap": seconds / larger if larger else None,
    }


def _measurements(
    name: str, config: Config, facts: chain.DataFacts, mesh: Mesh, seconds: float, traced: int
) -> Iterator[results.Record]:
    """What a benchmark measures; all but its rates."""
    if name in training.METHODS:
        config_with, stage = training.with_stage(config, name)
        yield training.measure(config_with, stage, facts, mesh, seconds, traced=traced)
    elif name in training.SIZES:
        for each, shown, devices in training.SIZES[name](config, facts, mesh):
            stage = training.with_stage(each, "teacher")[1]
            measured = training.measure(each, stage, shown, devices, seconds)
            yield {"image_shape": list(shown.image_shape), "devices": devices.size, **measured}
    elif name == "inputs":
        yield from inputs.pipeline(config, facts, mesh, seconds)
        yield inputs.wait(config, facts, mesh, seconds)
    else:
        yield from inputs.networks(facts, seconds)
