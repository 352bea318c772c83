"""How fast a config's programs run on these devices, and how much of their arithmetic that uses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffdistill import chain, plan
from diffdistill.config import Config
from diffdistill.data.pipeline import Batch
from diffdistill.evaluation import results
from diffdistill.fields import one_of
from diffdistill.generator import Generator
from diffdistill.methods.base import ARGUMENTS
from diffdistill.training import mesh as meshes
from diffdistill.training.loop import compile_step

BENCHMARKS = ("teacher", "halving", "sampling")
DTYPES = ("float32", "bfloat16")
SAMPLINGS = (("ddim", 32), ("ddim", 1), ("heun", 18))  # sampler and steps
# Dense bfloat16 operations a second of one device, from the vendors' data sheets.
PUBLISHED_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def run(
    config: Config,
    say: Callable[[str], Any],
    *,
    benchmarks: Sequence[str] = ("teacher",),
    dtypes: Sequence[str] = DTYPES,
    seconds: float = 20.0,
) -> Iterator[results.Record]:
    """Runs a config's programs on random images and parameters for a while, and says the rates.

    Args:
      config: network, batch, parts, updates per call and batch of samples are those of its teacher.
      say: receives a line for each record.
      benchmarks: some of BENCHMARKS. teacher: updates on data. halving: updates of a round of halving with the
        teacher's batch. sampling: each of SAMPLINGS, without guidance.
      dtypes: some of DTYPES.
      seconds: of measuring for each record, after compilation and one call; two calls at least.

    Yields:
      A record as soon as it is measured: images_per_second, flops_per_second, share_of_matmul (of the rate of a matrix
      product of that type, measured on the same devices), share_of_published (None where no data sheet is known or the
      type is not bfloat16), compile_seconds; of halving also cost_of_teacher, the time of an update in updates of the
      teacher (None unless that was measured just before).

    Raises:
      ConfigError: a benchmark or a type that is not known.
    """
    for name in benchmarks:
        one_of("--benchmarks", name, list(BENCHMARKS))
    for dtype in dtypes:
        one_of("--dtypes", dtype, list(DTYPES))
    mesh = meshes.make_mesh()
    facts, _ = plan.data_facts(config)
    for dtype in dtypes:
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        product = matmul_rate(mesh, dtype)
        published = _published(mesh) if dtype == "bfloat16" else None
        teacher_rate = None
        for name, measured in _measurements(changed, facts, mesh, benchmarks, seconds):
            flops, images = measured.pop("flops_per_image"), measured["images_per_second"]
            record = {
                "benchmark": name,
                "config": config.name,
                "dtype": dtype,
                **measured,
                "flops_per_second": flops * images,
                "matmul_flops_per_second": product,
                "share_of_matmul": flops * images / product,
                "share_of_published": flops * images / published if published else None,
                "hardware": meshes.describe(mesh),
            }
            if name == "teacher":
                teacher_rate = images
            if name == "halving":
                record["cost_of_teacher"] = teacher_rate / images if teacher_rate else None
            say(_line(record))
            yield record


def _line(record: results.Record) -> str:
    """A record for a person."""
    what = record["benchmark"]
    if what == "sampling":
        what = f"{record['sampler']} in {record['num_steps']} steps"
    shares = f"{100 * record['share_of_matmul']:.0f} % of the {plan.readable(record['matmul_flops_per_second'])}FLOP/s"
    of_sheet = record["share_of_published"]
    cost = record.get("cost_of_teacher")
    return (
        f"{record['config']}, {what}, {record['dtype']}, batch {record['batch_size']}: "
        f"{record['images_per_second']:.4g} images/s, {plan.readable(record['flops_per_second'])}FLOP/s: {shares} of a "
        f"matrix product here{'' if of_sheet is None else f', {100 * of_sheet:.0f} % of its data sheet'}"
        f"{f', an update takes {cost:.2f} times as long as one of the teacher' if cost else ''} "
        f"({record['hardware']}; compiled in {record['compile_seconds']:.0f} s)"
    )


def _measurements(
    config: Config, facts: chain.DataFacts, mesh: Mesh, benchmarks: Sequence[str], seconds: float
) -> Iterator[tuple[str, results.Record]]:
    """(benchmark, what it measured), in the order of BENCHMARKS."""
    for name in BENCHMARKS:
        if name not in benchmarks:
            continue
        if name == "sampling":
            for sampler, num_steps in SAMPLINGS:
                yield name, _sampling(config, facts, sampler, num_steps, seconds)
        else:
            yield name, _training(*_with_stage(config, name), facts, mesh, seconds)


def _with_stage(config: Config, name: str) -> tuple[Config, chain.Stage]:
    """The teacher, or a round of halving of the same batch, with a config that has it."""
    if name == "halving":
        teacher = config.teacher
        settings = dataclasses.replace(
            config.progressive,
            batch_size=teacher.batch_size,
            parts=teacher.parts,
            num_updates=config.progressive.num_updates or teacher.num_updates,
        )
        config = dataclasses.replace(config, progressive=settings)
    method = "progressive" if name == "halving" else name
    return config, next(stage for stage in chain.plan(config) if stage.method == method)


def _training(config: Config, stage: chain.Stage, facts: chain.DataFacts, mesh: Mesh, seconds: float) -> results.Record:
    """The rate of the program that trains a stage, with its data on the devices."""
    method = chain.method_of(config, stage, facts)
    compiled = compile_step(method.step, mesh, config.training.updates_per_call or None)
    count, key = compiled.updates_per_call, jax.random.key(0)
    start, stop = meshes.process_slice(stage.settings.batch_size)
    random = np.random.default_rng(jax.process_index())
    shape = (count, stop - start, *facts.image_shape)
    batches = {
        "image": random.integers(0, 256, shape, dtype=np.uint8),
        "label": random.integers(0, max(facts.num_classes, 1), shape[:2], dtype=np.int32),
    }
    batches = meshes.shard_batch(mesh, batches, axis=1)
    arguments = {name: np.int32(1) for name in ARGUMENTS}
    arguments |= {"num_steps": np.int32(max(stage.num_steps, 1)), "num_updates": np.int32(stage.num_updates)}
    flag = meshes.per_device_flag(mesh, False)
    sources = {}
    if stage.teacher:
        before = next(each for each in chain.plan(config) if each.name == stage.teacher)
        sources["teacher"] = meshes.replicate(mesh, chain.denoiser_of(config, before, facts).init(key))
    state = meshes.replicate(mesh, jax.jit(method.init)(key, sources))

    def call() -> None:
        nonlocal state
        state, metrics, _ = compiled.function(state, sources, batches, key, arguments, np.int32(count), flag)
        jax.block_until_ready(metrics)

    rate, compile_seconds = _calls_per_second(call, seconds)
    size = stage.settings.batch_size
    return {
        "batch_size": size,
        "parts": stage.settings.parts,
        "images_per_second": rate * count * size,
        "flops_per_image": plan.flops_per_update(config, stage, facts) / size,
        "compile_seconds": compile_seconds,
    }


def _sampling(config: Config, facts: chain.DataFacts, sampler: str, num_steps: int, seconds: float) -> results.Record:
    """The rate of the program that samples the teacher, as samples.Generator runs it."""
    stage = chain.plan(config)[0]
    denoiser = chain.denoiser_of(config, stage, facts)
    generator = Generator(
        name=stage.name,
        denoiser=denoiser,
        params=meshes.replicate(meshes.make_mesh(), denoiser.init(jax.random.key(0))),
        schedule=chain.sampling_schedule_of(config.process, config.model.prediction),
        num_steps=num_steps,
        sampler=sampler,
        settings=dataclasses.asdict(config.sampling),
        batch_size=config.sampling.batch_size,
    )
    size = generator.chunk_size(config.sampling.batch_size)
    if denoiser.task is not None:
        pixels = np.random.default_rng(0).integers(0, 256, (size, *facts.image_shape), dtype=np.uint8)
        shown = lambda seeds: Batch(image=pixels[: len(seeds)], label=np.zeros(len(seeds), np.int32))  # noqa: E731
        generator = dataclasses.replace(generator, examples=shown)

    def call() -> None:
        for chunk in generator.stream(size):
            jax.block_until_ready(chunk.images)

    rate, compile_seconds = _calls_per_second(call, seconds)
    evaluations = generator.network_evaluations(num_steps, 0.0, sampler)
    return {
        "sampler": sampler,
        "num_steps": num_steps,
        "batch_size": size,
        "images_per_second": rate * size,
        "flops_per_image": evaluations * plan.flops_per_evaluation(config, stage, facts),
        "compile_seconds": compile_seconds,
    }


def _calls_per_second(call: Callable[[], None], seconds: float) -> tuple[float, float]:
    """(calls a second, seconds of the first one); every process makes the same number of calls."""
    compile_seconds = _timed(call)
    call()
    begun, calls = time.monotonic(), 0
    while meshes.any_process(calls < 2 or time.monotonic() - begun < seconds):
        call()
        calls += 1
    return calls / (time.monotonic() - begun), compile_seconds


def matmul_rate(mesh: Mesh, dtype: str) -> float:
    """Operations a second of square matrix products of `dtype` on all devices of `mesh`, each by itself.

    The numbers are random, since a device that multiplies mostly zeros draws less power and runs faster; a matrix with
    entries of variance 1 / side keeps the size of what it multiplies, however often.
    """
    side, repeats = (8192, 20) if meshes.is_accelerator(mesh) else (1024, 3)

    @jax.jit
    def product(a: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, b: (a @ b).astype(a.dtype), start)

    first, second = jax.random.normal(jax.random.key(0), (2, side, side), jnp.float32)
    a, start = (first / side**0.5).astype(dtype), second.astype(dtype)
    product(a, start).block_until_ready()
    best = min(_timed(lambda: product(a, start).block_until_ready()) for _ in range(3))
    return mesh.size * repeats * 2.0 * side**3 / best


def _timed(action: Callable[[], Any]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def _published(mesh: Mesh) -> float | None:
    kind = mesh.devices.flat[0].device_kind
    found = [peak for name, peak in PUBLISHED_PEAKS.items() if kind.startswith(name)]
    return mesh.size * found[0] if found else None
