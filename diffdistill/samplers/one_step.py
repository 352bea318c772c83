"""One evaluation of the denoiser at one noise level: generators made by score distillation (methods.disback)."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion.process import expand, log_snr_from_ve_sigma, sigma
from diffdistill.diffusion.schedules import Schedule


def log_snr_of(sigma_init: float, schedule: Schedule) -> Array:
    """Returns the log-SNR () of the noise level sigma_init in VE form; of 0, that of the schedule's end, t = 1."""
    return log_snr_from_ve_sigma(sigma_init) if sigma_init else schedule.log_snr(1.0)


def generate(denoise: Callable[[Array, Array], Array], eps: Array, log_snr: ArrayLike) -> Array:
    """Returns D(sigma eps; log_snr), shape of eps: in VE form D(s eps; s), the noise alone at a level () or (B,)."""
    log_snr = jnp.broadcast_to(jnp.asarray(log_snr, jnp.float32), eps.shape[:1])
    return denoise(expand(sigma(log_snr), eps) * eps, log_snr)


def sample(
    denoise: Callable[[Array, Array], Array],
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None = None,
    clip: bool = True,
    sigma_init: float = 0.0,
) -> Array:
    """Returns images (B, H, W, C) from noise z of unit variance by one evaluation at sigma_init (0: the end, t = 1).

    `num_steps` and `keys` are ignored, and there so that every sampler is called alike.
    """
    del num_steps, keys
    x = generate(denoise, z, log_snr_of(sigma_init, schedule))
    return jnp.clip(x, -1.0, 1.0) if clip else x
