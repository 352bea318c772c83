"""Training noise: how noisy the examples are that a model learns from, as quantile functions of log-SNR.

A distribution maps u in [0, 1), any shape, to log-SNR of the same shape, so that even draws of u give even draws of
noise. They are the row "noise distribution" of table 1 of Karras et al. 2022, in terms of s = exp(-log_snr / 2), and
what score distillation adds to it. They are free of the schedule: a sampler may visit the noise levels in another
way than training did.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion import names, schedules
from diffdistill.diffusion.process import log_snr_from_ve_sigma

_VP_T_MIN = 1e-5  # eps_t of table 1


def lognormal(u: ArrayLike, *, p_mean: float = -1.2, p_std: float = 1.2) -> Array:
    """Returns -2 ln s with ln s normal of mean `p_mean` and standard deviation `p_std` (EDM)."""
    # The quantile of 0 is -infinity; the least draw above it is 2^-23, which lies 5.2 deviations out.
    u = jnp.maximum(jnp.asarray(u, dtype=float), 2.0**-24)
    return -2.0 * (p_mean + p_std * jax.scipy.special.ndtri(u))


def vp(u: ArrayLike) -> Array:
    """Returns the log-SNR of t uniform on [1e-5, 1] under the VP process of Song et al. 2021."""
    t = _VP_T_MIN + (1.0 - _VP_T_MIN) * jnp.asarray(u, dtype=float)
    return -jnp.log(jnp.expm1(schedules.vp_exponent(t)))


def ve(u: ArrayLike, *, sigma_min: float = 0.02, sigma_max: float = schedules.VE_SIGMA_MAX) -> Array:
    """Returns -2 ln s with ln s uniform from ln `sigma_min` to ln `sigma_max` (Song et al. 2021)."""
    u = jnp.asarray(u, dtype=float)
    return -2.0 * ((1.0 - u) * math.log(sigma_min) + u * math.log(sigma_max))


def iddpm(u: ArrayLike, *, num_train_steps: int = 1000) -> Array:
    """Returns the log-SNR of a uniform choice among the noise levels of the discrete cosine schedule."""
    table = log_snr_from_ve_sigma(schedules.discrete_sigmas(schedules.cosine_betas(num_train_steps)))
    index = jnp.floor(jnp.asarray(u, dtype=float) * num_train_steps).astype(jnp.int32)
    return table[jnp.minimum(index, num_train_steps - 1)]


def karras(
    u: ArrayLike,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = schedules.EDM_SIGMA_MAX,
    first: float = 0.0,
    last: float = 1.0,
) -> Array:
    """Returns -2 ln s with s^(1/7) uniform over a part of the way from that of `sigma_min` to that of `sigma_max`.

    The part is from `first` to `last`. Score distillation draws so: on [.02, .98] in DMD2 (Yin et al. 2024), of 1000
    nodes, and on [0, .8] in SiD (Zhou et al. 2024).
    """
    low, high = (bound ** (1.0 / schedules.KARRAS_RHO) for bound in (sigma_min, sigma_max))
    t = first + (last - first) * jnp.asarray(u, dtype=float)
    return -2.0 * schedules.KARRAS_RHO * jnp.log(low + t * (high - low))


NOISES: dict[str, Callable[..., Array]] = {
    "lognormal": lognormal,
    "vp": vp,
    "ve": ve,
    "iddpm": iddpm,
    "karras": karras,
}


def get(name: str, **settings: float) -> Callable[[ArrayLike], Array]:
    """Returns the distribution called `name`, one of NOISES, as a function of u with its settings bound.

    Settings: p_mean and p_std of lognormal, sigma_min and sigma_max of ve and karras, first and last of karras,
    num_train_steps of iddpm. ValueError for an unknown name or setting.
    """
    noise = names.choose(NOISES, name, "training noise")
    names.check_settings(noise, settings, f"training noise {name!r}")
    return functools.partial(noise, **settings)
