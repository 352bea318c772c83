"""Reverse DDIM and the target of its distillation: closed forms on a Gaussian, and the two steps written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import process, schedules
from diffdistill.samplers import ddim

COSINE = schedules.get("cosine")
# From log-SNR 12 on, float32 knows the noise in an image to 2e-5 of its deviation.
SHORT = schedules.get("cosine", log_snr_min=-12.0, log_snr_max=12.0)


def gaussian(z, log_snr):
    """The exact denoiser of data N(0, 0.25)."""
    a, s = process.alpha(log_snr), process.sigma(log_snr)
    return process.expand(0.25 * a / (0.25 * a**2 + s**2), z) * z


@pytest.mark.parametrize(("num_steps", "error"), [(64, 0.1), (1024, 0.01)])
def test_encoding_a_gaussian_gives_its_standard_noise(num_steps, error):
    """The exact flow multiplies by sqrt(alpha^2 / 4 + sigma^2): data of deviation 1/2 end at deviation 1."""
    x = jnp.full((1, 1, 1, 1), 0.5)
    assert float(ddim.encode(gaussian, x, SHORT, num_steps).squeeze()) == pytest.approx(1.0, abs=error)


@pytest.mark.parametrize("num_steps", [256, 1024])
def test_the_encoder_inverts_the_decoder_on_a_linear_denoiser(num_steps):
    z = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    x = ddim.sample(gaussian, z, SHORT, num_steps, clip=False)
    back = ddim.encode(gaussian, x, SHORT, num_steps)
    np.testing.assert_allclose(back, z, atol=8.0 / num_steps)


def test_one_evaluation_a_step_at_the_times_below():
    seen = []

    def denoise(z, log_snr):
        jax.debug.callback(lambda value: seen.append(float(value)), log_snr[0])
        return 0.5 * z

    ddim.encode(denoise, jnp.ones((1, 2, 2, 1)), SHORT, 4)
    jax.effects_barrier()
    assert seen == pytest.approx([float(SHORT.log_snr(i / 4)) for i in range(4)], rel=1e-5)


def curved(z, log_snr):
    """A denoiser that no straight line describes."""
    return jnp.tanh(process.expand(1 + 0.1 * log_snr, z) * z) * 0.8


@pytest.mark.parametrize("num_steps", [1, 2, 8, 64])
def test_one_step_along_the_target_ends_where_two_steps_do(num_steps):
    index = jnp.arange(num_steps, dtype=jnp.float32)
    s, m, t = index / num_steps, (index + 0.5) / num_steps, (index + 1) / num_steps
    z = jax.random.normal(jax.random.key(1), (num_steps, 3, 3, 1))
    target, x1, x2 = ddim.two_step_encoding_target(curved, z, SHORT, s, m, t)
    at = [SHORT.log_snr(time) for time in (s, m, t)]
    z_m = ddim.step(curved(z, at[0]), z, at[0], at[1])
    expected = ddim.step(curved(z_m, at[1]), z_m, at[1], at[2])
    np.testing.assert_allclose(ddim.step(target, z, at[0], at[2]), expected, atol=2e-4)
    np.testing.assert_array_equal(x1, curved(z, at[0]))
    np.testing.assert_allclose(x2, curved(z_m, at[1]), atol=1e-6)


def test_the_target_lies_between_the_two_predictions_of_the_noise():
    index = jnp.arange(16, dtype=jnp.float32)
    s, m, t = index / 16, (index + 0.5) / 16, (index + 1) / 16
    z = jax.random.normal(jax.random.key(2), (16, 3, 3, 1))
    target, x1, x2 = ddim.two_step_encoding_target(curved, z, SHORT, s, m, t)
    at = SHORT.log_snr(s)
    z_m = ddim.step(x1, z, at, SHORT.log_snr(m))
    found, first = (ddim._noise_in(z, x, at) for x in (target, x1))
    second = ddim._noise_in(z_m, x2, SHORT.log_snr(m))
    slack = 2e-3
    assert jnp.all(found >= jnp.minimum(first, second) - slack)
    assert jnp.all(found <= jnp.maximum(first, second) + slack)


def test_both_ends_of_the_schedule_are_legal():
    z = jax.random.normal(jax.random.key(3), (1, 2, 2, 1))
    target, _, _ = ddim.two_step_encoding_target(curved, z, COSINE, jnp.zeros(1), jnp.full(1, 0.5), jnp.ones(1))
    assert jnp.isfinite(target).all()
    assert jnp.isfinite(ddim.encode(curved, z, COSINE, 1)).all()
