"""The variance-preserving process z = alpha x + sigma eps as functions of log-SNR, and its twin in VE form.

log_snr = log(alpha^2 / sigma^2), and alpha^2 + sigma^2 = 1; as an angle, alpha = cos(theta) and sigma = sin(theta).
Arrays of log_snr are (B,) or scalar; images are (B, H, W, C).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def expand(a: ArrayLike, like: Array) -> Array:
    """Returns `a`, a scalar or (B,), with trailing axes of length one so that it broadcasts against `like` (B, ...).

    A `like` without axes (a scalar) is legal only with a scalar `a`; otherwise ValueError.
    """
    a = jnp.asarray(a)
    if a.ndim == 0:
        return a
    if a.ndim != 1 or like.ndim < 1 or (a.shape[0] != like.shape[0] and 1 not in (a.shape[0], like.shape[0])):
        raise ValueError(
            f"expected a scalar or one value per example, shape ({like.shape[0] if like.ndim else ''},), for an array "
            f"of shape {like.shape}, got shape {a.shape}; index or broadcast it to one value per example first"
        )
    return a.reshape(a.shape + (1,) * (like.ndim - 1))


def alpha(log_snr: ArrayLike) -> Array:
    """Returns sqrt(sigmoid(log_snr)), the scale of the data in z; shape of log_snr."""
    # exp(log / 2) rather than sqrt: its gradient stays finite where the sigmoid underflows.
    return jnp.exp(0.5 * jax.nn.log_sigmoid(jnp.asarray(log_snr, dtype=float)))


def sigma(log_snr: ArrayLike) -> Array:
    """Returns sqrt(sigmoid(-log_snr)), the scale of the noise in z; shape of log_snr."""
    return alpha(-jnp.asarray(log_snr, dtype=float))


def angle(log_snr: ArrayLike) -> Array:
    """Returns theta in (0, pi/2) with tan(theta) = sigma / alpha; shape of log_snr."""
    return jnp.arctan(ve_sigma(log_snr))


def log_snr_from_angle(theta: ArrayLike) -> Array:
    """Returns -2 log tan(theta), the inverse of `angle`, for theta in (0, pi/2)."""
    return -2.0 * jnp.log(jnp.tan(jnp.asarray(theta, dtype=float)))


def ve_sigma(log_snr: ArrayLike) -> Array:
    """Returns sigma / alpha = exp(-log_snr / 2), the noise level of the variance-exploding (EDM) form."""
    return jnp.exp(-0.5 * jnp.asarray(log_snr, dtype=float))


def log_snr_from_ve_sigma(s: ArrayLike) -> Array:
    """Returns -2 log(s), the inverse of `ve_sigma`, for s > 0."""
    return -2.0 * jnp.log(jnp.asarray(s, dtype=float))


def vp_to_ve(z: Array, log_snr: ArrayLike) -> Array:
    """Returns z / alpha = x + ve_sigma eps for z (B, H, W, C)."""
    return z / expand(alpha(log_snr), z)


def ve_to_vp(z_ve: Array, log_snr: ArrayLike) -> Array:
    """Returns alpha z_ve, the inverse of `vp_to_ve`."""
    return expand(alpha(log_snr), z_ve) * z_ve


def add_noise(x: Array, eps: Array, log_snr: ArrayLike) -> Array:
    """Returns z = alpha x + sigma eps for x and eps of shape (B, H, W, C)."""
    return expand(alpha(log_snr), x) * x + expand(sigma(log_snr), x) * eps


def log1mexp(x: ArrayLike) -> Array:
    """Returns log(1 - exp(-x)) for x >= 0, with finite values and gradients everywhere, x = 0 included.

    At and below the smallest normal number the value stays at its logarithm, about -87 in float32, and the gradient
    is 0. Maechler 2012, "Accurately computing log(1 - exp(-|a|))": expm1 for small x, log1p for large x.
    """
    x = jnp.asarray(x, dtype=float)
    tiny = jnp.finfo(x.dtype).tiny
    cut = 0.6931472  # log 2
    # Each branch sees only arguments it can differentiate: a NaN in the branch not taken would reach the gradient.
    small = jnp.log(-jnp.expm1(-jnp.maximum(jnp.where(x < cut, x, cut), tiny)))
    large = jnp.log1p(-jnp.exp(-jnp.where(x < cut, cut, x)))
    return jnp.where(x < cut, small, large)


def transition_variance(log_snr_t: ArrayLike, log_snr_s: ArrayLike) -> Array:
    """Returns sigma_{t|s}^2 = (1 - exp(log_snr_t - log_snr_s)) sigma_t^2, the noise added between s and the noisier t.

    Kingma et al. 2021, "Variational diffusion models", section 3.
    """
    log_snr_t, log_snr_s = jnp.asarray(log_snr_t, dtype=float), jnp.asarray(log_snr_s, dtype=float)
    return -jnp.expm1(log_snr_t - log_snr_s) * jax.nn.sigmoid(-log_snr_t)
