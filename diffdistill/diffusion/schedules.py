"""Noise schedules: log-SNR as a function of time t in [0, 1], from clean (t = 0) to noise (t = 1).

Every schedule is clipped to [log_snr_min, log_snr_max], so t = 0 and t = 1 are legal inputs of everything downstream.
The native times of ve (sigma^2) and edm (sigma) are divided by their ends, sigma_max^2 and sigma_max. Equal steps of
karras are the noise levels that EDM's samplers take (rho = 7): sigma^(1/7) is linear in t between its bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion import names
from diffdistill.diffusion.process import ve_sigma

VP_BETA_D, VP_BETA_MIN = 19.9, 0.1  # Song et al. 2021, as in Karras et al. 2022, table 1
VE_SIGMA_MAX = 100.0
EDM_SIGMA_MAX = 80.0
KARRAS_RHO = 7.0
MOST_TRAIN_STEPS = 10**6  # of discrete schedules, which are tables
_RATE_POINTS = 4097


def _every_sigma(s: ArrayLike) -> Array:
    return jnp.asarray(s, dtype=float)


@dataclass(frozen=True)
class Schedule:
    """A noise schedule.

    `log_snr` maps t in [0, 1], any shape, to log-SNR of the same shape, decreasing in t. `num_train_steps` is the
    length T of a discrete schedule, whose times are n/T and which rounds any other t to the nearest of them; it is
    None for a continuous one. `nearest_sigma` rounds a noise level in VE form, any shape, to those of the times
    1/T..1 of a discrete schedule; a continuous one has them all.
    """

    name: str
    log_snr: Callable[[ArrayLike], Array]
    num_train_steps: int | None = None
    nearest_sigma: Callable[[ArrayLike], Array] = _every_sigma

    def sigma_range(self) -> tuple[float, float]:
        """The least and the greatest noise level in VE form, exp(-log_snr / 2), that the schedule has."""
        with jax.ensure_compile_time_eval():  # plain numbers also where a sampler is being traced
            first = 0.0 if self.num_train_steps is None else 1.0 / self.num_train_steps
            return float(ve_sigma(self.log_snr(first))), float(ve_sigma(self.log_snr(1.0)))


def linear_betas(num_train_steps: int) -> np.ndarray:
    """Returns beta_1..beta_T, (T,) float64: linear from 1e-4 to 0.02, scaled by 1000/T (Ho et al. 2020)."""
    scale = 1000.0 / num_train_steps
    return np.linspace(1e-4 * scale, 0.02 * scale, num_train_steps, dtype=np.float64)


def cosine_betas(num_train_steps: int) -> np.ndarray:
    """Returns beta_1..beta_T, (T,) float64: the cosine schedule, capped at .999 (Nichol & Dhariwal 2021, eq. 17)."""
    u = np.arange(num_train_steps + 1, dtype=np.float64) / num_train_steps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def alpha_bars(betas: np.ndarray) -> np.ndarray:
    """Returns abar_0..abar_T, (T+1,) float64, with abar_0 = 1 and abar_n the product of 1 - beta up to n."""
    return np.concatenate([[1.0], np.cumprod(1.0 - np.asarray(betas, np.float64))])


def discrete_sigmas(betas: np.ndarray) -> np.ndarray:
    """Returns the noise levels in VE form of times 1/T..1, (T,) float64, increasing."""
    alpha_bar = alpha_bars(betas)[1:]
    return np.sqrt((1.0 - alpha_bar) / alpha_bar)


def nearest_index(sigmas: np.ndarray, s: ArrayLike) -> Array:
    """Returns the index of the nearest of the increasing `sigmas` (T,) to each noise level of `s`; shape of s."""
    between = jnp.asarray(0.5 * (sigmas[1:] + sigmas[:-1]), dtype=float)
    return jnp.searchsorted(between, jnp.asarray(s, dtype=float))


def vp_exponent(t: ArrayLike, beta_d: float = VP_BETA_D, beta_min: float = VP_BETA_MIN) -> Array:
    """Returns beta_d t^2 / 2 + beta_min t = log(1 + sigma^2), with sigma the noise level in VE form (Song et al.)."""
    t = jnp.asarray(t, dtype=float)
    return (0.5 * beta_d * t + beta_min) * t


def vp_time(exponent: ArrayLike, beta_d: float = VP_BETA_D, beta_min: float = VP_BETA_MIN) -> Array:
    """Returns t, the inverse of `vp_exponent`, for exponents >= 0; written so that small times subtract nothing."""
    exponent = jnp.asarray(exponent, dtype=float)
    return 2.0 * exponent / (beta_min + jnp.sqrt(beta_min**2 + 2.0 * beta_d * exponent))


def _cosine(log_snr_min: float, log_snr_max: float, num_train_steps: int) -> Schedule:
    start = float(np.arctan(np.exp(-0.5 * log_snr_max)))  # theta(0)
    end = float(np.arctan(np.exp(0.5 * log_snr_min)))  # pi/2 - theta(1)
    slope = np.pi / 2 - start - end

    def log_snr(t: ArrayLike) -> Array:
        # The angle is measured from the nearer end: near pi/2 float32 has nothing left of the 4.5e-5 that matter, and
        # tan can turn negative. 1 - t is exact for t >= 1/2.
        t = jnp.asarray(t, dtype=float)
        early = t <= 0.5
        theta = slope * jnp.where(early, t, 1.0 - t) + jnp.where(early, start, end)
        return jnp.clip(jnp.where(early, -2.0, 2.0) * jnp.log(jnp.tan(theta)), log_snr_min, log_snr_max)

    return Schedule("cosine", log_snr)


def _discrete(name: str, betas: np.ndarray, log_snr_min: float, log_snr_max: float) -> Schedule:
    alpha_bar = alpha_bars(betas)
    with np.errstate(divide="ignore"):  # abar_0 = 1: infinite log-SNR, clipped to the bound
        log_snrs = np.log(alpha_bar) - np.log(1.0 - alpha_bar)
    table = np.clip(log_snrs, log_snr_min, log_snr_max).astype(np.float32)
    num_train_steps = len(betas)

    def log_snr(t: ArrayLike) -> Array:
        index = jnp.clip(jnp.round(jnp.asarray(t, dtype=float) * num_train_steps), 0, num_train_steps).astype(jnp.int32)
        return jnp.asarray(table)[index]

    sigmas = np.exp(-0.5 * np.clip(log_snrs[1:], log_snr_min, log_snr_max))

    def nearest_sigma(s: ArrayLike) -> Array:
        return jnp.asarray(sigmas, dtype=float)[nearest_index(sigmas, s)]

    return Schedule(name, log_snr, num_train_steps, nearest_sigma)


def _discrete_linear(log_snr_min: float, log_snr_max: float, num_train_steps: int) -> Schedule:
    return _discrete("discrete_linear", linear_betas(num_train_steps), log_snr_min, log_snr_max)


def _discrete_cosine(log_snr_min: float, log_snr_max: float, num_train_steps: int) -> Schedule:
    return _discrete("discrete_cosine", cosine_betas(num_train_steps), log_snr_min, log_snr_max)


def _vp(log_snr_min: float, log_snr_max: float, num_train_steps: int) -> Schedule:
    floor = float(np.log1p(np.exp(-log_snr_max)))

    def log_snr(t: ArrayLike) -> Array:
        exponent = jnp.maximum(vp_exponent(t), floor)
        return jnp.clip(-jnp.log(jnp.expm1(exponent)), log_snr_min, log_snr_max)

    return Schedule("vp", log_snr)


def _ve(log_snr_min: float, log_snr_max: float, num_train_steps: int) -> Schedule:
    floor = float(np.exp(-log_snr_max))

    def log_snr(t: ArrayLike) -> Array:
        variance = jnp.maximum(VE_SIGMA_MAX**2 * jnp.asarray(t, dtype=float), floor)
        return jnp.clip(-jnp.log(variance), log_snr_min, log_snr_max)

    return Schedule("ve", log_snr)


def _edm(log_snr_min: float, log_snr_max: float, num_train_steps: int) -> Schedule:
    floor = float(np.exp(-0.5 * log_snr_max))

    def log_snr(t: ArrayLike) -> Array:
        sigma = jnp.maximum(EDM_SIGMA_MAX * jnp.asarray(t, dtype=float), floor)
        return jnp.clip(-2.0 * jnp.log(sigma), log_snr_min, log_snr_max)

    return Schedule("edm", log_snr)


def _karras(log_snr_min: float, log_snr_max: float, num_train_steps: int) -> Schedule:
    low, high = (float(np.exp(-0.5 * bound / KARRAS_RHO)) for bound in (log_snr_max, log_snr_min))

    def log_snr(t: ArrayLike) -> Array:
        root = low + jnp.asarray(t, dtype=float) * (high - low)
        return jnp.clip(-2.0 * KARRAS_RHO * jnp.log(root), log_snr_min, log_snr_max)

    return Schedule("karras", log_snr)


SCHEDULES: dict[str, Callable[[float, float, int], Schedule]] = {
    "cosine": _cosine,
    "discrete_linear": _discrete_linear,
    "discrete_cosine": _discrete_cosine,
    "vp": _vp,
    "ve": _ve,
    "edm": _edm,
    "karras": _karras,
}


def get(name: str, *, log_snr_min: float = -20.0, log_snr_max: float = 20.0, num_train_steps: int = 1000) -> Schedule:
    """Returns the schedule called `name`, one of SCHEDULES, clipped to [log_snr_min, log_snr_max].

    `num_train_steps` is read by the discrete ones only. ValueError for an unknown name, bounds that are not increasing
    or reach beyond +-60 (float32 loses sigma or alpha there), and a T below 2, so small that a beta reaches 1, or above
    MOST_TRAIN_STEPS.
    """
    make = names.choose(SCHEDULES, name, "schedule")
    if not -60.0 <= log_snr_min < log_snr_max <= 60.0:
        raise ValueError(
            f"log_snr_min={log_snr_min} and log_snr_max={log_snr_max}: expected -60 <= log_snr_min < log_snr_max <= 60"
        )
    smallest = 21 if name == "discrete_linear" else 2  # its last beta is 20/T
    if name.startswith("discrete") and num_train_steps < smallest:
        raise ValueError(f"num_train_steps={num_train_steps}: the {name} schedule needs at least {smallest}")
    if name.startswith("discrete") and num_train_steps > MOST_TRAIN_STEPS:
        raise ValueError(f"num_train_steps={num_train_steps}: a discrete schedule has at most {MOST_TRAIN_STEPS}")
    return make(float(log_snr_min), float(log_snr_max), num_train_steps)


def rate(schedule: Schedule) -> Callable[[ArrayLike], Array]:
    """Returns -d log_snr / dt as a function of log_snr (any shape): the factor of a weight per unit of log-SNR.

    For a discrete schedule of T steps it is T (SNR_{n-1} / SNR_n - 1) at its time n/T, with which the variational bound
    in log-SNR becomes that of the T steps; at n = 1, where SNR_0 is infinite, that of n = 2 stands in. Beyond the ends
    of the schedule the rate is that at the end.
    """
    with jax.ensure_compile_time_eval():
        if schedule.num_train_steps is None:
            t = jnp.linspace(0.0, 1.0, _RATE_POINTS)
            slopes = np.asarray(jax.vmap(jax.grad(lambda time: -schedule.log_snr(time)))(t))
        else:
            t = jnp.arange(1, schedule.num_train_steps + 1) / schedule.num_train_steps
            steps = -np.diff(np.asarray(schedule.log_snr(t), np.float64))
            slopes = schedule.num_train_steps * np.expm1(np.concatenate([steps[:1], steps]))
        levels = np.asarray(schedule.log_snr(t))
    moving = slopes > 0  # elsewhere the schedule is clipped to its bounds
    # Where a schedule is a power of time, log rate is a line in log-SNR: interpolated without error.
    levels, log_slopes = levels[moving][::-1], np.log(slopes[moving])[::-1]

    return lambda log_snr: jnp.exp(jnp.interp(jnp.asarray(log_snr, dtype=float), levels, log_slopes))
