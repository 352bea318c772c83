"""The residual and attention blocks that every network here is stacked from, and the UNet stack itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffdistill.models import arguments, initialisers, layers
from diffdistill.models.initialisers import Initialiser
from diffdistill.models.resampling import resample


@dataclass(frozen=True)
class Style:
    """What tells the blocks of one family of networks from those of another; the defaults are Salimans & Ho's.

    Attributes:
      num_groups: groups of a GroupNorm where the number of channels allows; also at least `channels_per_group` each.
      eps: added to its variance.
      modulated: the embedding gives scale and shift of the second norm; False: it is added in front of that norm.
      project_resampled: skip paths that change resolution get a 1x1 projection even where the width stays.
      skip_scale: factor after every addition of a skip path.
      resample_filter: taps of the filter for halving and doubling.
      kernel, last, qkv: initialisers of kernels in general, of each branch's last layer, of queries, keys and values.
      random_bias: biases start uniform in +-1/sqrt(fan_in); False: at zero (as those of last layers always do).
    """

    num_groups: int = 32
    channels_per_group: int = 1
    eps: float = 1e-6
    modulated: bool = True
    project_resampled: bool = False
    skip_scale: float = 1.0
    resample_filter: tuple[int, ...] = (1, 1)
    kernel: Initialiser = initialisers.fan_in_normal
    last: Initialiser = initialisers.zeros
    qkv: Initialiser = initialisers.fan_in_normal
    random_bias: bool = False

    def norm(self, x: jax.Array, name: str, dtype: DTypeLike = jnp.float32, **options: Any) -> jax.Array:
        """GroupNorm of (B, H, W, C), computed in float32; options as of its __call__."""
        groups = min(self.num_groups, max(x.shape[-1] // self.channels_per_group, 1))
        return layers.GroupNorm(groups, dtype, self.eps, name=name)(x, **options)

    def conv(self, x: jax.Array, features: int, name: str, dtype: DTypeLike = jnp.float32, **options) -> jax.Array:
        """3x3 convolution of (B, H, W, C); options as of flax's Conv."""
        init = {"kernel_init": self.kernel, "bias_init": self._bias(9 * x.shape[-1])}
        return nn.Conv(features, (3, 3), dtype=dtype, name=name, **{**init, **options})(x)

    def unbiased_conv(
        self, x: jax.Array, features: int, name: str, dtype: DTypeLike, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The same, and its bias (features,), which is not yet added; options as of layers.Unbiased."""
        init = {"kernel_init": self.kernel, "bias_init": self._bias(9 * x.shape[-1])}
        return layers.Unbiased(features, (3, 3), dtype, name=name, **{**init, **options})(x)

    def dense(self, x: jax.Array, features: int, name: str, dtype: DTypeLike = jnp.float32, **options) -> jax.Array:
        """Linear map of the last axis; options as of flax's Dense."""
        init = {"kernel_init": self.kernel, "bias_init": self._bias(x.shape[-1])}
        return nn.Dense(features, dtype=dtype, name=name, **{**init, **options})(x)

    def unbiased_dense(
        self, x: jax.Array, features: int, name: str, dtype: DTypeLike, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The same, and its bias, which is not yet added."""
        return layers.Unbiased(features, (), dtype, self.kernel, self._bias(x.shape[-1]), name=name, **options)(x)

    def last_conv(self, x: jax.Array, features: int, name: str, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The 3x3 convolution that ends a branch: it starts at (or near) zero."""
        return self.conv(x, features, name, dtype, kernel_init=self.last, bias_init=initialisers.zeros)

    def _bias(self, fan_in: int) -> Initialiser:
        return initialisers.uniform(1.0 / math.sqrt(fan_in)) if self.random_bias else initialisers.zeros


class ResidualBlock(nn.Module):
    """GroupNorm, swish, (resample), conv, GroupNorm conditioned on the embedding, swish, dropout, last conv; + skip.

    The skip path is resampled too and gets a 1x1 projection where the number of channels changes.
    """

    channels: int
    style: Style
    dropout: float
    dtype: DTypeLike
    resample: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, activated_embedding: jax.Array, deterministic: bool) -> jax.Array:
        style = self.style
        h = nn.swish(style.norm(x, "norm1", self.dtype))
        h, x = (resample(value, self.resample, style.resample_filter) for value in (h, x))
        h, bias = style.unbiased_conv(h, self.channels, "conv1", self.dtype)

        width = 2 * self.channels if style.modulated else self.channels
        condition = style.dense(activated_embedding, width, "temb_proj", self.dtype)
        if style.modulated:
            scale, shift = jnp.split(condition, 2, axis=-1)
            h = style.norm(h, "norm2", self.dtype, added=bias[None], scale=scale, shift=shift)
        else:
            h = style.norm(h, "norm2", self.dtype, added=bias + condition.astype(jnp.float32))
        h = layers.Dropout(self.dropout)(nn.swish(h), deterministic)

        # The factor of the sum goes into kernels and biases, which are smaller than what they are applied to.
        factor, inputs = style.skip_scale, x.shape[-1]
        last = {"kernel_init": style.last, "bias_init": initialisers.zeros}
        h, bias = style.unbiased_conv(h, self.channels, "conv2", self.dtype, factor=factor, **last)
        if inputs != self.channels or (style.project_resampled and self.resample != "none"):
            x, skip_bias = style.unbiased_dense(x, self.channels, "nin_shortcut", self.dtype, factor=factor)
            bias = bias + skip_bias
        elif factor != 1.0:
            x = x * factor
        return (h + bias.astype(self.dtype)) + x


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to its input; zero (or nearly so) at initialisation."""

    num_heads: int
    style: Style
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        heads = (batch, height * width, self.num_heads, channels // self.num_heads)
        style = self.style
        h = style.norm(x, "norm", self.dtype)
        query, key, value = (
            style.dense(h, channels, name, self.dtype, kernel_init=style.qkv).reshape(heads) for name in "qkv"
        )
        h = layers.attend(query, key, value, self.attention).reshape(x.shape)
        h = style.dense(h, channels, "proj_out", self.dtype, kernel_init=style.last, bias_init=initialisers.zeros)
        h = x + h
        return h if style.skip_scale == 1.0 else h * style.skip_scale


class Settings(arguments.Settings, Protocol):
    """What a stack of blocks needs to know of its network."""

    @property
    def blocks_per_level(self) -> int: ...
    @property
    def attention_resolutions(self) -> tuple[int, ...]: ...
    @property
    def dropout(self) -> float: ...
    @property
    def remat(self) -> bool: ...
    @property
    def attention(self) -> str: ...


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of one network, inside its compact __call__: all that they share is given once.

    Attributes:
      network: whose dropout, heads, dtype, remat and kind of attention count.
      style: of the network's family.
      embedding: (B, features) of noise level and condition, activated.
      deterministic: no dropout.
    """

    network: Settings
    style: Style
    embedding: jax.Array
    deterministic: bool

    def residual(self, h: jax.Array, channels: int, name: str, how: str = "none") -> jax.Array:
        """A residual block to `channels`; how: "none", "down" or "up"."""
        network = self.network
        block = nn.remat(ResidualBlock, static_argnums=(3,)) if network.remat else ResidualBlock
        module = block(channels, self.style, network.dropout, network.dtype, how, name=name)
        return module(h, self.embedding, self.deterministic)

    def attend(self, h: jax.Array, name: str) -> jax.Array:
        """An attention block."""
        network = self.network
        block = nn.remat(AttentionBlock) if network.remat else AttentionBlock
        heads = arguments.heads_of(network, h.shape[-1])
        return block(heads, self.style, network.dtype, network.attention, name=name)(h)

    def listed(self, h: jax.Array) -> bool:
        """Whether the resolution of `h` is among those with attention."""
        return h.shape[1] in self.network.attention_resolutions

    def middle(self, h: jax.Array, channels: int) -> jax.Array:
        """The lowest resolution between encoder and decoder: residual, attention, residual."""
        h = self.residual(h, channels, "mid_block_1")
        h = self.attend(h, "mid_attn_1")
        return self.residual(h, channels, "mid_block_2")


def stack(blocks: Blocks, h: jax.Array, widths: Sequence[int]) -> jax.Array:
    """The UNet of Dhariwal & Nichol 2021 between its first convolution and its last norm: (B, H, W, widths[0]).

    Each level has `blocks_per_level` residual blocks on the way down and one more on the way up, followed by attention
    at the listed resolutions. Between levels a residual block changes the resolution, keeps the width and has no
    attention.
    """
    last, count = len(widths) - 1, blocks.network.blocks_per_level

    def stage(h: jax.Array, channels: int, level: str, index: int) -> jax.Array:
        h = blocks.residual(h, channels, f"{level}_block_{index}")
        return blocks.attend(h, f"{level}_attn_{index}") if blocks.listed(h) else h

    skips = [h]
    for level, width in enumerate(widths):
        for index in range(count):
            h = stage(h, width, f"down_{level}", index)
            skips.append(h)
        if level < last:
            h = blocks.residual(h, width, f"down_{level}_downsample", "down")
            skips.append(h)
    h = blocks.middle(h, widths[-1])
    for level, width in reversed(list(enumerate(widths))):
        for index in range(count + 1):
            h = stage(jnp.concatenate([h, skips.pop()], axis=-1), width, f"up_{level}", index)
        if level > 0:
            h = blocks.residual(h, width, f"up_{level}_upsample", "up")
    return h


def guidance_branch(style: Style, w: jax.Array, features: int, embedding: int, kind: str) -> jax.Array:
    """What the guidance weight w (B,) adds to the embedding (B, embedding): zero at initialisation (spec 02).

    Its modules are called guidance_*, which is how a student takes its teacher's parameters (denoiser.transfer).
    """
    g = style.dense(layers.guidance_sinusoids(w, features, kind), embedding, "guidance_dense0")
    return style.dense(
        nn.swish(g), embedding, "guidance_dense1", kernel_init=initialisers.zeros, bias_init=initialisers.zeros
    )
