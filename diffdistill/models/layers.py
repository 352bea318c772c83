"""The small parts that networks are built from: embeddings of scalars, normalisation, attention."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffdistill.models.initialisers import Initialiser

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


class Unbiased(nn.Module):
    """A linear map of (B, H, W, C) to `features` channels in `dtype`, and its float32 bias, which is not yet added.

    What follows may take the bias for less than a pass over all pixels. Parameters are those of flax's Conv or Dense.

    Attributes:
      size: (3, 3) for a convolution, () for a map of every pixel on its own.
      factor: of the map and of the bias, not of the parameters.
    """

    features: int
    size: tuple[int, ...]
    dtype: DTypeLike
    kernel_init: Initialiser
    bias_init: Initialiser
    factor: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", self.kernel_init, (*self.size, x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        if self.factor != 1.0:
            kernel, bias = kernel * self.factor, bias * self.factor
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if not self.size:
            return jnp.dot(x, kernel), bias
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers), bias


class Dropout(nn.Module):
    """Zero with probability `rate`, otherwise divided by 1 - rate; does nothing where `deterministic`.

    Takes the "dropout" stream as flax's Dropout does. The stream gives two seeds for each image, and a hash of its
    position says what becomes of a value: a dozen integer operations, where a draw of Threefry takes about a hundred.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        if self.rate == 1.0:
            return jnp.zeros_like(x)
        least = np.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        kept = hashed_bits(self.make_rng("dropout"), x.shape) >= least
        return jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 (B, ...) that look random: good enough for dropout, not for noise. One value at a time, so that it is the
    same on any number of devices.

    The mixing is that of lowbias32 (Wellons 2018, "Prospecting for Hash Functions"), with a seed before each half.
    """
    first, second = jax.random.bits(key, (2, shape[0]) + (1,) * (len(shape) - 1), jnp.uint32)
    values = jnp.arange(math.prod(shape[1:]), dtype=jnp.uint32).reshape(1, *shape[1:])
    values = (values + first) * np.uint32(0x9E3779B1)
    values = (values ^ (values >> 16)) * np.uint32(0x7FEB352D)
    values = values ^ (values >> 15) ^ second
    values = (values ^ (values >> 16)) * np.uint32(0x846CA68B)
    return values ^ (values >> 16)


class GroupNorm(nn.Module):
    """GroupNorm of (B, H, W, C), in float32 inside; output in `dtype`.

    Channel counts that `num_groups` does not divide get their greatest common divisor as the number of groups, so
    that any width works; multiples of `num_groups` are not affected.

    It reads its input twice, which is what it costs on an accelerator: once for the moments of every channel, from
    which those of the groups follow, once to apply them. What is the same for all pixels goes into the small arrays
    between the two: `added` (B or 1, C) counts as added to the input, `scale` and `shift` (B, C) change the output to
    GroupNorm(x + added) (1 + scale) + shift.
    """

    num_groups: int
    dtype: DTypeLike = jnp.float32
    eps: float = 1e-6

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        added: jax.Array | None = None,
        scale: jax.Array | None = None,
        shift: jax.Array | None = None,
    ) -> jax.Array:
        channels = x.shape[-1]
        groups = math.gcd(channels, self.num_groups)
        gain = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return _group_norm(x, gain, bias, added, scale, shift, groups=groups, dtype=self.dtype, eps=self.eps)


# Under jax.jit it is traced once for all layers of the same shapes, of which a network has many. XLA sees one program.
@functools.partial(jax.jit, static_argnames=("groups", "dtype", "eps"))
def _group_norm(
    x: jax.Array,
    gain: jax.Array,
    bias: jax.Array,
    added: jax.Array | None,
    scale: jax.Array | None,
    shift: jax.Array | None,
    *,
    groups: int,
    dtype: DTypeLike,
    eps: float,
) -> jax.Array:
    """What GroupNorm computes with the parameters `gain` and `bias` (C,)."""
    channels = x.shape[-1]

    def group_mean(values: jax.Array) -> jax.Array:
        means = values.reshape(-1, groups, channels // groups).mean(axis=-1)
        return jnp.repeat(means, channels // groups, axis=-1)

    # From each channel's first pixel, which lies among its values: moments about zero would lose the variance of
    # values that are far from zero (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance").
    # Nothing depends on that point, so no gradient flows into it.
    pivot = jax.lax.stop_gradient(x[:, 0, 0, :]).astype(jnp.float32)
    x = x.astype(jnp.float32) - pivot[:, None, None, :]
    mean = x.mean(axis=(1, 2))
    variance = jnp.maximum(jnp.square(x).mean(axis=(1, 2)) - jnp.square(mean), 0.0)
    offset = pivot if added is None else pivot + added.astype(jnp.float32)
    offset -= group_mean(mean + offset)
    variance = group_mean(variance + jnp.square(mean + offset))
    gain = jax.lax.rsqrt(variance + eps) * gain
    if scale is not None:
        scale = 1 + scale.astype(jnp.float32)
        gain, bias = gain * scale, bias * scale
    if shift is not None:
        bias = bias + shift.astype(jnp.float32)
    # Behind a barrier, since XLA would otherwise sum the gradient of the bias over images and pixels once more.
    gain, bias = jax.lax.optimization_barrier((gain, offset * gain + bias))
    return (x * gain[:, None, None, :] + bias[:, None, None, :]).astype(dtype)


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
