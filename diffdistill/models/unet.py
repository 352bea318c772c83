"""The ADM-type UNet of Salimans & Ho 2022 (arXiv 2202.00512), with the w branch of Meng et al. 2023 (2210.03142)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffdistill.models import layers

Conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=layers.fan_in_normal)
Dense = functools.partial(nn.Dense, kernel_init=layers.fan_in_normal)
GUIDANCE_EMBEDDINGS = ("none", "mapped", "raw")


def downsample(x: jax.Array) -> jax.Array:
    """Mean of each 2x2 square: (B, H, W, C) -> (B, H/2, W/2, C)."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour: (B, H, W, C) -> (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


RESAMPLERS = {"none": lambda x: x, "down": downsample, "up": upsample}


class ResidualBlock(nn.Module):
    """GroupNorm, swish, (resample), conv, GroupNorm modulated by the embedding, swish, dropout, zero-init conv.

    The skip path is resampled too and gets a 1x1 projection where the number of channels changes.
    """

    channels: int
    num_groups: int
    dropout: float
    dtype: DTypeLike
    resample: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, activated_embedding: jax.Array, deterministic: bool) -> jax.Array:
        resample = RESAMPLERS[self.resample]
        h = nn.swish(layers.GroupNorm(self.num_groups, self.dtype, name="norm1")(x))
        h, x = resample(h), resample(x)
        h = Conv(self.channels, dtype=self.dtype, name="conv1")(h)

        modulation = Dense(2 * self.channels, dtype=self.dtype, name="temb_proj")(activated_embedding)
        scale, shift = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        h = layers.GroupNorm(self.num_groups, self.dtype, name="norm2")(h)
        h = nn.swish(h * (1 + scale) + shift)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        h = Conv(self.channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="conv2")(h)

        if x.shape[-1] != self.channels:
            x = Dense(self.channels, dtype=self.dtype, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to its input; zero at initialisation."""

    num_heads: int
    num_groups: int
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        heads = (batch, height * width, self.num_heads, channels // self.num_heads)
        h = layers.GroupNorm(self.num_groups, self.dtype, name="norm")(x)
        query, key, value = (Dense(channels, dtype=self.dtype, name=name)(h).reshape(heads) for name in "qkv")
        h = layers.attend(query, key, value, self.attention).reshape(x.shape)
        return x + Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="proj_out")(h)


class UNet(nn.Module):
    """(inputs (B, H, W, C), time (B,), label, guidance) -> (B, H, W, output_channels) float32, zero at initialisation.

    Each level of `multipliers` has `blocks_per_level` residual blocks on the way down and one more on the way up;
    attention follows each of them where the height of the image is in `attention_resolutions`, and stands in the
    middle always. Between levels a residual block halves (mean) or doubles (nearest) the resolution; it keeps the
    width and has no attention. Parameters are float32; `dtype` is what the blocks compute in, while statistics,
    softmax, embeddings, the last convolution and the output stay float32. `remat` recomputes each block in the
    backward pass: less memory, same parameters, same values to rounding.

    num_heads, head_dim: give one of them (neither: one head). num_classes: 0 is an unconditional network; label
    num_classes is the null class (one-hot of all zeros). guidance_embedding: "none", "mapped" (sinusoids of
    arctan(exp(-w/2))/(pi/2)) or "raw" (sinusoids of w); the branch is zero-initialised, so that a network fresh from
    a teacher ignores w (spec 02).
    """

    channels: int
    multipliers: tuple[int, ...]
    embedding: int
    output_channels: int
    blocks_per_level: int = 3
    attention_resolutions: tuple[int, ...] = ()
    num_heads: int | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    num_classes: int = 0
    guidance_embedding: str = "none"
    num_groups: int = 32
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        time: jax.Array,
        label: jax.Array | None = None,
        guidance: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """inputs (B, H, W, C); time (B,) as the parameterisation gives it; label (B,) int32; guidance w (B,) float32.

        H and W must be divisible by 2**(levels - 1). With deterministic=False an rng named "dropout" is needed.
        Errors: ValueError for a label or guidance that this network lacks or does not take, and for sizes that do
        not fit.
        """
        self._check(inputs, label, guidance)
        residual_block = nn.remat(ResidualBlock, static_argnums=(3,)) if self.remat else ResidualBlock
        attention_block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        embedding = nn.swish(self._embed(time, label, guidance))

        def residual(h: jax.Array, channels: int, name: str, resample: str = "none") -> jax.Array:
            block = residual_block(channels, self.num_groups, self.dropout, self.dtype, resample, name=name)
            return block(h, embedding, deterministic)

        def attend(h: jax.Array, name: str) -> jax.Array:
            heads = self._num_heads(h.shape[-1])
            return attention_block(heads, self.num_groups, self.dtype, self.attention, name=name)(h)

        def stage(h: jax.Array, channels: int, level: str, index: int) -> jax.Array:
            h = residual(h, channels, f"{level}_block_{index}")
            return attend(h, f"{level}_attn_{index}") if h.shape[1] in self.attention_resolutions else h

        widths = [self.channels * multiplier for multiplier in self.multipliers]
        last = len(widths) - 1
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(inputs)
        skips = [h]
        for level, width in enumerate(widths):
            for index in range(self.blocks_per_level):
                h = stage(h, width, f"down_{level}", index)
                skips.append(h)
            if level < last:
                h = residual(h, width, f"down_{level}_downsample", "down")
                skips.append(h)

        h = residual(h, widths[-1], "mid_block_1")
        h = attend(h, "mid_attn_1")
        h = residual(h, widths[-1], "mid_block_2")

        for level, width in reversed(list(enumerate(widths))):
            for index in range(self.blocks_per_level + 1):
                h = stage(jnp.concatenate([h, skips.pop()], axis=-1), width, f"up_{level}", index)
            if level > 0:
                h = residual(h, width, f"up_{level}_upsample", "up")

        h = nn.swish(layers.GroupNorm(self.num_groups, name="norm_out")(h))
        return Conv(self.output_channels, kernel_init=nn.initializers.zeros, name="conv_out")(h)

    def _embed(self, time: jax.Array, label: jax.Array | None, guidance: jax.Array | None) -> jax.Array:
        """The sum (B, embedding) of what is known besides the image: time, class and guidance weight."""
        h = Dense(self.embedding, name="dense0")(layers.sinusoids(time, self.channels))
        h = Dense(self.embedding, name="dense1")(nn.swish(h))
        if label is not None:
            h = h + Dense(self.embedding, name="class_emb")(jax.nn.one_hot(label, self.num_classes))
        if guidance is not None:
            # 1000 as for the time: the sinusoids resolve about 1e-3 of the mapped range (0, 1).
            mapped = jnp.arctan(jnp.exp(-guidance / 2)) / (jnp.pi / 2)
            w = 1000.0 * (mapped if self.guidance_embedding == "mapped" else guidance)
            g = Dense(self.embedding, name="guidance_dense0")(layers.sinusoids(w, self.channels))
            g = Dense(self.embedding, kernel_init=nn.initializers.zeros, name="guidance_dense1")(nn.swish(g))
            h = h + g
        return h

    def _num_heads(self, channels: int) -> int:
        heads = self.num_heads or 1
        if self.head_dim is not None:
            heads = channels // self.head_dim
        if heads < 1 or channels % heads or (self.head_dim is not None and channels % self.head_dim):
            raise ValueError(
                f"attention over {channels} channels cannot be split into num_heads={self.num_heads}, "
                f"head_dim={self.head_dim}: choose one that divides the channels of every level with attention."
            )
        return heads

    def _check(self, inputs: jax.Array, label: jax.Array | None, guidance: jax.Array | None) -> None:
        """Refuses settings and arguments that do not fit together, with a message that says which."""
        if inputs.ndim != 4:
            raise ValueError(f"the network takes images (B, H, W, C); got shape {inputs.shape}.")
        factor = 2 ** (len(self.multipliers) - 1)
        height, width = inputs.shape[1:3]
        if height % factor or width % factor:
            raise ValueError(
                f"a network of {len(self.multipliers)} levels needs height and width divisible by {factor}; got "
                f"{height}x{width}. Resize the images or give fewer multipliers."
            )
        if self.guidance_embedding not in GUIDANCE_EMBEDDINGS:
            raise ValueError(
                f"guidance_embedding={self.guidance_embedding!r} is not known; choose one of "
                f"{', '.join(GUIDANCE_EMBEDDINGS)}."
            )
        if self.num_heads is not None and self.head_dim is not None:
            raise ValueError(f"num_heads={self.num_heads} and head_dim={self.head_dim} exclude each other: give one.")
        if jnp.dtype(self.dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
            raise ValueError(f"dtype={self.dtype!r} is not supported; choose float32 or bfloat16.")
        if self.num_classes > 0 and label is None:
            raise ValueError(
                f"this network is conditional on {self.num_classes} classes and needs a label; for the null class give "
                f"label={self.num_classes}."
            )
        if self.num_classes == 0 and label is not None:
            raise ValueError("this network is unconditional (num_classes=0) and takes no label; leave it out.")
        if self.guidance_embedding != "none" and guidance is None:
            raise ValueError(
                f"this network needs guidance, the weight w (guidance_embedding={self.guidance_embedding!r}); "
                f"w = 0 is the plain conditional model."
            )
        if self.guidance_embedding == "none" and guidance is not None:
            raise ValueError(
                "this network has no guidance branch (guidance_embedding='none') and takes no guidance weight; leave "
                "it out, or guide it with two evaluations (models.denoiser.guided)."
            )
