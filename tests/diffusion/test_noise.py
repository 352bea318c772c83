"""Training noise: quantiles, ends and even draws of every distribution."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import noise, process, schedules

LEVELS = jnp.linspace(0, 1, 1001)[:-1]


def sigmas(name, u, **settings):
    return np.asarray(process.ve_sigma(noise.get(name, **settings)(jnp.asarray(u, jnp.float32))))


def test_golden_quantiles_of_edm():
    """Spec 03: measured on draws of the reference, so known to a few per cent in the tails."""
    golden = {0.1: 0.0073, 1: 0.0184, 5: 0.0418, 25: 0.134, 50: 0.301, 75: 0.676, 95: 2.17, 99: 4.86, 99.9: 12.5}
    np.testing.assert_allclose(sigmas("lognormal", [p / 100 for p in golden]), list(golden.values()), rtol=0.025)


def test_lognormal_has_the_moments_it_was_told():
    logs = np.log(sigmas("lognormal", (np.arange(20000) + 0.5) / 20000, p_mean=-0.4, p_std=2.0))
    assert logs.mean() == pytest.approx(-0.4, abs=1e-3)
    assert logs.std() == pytest.approx(2.0, rel=1e-3)


def test_vp_draws_its_time_uniformly_down_to_1e_5():
    s = sigmas("vp", LEVELS).astype(np.float64)
    t = schedules.vp_time(np.log1p(s**2))
    np.testing.assert_allclose(t, 1e-5 + (1 - 1e-5) * np.asarray(LEVELS), rtol=2e-5)
    assert s[0] == pytest.approx(0.00100050, rel=1e-5)


def test_ve_draws_the_logarithm_uniformly():
    np.testing.assert_allclose(sigmas("ve", [0.0, 0.5, 1.0]), [0.02, np.sqrt(2), 100], rtol=2e-6)
    np.testing.assert_allclose(sigmas("ve", [0.0, 1.0], sigma_min=0.1, sigma_max=10.0), [0.1, 10], rtol=2e-6)


def test_iddpm_draws_every_level_of_its_table_alike():
    table = schedules.discrete_sigmas(schedules.cosine_betas(1000))
    np.testing.assert_allclose(sigmas("iddpm", (np.arange(1000) + 0.5) / 1000), table, rtol=3e-6)


def test_karras_draws_evenly_along_the_levels_of_the_samplers():
    golden = [0.002, 0.16975276, 2.515219, 17.527832, 80.0]  # t_i for N = 5, spec 03
    np.testing.assert_allclose(sigmas("karras", np.linspace(0, 1, 5)), golden, rtol=2e-5)
    np.testing.assert_allclose(sigmas("karras", [0.0, 1.0], first=0.25, last=0.75), golden[1:4:2], rtol=2e-5)


@pytest.mark.parametrize("name", noise.NOISES)
def test_every_draw_is_finite_and_noisier_draws_are_larger(name):
    log_snr = noise.get(name)(LEVELS)
    assert log_snr.shape == LEVELS.shape
    assert log_snr.dtype == jnp.float32
    assert (np.diff(log_snr) < 0).all()
    assert np.isfinite(noise.get(name)(jnp.float32([0.0, 1 - 2**-24]))).all()


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"unknown training noise 'lognorm'.*Did you mean 'lognormal'"):
        noise.get("lognorm")
    with pytest.raises(ValueError, match=r"'p_men'.*Did you mean 'p_mean'"):
        noise.get("lognormal", p_men=0.0)
    with pytest.raises(ValueError, match="takes no settings"):
        noise.get("vp", p_mean=0.0)
