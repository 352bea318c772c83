"""The small parts that networks are built from: embeddings of scalars, normalisation, attention."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

ATTENTIONS = ("auto", "xla", "cudnn")


def sinusoids(value: jax.Array, features: int) -> jax.Array:
    """Sines then cosines of `value` (B,) at frequencies 1 ... 1/10000, as (B, features) float32.

    The frequencies include both ends, as in DDPM (Ho et al. 2020) and the released networks of Salimans & Ho 2022;
    an odd number of features ends in a column of zeros.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(10000.0) / max(half - 1, 1) * jnp.arange(half, dtype=jnp.float32))
    angles = value.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, features - 2 * half)))


def group_norm(channels: int, num_groups: int, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """GroupNorm over `channels`, with statistics in float32 and the accurate (two-pass) variance.

    Channel counts that `num_groups` does not divide get their greatest common divisor as the number of groups, so
    that any width works; multiples of `num_groups` are not affected.
    """
    groups = math.gcd(channels, num_groups)
    return nn.GroupNorm(num_groups=groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def cudnn_permits(dtype: DTypeLike, head_dim: int, platform: str, compute_capability: float) -> bool:
    """Whether cuDNN's fused attention takes this: 16 bits, head_dim a multiple of 8 up to 128 (256 from Hopper on)."""
    largest = 256 if compute_capability >= 9.0 else 128
    return (
        platform == "gpu"
        and compute_capability >= 8.0
        and jnp.dtype(dtype) == jnp.bfloat16
        and head_dim % 8 == 0
        and head_dim <= largest
    )


def attend(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str) -> jax.Array:
    """Softmax attention of (B, T, heads, head_dim) arrays; logits are scaled by head_dim**-0.5, softmax in float32.

    implementation: "xla" runs anywhere; "cudnn" is the fused kernel of NVIDIA GPUs (bfloat16 only); "auto" takes the
    fused kernel where it exists for these arguments.
    """
    if implementation not in ATTENTIONS:
        raise ValueError(f"attention={implementation!r} is not known; choose one of {', '.join(ATTENTIONS)}.")
    device = jax.local_devices()[0]
    capability = float(getattr(device, "compute_capability", 0.0))
    fused = cudnn_permits(query.dtype, query.shape[-1], device.platform, capability)
    if implementation == "cudnn" and not fused:
        raise ValueError(
            f"attention='cudnn' needs dtype bfloat16, a head dimension that is a multiple of 8 up to 128 (256 on Hopper "
            f"and later) and an NVIDIA GPU from Ampere on; got {query.dtype}, head dimension {query.shape[-1]} and "
            f"platform {device.platform!r}. Use attention='auto' to fall back by itself."
        )
    return jax.nn.dot_product_attention(
        query, key, value, implementation="cudnn" if fused and implementation != "xla" else "xla"
    )
