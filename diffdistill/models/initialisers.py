"""How kernels start: one initialiser per family of networks, each (key, shape, dtype) -> array.

What they draw with is a function under jax.jit, so that it is traced once for each shape: flax asks an initialiser for
its shape again wherever a parameter is used.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initialiser = Callable[..., jax.Array]
zeros: Initialiser = nn.initializers.zeros


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """LeCun's truncated normal for kernels (..., inputs, outputs): variance 1 / (number of inputs of one output).

    As flax's default, but drawn flat: the counters of a flat draw are simpler, which halves the compilation of a
    network's initialisation.
    """
    # The standard deviation of a normal cut at two standard deviations.
    return _truncated_normal(key, 1.0 / (0.87962566103423978 * math.sqrt(math.prod(shape[:-1]))), shape, dtype)


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Uniform in +-1/sqrt(number of inputs of one output), for kernels (..., inputs, outputs)."""
    return uniform(1.0 / math.sqrt(math.prod(shape[:-1])))(key, shape, dtype)


def uniform(bound: float) -> Initialiser:
    """Uniform in +-bound."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return _uniform(key, bound, shape, dtype)

    return draw


def xavier_uniform(gain: float = 1.0, side_by_side: int = 1) -> Initialiser:
    """Glorot's uniform times `gain`: bound gain sqrt(6 / (fan_in + fan_out)).

    side_by_side: how many kernels of this shape form one layer (3 for queries, keys and values); fan_out counts all.
    """

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        fan_in, fan_out = math.prod(shape[:-1]), math.prod((*shape[:-2], shape[-1])) * side_by_side
        return uniform(gain * math.sqrt(6.0 / (fan_in + fan_out)))(key, shape, dtype)

    return draw


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _truncated_normal(key: jax.Array, scale: float, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return scale * jax.random.truncated_normal(key, -2.0, 2.0, (math.prod(shape),), dtype).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _uniform(key: jax.Array, bound: float, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)
