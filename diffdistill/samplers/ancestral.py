"""Ancestral sampling with a variance between the two bounds of the reverse process (Salimans & Ho 2022, section 2).

`denoise` is as in `ddim`: denoise(z (B, H, W, C), log_snr (B,)) -> x_hat (B, H, W, C). Of a network that learns the
variance it gives a pair (x_hat, fraction), each (B, H, W, C): where between the bounds the log-variance of a step lies
(Nichol & Dhariwal 2021).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion.process import alpha, expand, log1mexp
from diffdistill.diffusion.schedules import Schedule
from diffdistill.samplers.ddim import check_num_steps, step_times

PredictStep = Callable[[Array, Array], Array | tuple[Array, Array]]


def step(
    x_hat: Array,
    z: Array,
    noise: Array,
    log_snr_t: ArrayLike,
    log_snr_s: ArrayLike,
    variance_fraction: ArrayLike,
) -> Array:
    """Returns z_s, shape of z, from z = z_t, the prediction x_hat and standard normal noise; s is the cleaner time.

    With r = exp(log_snr_t - log_snr_s): mean r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x_hat, and a variance
    log-linear between the posterior's (1 - r) sigma_s^2 (fraction 0) and sigma_{t|s}^2 = (1 - r) sigma_t^2
    (fraction 1). log_snr is scalar or (B,); fraction is too, or one per pixel, shape of z.
    """
    log_snr_t, log_snr_s = jnp.asarray(log_snr_t, dtype=float), jnp.asarray(log_snr_s, dtype=float)
    gap = log_snr_s - log_snr_t
    alpha_s = alpha(log_snr_s)
    keep = jnp.exp(-gap) * alpha_s / alpha(log_snr_t)
    fraction = jnp.asarray(variance_fraction, dtype=float)
    fraction = fraction if fraction.shape == z.shape else expand(fraction, z)
    log_variance = (
        expand(log1mexp(gap), z)
        + (1.0 - fraction) * expand(jax.nn.log_sigmoid(-log_snr_s), z)
        + fraction * expand(jax.nn.log_sigmoid(-log_snr_t), z)
    )
    mean = expand(keep, z) * z + expand(-jnp.expm1(-gap) * alpha_s, z) * x_hat
    return mean + jnp.exp(0.5 * log_variance) * noise


def check_keys(keys: Array | None, z: Array, sampler: str) -> Array:
    """Returns `keys` if they are one typed key per image of z (B, ...); ValueError otherwise."""
    if keys is None or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != z.shape[:1]:
        given = "None" if keys is None else f"shape {keys.shape} of {keys.dtype}"
        raise ValueError(
            f"the {sampler} sampler needs one typed key per image, shape {z.shape[:1]}, got {given}; "
            "make them with jax.vmap(jax.random.key)(seeds) or jax.random.split"
        )
    return keys


def step_noise(keys: Array, i: int | Array, like: Array) -> Array:
    """Returns the standard normal noise of step i, shape of `like` (B, ...): that of image k comes from key k alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), like.shape[1:], like.dtype))(keys)


def prediction(given: Array | tuple[Array, Array], variance_fraction: ArrayLike) -> tuple[Array, ArrayLike]:
    """Returns (x_hat, fraction): what `denoise` gave, with `variance_fraction` where that is x_hat alone."""
    return given if isinstance(given, tuple) else (given, variance_fraction)


def sample(
    denoise: PredictStep,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None,
    clip: bool = True,
    variance_fraction: ArrayLike = 0.0,
) -> Array:
    """Returns images (B, H, W, C) from noise z at t = 1 by `num_steps` equal steps in t; the last returns x_hat.

    `keys` (B,) are typed PRNG keys, one per image: the noise of image k in step i comes from fold_in(keys[k], i) and
    so depends neither on the batch nor on its place in it. `variance_fraction` (in [0, 1]) counts where the network
    does not learn the variance; it and `num_steps` (int >= 1) may be traced. `clip` limits x_hat to [-1, 1] at each
    step. ValueError for missing or misshapen keys.
    """
    check_num_steps(num_steps)
    image_keys = check_keys(keys, z, "ancestral")

    def body(i: Array, z: Array) -> Array:
        t, s = step_times(i, num_steps)
        log_snr_t, log_snr_s = schedule.log_snr(t), schedule.log_snr(s)
        x_hat, fraction = prediction(denoise(z, jnp.broadcast_to(log_snr_t, z.shape[:1])), variance_fraction)
        if clip:
            x_hat = jnp.clip(x_hat, -1.0, 1.0)
        return jnp.where(s > 0, step(x_hat, z, step_noise(image_keys, i, z), log_snr_t, log_snr_s, fraction), x_hat)

    return jax.lax.fori_loop(0, num_steps, body, z)
