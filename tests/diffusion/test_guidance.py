"""Guidance: the convention, and why it is applied to x or v and not to eps."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import guidance, parameterisation, process


@pytest.fixture(scope="module")
def predictions():
    draw, shape = np.random.default_rng(5), (81, 3, 3, 2)
    arrays = draw.uniform(-1, 1, shape), draw.uniform(-1, 1, shape), draw.standard_normal(shape)
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def exact(x_cond, x_uncond, w):
    return (1 + w) * np.asarray(x_cond, np.float64) - w * np.asarray(x_uncond, np.float64)


def through(to, back, predictions, log_snr, w=4.0):
    """Guided x_hat by way of another quantity, and its largest error per example."""
    x_cond, x_uncond, z = predictions
    guided = guidance.combine(to(x_cond, z, log_snr), to(x_uncond, z, log_snr), w)
    return np.abs(back(guided, z, log_snr) - exact(x_cond, x_uncond, w)).max(axis=(1, 2, 3))


def test_zero_is_conditional_and_minus_one_unconditional(predictions):
    x_cond, x_uncond, _ = predictions
    np.testing.assert_array_equal(guidance.combine(x_cond, x_uncond, 0.0), x_cond)
    np.testing.assert_array_equal(guidance.combine(x_cond, x_uncond, -1.0), x_uncond)


def test_each_example_has_its_own_weight(predictions):
    x_cond, x_uncond, _ = predictions
    w = jnp.linspace(0, 4, 81)
    expected = exact(x_cond, x_uncond, np.asarray(w, np.float64)[:, None, None, None])
    np.testing.assert_allclose(guidance.combine(x_cond, x_uncond, w), expected, atol=2e-6)


def test_combining_in_v_is_combining_in_x_at_every_log_snr(predictions):
    log_snr = jnp.linspace(-20, 20, 81)
    assert through(parameterisation.v_from_x, parameterisation.x_from_v, predictions, log_snr).max() < 5e-6


def test_combining_in_eps_loses_the_noisy_end(predictions):
    """Measured: 5e-2 in x at t = 1 and w = 4, where x and v are right to 2e-6; at log-SNR 0 nothing is lost."""
    noisy = jnp.full(81, -20.0)
    in_eps = through(parameterisation.eps_from_x, parameterisation.x_from_eps, predictions, noisy).max()
    in_v = through(parameterisation.v_from_x, parameterisation.x_from_v, predictions, noisy).max()
    assert 1e-2 < in_eps < 0.2
    assert in_v < 5e-6
    middle = through(parameterisation.eps_from_x, parameterisation.x_from_eps, predictions, jnp.zeros(81)).max()
    assert middle < 1e-5
    assert process.alpha(-20.0) < 1e-4
