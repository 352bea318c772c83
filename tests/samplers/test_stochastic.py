"""The N-step stochastic sampler: golden ends on a Gaussian, its evaluations, and what its noise depends on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill import samplers
from diffdistill.diffusion import process, schedules
from diffdistill.samplers import ddim, stochastic

COSINE = schedules.get("cosine")
GOLDEN = {4: 0.2747052, 16: 0.3989610, 64: 0.4704040, 256: 0.4922817, 1024: 0.4980495}  # spec 02


def slope(log_snr):
    """D(z) / z of the exact denoiser of data N(0, 0.25)."""
    a, s = process.alpha(log_snr), process.sigma(log_snr)
    return 0.25 * a / (0.25 * a**2 + s**2)


def gaussian(z, log_snr):
    return process.expand(slope(log_snr), z) * z


@pytest.mark.parametrize("num_steps", GOLDEN)
def test_deviation_on_a_gaussian_is_golden(num_steps):
    """The sampler is linear here: what a step does to z = 1 without noise, and the deviation of its noise."""
    variance, zero, one = 1.0, jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    for i in range(num_steps):
        t, s = ddim.step_times(i, num_steps)
        log_snr_t, log_snr_s = COSINE.log_snr(t), COSINE.log_snr(s)
        if i == num_steps - 1:
            variance *= float(slope(log_snr_t)) ** 2
            break
        _, k = ddim.step_times(i + 1, num_steps)
        log_snr_k = COSINE.log_snr(k)
        z_k = ddim.step(slope(log_snr_t) * one, one, log_snr_t, log_snr_k)
        keep = float(stochastic.noise_back(z_k, zero, log_snr_k, log_snr_s).squeeze())
        added = float(stochastic.noise_back(zero, one, log_snr_k, log_snr_s).squeeze())
        variance = keep**2 * variance + added**2
    assert np.sqrt(variance) == pytest.approx(GOLDEN[num_steps], rel=3e-5)


@functools.cache
def images(count: int):
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    z = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 9999), (4, 4, 1)))(keys)
    run = jax.jit(lambda n, z, keys: stochastic.sample(gaussian, z, COSINE, n, keys=keys, clip=False))
    return lambda num_steps, chosen=slice(None): run(jnp.int32(num_steps), z[chosen], keys[chosen])


@pytest.mark.parametrize("num_steps", [1, 4, 16])
def test_samples_have_that_deviation(num_steps):
    expected = GOLDEN.get(num_steps, float(slope(COSINE.log_snr(1.0))))
    assert float(jnp.std(images(4096)(num_steps))) == pytest.approx(expected, rel=0.01)


def test_noise_of_an_image_is_its_own():
    whole = images(4096)(4)
    np.testing.assert_allclose(images(4096)(4, slice(7, 9)), whole[7:9], atol=1e-6)


def test_exactly_n_evaluations_at_the_times_of_n_steps():
    for num_steps in (1, 2, 5):
        seen = []

        def denoise(z, log_snr, seen=seen):
            jax.debug.callback(lambda value: seen.append(float(value)), log_snr[0])
            return 0.5 * z

        stochastic.sample(
            denoise, jnp.ones((1, 2, 2, 1)), COSINE, num_steps, keys=jax.random.split(jax.random.key(0), 1)
        )
        jax.effects_barrier()
        expected = [float(COSINE.log_snr((num_steps - i) / num_steps)) for i in range(num_steps)]
        assert seen == pytest.approx(expected, rel=1e-5)
        assert samplers.num_evaluations("stochastic", num_steps) == num_steps


def test_keys_are_needed():
    with pytest.raises(ValueError, match="the stochastic sampler needs one typed key per image"):
        stochastic.sample(gaussian, jnp.ones((2, 2, 2, 1)), COSINE, 3, keys=None)
