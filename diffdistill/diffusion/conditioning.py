"""Tasks from image to image: what a model is shown, beside z, of the image that it is to make.

A task is a function of the clean image x (B, H, W, C), so that any set of images trains it. What it gives has the size
of the image and is concatenated to the network's input (Saharia et al. 2022, Palette; Meng et al. 2023, section 4.5).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffdistill.diffusion import names

FACTOR = 4  # of super-resolution
_HOLE = (0.25, 0.75)  # sides of the hole of inpainting, as shares of the image's


@dataclass(frozen=True)
class Task:
    """What is shown of an image.

    Attributes:
      name: of TASKS.
      channels: of an image with so many.
      show: (x (B, H, W, C) float32, mask (B, H, W) of 0 and 1) -> (B, H, W, channels(C)).
      takes_mask: whether the mask, 1 where the image is to be made, means anything.
    """

    name: str
    channels: Callable[[int], int]
    show: Callable[[jax.Array, jax.Array], jax.Array]
    takes_mask: bool = False

    def example(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """What is shown of x (B, H, W, C) in training: with a mask drawn at random."""
        batch, height, width, _ = x.shape
        return self.show(x, jax.vmap(lambda key: random_hole(key, height, width))(jax.random.split(key, batch)))


def random_hole(key: jax.Array, height: int, width: int) -> jax.Array:
    """A mask (H, W) float32 that is 1 in one rectangle of a quarter to three quarters of either side."""
    inside = []
    for axis, size in enumerate((height, width)):
        share, place = jax.random.uniform(jax.random.fold_in(key, axis), (2,))
        length = jnp.maximum(jnp.round(size * (_HOLE[0] + (_HOLE[1] - _HOLE[0]) * share)), 1.0)
        start = jnp.floor(place * (size - length + 1.0))
        inside.append((jnp.arange(size) >= start) & (jnp.arange(size) < start + length))
    return (inside[0][:, None] & inside[1]).astype(jnp.float32)


def _inpainting(x: jax.Array, mask: jax.Array) -> jax.Array:
    mask = mask[..., None].astype(x.dtype)
    return jnp.concatenate([x * (1.0 - mask), mask], axis=-1)


def _super_resolution(x: jax.Array, mask: jax.Array) -> jax.Array:
    del mask
    batch, height, width, channels = x.shape
    if height % FACTOR or width % FACTOR:
        raise ValueError(
            f"super_resolution shrinks images {FACTOR} times: sides must be multiples of it, got {height} x {width}."
        )
    small = x.reshape(batch, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels).mean(axis=(2, 4))
    return jnp.repeat(jnp.repeat(small, FACTOR, axis=1), FACTOR, axis=2)


def _colourisation(x: jax.Array, mask: jax.Array) -> jax.Array:
    del mask
    return jnp.mean(x, axis=-1, keepdims=True)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("inpainting", lambda channels: channels + 1, _inpainting, takes_mask=True),
        Task("super_resolution", lambda channels: channels, _super_resolution),
        Task("colourisation", lambda channels: 1, _colourisation),
    )
}


def get(name: str) -> Task | None:
    """The task called `name`, one of TASKS; None for the empty name. ValueError for any other."""
    return names.choose(TASKS, name, "task") if name else None
