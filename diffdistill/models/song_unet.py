"""DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456), in the form that Karras et al. 2022 (2206.00364) train."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffdistill.models import arguments, initialisers, layers
from diffdistill.models.blocks import Blocks, Style, guidance_branch
from diffdistill.models.resampling import fir_downsample, fir_margin, resample

NOISE_EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "residual", "skip")
DECODERS = ("standard", "skip")
FOURIER_SCALE = 16.0

# One object each, so that equal networks are equal: they key compiled programs.
_XAVIER = initialisers.xavier_uniform()
_XAVIER_LAST = initialisers.xavier_uniform(1e-5)
_XAVIER_QKV = initialisers.xavier_uniform(math.sqrt(0.2), side_by_side=3)


def fourier_frequencies(count: int) -> tuple[float, ...]:
    """`count` frequencies drawn once and for all from N(0, 16^2), for NCSN++ networks that are trained here."""
    draws = np.random.Generator(np.random.PCG64(0)).standard_normal(count)
    return tuple((FOURIER_SCALE * draws).astype(np.float32).tolist())


class SongUNet(nn.Module):
    """(inputs (B, H, W, C), time (B,), label, guidance) -> (B, H, W, output_channels) float32, near zero at first.

    Levels, remat, dtype, heads, classes and the w branch are as in models.unet.UNet; attention stands in the middle,
    after each encoder block of a listed resolution and after the last decoder block of one.

    DDPM++ is the default; NCSN++ is noise_embedding="fourier", noise_features=2 * channels, encoder="residual",
    resample_filter=(1, 3, 3, 1).

    noise_features: width of the embedding of the noise level, 0 means `channels`. noise_frequencies: those of
    "fourier", noise_features / 2 constants, empty for `fourier_frequencies`; they are settings because nothing may
    train, decay or average them. encoder: "residual" and "skip" feed a downsampled input to every level, adding it to
    what the level sees. decoder: "skip" sums an output of every level. augmentation_features: length of the
    augmentation label, 0 for none; a missing label means an image as it is.
    """

    channels: int
    multipliers: tuple[int, ...]
    embedding: int
    output_channels: int
    blocks_per_level: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    num_classes: int = 0
    guidance_embedding: str = "none"
    augmentation_features: int = 0
    noise_embedding: str = "positional"
    noise_features: int = 0
    noise_frequencies: tuple[float, ...] = ()
    encoder: str = "standard"
    decoder: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
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
        augmentation: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """inputs, time, label and guidance as of UNet; augmentation (B, augmentation_features) float32.

        Errors: ValueError for arguments that this network lacks or does not take, and for sizes that do not fit.
        """
        arguments.check(self, inputs, label, guidance)
        arguments.check_choice("noise_embedding", self.noise_embedding, NOISE_EMBEDDINGS)
        arguments.check_choice("encoder", self.encoder, ENCODERS)
        arguments.check_choice("decoder", self.decoder, DECODERS)
        style = self._style()
        embedding = self._embed(style, time, label, guidance, augmentation)
        blocks = Blocks(self, style, nn.swish(embedding), deterministic)
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        skips = self._encode(blocks, inputs, widths)
        h = blocks.middle(skips[-1], widths[-1])
        return self._decode(blocks, h, skips, widths)

    def _style(self) -> Style:
        return Style(
            num_groups=self.num_groups,
            channels_per_group=4,
            modulated=False,
            project_resampled=True,
            skip_scale=math.sqrt(0.5),
            resample_filter=self.resample_filter,
            kernel=_XAVIER,
            last=_XAVIER_LAST,
            qkv=_XAVIER_QKV,
        )

    def _embed(
        self,
        style: Style,
        time: jax.Array,
        label: jax.Array | None,
        guidance: jax.Array | None,
        augmentation: jax.Array | None,
    ) -> jax.Array:
        """What is known besides the image, (B, embedding)."""
        features = self.noise_features or self.channels
        h = layers.sinusoids(time, features) if self.noise_embedding == "positional" else self._fourier(time, features)
        if label is not None:
            one_hot = jax.nn.one_hot(label, self.num_classes) * math.sqrt(self.num_classes)
            h = h + style.dense(one_hot, features, "class_emb")
        augmentation = arguments.augmentation_parameters(augmentation, self.augmentation_features, time.shape[0])
        if self.augmentation_features:
            h = h + style.dense(augmentation, features, "augmentation_emb", use_bias=False)
        h = style.dense(h, self.embedding, "dense0")
        h = style.dense(nn.swish(h), self.embedding, "dense1")
        if guidance is not None:
            h = h + guidance_branch(style, guidance, self.channels, self.embedding, self.guidance_embedding)
        return h

    def _fourier(self, time: jax.Array, features: int) -> jax.Array:
        """Sines then cosines of 2 pi f time, (B, features)."""
        frequencies = self.noise_frequencies or fourier_frequencies(features // 2)
        if 2 * len(frequencies) != features:
            raise ValueError(
                f"noise_frequencies has {len(frequencies)} entries, but noise_features={features} needs {features / 2}."
            )
        angles = time.astype(jnp.float32)[:, None] * (2 * np.pi * np.asarray(frequencies, np.float32))
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)

    def _encode(self, blocks: Blocks, inputs: jax.Array, widths: list[int]) -> list[jax.Array]:
        """The outputs of the first convolution and of every block on the way down, first to last."""
        h, side = blocks.style.conv(inputs, self.channels, "conv_in", self.dtype), inputs
        skips = [h]
        for level, width in enumerate(widths):
            for index in range(self.blocks_per_level):
                h = blocks.residual(h, width, f"down_{level}_block_{index}")
                h = blocks.attend(h, f"down_{level}_attn_{index}") if blocks.listed(h) else h
                skips.append(h)
            if level < len(widths) - 1:
                h = blocks.residual(h, width, f"down_{level}_downsample", "down")
                h, side = self._feed(blocks.style, h, side, f"down_{level}_input")
                skips.append(h)
        return skips

    def _feed(self, style: Style, h: jax.Array, side: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        """Adds the side path, which carries the input down beside the blocks; returns `h` and it for the next level."""
        taps, width = self.resample_filter, h.shape[-1]
        if self.encoder == "skip":
            side = resample(side, "down", taps)
            h = h + style.dense(side, width, name, self.dtype)
        elif self.encoder == "residual":
            # The filter needs a margin of its own, which the convolution in front of it provides.
            margin = 1 + fir_margin(taps)
            side = style.conv(side, width, name, self.dtype, padding=margin)
            h = side = (h + fir_downsample(side, taps, pad=False)) * math.sqrt(0.5)
        return h, side

    def _decode(self, blocks: Blocks, h: jax.Array, skips: list[jax.Array], widths: list[int]) -> jax.Array:
        """The output of the last level, or the sum of those of all levels."""
        style, count, output = blocks.style, self.blocks_per_level, None
        for level, width in reversed(list(enumerate(widths))):
            for index in range(count + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = blocks.residual(h, width, f"up_{level}_block_{index}")
            h = blocks.attend(h, f"up_{level}_attn_{count}") if blocks.listed(h) else h
            if level == 0 or self.decoder == "skip":
                norm, conv = (
                    ("norm_out", "conv_out") if level == 0 else (f"up_{level}_norm_out", f"up_{level}_conv_out")
                )
                term = style.last_conv(nn.swish(style.norm(h, norm)), self.output_channels, conv)
                output = term if output is None else term + resample(output, "up", self.resample_filter)
            if level > 0:
                h = blocks.residual(h, width, f"up_{level}_upsample", "up")
        assert output is not None  # level 0 is always there
        return output
