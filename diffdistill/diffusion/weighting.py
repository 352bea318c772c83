"""Loss weights: factors on the mean squared error of x_hat, as functions of log-SNR (any shape).

A weight on MSE(x) is the same thing as another weight on MSE(eps) = SNR MSE(x) or MSE(v) = (1 + SNR) MSE(x).
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion import names


def constant(log_snr: ArrayLike) -> Array:
    """Returns 1: MSE(x)."""
    return jnp.ones_like(jnp.asarray(log_snr, dtype=float))


def snr(log_snr: ArrayLike) -> Array:
    """Returns SNR: MSE(eps)."""
    return jnp.exp(jnp.asarray(log_snr, dtype=float))


def snr_trunc(log_snr: ArrayLike) -> Array:
    """Returns max(SNR, 1): max(MSE(x), MSE(eps)) per example (Salimans & Ho 2022, eq. 9)."""
    return jnp.maximum(snr(log_snr), 1.0)


def snr_plus_one(log_snr: ArrayLike) -> Array:
    """Returns 1 + SNR: MSE(v) (Salimans & Ho 2022, eq. 10)."""
    return 1.0 + snr(log_snr)


def p2(log_snr: ArrayLike, *, k: float = 1.0, gamma: float = 1.0) -> Array:
    """Returns SNR / (k + SNR)^gamma (Choi et al. 2022); gamma = 0 is `snr`."""
    ratio = snr(log_snr)
    return ratio / (k + ratio) ** gamma


def min_snr(log_snr: ArrayLike, *, g: float = 5.0) -> Array:
    """Returns min(SNR, g) (Hang et al. 2023)."""
    return jnp.minimum(snr(log_snr), g)


def edm(log_snr: ArrayLike, *, sigma_data: float = 0.5) -> Array:
    """Returns (s^2 + sigma_data^2) / (s sigma_data)^2 with s = ve_sigma: unit weight on F (Karras et al. 2022)."""
    return snr(log_snr) + 1.0 / sigma_data**2  # the same fraction, split: 1/s^2 is the SNR


WEIGHTS: dict[str, Callable[..., Array]] = {
    "constant": constant,
    "snr": snr,
    "snr_trunc": snr_trunc,
    "snr_plus_one": snr_plus_one,
    "p2": p2,
    "min_snr": min_snr,
    "edm": edm,
}


def get(name: str, **settings: float) -> Callable[[ArrayLike], Array]:
    """Returns the weight called `name`, one of WEIGHTS, as a function of log_snr with its settings bound.

    Settings: k and gamma of p2, g of min_snr, sigma_data of edm. ValueError for an unknown name or setting.
    """
    weight = names.choose(WEIGHTS, name, "loss weight")
    names.check_settings(weight, settings, f"loss weight {name!r}")
    return functools.partial(weight, **settings)
