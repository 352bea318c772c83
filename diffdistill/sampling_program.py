"""The compiled program that makes a batch of images: from seeds to noise, through a sampler, to pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffdistill import samplers
from diffdistill.diffusion.conditioning import random_hole
from diffdistill.diffusion.schedules import Schedule
from diffdistill.evaluation import protocols
from diffdistill.methods.base import images
from diffdistill.models.denoiser import Condition, Denoiser, guided
from diffdistill.training import mesh as meshes
from diffdistill.training import xla


@functools.lru_cache(maxsize=16)
def compiled(
    denoiser: Denoiser,
    schedule: Schedule,
    sampler: str,
    clip: bool,
    settings: tuple[tuple[str, Any], ...],
    quantisation: str,
    two_branches: bool,
    takes_guidance: bool,
    with_variance: bool,
    fixed_steps: int | None,
) -> Callable[..., jax.Array]:
    """One compiled program for every stage with these networks, every w and every number of steps.

    fixed_steps: the number of steps of a sampler that needs a plain one; None for any other.
    """
    model = guided(denoiser) if two_branches else denoiser
    mesh = meshes.make_mesh()
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)

    @functools.partial(
        jax.jit,
        in_shardings=(everywhere, rows, rows, rows, rows, rows, everywhere, everywhere),
        out_shardings=rows,
        compiler_options=xla.compiler_options(mesh),
    )
    def run(
        params: Any,
        seeds: jax.Array,
        labels: jax.Array,
        latents: jax.Array | None,
        pictures: jax.Array | None,
        masks: jax.Array | None,
        w: jax.Array,
        num_steps: jax.Array,
    ) -> jax.Array:
        keys = jax.vmap(jax.random.key)(seeds)
        if latents is None:
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, 0), denoiser.image_shape, jnp.float32)  # noqa: E731
            latents = jax.vmap(draw)(keys)
        condition = Condition(
            label=labels if denoiser.num_classes else None,
            guidance=jnp.full(seeds.shape, w) if two_branches or takes_guidance else None,
            image=shown_of(denoiser, keys, pictures, masks),
        )

        def denoise(z: jax.Array, log_snr: jax.Array) -> Any:
            predicted = model.predict(params, z, log_snr, condition)
            return (predicted.x, predicted.variance_fraction) if with_variance else predicted.x

        x = samplers.get(sampler)(
            denoise,
            latents,
            schedule,
            num_steps if fixed_steps is None else fixed_steps,
            keys=jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            clip=clip,
            **dict(settings),
        )
        return protocols.quantise(x, quantisation)

    return run


def shown_of(
    denoiser: Denoiser, keys: jax.Array, pictures: jax.Array | None, masks: jax.Array | None
) -> jax.Array | None:
    """What a model from image to image is shown of pictures (B, H, W, C); the key of an image says where its hole is.

    masks: (B, H, W); None: drawn from the keys. None for any other model.
    """
    if denoiser.task is None or pictures is None:
        return None
    _, height, width, _ = pictures.shape
    if masks is None:
        masks = jax.vmap(lambda key: random_hole(jax.random.fold_in(key, 2), height, width))(keys)
    return denoiser.task.show(images({"image": pictures}), masks)
