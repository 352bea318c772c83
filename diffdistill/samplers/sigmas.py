"""Where and along what the samplers of the EDM family step: discretisations and paths (Karras et al. 2022, table 1).

Noise levels are those of the VE form, s = exp(-log_snr / 2), and 0 is clean. A discretisation says which N levels are
visited, from the highest to the lowest; a path says how the level depends on the time in which a solver is straight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion import names, schedules

_VP_T_MIN = 1e-3  # eps_s of table 1
_IDDPM_SIGMAS = schedules.discrete_sigmas(schedules.cosine_betas(1000))[::-1]  # u_0 .. u_999, decreasing

# sigmas(i, num_steps): the level of step i = 0..N-1, either traced.
Sigmas = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Discretisation:
    """A way to spread the steps: its own range of noise levels, and make(sigma_min, sigma_max, rho) -> Sigmas."""

    sigma_min: float
    sigma_max: float
    make: Callable[[float, float, float], Sigmas]


@dataclass(frozen=True)
class Path:
    """A noise level as a function of the time t of a solver, each of one scalar.

    Attributes:
      sigma: the level at t > 0.
      time: its inverse.
      rate: sigma'(t) / sigma(t).
    """

    sigma: Callable[[Array], Array]
    time: Callable[[Array], Array]
    rate: Callable[[Array], Array]


def _mix(first: float, last: float, i: Array, num_steps: Array) -> Array:
    """The value i/(N-1) of the way from first to last, as a sum of positive parts: float32 keeps its last digits."""
    i, gaps = jnp.asarray(i), jnp.maximum(jnp.asarray(num_steps) - 1, 1)
    return (first * (gaps - i).astype(float) + last * i.astype(float)) / gaps.astype(float)


def _edm(sigma_min: float, sigma_max: float, rho: float) -> Sigmas:
    ratio = (sigma_min / sigma_max) ** (1.0 / rho)
    power = int(rho) if rho == int(rho) else rho  # whole powers are products, which round less

    return lambda i, num_steps: sigma_max * _mix(1.0, ratio, i, num_steps) ** power


def _ve(sigma_min: float, sigma_max: float, rho: float) -> Sigmas:
    ratio = math.log(sigma_min / sigma_max)
    return lambda i, num_steps: sigma_max * jnp.exp(_mix(0.0, ratio, i, num_steps))


def _vp(sigma_min: float, sigma_max: float, rho: float) -> Sigmas:
    path = vp_path(sigma_min, sigma_max)
    return lambda i, num_steps: path.sigma(_mix(1.0, _VP_T_MIN, i, num_steps))


def _iddpm(sigma_min: float, sigma_max: float, rho: float) -> Sigmas:
    table = _IDDPM_SIGMAS
    # The ends of a schedule went through a float32 logarithm.
    inside = np.flatnonzero((table >= sigma_min * (1.0 - 1e-5)) & (table <= sigma_max * (1.0 + 1e-5)))
    if not inside.size:
        raise ValueError(
            f"sigma_min={sigma_min:g} and sigma_max={sigma_max:g}: the iddpm discretisation has no noise level between "
            f"them; its levels run from {table[-1]:.4g} to {table[0]:.4g}"
        )
    first, count = int(inside[0]), len(inside)

    def sigmas(i: Array, num_steps: Array) -> Array:
        # floor(first + i (count - 1)/(N - 1) + 1/2), in whole numbers.
        gaps = jnp.maximum(jnp.asarray(num_steps) - 1, 1)
        return jnp.asarray(table, dtype=float)[first + (2 * (count - 1) * jnp.asarray(i) + gaps) // (2 * gaps)]

    return sigmas


def vp_path(sigma_min: float, sigma_max: float) -> Path:
    """Returns the VP process of Song et al. 2021 with its betas fitted so that t = 1e-3 and 1 have these levels."""
    at_min, at_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2.0 * (at_min / _VP_T_MIN - at_max) / (_VP_T_MIN - 1.0)
    beta_min = at_max - 0.5 * beta_d

    def sigma(t: Array) -> Array:
        return jnp.sqrt(jnp.expm1(schedules.vp_exponent(t, beta_d, beta_min)))

    def time(s: Array) -> Array:
        return schedules.vp_time(jnp.log1p(s**2), beta_d, beta_min)

    def rate(t: Array) -> Array:
        return 0.5 * (beta_d * t + beta_min) * (1.0 + sigma(t) ** -2)

    return Path(sigma, time, rate)


def _ve_path(sigma_min: float, sigma_max: float) -> Path:
    return Path(sigma=jnp.sqrt, time=jnp.square, rate=lambda t: 0.5 / t)


def _linear_path(sigma_min: float, sigma_max: float) -> Path:
    return Path(sigma=lambda t: t, time=lambda s: s, rate=lambda t: 1.0 / t)


def vp_sigma(t: float) -> float:
    """Returns the noise level of the VP process of Song et al. 2021 at time t in [0, 1], in float64."""
    return math.sqrt(math.expm1(0.5 * schedules.VP_BETA_D * t**2 + schedules.VP_BETA_MIN * t))


DISCRETISATIONS: dict[str, Discretisation] = {
    "edm": Discretisation(0.002, 80.0, _edm),
    "vp": Discretisation(vp_sigma(_VP_T_MIN), vp_sigma(1.0), _vp),
    "ve": Discretisation(0.02, 100.0, _ve),
    "iddpm": Discretisation(0.002, 81.0, _iddpm),
}

PATHS: dict[str, Callable[[float, float], Path]] = {"linear": _linear_path, "vp": vp_path, "ve": _ve_path}

# s(t), by which the state of a solver is its VE form multiplied; as a function of sigma(t).
SCALINGS: dict[str, Callable[[Array], ArrayLike]] = {
    "none": lambda sigma: 1.0,
    "vp": lambda sigma: 1.0 / jnp.sqrt(1.0 + sigma**2),
}


def sigma_range(
    schedule: schedules.Schedule, discretisation: str, sigma_min: float, sigma_max: float
) -> tuple[float, float]:
    """Returns the least and the greatest level that a sampler visits: those asked for that the schedule has.

    0 stands for the published end of the discretisation. ValueError for an unknown discretisation and an empty range.
    """
    own = names.choose(DISCRETISATIONS, discretisation, "discretisation")
    low, high = schedule.sigma_range()
    # An end of the schedule went through a float32 logarithm; a level that it misses by its rounding counts as met.
    lowest, highest = sigma_min or own.sigma_min, sigma_max or own.sigma_max
    lowest = low if lowest < low * (1.0 - 1e-5) else lowest
    highest = high if highest > high * (1.0 + 1e-5) else highest
    if not 0.0 < lowest < highest:
        raise ValueError(
            f"sigma_min={sigma_min:g} and sigma_max={sigma_max:g} (0: the published {own.sigma_min:.4g} and "
            f"{own.sigma_max:.4g}) leave no noise levels of the schedule {schedule.name!r}, which has {low:.4g} to "
            f"{high:.4g}; give 0 <= sigma_min < sigma_max within that range"
        )
    return lowest, highest
