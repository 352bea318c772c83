"""What XLA is asked for when it compiles the large programs."""

from __future__ import annotations

import functools
import os

import jax
from jax.sharding import Mesh

_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for a program with convolutions on these devices.

    On CPUs jaxlib 0.10.2 gives convolutions to the library YNN; an update of the UNet of the digits takes 1.7 times as
    long as with XLA's own (benchmarks/README.md). Only matrix products are left to it, unless XLA_FLAGS says
    otherwise.
    """
    if mesh.devices.flat[0].platform != "cpu" or _FLAG in os.environ.get("XLA_FLAGS", ""):
        return {}
    return dict(_known(((_FLAG, "LIBRARY_FUSION_TYPE_DOT"),)))


@functools.cache
def _known(options: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The options, or none where this version of XLA does not know them."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0.0, compiler_options=dict(options)).lower().compile()
        except (jax.errors.JaxRuntimeError, ValueError):
            return ()
    return options
