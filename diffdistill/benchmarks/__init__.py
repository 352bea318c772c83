"""How fast a config's programs run on these devices, and how much of what the devices can do that is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from diffdistill import chain, plan
from diffdistill.benchmarks import device, inputs, sampling, training, where
from diffdistill.benchmarks.table import line
from diffdistill.config import Config
from diffdistill.evaluation import program, results
from diffdistill.fields import one_of
from diffdistill.training import mesh as meshes

BENCHMARKS = (*training.METHODS, "growth", "sampling", "inputs", "features")
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
) -> Iterator[results.Record]:
    """Runs a config's programs on random images and parameters for a while, and says the rates.

    Args:
      config: network, batch, parts, updates per call and batch of samples are those of its teacher.
      say: receives a line for each record.
      benchmarks: some of BENCHMARKS. teacher, guided, halving, distillation: updates of a stage of that kind, with the
        teacher's batch. growth: the teacher at other batches, sides of the image and numbers of devices. sampling:
        every sampler in 1, 4 and 18 steps, without guidance. inputs: reading, mirroring, augmenting, and how long
        training waits for batches. features: the networks that judge images. The last two are measured with the first
        type alone.
      dtypes: some of DTYPES.
      seconds: of measuring for each record, after compilation and one call; two calls at least.
      traced: further calls of each stage that trains, which the profiler watches; a table says where their time goes.

    Yields:
      A record as soon as it is measured: images_per_second, seconds (of an update or a batch), compile_seconds,
      program_memory (bytes on one device, as the compiler has planned it), peak_memory (the most bytes that a device
      has held since the program began, where it says so). Where the FLOPs are known: flops_per_second, share_of_matmul
      (of the rate of a matrix product of that type, measured on the same devices), share_of_published (None where no
      data sheet is known or the type is not bfloat16), floor_by_flops and floor_by_bytes (the seconds that it would
      take if nothing but the arithmetic, at the rate of that product, or the memory, at the rate of a copy, took
      time), and gap, the seconds in units of the larger floor. Of the other stages cost_of_teacher, the time of an
      update in updates of the teacher (None unless that was measured just before). With `traced`, where: seconds of an
      update by part of the network and direction, on one device.

    Raises:
      ConfigError: a benchmark or a type that is not known, or a stage that this teacher cannot have.
    """
    for name in benchmarks:
        one_of("--benchmarks", name, list(BENCHMARKS))
    for dtype in dtypes:
        one_of("--dtypes", dtype, list(DTYPES))
    mesh = meshes.make_mesh()
    facts, _ = plan.data_facts(config)
    for dtype in dtypes:
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        rates = device.rates(mesh, dtype)
        teacher = None
        for name, measured in _measurements(changed, facts, mesh, benchmarks, seconds, traced, dtype == dtypes[0]):
            record = {
                "benchmark": name,
                "config": config.name,
                "dtype": dtype,
                **measured,
                **_roofline(measured, rates),
                "peak_memory": device.peak_memory(mesh),
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


def _roofline(measured: results.Record, rates: device.Rates) -> results.Record:
    """The floors of what was measured, and how far above the larger one it is."""
    seconds, flops, moved = measured["seconds"], measured.get("flops"), measured.get("bytes")
    matmul = rates.matmul * measured["devices"]
    by_flops = flops / matmul if flops else None
    by_bytes = moved / rates.memory if moved else None  # the compiler counts those of one device
    floor = max((each for each in (by_flops, by_bytes) if each is not None), default=None)
    return {
        "flops_per_second": flops / seconds if flops else None,
        "matmul_flops_per_second": matmul,
        "memory_bytes_per_second": rates.memory * measured["devices"],
        "share_of_matmul": by_flops / seconds if by_flops else None,
        "share_of_published": by_flops / seconds * rates.matmul / rates.published
        if by_flops and rates.published
        else None,
        "floor_by_flops": by_flops,
        "floor_by_bytes": by_bytes,
        "gap": seconds / floor if floor else None,
    }


def _measurements(
    config: Config,
    facts: chain.DataFacts,
    mesh: Mesh,
    benchmarks: Sequence[str],
    seconds: float,
    traced: int,
    first: bool,
) -> Iterator[tuple[str, results.Record]]:
    """(benchmark, what it measured), in the order of BENCHMARKS; all but its rates. first: of several types."""

    def at(facts: chain.DataFacts, mesh: Mesh, record: results.Record) -> results.Record:
        return {"image_shape": list(facts.image_shape), "devices": mesh.size, **record}

    for name in BENCHMARKS:
        if name not in benchmarks or (name in ONCE and not first):
            continue
        if name in training.METHODS:
            config_with, stage = training.with_stage(config, name)
            yield name, at(facts, mesh, training.measure(config_with, stage, facts, mesh, seconds, traced=traced))
        elif name == "growth":
            for each, shown, devices in training.sizes(config, facts, mesh):
                stage = training.with_stage(each, "teacher")[1]
                yield name, at(shown, devices, training.measure(each, stage, shown, devices, seconds))
        elif name == "sampling":
            for record in sampling.measure(config, facts, mesh, seconds):
                yield name, at(facts, mesh, record)
        elif name == "inputs":
            for record in inputs.pipeline(config, facts, mesh, seconds):
                yield name, at(facts, mesh, record)
            yield name, at(facts, mesh, inputs.wait(config, facts, mesh, seconds))
        else:
            for record in inputs.networks(facts, seconds):
                yield name, at(facts, mesh, record)
