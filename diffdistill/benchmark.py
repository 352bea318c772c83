"""How fast a config's teacher trains on these devices, and how much of their arithmetic that uses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffdistill import chain, plan
from diffdistill.config import Config
from diffdistill.evaluation import results
from diffdistill.training import mesh as meshes
from diffdistill.training.loop import compile_step

DTYPES = ("float32", "bfloat16")
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


def run(config: Config, say: Callable[[str], Any], *, seconds: float = 20.0) -> list[results.Record]:
    """Trains the teacher of a config on random images for a while in each of DTYPES, and says the rates.

    Args:
      config: network, batch, parts and updates per call are those of its teacher.
      say: receives a line for each type.
      seconds: of measuring for each type, after compilation and one call; two calls at least.

    Returns:
      A record of each type: images_per_second, flops_per_second, share_of_matmul (the rate of a matrix product of that
      type, measured on the same devices), share_of_published (None where no data sheet is known or the type is not
      bfloat16), compile_seconds.
    """
    mesh = meshes.make_mesh()
    facts, _ = plan.data_facts(config)
    records = []
    for dtype in DTYPES:
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        stage = chain.plan(changed)[0]
        rate, compile_seconds = _updates_per_second(changed, facts, mesh, seconds)
        flops = plan.flops_per_update(changed, stage, facts) * rate
        product = matmul_rate(mesh, dtype)
        published = _published(mesh) if dtype == "bfloat16" else None
        record = {
            "benchmark": "teacher",
            "config": config.name,
            "dtype": dtype,
            "batch_size": stage.settings.batch_size,
            "parts": stage.settings.parts,
            "images_per_second": rate * stage.settings.batch_size,
            "flops_per_second": flops,
            "matmul_flops_per_second": product,
            "share_of_matmul": flops / product,
            "share_of_published": flops / published if published else None,
            "compile_seconds": compile_seconds,
            "hardware": meshes.describe(mesh),
        }
        records.append(record)
        of_sheet = f", {100 * flops / published:.0f} % of its data sheet" if published else ""
        say(
            f"{config.name}, {dtype}, batch {stage.settings.batch_size}: {record['images_per_second']:.4g} images/s, "
            f"{plan.readable(flops)}FLOP/s: {100 * flops / product:.0f} % of the {plan.readable(product)}FLOP/s of a "
            f"matrix product here{of_sheet} ({record['hardware']}; compiled in {compile_seconds:.0f} s)"
        )
    return records


def _updates_per_second(config: Config, facts: chain.DataFacts, mesh: Mesh, seconds: float) -> tuple[float, float]:
    """(updates a second, seconds of the first call) of the program that training runs, with data on the devices."""
    stage = chain.plan(config)[0]
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
    arguments = {"num_steps": np.int32(1), "num_updates": np.int32(stage.num_updates)}
    flag = meshes.per_device_flag(mesh, False)
    state = meshes.replicate(mesh, jax.jit(lambda key: method.init(key, {}))(key))

    def call(state: Any) -> Any:
        state, metrics, _ = compiled.function(state, {}, batches, key, arguments, np.int32(count), flag)
        jax.block_until_ready(metrics)
        return state

    begun = time.monotonic()
    state = call(state)
    compile_seconds = time.monotonic() - begun
    state = call(state)
    begun, calls = time.monotonic(), 0
    # All processes make the same number of calls.
    while meshes.any_process(calls < 2 or time.monotonic() - begun < seconds):
        state = call(state)
        calls += 1
    return calls * count / (time.monotonic() - begun), compile_seconds


def matmul_rate(mesh: Mesh, dtype: str) -> float:
    """Operations a second of square matrix products of `dtype` on all devices of `mesh`, each by itself."""
    side, repeats = (8192, 20) if meshes.is_accelerator(mesh) else (1024, 3)

    @jax.jit
    def product(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, b: (a @ b).astype(a.dtype), a)

    a = jnp.eye(side, dtype=dtype)
    product(a).block_until_ready()
    best = min(_timed(lambda: product(a).block_until_ready()) for _ in range(3))
    return mesh.size * repeats * 2.0 * side**3 / best


def _timed(action: Callable[[], Any]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def _published(mesh: Mesh) -> float | None:
    kind = mesh.devices.flat[0].device_kind
    found = [peak for name, peak in PUBLISHED_PEAKS.items() if kind.startswith(name)]
    return mesh.size * found[0] if found else None
