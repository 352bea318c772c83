"""The ablation sampler: every solver, discretisation, noise schedule and scaling against float64 and golden ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill import samplers
from diffdistill.diffusion import process, schedules
from diffdistill.samplers import heun, sigmas


def gaussian(z, log_snr):
    """The exact denoiser of data N(0, 0.25)."""
    a, s = process.alpha(log_snr), process.sigma(log_snr)
    return process.expand(0.25 * a / (0.25 * a**2 + s**2), z) * z


@functools.cache
def ends(name, **settings):
    """num_steps -> the end from z = 1, from one compilation."""
    sample, z = samplers.get(name), jnp.ones((1, 1, 1, 1))
    run = jax.jit(lambda n: sample(gaussian, z, schedules.get("cosine"), n, clip=False, **settings).squeeze())
    return lambda num_steps: float(run(jnp.int32(num_steps)))


ABLATIONS = {
    ("euler", "vp", "vp", "vp"): 0.4898417,
    ("heun", "edm", "vp", "vp"): 0.5040047,
    ("euler", "ve", "ve", "none"): 1.5904799,
    ("heun", "edm", "ve", "none"): 0.2529857,
    ("euler", "iddpm", "linear", "none"): 0.4571431,
}


def ablation(solver, discretisation, noise_schedule, scaling, **more):
    names = {"solver": solver, "discretisation": discretisation, "noise_schedule": noise_schedule, "scaling": scaling}
    return ends("ablation", **names, **more)


@pytest.mark.parametrize("choice", ABLATIONS)
def test_golden_ends_of_the_ablation(choice):
    assert ablation(*choice)(18) == pytest.approx(ABLATIONS[choice], abs=1e-5)


def test_the_iddpm_preset_reaches_its_golden_end_on_its_own_levels():
    """A discrete process, whose least level u_999 is the last that is visited."""
    schedule = schedules.get("discrete_cosine", log_snr_min=-20.0, log_snr_max=20.0, num_train_steps=1000)
    low, high = sigmas.sigma_range(schedule, "iddpm", 0.0, 0.0)
    levels = sigmas.DISCRETISATIONS["iddpm"].make(low, high, 7.0)
    last = [float(levels(jnp.int32(i), jnp.int32(18))) for i in (0, 16, 17)]
    assert last == pytest.approx([80.2037, 0.104037, 0.00642541], rel=1e-5)
    found = heun.ablation(
        gaussian,
        jnp.ones((1, 1, 1, 1)),
        schedule,
        18,
        clip=False,
        solver="euler",
        discretisation="iddpm",
        noise_schedule="linear",
        scaling="none",
    )
    assert float(found.squeeze()) == pytest.approx(0.4571431, abs=1e-5)


def reference(solver, discretisation, noise_schedule, scaling, num_steps, alpha=1.0):
    """The same in float64 with s(t), its derivative and the ODE of spec 03 written out."""
    ranges = {"vp": (np.sqrt(np.expm1(0.5 * 19.9e-6 + 1e-4)), np.sqrt(np.expm1(10.05))), "ve": (0.02, 100.0)}
    low, high = ranges.get(discretisation, (0.002, 81.0 if discretisation == "iddpm" else 80.0))
    eps = 1e-3
    beta_d = 2 * (np.log1p(low**2) / eps - np.log1p(high**2)) / (eps - 1)
    beta_min = np.log1p(high**2) - beta_d / 2
    vp_sigma = lambda t: np.sqrt(np.expm1(0.5 * beta_d * t**2 + beta_min * t))  # noqa: E731
    u = np.arange(num_steps) / (num_steps - 1)
    if discretisation == "vp":
        levels = vp_sigma(1 + u * (eps - 1))
    elif discretisation == "ve":
        levels = np.sqrt(high**2 * (low**2 / high**2) ** u)
    elif discretisation == "iddpm":
        table = schedules.discrete_sigmas(schedules.cosine_betas(1000))[::-1]
        levels = table[np.floor(8 + 991 * u + 0.5).astype(int)]
    else:
        levels = (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if noise_schedule == "vp":
        sigma, slope = vp_sigma, lambda t: 0.5 * (beta_d * t + beta_min) * (vp_sigma(t) + 1 / vp_sigma(t))
        time = lambda s: (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(s**2)) - beta_min) / beta_d  # noqa: E731
    elif noise_schedule == "ve":
        sigma, slope, time = np.sqrt, lambda t: 0.5 / np.sqrt(t), np.square
    else:
        sigma, slope, time = (lambda t: t), (lambda t: 1.0), (lambda s: s)
    if scaling == "vp":
        s, s_slope = (lambda t: (1 + sigma(t) ** 2) ** -0.5), (lambda t: -sigma(t) * slope(t) * s(t) ** 3)
    else:
        s, s_slope = (lambda t: 1.0), (lambda t: 0.0)

    def derivative(x, t):
        denoised = 0.25 / (0.25 + sigma(t) ** 2) * x / s(t)
        return (slope(t) / sigma(t) + s_slope(t) / s(t)) * x - slope(t) * s(t) / sigma(t) * denoised

    t = [*time(levels), 0.0]
    x = sigma(t[0]) * s(t[0])
    for i in range(num_steps):
        h, first = t[i + 1] - t[i], derivative(x, t[i])
        if solver == "heun" and i < num_steps - 1:
            second = derivative(x + alpha * h * first, t[i] + alpha * h)
            x = x + h * ((1 - 0.5 / alpha) * first + 0.5 / alpha * second)
        else:
            x = x + h * first
    return x


@pytest.mark.parametrize("scaling", sigmas.SCALINGS)
@pytest.mark.parametrize("noise_schedule", sigmas.PATHS)
@pytest.mark.parametrize("discretisation", sigmas.DISCRETISATIONS)
@pytest.mark.parametrize("solver", heun.EVALUATIONS)
def test_every_ablation_against_float64(solver, discretisation, noise_schedule, scaling):
    choice = (solver, discretisation, noise_schedule, scaling)
    alpha = 0.7 if solver == "heun" and discretisation == "edm" else 1.0
    expected = reference(*choice, 18, alpha=alpha)
    got = ablation(*choice, **({"alpha": alpha} if alpha != 1.0 else {}))(18)
    assert got == pytest.approx(expected, abs=5e-6 * max(1, abs(expected)))


def test_heun_and_euler_are_rows_of_the_ablation():
    for name, solver in (("heun", "heun"), ("euler", "euler")):
        assert ends(name)(18) == ablation(solver, "edm", "linear", "none")(18)
