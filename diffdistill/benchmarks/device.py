"""What the devices can do at best, and what the compiler says of a program: the two sides of a roofline."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffdistill import compilation
from diffdistill.training import mesh as meshes
from diffdistill.training import processes

# Dense bfloat16 operations a second of one device, from the vendors' data sheets.
PUBLISHED_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,  # as JAX calls v5p
    "TPU v6 lite": 918e12,
}


@dataclass(frozen=True)
class Rates:
    """Of one device.

    Attributes:
      matmul: operations a second of square matrix products of the type that is computed in, as measured.
      memory: bytes a second that an array is read and written with, as measured.
      published: operations a second of the data sheet; None where there is none, or it is of another type.
    """

    matmul: float
    memory: float
    published: float | None


@dataclass(frozen=True)
class Program:
    """A program that is compiled, with what the compiler says of it.

    Attributes:
      run: calls it.
      compile_seconds: from its function to the program.
      cached: whether the compilation cache had it.
      bytes_accessed: what it reads and writes, the body of a loop counted once, however often it runs; None where that
        is not known.
      memory: bytes of arguments, results and everything between at the same time on one device; None likewise.
    """

    run: Callable[..., Any]
    compile_seconds: float
    cached: bool
    bytes_accessed: float | None
    memory: int | None


def rates(mesh: Mesh, dtype: str, *, exact: bool = False) -> Rates:
    """What products of matrices of `dtype`, and copies, reach on a device of `mesh`.

    exact: products of float32 without the faster, less precise passes that accelerators take otherwise.
    """
    kind = mesh.devices.flat[0].device_kind
    peaks = [peak for name, peak in PUBLISHED_PEAKS.items() if kind.startswith(name) and dtype == "bfloat16"]
    large = meshes.is_accelerator(mesh)
    return Rates(matmul_rate(dtype, large, exact=exact), memory_rate(large), peaks[0] if peaks else None)


def compiled(function: Any, *arguments: Any) -> Program:
    """Compiles a jitted function for these arguments."""
    begun, hits = time.monotonic(), compilation.hits()
    program = function.lower(*arguments).compile()
    seconds = time.monotonic() - begun
    costs, sizes = program.cost_analysis() or {}, program.memory_analysis()
    memory = None
    if sizes is not None:
        memory = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        memory += sizes.temp_size_in_bytes
    return Program(program, seconds, compilation.hits() > hits, costs.get("bytes accessed"), memory)


def peak_memory(mesh: Mesh) -> int | None:
    """The most bytes that one device has held since the process began; None where devices do not say."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(peaks, default=None)


def risen(mesh: Mesh, before: int | None) -> int | None:
    """`peak_memory` where it is more than it was before; None otherwise, since then it is that of something else."""
    peak = peak_memory(mesh)
    return peak if peak is not None and peak > (before or 0) else None


def first_call(call: Callable[[], Any]) -> tuple[float, bool]:
    """The seconds of a call that compiles what it runs, and whether the compilation cache had some of it."""
    hits = compilation.hits()
    return timed(call), compilation.hits() > hits


def calls_per_second(call: Callable[[], Any], seconds: float, *, untimed: int = 1, in_flight: int = 0) -> float:
    """How often `call` runs in a second; two runs at least, and as many on every process.

    Args:
      call: returns what is to be waited for.
      seconds: of measuring.
      untimed: runs before.
      in_flight: runs that the devices have got and that are not yet waited for, as in training: with none, the devices
        stand still while the host prepares the next one.
    """
    for _ in range(untimed):
        jax.block_until_ready(call())
    waiting: collections.deque[Any] = collections.deque()
    begun, calls = time.monotonic(), 0
    while processes.any_process(calls < 2 or time.monotonic() - begun < seconds):
        waiting.append(call())
        calls += 1
        while len(waiting) > in_flight:
            jax.block_until_ready(waiting.popleft())
    jax.block_until_ready(list(waiting))
    return calls / (time.monotonic() - begun)


def matmul_rate(dtype: str, large: bool, *, exact: bool = False) -> float:
    """Operations a second of square matrix products of `dtype` on one device; `large` ones on accelerators.

    The numbers are random, since a device that multiplies mostly zeros draws less power and runs faster; a matrix with
    entries of variance 1 / side keeps the size of what it multiplies, however often.
    """
    side, repeats = (8192, 20) if large else (1024, 3)
    product = functools.partial(_product, repeats, jax.lax.Precision.HIGHEST if exact else None)
    first, second = jax.random.normal(jax.random.key(0), (2, side, side), jnp.float32)
    a, start = (first / side**0.5).astype(dtype), second.astype(dtype)
    product(a, start).block_until_ready()
    best = min(timed(lambda: product(a, start).block_until_ready()) for _ in range(3))
    return repeats * 2.0 * side**3 / best


def memory_rate(large: bool) -> float:
    """Bytes a second, read and written, of a pass over an array too large for a cache; `large` on accelerators."""
    length = 2**28 if large else 2**25
    x = jnp.zeros(length, jnp.float32)
    _passed(x).block_until_ready()
    best = min(timed(lambda: _passed(x).block_until_ready()) for _ in range(5))
    return 8.0 * length / best


@functools.partial(jax.jit, static_argnums=(0, 1))
def _product(repeats: int, precision: jax.lax.Precision | None, a: jax.Array, start: jax.Array) -> jax.Array:
    once = lambda _, b: jnp.matmul(a, b, precision=precision).astype(a.dtype)  # noqa: E731
    return jax.lax.fori_loop(0, repeats, once, start)


@jax.jit
def _passed(x: jax.Array) -> jax.Array:
    return x + 1.0


def timed(action: Callable[[], Any]) -> float:
    """The seconds that `action` takes."""
    start = time.monotonic()
    action()
    return time.monotonic() - start
