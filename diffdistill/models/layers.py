"""The small parts that networks are built from: embeddings of scalars, normalisation, attention."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

ATTENTIONS = ("auto", "xla", "cudnn")


def sinusoids(value: jax.Array, features: int, *, endpoint: bool = True) -> jax.Array:
    """Sines then cosines of `value` (B,) at frequencies 1 ... 1/10000, as (B, features) float32.

    The frequencies include both ends, as in DDPM (Ho et al. 2020) and the released networks of Salimans & Ho 2022;
    endpoint=False stops one step short of 1/10000, as ADM does. An odd number of features ends in a column of zeros.
    """
    half = features // 2
    steps = max(half - 1 if endpoint else half, 1)
    frequencies = jnp.exp(-math.log(10000.0) / steps * jnp.arange(half, dtype=jnp.float32))
    angles = value.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, features - 2 * half)))


def guidance_sinusoids(w: jax.Array, features: int, kind: str) -> jax.Array:
    """Sinusoids (B, features) of the guidance weight (B,): kind "mapped" of arctan(exp(-w/2))/(pi/2), "raw" of w."""
    # 1000 as for the time: the sinusoids resolve about 1e-3 of the mapped range (0, 1).
    mapped = jnp.arctan(jnp.exp(-w / 2)) / (jnp.pi / 2)
    return sinusoids(1000.0 * (mapped if kind == "mapped" else w), features)


class GroupNorm(nn.Module):
    """GroupNorm of (B, H, W, C) with statistics in float32 and the accurate (two-pass) variance; output in `dtype`.

    Channel counts that `num_groups` does not divide get their greatest common divisor as the number of groups, so
    that any width works; multiples of `num_groups` are not affected.
    """

    num_groups: int
    dtype: DTypeLike = jnp.float32
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        groups = math.gcd(channels, self.num_groups)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def group_mean(h: jax.Array) -> jax.Array:
            # Per channel first: a reduction over H and W that keeps NHWC as it is, which XLA:CPU runs a fifth faster
            # than one over (H, W, channels of the group).
            means = h.mean(axis=(1, 2)).reshape(-1, groups, channels // groups).mean(axis=-1)
            return jnp.repeat(means, channels // groups, axis=-1)[:, None, None, :]

        centred = x.astype(jnp.float32)
        centred = centred - group_mean(centred)
        variance = group_mean(jnp.square(centred))
        return (centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias).astype(self.dtype)


def cudnn_permits(dtype: DTypeLike, head_dim: int, platform: str, compute_capability: str) -> bool:
    """Whether cuDNN's fused attention takes this: 16 bits, head_dim a multiple of 8 up to 128 (256 from Hopper on)."""
    # Other makers' devices have no number there ("gfx90a"), and no cuDNN.
    version = float(compute_capability) if re.fullmatch(r"\d+\.\d+", compute_capability) else 0.0
    return (
        platform == "gpu"
        and version >= 8.0
        and jnp.dtype(dtype) == jnp.bfloat16
        and head_dim % 8 == 0
        and head_dim <= (256 if version >= 9.0 else 128)
    )


def attend(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str) -> jax.Array:
    """Softmax attention of (B, T, heads, head_dim) arrays; logits are scaled by head_dim**-0.5, softmax in float32.

    implementation: "xla" runs anywhere; "cudnn" is the fused kernel of NVIDIA GPUs (bfloat16 only); "auto" takes the
    fused kernel where it exists for these arguments.
    """
    if implementation not in ATTENTIONS:
        raise ValueError(f"attention={implementation!r} is not known; choose one of {', '.join(ATTENTIONS)}.")
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    fused = cudnn_permits(query.dtype, query.shape[-1], device.platform, capability)
    if implementation == "cudnn" and not fused:
        raise ValueError(
            f"attention='cudnn' needs dtype bfloat16, a head dimension that is a multiple of 8 up to 128 (256 from "
            f"Hopper on) and an NVIDIA GPU from Ampere on; got {query.dtype}, head dimension {query.shape[-1]} and "
            f"platform {device.platform!r}. Use attention='auto' to fall back by itself."
        )
    return jax.nn.dot_product_attention(
        query, key, value, implementation="cudnn" if fused and implementation != "xla" else "xla"
    )
