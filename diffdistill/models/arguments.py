"""What the networks of this room are given, checked: settings and arguments that fit together, or an error."""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

GUIDANCE_EMBEDDINGS = ("none", "mapped", "raw")


class Settings(Protocol):
    """The settings that every network here has."""

    @property
    def multipliers(self) -> tuple[int, ...]: ...
    @property
    def num_heads(self) -> int | None: ...
    @property
    def head_dim(self) -> int | None: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def guidance_embedding(self) -> str: ...
    @property
    def dtype(self) -> DTypeLike: ...


def check(network: Settings, inputs: jax.Array, label: jax.Array | None, guidance: jax.Array | None) -> None:
    """Refuses settings and arguments that do not fit together: ValueError with a message that says which."""
    if inputs.ndim != 4:
        raise ValueError(f"the network takes images (B, H, W, C); got shape {inputs.shape}.")
    factor = 2 ** (len(network.multipliers) - 1)
    height, width = inputs.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(
            f"a network of {len(network.multipliers)} levels needs height and width divisible by {factor}; got "
            f"{height}x{width}. Resize the images or give fewer multipliers."
        )
    check_choice("guidance_embedding", network.guidance_embedding, GUIDANCE_EMBEDDINGS)
    if network.num_heads is not None and network.head_dim is not None:
        raise ValueError(f"num_heads={network.num_heads} and head_dim={network.head_dim} exclude each other: give one.")
    if jnp.dtype(network.dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype={network.dtype!r} is not supported; choose float32 or bfloat16.")
    if network.num_classes > 0 and label is None:
        raise ValueError(
            f"this network is conditional on {network.num_classes} classes and needs a label; for the null class give "
            f"label={network.num_classes}."
        )
    if network.num_classes == 0 and label is not None:
        raise ValueError("this network is unconditional (num_classes=0) and takes no label; leave it out.")
    if network.guidance_embedding != "none" and guidance is None:
        raise ValueError(
            f"this network needs guidance, the weight w (guidance_embedding={network.guidance_embedding!r}); "
            f"w = 0 is the plain conditional model."
        )
    if network.guidance_embedding == "none" and guidance is not None:
        raise ValueError(
            "this network has no guidance branch (guidance_embedding='none') and takes no guidance weight; leave "
            "it out, or guide it with two evaluations (models.denoiser.guided)."
        )


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a setting that is not among the known ones: ValueError that lists them."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")


def augmentation_parameters(augmentation: jax.Array | None, features: int, batch_size: int) -> jax.Array:
    """The augmentation label as (B, features): zeros, an image as it is, where none is given.

    ValueError for another shape, and for a network that takes none (features=0).
    """
    if augmentation is None:
        return jnp.zeros((batch_size, features), jnp.float32)
    if features == 0:
        raise ValueError(
            "this network takes no augmentation parameters (augmentation_features=0); leave augmentation out."
        )
    if augmentation.shape != (batch_size, features):
        raise ValueError(
            f"augmentation must be ({batch_size}, {features}), {features} parameters of each image; got "
            f"{augmentation.shape}."
        )
    return augmentation.astype(jnp.float32)


def heads_of(network: Settings, channels: int) -> int:
    """The number of attention heads over `channels`; ValueError where the settings do not divide them."""
    heads = network.num_heads or 1
    if network.head_dim is not None:
        heads = channels // network.head_dim
    if heads < 1 or channels % heads or (network.head_dim is not None and channels % network.head_dim):
        raise ValueError(
            f"attention over {channels} channels cannot be split into num_heads={network.num_heads}, "
            f"head_dim={network.head_dim}: choose one that divides the channels of every level with attention."
        )
    return heads
