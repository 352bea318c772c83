"""Discretisations and paths of the EDM family: golden noise levels, inverses, and ranges that a schedule allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import schedules
from diffdistill.samplers import sigmas

EDM_18 = (
    "80 57.586 40.7856 28.3746 19.3525 12.9101 8.40094 5.31519 3.25682 1.92334 1.08817 .585348 .296442 .139516 "
    ".0599473 .0229345 .00752802 .002"
)  # spec 03
EDM_5 = "80 17.527832 2.515219 .16975276 .002"
IDDPM = schedules.discrete_sigmas(schedules.cosine_betas(1000))[::-1]  # u_0 .. u_999


def levels(name, num_steps, low=None, high=None, rho=7.0):
    """All levels, with a traced number of steps as in the samplers."""
    own = sigmas.DISCRETISATIONS[name]
    function = own.make(own.sigma_min if low is None else low, own.sigma_max if high is None else high, rho)
    run = jax.jit(lambda n: jax.vmap(lambda i: function(i, n))(jnp.arange(num_steps)))
    return np.asarray(run(jnp.int32(num_steps)), np.float64)


@pytest.mark.parametrize("golden", [EDM_18, EDM_5])
def test_golden_levels_of_edm(golden):
    expected = np.array(golden.split(), np.float64)
    np.testing.assert_allclose(levels("edm", len(expected)), expected, rtol=4e-6)  # half of the last printed digit


@pytest.mark.parametrize("num_steps", [2, 5, 18, 40, 256, 1000])
def test_levels_of_edm_against_float64(num_steps):
    u = np.arange(num_steps) / (num_steps - 1)
    for low, high, rho in ((0.002, 80, 7.0), (0.02, 14.6, 3.0), (0.002, 80, 2.5)):
        expected = (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        whole = rho == int(rho)
        rounding = (1e-6 if num_steps <= 40 else 1.5e-6) if whole else 3e-6
        np.testing.assert_allclose(levels("edm", num_steps, low, high, rho), expected, rtol=rounding)


def test_levels_of_vp_and_ve_against_float64():
    u = np.arange(18) / 17
    t = 1 + u * (1e-3 - 1)
    np.testing.assert_allclose(levels("vp", 18), np.sqrt(np.expm1(0.5 * 19.9 * t**2 + 0.1 * t)), rtol=3e-6)
    np.testing.assert_allclose(levels("ve", 18), 100 * (0.02 / 100) ** u, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 18, 79, 256, 992])
def test_levels_of_iddpm_are_entries_of_its_table(num_steps):
    """u_j at j = floor(8 + 991/(N - 1) i + 1/2); u_8 = 80.2 is the first below 81."""
    j = np.floor(8 + 991 / max(num_steps - 1, 1) * np.arange(num_steps) + 0.5).astype(int)
    np.testing.assert_allclose(levels("iddpm", num_steps), IDDPM[j], rtol=1e-7)
    assert levels("iddpm", num_steps)[0] == pytest.approx(80.2037, rel=1e-6)


def test_a_narrower_range_starts_further_down_the_table_of_iddpm():
    np.testing.assert_allclose(levels("iddpm", 2, 0.0066, 75), [IDDPM[9], IDDPM[IDDPM >= 0.0066][-1]], rtol=1e-6)
    with pytest.raises(ValueError, match="no noise level between"):
        sigmas.DISCRETISATIONS["iddpm"].make(700.0, 800.0, 7.0)


@pytest.mark.parametrize("name", sigmas.DISCRETISATIONS)
def test_levels_decrease_between_their_ends_and_one_step_starts_at_the_highest(name):
    own = sigmas.DISCRETISATIONS[name]
    found = levels(name, 64)
    assert (np.diff(found) < 0).all()
    if name != "iddpm":
        np.testing.assert_allclose(found[[0, -1]], [own.sigma_max, own.sigma_min], rtol=2e-6)
    assert levels(name, 1) == pytest.approx(found[:1])


def test_vp_ends_at_its_published_times():
    assert sigmas.DISCRETISATIONS["vp"].sigma_max == pytest.approx(152.167, rel=1e-6)
    assert sigmas.DISCRETISATIONS["vp"].sigma_min == pytest.approx(0.01048599, rel=1e-6)


@pytest.mark.parametrize("name", sigmas.PATHS)
def test_paths_are_inverted_and_have_the_rate_that_differences_have(name):
    path = sigmas.PATHS[name](0.002, 80.0)
    for s in (0.002, 0.3, 79.0):
        t = path.time(jnp.float32(s))
        assert float(path.sigma(t)) == pytest.approx(s, rel=3e-6)
        difference = jax.grad(lambda t: jnp.log(path.sigma(t)))(t)
        assert float(path.rate(t)) == pytest.approx(float(difference), rel=1e-4)


def test_the_vp_path_is_fitted_to_its_range():
    path = sigmas.PATHS["vp"](0.002, 80.0)
    assert float(path.sigma(jnp.float32(1.0))) == pytest.approx(80, rel=3e-6)
    assert float(path.sigma(jnp.float32(1e-3))) == pytest.approx(0.002, rel=3e-6)
    published = sigmas.PATHS["vp"](sigmas.vp_sigma(1e-3), sigmas.vp_sigma(1.0))
    exponent = schedules.vp_exponent(jnp.float32(0.4))
    assert float(published.sigma(jnp.float32(0.4))) == pytest.approx(float(jnp.sqrt(jnp.expm1(exponent))), rel=3e-6)


def test_the_range_is_what_was_asked_for_within_what_the_schedule_has():
    find = sigmas.sigma_range
    assert find(schedules.get("cosine"), "edm", 0, 0) == (0.002, 80.0)
    assert find(schedules.get("cosine"), "edm", 0.01, 0) == (0.01, 80.0)
    bounds = {"log_snr_min": -2 * np.log(80), "log_snr_max": -2 * np.log(0.002)}
    assert find(schedules.get("cosine", **bounds), "edm", 0, 0) == (0.002, 80.0)  # not by its rounded logarithms
    assert find(schedules.get("cosine", **bounds), "ve", 0, 0) == (0.02, pytest.approx(80))
    narrow = schedules.get("ve", log_snr_max=-2 * np.log(0.02))
    assert find(narrow, "edm", 0, 0) == (pytest.approx(0.02), 80.0)
    assert find(narrow, "edm", 0.001, 1e6) == pytest.approx((0.02, 100))
    assert find(schedules.get("discrete_cosine"), "edm", 0, 0) == (pytest.approx(0.00642541), 80.0)


def test_a_range_without_levels_is_refused():
    with pytest.raises(ValueError, match="leave no noise levels"):
        sigmas.sigma_range(schedules.get("cosine"), "edm", 3.0, 2.0)
    with pytest.raises(ValueError, match=r"'cosine', which has 148\.4 to 2981"):
        sigmas.sigma_range(schedules.get("cosine", log_snr_min=-16, log_snr_max=-10), "edm", 0, 0)
    with pytest.raises(ValueError, match=r"unknown discretisation 'emd'.*Did you mean 'edm'"):
        sigmas.sigma_range(schedules.get("cosine"), "emd", 0, 0)
