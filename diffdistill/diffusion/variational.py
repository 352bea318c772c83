"""The variational bound of a diffusion of discrete steps, term by term (Ho et al. 2020; Nichol & Dhariwal 2021).

A step goes from the noise level log_snr_t to the cleaner log_snr_s. Its model is a Gaussian whose mean takes x_hat for
the data and whose log-variance lies between the bounds of the reverse process: `fraction` 0 is the posterior's variance
(1 - r) sigma_s^2, 1 is that of the noise added, (1 - r) sigma_t^2, with r = exp(log_snr_t - log_snr_s). A network that
learns the variance puts out v = 2 fraction - 1 per pixel; neither is limited to its range.

Noise levels are (B,), images and fractions (B, H, W, C) with data in [-1, 1]; all terms are means over the pixels of an
image, in nats per dimension, (B,).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion.process import expand, log1mexp

BITS_PER_NAT = 1.0 / math.log(2.0)
_HALF_BIN = 1.0 / 255.0  # bytes lie 2/255 apart in [-1, 1]


def step_divergence(x: Array, x_hat: Array, fraction: ArrayLike, log_snr_t: Array, log_snr_s: Array) -> Array:
    """Returns KL(q(z_s | z_t, x) || p(z_s | z_t)) of one step.

    With d = log(sigma_t^2 / sigma_s^2) >= 0 it is (f d + expm1(-f d) + exp(-f d) (SNR_s - SNR_t) (x - x_hat)^2) / 2:
    nothing large is subtracted, and at fraction f = 0 it is the term of Kingma et al. 2021.
    """
    log_snr_t, log_snr_s = jnp.asarray(log_snr_t, dtype=float), jnp.asarray(log_snr_s, dtype=float)
    d = expand(jax.nn.log_sigmoid(-log_snr_t) - jax.nn.log_sigmoid(-log_snr_s), x)
    gained = jnp.exp(log_snr_s) * -jnp.expm1(log_snr_t - log_snr_s)
    wider = jnp.asarray(fraction, dtype=float) * d
    missed = expand(gained, x) * jnp.square(x - x_hat)
    return 0.5 * _mean(wider + jnp.expm1(-wider) + jnp.exp(-wider) * missed)


def first_log_variance(fraction: ArrayLike, log_snr_first: Array, log_snr_second: Array, like: Array) -> Array:
    """Returns the log-variance (B, H, W, C) of the step to data, whose lower bound would be 0: that of the step before.

    log_snr_first and log_snr_second are the two cleanest noise levels (Nichol & Dhariwal 2021, section 3.1).
    """
    log_snr_first, log_snr_second = (jnp.asarray(each, dtype=float) for each in (log_snr_first, log_snr_second))
    narrower = expand(log1mexp(log_snr_first - log_snr_second), like)
    return expand(jax.nn.log_sigmoid(-log_snr_first), like) + (1.0 - fraction) * narrower


def decoder(x: Array, x_hat: Array, log_variance: Array) -> Array:
    """Returns -log p of bytes x under a Gaussian around x_hat: its mass within 1/255; the outer bins are open."""
    scale = jnp.exp(-0.5 * log_variance)
    upper, lower = (x - x_hat + _HALF_BIN) * scale, (x - x_hat - _HALF_BIN) * scale
    # Both ends on the side where the tail is: differences of numbers near 1 would lose everything.
    flipped = upper + lower > 0
    a, b = jnp.where(flipped, -lower, upper), jnp.where(flipped, -upper, lower)
    log_a, log_b = jax.scipy.special.log_ndtr(a), jax.scipy.special.log_ndtr(b)
    inside = log_a + log1mexp(log_a - log_b)
    lowest, highest = jax.scipy.special.log_ndtr(upper), jax.scipy.special.log_ndtr(-lower)
    return -_mean(jnp.where(x < -0.999, lowest, jnp.where(x > 0.999, highest, inside)))


def prior(x: Array, log_snr: ArrayLike) -> Array:
    """Returns KL(q(z_T | x) || N(0, 1)), (B,), at the noisiest level, a scalar log-SNR."""
    log_snr = jnp.asarray(log_snr, dtype=float)
    # -1 - log(sigma^2) + sigma^2 with 1 - sigma^2 = alpha^2: sigma is too near 1 for a logarithm of it.
    kept = jax.nn.sigmoid(log_snr)
    return _mean(0.5 * (jax.nn.softplus(log_snr) - kept + kept * jnp.square(x)))


def term(
    x: Array, x_hat: Array, fraction: ArrayLike, log_snr_t: Array, log_snr_s: Array, first: Array, second: ArrayLike
) -> Array:
    """Returns the bound's term of a step: the decoder where `first` (B,), which ends at the data; else its divergence.

    second: log-SNR of the step before the first, () or (B,).
    """
    to_noise = step_divergence(x, x_hat, fraction, log_snr_t, jnp.where(first, log_snr_t, log_snr_s))
    # Of other steps than the first stand-ins: what is dropped must be finite, or its gradient is 0 times infinity.
    second = jnp.where(first, second, log_snr_t - 1.0)
    to_data = decoder(x, jnp.where(expand(first, x), x_hat, x), first_log_variance(fraction, log_snr_t, second, x))
    return jnp.where(first, to_data, to_noise)


def _mean(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
