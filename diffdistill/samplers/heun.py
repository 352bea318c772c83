"""The samplers of Karras et al. 2022: Heun and Euler on the probability-flow ODE in VE form, with or without churn.

`denoise` is as in `ddim`: denoise(z (B, H, W, C), log_snr (B,)) -> x_hat (B, H, W, C), z variance preserving. The
initial z is of unit variance, and its VE form sigma_max z; so a file of unit normals starts the same images here and
in an implementation that multiplies them by t_0 itself. Noise levels run from 80 down to .002 unless asked otherwise,
never beyond what the schedule has, and are rounded to the table of a discrete one. The schedule's own times play no
part.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from diffdistill.diffusion import names
from diffdistill.diffusion.process import log_snr_from_ve_sigma
from diffdistill.diffusion.schedules import Schedule
from diffdistill.samplers.ancestral import check_keys, step_noise
from diffdistill.samplers.ddim import Denoise, check_num_steps
from diffdistill.samplers.sigmas import DISCRETISATIONS, PATHS, SCALINGS, Path, Sigmas, sigma_range

# Evaluations of the denoiser in N steps: the last step of second order ends at 0, where the slope is not defined.
EVALUATIONS: dict[str, Callable[[int | Array], int | Array]] = {
    "euler": lambda num_steps: num_steps,
    "heun": lambda num_steps: 2 * num_steps - 1,
}

# Stochastic settings tuned in the paper (its table 5). The networks of configuration F are sampled without churn.
TUNED_CHURN: dict[str, dict[str, float]] = {
    "cifar10-vp": {"s_churn": 30.0, "s_tmin": 0.01, "s_tmax": 1.0, "s_noise": 1.007},
    "cifar10-ve": {"s_churn": 80.0, "s_tmin": 0.05, "s_tmax": 1.0, "s_noise": 1.007},
    "imagenet64-adm": {"s_churn": 80.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
    "imagenet64-edm": {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
}


@dataclass(frozen=True)
class _Solver:
    """One choice from each column of the design space; the sampler that it makes is `_integrate`."""

    schedule: Schedule
    name: str
    sigmas: Sigmas
    path: Path
    scaling: str = "none"
    alpha: float = 1.0
    churn: Callable[[Array, Array], Array] | None = None  # (sigma, num_steps) -> gamma
    s_noise: float = 1.0

    def times(self, i: Array, num_steps: Array) -> tuple[Array, Array, Array]:
        """(t_i, t^_i, t_{i+1}): start of step i, the noisier time to which churn takes it, and its end."""
        sigma = self.schedule.nearest_sigma(self.sigmas(i, num_steps))
        t = churned = self.path.time(sigma)
        if self.churn is not None:
            gamma = self.churn(sigma, num_steps)
            churned = jnp.where(gamma > 0, self.path.time(self.schedule.nearest_sigma(sigma * (1.0 + gamma))), t)
        is_last = i + 1 >= num_steps
        end = self.path.time(self.schedule.nearest_sigma(self.sigmas(jnp.minimum(i + 1, num_steps - 1), num_steps)))
        return t, churned, jnp.where(is_last, 0.0, end)

    def scale(self, t: Array) -> Array:
        return jnp.asarray(SCALINGS[self.scaling](self.path.sigma(t)), dtype=float)

    def slope(self, denoise: Denoise, x: Array, t: Array, clip: bool) -> Array:
        """dx/dt of the ODE at the state x = s(t) z_ve: (sigma'/sigma)(s^2 x - s D), with either s of SCALINGS."""
        sigma, scale = self.path.sigma(t), self.scale(t)
        z = x * (1.0 if self.scaling == "vp" else 1.0 / jnp.sqrt(1.0 + sigma**2))
        x_hat = denoise(z, jnp.broadcast_to(log_snr_from_ve_sigma(sigma), x.shape[:1]))
        if clip:
            x_hat = jnp.clip(x_hat, -1.0, 1.0)
        return self.path.rate(t) * (scale**2 * x - scale * x_hat)


def sample(
    denoise: Denoise,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None = None,
    clip: bool = True,
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
    rho: float = 7.0,
    alpha: float = 1.0,
) -> Array:
    """Returns images (B, H, W, C) from noise z by deterministic steps of second order: 2 num_steps - 1 evaluations.

    Algorithm 1 for alpha = 1 (Heun); 1/2 is the midpoint rule and 2/3 Ralston's (algorithm 3). The levels are those of
    `rho` between `sigma_max` and `sigma_min` (0: the published 80 and .002). `num_steps` (int >= 1) may be traced.
    `clip` limits x_hat to [-1, 1]; the paper does not. `keys` is ignored. ValueError for a range without levels.
    """
    del keys
    return _integrate(
        _edm_solver(schedule, "heun", sigma_min, sigma_max, rho, alpha), denoise, z, num_steps, clip, None
    )


def euler(
    denoise: Denoise,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None = None,
    clip: bool = True,
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
    rho: float = 7.0,
) -> Array:
    """As `sample`, by steps of first order: DDIM at EDM's noise levels, num_steps evaluations."""
    del keys
    return _integrate(_edm_solver(schedule, "euler", sigma_min, sigma_max, rho, 1.0), denoise, z, num_steps, clip, None)


def churn(
    denoise: Denoise,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None,
    clip: bool = True,
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
    rho: float = 7.0,
    alpha: float = 1.0,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Array:
    """As `sample`, with fresh noise before each step (algorithm 2): 2 num_steps - 1 evaluations.

    A step from a level in [s_tmin, s_tmax] first raises it by the factor 1 + min(s_churn / num_steps, sqrt(2) - 1),
    with noise of deviation `s_noise`. `keys` (B,) are typed PRNG keys, one per image, as in `ancestral`: the noise of
    image k in step i comes from fold_in(keys[k], i). The defaults are TUNED_CHURN["imagenet64-edm"]; s_churn = 0 is
    `sample`, to the last bit. ValueError for missing or misshapen keys and for a range without levels.
    """

    def gamma(sigma: Array, num_steps: Array) -> Array:
        raised = jnp.minimum(s_churn / num_steps.astype(float), math.sqrt(2.0) - 1.0)
        return jnp.where((sigma >= s_tmin) & (sigma <= s_tmax), raised, 0.0)

    image_keys = check_keys(keys, z, "churn")
    solver = _edm_solver(schedule, "heun", sigma_min, sigma_max, rho, alpha)
    if s_churn == 0:  # the program of `sample`: another one, with noise times 0, would be rounded in another way
        return _integrate(solver, denoise, z, num_steps, clip, None)
    solver = dataclasses.replace(solver, churn=gamma, s_noise=s_noise)
    return _integrate(solver, denoise, z, num_steps, clip, image_keys)


def ablation(
    denoise: Denoise,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None = None,
    clip: bool = True,
    solver: str = "heun",
    discretisation: str = "edm",
    noise_schedule: str = "linear",
    scaling: str = "none",
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
    rho: float = 7.0,
    alpha: float = 1.0,
) -> Array:
    """As `sample`, with any solver, discretisation, noise schedule and scaling: the samplers that the paper compares.

    Args:
      solver: a name of EVALUATIONS, which says what it costs; alpha acts on "heun".
      discretisation: a name of DISCRETISATIONS; each has its own range of levels (0: that one). rho acts on "edm".
      noise_schedule: a name of PATHS, sigma(t). The betas of "vp" are fitted to the range.
      scaling: a name of SCALINGS, s(t).
    """
    del keys
    names.choose(EVALUATIONS, solver, "solver")
    names.choose(SCALINGS, scaling, "scaling")
    path = names.choose(PATHS, noise_schedule, "noise schedule")
    low, high = sigma_range(schedule, discretisation, sigma_min, sigma_max)
    sigmas = DISCRETISATIONS[discretisation].make(low, high, rho)
    chosen = _Solver(schedule, solver, sigmas, path(low, high), scaling, alpha)
    return _integrate(chosen, denoise, z, num_steps, clip, None)


def _edm_solver(schedule: Schedule, name: str, sigma_min: float, sigma_max: float, rho: float, alpha: float) -> _Solver:
    low, high = sigma_range(schedule, "edm", sigma_min, sigma_max)
    return _Solver(schedule, name, DISCRETISATIONS["edm"].make(low, high, rho), PATHS["linear"](low, high), alpha=alpha)


def _integrate(
    solver: _Solver, denoise: Denoise, z: Array, num_steps: int | Array, clip: bool, keys: Array | None
) -> Array:
    """Runs a solver from noise z. One evaluation of the denoiser per turn of the loop, so the program holds it once."""
    check_num_steps(num_steps)
    steps = jnp.asarray(num_steps)
    second_order = solver.name == "heun"
    alpha = solver.alpha

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, first_slope = carry
        i, corrects = (k // 2, k % 2 == 1) if second_order else (k, jnp.bool_(False))
        t, t_hat, t_end = solver.times(i, steps)
        if keys is not None:
            image_keys = keys
            x = jax.lax.cond(corrects, lambda: x, lambda: _churn(solver, x, t, t_hat, image_keys, i))
        h = t_end - t_hat
        at = jnp.where(corrects, x + alpha * h * first_slope, x)
        slope = solver.slope(denoise, at, jnp.where(corrects, t_hat + alpha * h, t_hat), clip)
        if not second_order:
            return x + h * slope, slope
        combined = (1.0 - 0.5 / alpha) * first_slope + (0.5 / alpha) * slope
        # The first evaluation of a step changes nothing yet, unless the step is the last, which is Euler's.
        after = jnp.where(corrects, x + h * combined, jnp.where(i + 1 >= steps, x + h * slope, x))
        return after, slope

    start = solver.times(jnp.asarray(0), steps)[0]
    x = solver.path.sigma(start) * solver.scale(start) * z
    return jax.lax.fori_loop(0, EVALUATIONS[solver.name](num_steps), body, (x, jnp.zeros_like(x)))[0]


def _churn(solver: _Solver, x: Array, t: Array, t_hat: Array, keys: Array, i: Array) -> Array:
    """The state at the noisier time t_hat: as much fresh noise as lies between the two levels, times s_noise."""
    sigma, sigma_hat = solver.path.sigma(t), solver.path.sigma(t_hat)
    # A discrete schedule may round the noisier level down to the other or below.
    added = jnp.sqrt(jnp.maximum((sigma_hat - sigma) * (sigma_hat + sigma), 0.0))
    scale = solver.scale(t_hat)
    return scale / solver.scale(t) * x + added * scale * solver.s_noise * step_noise(keys, i, x)
