"""ADM of Dhariwal & Nichol 2021 (arXiv 2105.05233), in the form that Karras et al. 2022 (2206.00364) train."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffdistill.models import arguments, initialisers, layers
from diffdistill.models.blocks import Blocks, Style, guidance_branch, stack


class EdmADM(nn.Module):
    """(inputs (B, H, W, C), time (B,), label, guidance) -> (B, H, W, output_channels) float32, zero at initialisation.

    The stack of models.unet.UNet and its settings. What differs: the embedding of the noise level (cosines first,
    frequencies that stop short of 1/10000), classes without a bias, eps of the norms, initialisation, an augmentation
    label, and a first convolution as wide as the first level. Published networks of guided-diffusion fit this one.

    noise_features: width of the embedding of the noise level, 0 means `channels`. augmentation_features: length of
    the augmentation label, 0 for none; a missing label means an image as it is.
    """

    channels: int
    multipliers: tuple[int, ...]
    embedding: int
    output_channels: int
    blocks_per_level: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    num_heads: int | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    num_classes: int = 0
    guidance_embedding: str = "none"
    augmentation_features: int = 0
    noise_features: int = 0
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
        style = Style(
            num_groups=self.num_groups,
            channels_per_group=4,
            eps=1e-5,
            kernel=initialisers.fan_in_uniform,
            qkv=initialisers.fan_in_uniform,
            random_bias=True,
        )
        embedding = self._embed(style, time, label, guidance, augmentation)
        blocks = Blocks(self, style, nn.swish(embedding), deterministic)
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        h = style.conv(inputs, widths[0], "conv_in", self.dtype)
        h = stack(blocks, h, widths)
        return style.last_conv(nn.swish(style.norm(h, "norm_out")), self.output_channels, "conv_out")

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
        h = jnp.roll(layers.sinusoids(time, features, endpoint=False), features // 2, axis=1)
        augmentation = arguments.augmentation_parameters(augmentation, self.augmentation_features, time.shape[0])
        if self.augmentation_features:
            options = {"use_bias": False, "kernel_init": initialisers.zeros}
            h = h + style.dense(augmentation, features, "augmentation_emb", **options)
        h = style.dense(h, self.embedding, "dense0")
        h = style.dense(nn.swish(h), self.embedding, "dense1")
        if label is not None:
            options = {"use_bias": False, "kernel_init": nn.initializers.normal(1.0)}
            h = h + style.dense(jax.nn.one_hot(label, self.num_classes), self.embedding, "class_emb", **options)
        if guidance is not None:
            h = h + guidance_branch(style, guidance, features, self.embedding, self.guidance_embedding)
        return h
