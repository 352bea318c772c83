"""The VP algebra against float64 formulas over the whole range of log-SNR, both ends included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import process

LOG_SNR = np.linspace(-20.0, 20.0, 81)


def reference(log_snr):
    """alpha, sigma and theta in float64."""
    return 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr)), np.arctan(np.exp(-log_snr / 2))


def test_alpha_sigma_and_angle_are_relatively_accurate_at_every_log_snr():
    alpha, sigma, theta = reference(LOG_SNR)
    log_snr = LOG_SNR.astype(np.float32)
    for function, expected in [(process.alpha, alpha), (process.sigma, sigma), (process.angle, theta)]:
        got = function(log_snr)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=3e-6)


def test_alpha_squared_plus_sigma_squared_is_one():
    log_snr = LOG_SNR.astype(np.float32)
    np.testing.assert_allclose(process.alpha(log_snr) ** 2 + process.sigma(log_snr) ** 2, 1.0, atol=5e-7)


def test_gradients_are_finite_up_to_the_widest_bounds_a_schedule_takes():
    log_snr = jnp.array([-60.0, -20.0, 0.0, 20.0, 60.0])
    for function in (process.alpha, process.sigma, process.angle):
        assert np.isfinite(jax.vmap(jax.grad(function))(log_snr)).all()


def test_angle_round_trip():
    # In float32 an angle near pi/2 resolves 1.2e-7 of its distance exp(log_snr / 2) to it: the noisy end is lost.
    log_snr = LOG_SNR.astype(np.float32)
    error = np.abs(process.log_snr_from_angle(process.angle(log_snr)) - log_snr)
    assert (error < 1e-5 + 4e-7 * np.exp(-np.minimum(LOG_SNR, 0) / 2)).all()


def test_ve_sigma_round_trip():
    log_snr = LOG_SNR.astype(np.float32)
    np.testing.assert_allclose(process.log_snr_from_ve_sigma(process.ve_sigma(log_snr)), LOG_SNR, atol=5e-6)
    np.testing.assert_allclose(process.ve_sigma(log_snr), np.exp(-LOG_SNR / 2), rtol=2e-6)


def test_ve_form_adds_noise_of_ve_sigma_to_the_data():
    draw, shape = np.random.default_rng(0), (81, 3, 3, 2)
    x, eps = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for _ in range(2))
    log_snr = LOG_SNR.astype(np.float32)
    z = process.add_noise(x, eps, log_snr)
    s = np.exp(-LOG_SNR / 2)[:, None, None, None]
    expected = np.asarray(x, np.float64) + s * np.asarray(eps, np.float64)
    np.testing.assert_allclose(process.vp_to_ve(z, log_snr) / (1 + s), expected / (1 + s), atol=2e-6)
    np.testing.assert_allclose(process.ve_to_vp(process.vp_to_ve(z, log_snr), log_snr), z, rtol=1e-6)


def test_log1mexp_matches_float64_and_has_finite_gradients():
    x = np.concatenate([np.logspace(-35, 2, 300), [np.log(2)]])
    expected = np.where(x < 0.1, np.log(-np.expm1(-np.minimum(x, 1))), np.log1p(-np.exp(-np.maximum(x, 0.01))))
    np.testing.assert_allclose(process.log1mexp(x.astype(np.float32)), expected, rtol=2e-6, atol=1e-37)
    gradient = jax.vmap(jax.grad(process.log1mexp))(x.astype(np.float32))
    np.testing.assert_allclose(gradient, 1 / np.expm1(x), rtol=1e-4, atol=1e-37)


def test_log1mexp_is_finite_at_zero():
    assert np.isfinite(process.log1mexp(0.0))
    assert np.isfinite(jax.grad(process.log1mexp)(0.0))


def test_transition_variance_closes_the_chain():
    """Scaling z_s by alpha_t / alpha_s and adding sigma_{t|s} noise must give the variance of z_t."""
    t, s = np.meshgrid(LOG_SNR[::4], LOG_SNR[::4])
    t, s = t[t < s], s[t < s]
    alpha_t, sigma_t, _ = reference(t)
    alpha_s, sigma_s, _ = reference(s)
    expected = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    np.testing.assert_allclose(process.transition_variance(np.float32(t), np.float32(s)), expected, rtol=1e-5)


def test_transition_variance_of_near_times_keeps_its_digits():
    t, s = np.float32(3.0), np.float32(3.0) + np.float32(1e-4)
    expected = -np.expm1(np.float64(t) - np.float64(s)) / (1 + np.exp(3.0))
    np.testing.assert_allclose(process.transition_variance(t, s), expected, rtol=1e-6)


def test_expand_broadcasts_per_example_and_refuses_the_rest():
    like = jnp.zeros((4, 2, 3, 5))
    assert process.expand(1.0, like).shape == ()
    assert process.expand(jnp.zeros(4), like).shape == (4, 1, 1, 1)
    assert process.expand(jnp.zeros(4), jnp.zeros((4, 7))).shape == (4, 1)
    for wrong in (jnp.zeros(3), jnp.zeros((4, 2))):
        with pytest.raises(ValueError, match="one value per example"):
            process.expand(wrong, like)
