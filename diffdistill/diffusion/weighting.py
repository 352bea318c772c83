"""Loss weights: factors on the mean squared error of x_hat, as functions of log-SNR (any shape).

A weight on MSE(x) is the same thing as another weight on MSE(eps) = SNR MSE(x) or MSE(v) = (1 + SNR) MSE(x).

The weights called vdm and sigmoid are defined per unit of log-SNR. `rate`, the fall of log-SNR per unit of the time
that is drawn uniformly (schedules.rate), makes the mean over that time an integral over log-SNR; left at one it means
that log-SNR itself is drawn uniformly.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
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
    """Returns SNR / (k + SNR)^gamma (Choi et al. 2022); gamma = 0 is `snr`. On MSE(eps) it is (k + SNR)^-gamma."""
    log_snr = jnp.asarray(log_snr, dtype=float)
    return jnp.exp(log_snr - gamma * _log_add(k, log_snr))


def min_snr(log_snr: ArrayLike, *, g: float = 5.0) -> Array:
    """Returns min(SNR, g) (Hang et al. 2023)."""
    return jnp.minimum(snr(log_snr), g)


def max_snr(log_snr: ArrayLike, *, g: float = 1.0) -> Array:
    """Returns max(SNR, g), `snr_trunc` with any bound (compared with min_snr by Hang et al. 2023)."""
    return jnp.maximum(snr(log_snr), g)


def soft_min_snr(log_snr: ArrayLike, *, g: float = 5.0) -> Array:
    """Returns SNR g / (SNR + g), a smooth `min_snr` and g times `p2` with k = g (Crowson et al. 2024, HDiT)."""
    log_snr = jnp.asarray(log_snr, dtype=float)
    return g * jnp.exp(log_snr - _log_add(g, log_snr))


def debiased(log_snr: ArrayLike) -> Array:
    """Returns sqrt(SNR), 1 / sqrt(SNR) on MSE(eps) (Yu et al. 2024, "Debias the training of diffusion models")."""
    return jnp.exp(0.5 * jnp.asarray(log_snr, dtype=float))


def unit_rate(log_snr: ArrayLike) -> Array:
    """Returns 1: log-SNR is drawn uniformly."""
    return jnp.ones_like(jnp.asarray(log_snr, dtype=float))


def vdm(log_snr: ArrayLike, *, rate: Callable[[ArrayLike], Array] = unit_rate) -> Array:
    """Returns SNR rate / 2: the diffusion part of the variational bound in nats per dimension (Kingma et al. 2021)."""
    return 0.5 * snr(log_snr) * rate(log_snr)


def sigmoid(log_snr: ArrayLike, *, shift: float = 2.0, rate: Callable[[ArrayLike], Array] = unit_rate) -> Array:
    """Returns `vdm` times sigmoid(shift - log_snr) (Kingma & Gao 2023, section 5)."""
    return vdm(log_snr, rate=rate) * jax.nn.sigmoid(shift - jnp.asarray(log_snr, dtype=float))


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
    "max_snr": max_snr,
    "soft_min_snr": soft_min_snr,
    "debiased": debiased,
    "edm": edm,
    "vdm": vdm,
    "sigmoid": sigmoid,
}

# Parts of the noise range by what is learnt there (Choi et al. 2022): SNR below 1e-2, from there to 1, above.
REGIMES = ("coarse", "content", "clean_up")
_REGIME_BOUNDS = (math.log(1e-2), 0.0)


def get(name: str, **settings: Any) -> Callable[[ArrayLike], Array]:
    """Returns the weight called `name`, one of WEIGHTS, as a function of log_snr with its settings bound.

    Settings: k and gamma of p2, g of min_snr, max_snr and soft_min_snr, sigma_data of edm, rate of vdm and sigmoid,
    shift of sigmoid. ValueError for an unknown name or setting.
    """
    weight = names.choose(WEIGHTS, name, "loss weight")
    names.check_settings(weight, settings, f"loss weight {name!r}")
    return functools.partial(weight, **settings)


def settings_of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of `values` that the weight called `name` takes as settings; ValueError for an unknown name."""
    weight = names.choose(WEIGHTS, name, "loss weight")
    return {setting: values[setting] for setting in names.settings_of(weight) if setting in values}


def per_unit_log_snr(name: str) -> bool:
    """Whether the weight called `name` is defined per unit of log-SNR and wants to know its `rate`."""
    return "rate" in names.settings_of(names.choose(WEIGHTS, name, "loss weight"))


def on_noise(weight: Callable[[Array], Array], log_snr: ArrayLike) -> Array:
    """Returns the factor on MSE(eps) that `weight`, a factor on MSE(x), amounts to: weight / SNR; shape of log_snr."""
    log_snr = jnp.asarray(log_snr, dtype=float)
    return weight(log_snr) * jnp.exp(-log_snr)


def normalised(weight: Callable[[Array], Array], log_snr: ArrayLike) -> Callable[[Array], Array]:
    """Returns `weight` over the mean of its factor on MSE(eps) at `log_snr`, noise levels as they are drawn (N,)."""
    mean = float(jnp.mean(on_noise(weight, log_snr)))
    return lambda log_snr: weight(log_snr) / mean


def regime(log_snr: ArrayLike) -> Array:
    """Returns the index in REGIMES of each noise level, int32; shape of log_snr."""
    log_snr = jnp.asarray(log_snr, dtype=float)
    return sum((log_snr >= bound).astype(jnp.int32) for bound in _REGIME_BOUNDS)  # type: ignore[return-value]


def _log_add(k: float, log_snr: Array) -> Array:
    """log(k + SNR) for k >= 0."""
    return jnp.logaddexp(math.log(k), log_snr) if k > 0 else log_snr
