"""The ADM-type UNet of Salimans & Ho 2022 (arXiv 2202.00512), with the w branch of Meng et al. 2023 (2210.03142)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffdistill.models import arguments, layers
from diffdistill.models.blocks import Blocks, Style, guidance_branch, stack


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
        arguments.check(self, inputs, label, guidance)
        style = Style(self.num_groups)
        blocks = Blocks(self, style, nn.swish(self._embed(style, time, label, guidance)), deterministic)
        h = style.conv(inputs, self.channels, "conv_in", self.dtype)
        h = stack(blocks, h, [self.channels * multiplier for multiplier in self.multipliers])
        return style.last_conv(nn.swish(style.norm(h, "norm_out")), self.output_channels, "conv_out")

    def _embed(self, style: Style, time: jax.Array, label: jax.Array | None, guidance: jax.Array | None) -> jax.Array:
        """The sum (B, embedding) of what is known besides the image: time, class and guidance weight."""
        h = style.dense(layers.sinusoids(time, self.channels), self.embedding, "dense0")
        h = style.dense(nn.swish(h), self.embedding, "dense1")
        if label is not None:
            h = h + style.dense(jax.nn.one_hot(label, self.num_classes), self.embedding, "class_emb")
        if guidance is not None:
            h = h + guidance_branch(style, guidance, self.channels, self.embedding, self.guidance_embedding)
        return h
