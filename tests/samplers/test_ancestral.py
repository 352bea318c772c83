"""Ancestral sampling: golden standard deviations, the two variance bounds, and one key per image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill import samplers
from diffdistill.diffusion import process, schedules
from diffdistill.samplers import ancestral

GOLDEN = {
    (0.0, 2): 0.2000000,
    (0.0, 4): 0.3049284,
    (0.0, 16): 0.4199372,
    (0.0, 256): 0.4926834,
    (1.0, 2): 0.2828427,
    (1.0, 4): 0.4886287,
    (1.0, 16): 0.5205761,
    (1.0, 256): 0.5017728,
}  # spec 01, float64


def gaussian(z, log_snr):
    """The exact denoiser of data N(0, 0.25)."""
    a, s = process.alpha(log_snr), process.sigma(log_snr)
    return process.expand(0.25 * a / (0.25 * a**2 + s**2), z) * z


def crooked(z, log_snr):
    """A denoiser that is neither linear nor the same for every image or pixel."""
    return jnp.tanh(jnp.sin(3 * z) + 0.1 * process.expand(log_snr, z) + jnp.roll(z, 1, axis=1))


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


@pytest.mark.parametrize(("fraction", "num_steps"), GOLDEN)
def test_golden_deviations(fraction, num_steps):
    """Exactly, without drawing: what each step does to the variance, all steps in one call, z and noise apart."""
    left = np.maximum(num_steps - np.arange(257), 0)  # padded, so that every step count has the same shapes
    log_snr = schedules.get("cosine").log_snr(left.astype(np.float32) / np.float32(num_steps))
    t, s = log_snr[:-1], log_snr[1:]
    one = jnp.ones((256, 1, 1, 1))
    x_hat = gaussian(one, t)
    kept, added, answer = (
        np.asarray(a, np.float64).ravel()[:num_steps]
        for a in (
            ancestral.step(x_hat, one, 0 * one, t, s, fraction),
            ancestral.step(0 * one, 0 * one, one, t, s, fraction),
            x_hat,
        )
    )
    variance = 1.0
    for keep, add in zip(kept[:-1], added[:-1], strict=True):
        variance = keep**2 * variance + add**2
    assert np.sqrt(variance) * answer[-1] == pytest.approx(GOLDEN[fraction, num_steps], abs=1e-6)


def test_the_sampler_itself_draws_that_gaussian():
    """Drawn with one compilation for every step count and fraction."""
    count, schedule, traces = 1 << 16, schedules.get("cosine"), []
    z = jnp.asarray(np.random.default_rng(8).standard_normal((count, 1, 1, 1)), jnp.float32)

    @jax.jit
    def run(num_steps, fraction):
        traces.append(num_steps)
        keys = jax.random.split(jax.random.key(7), count)
        return ancestral.sample(gaussian, z, schedule, num_steps, keys=keys, clip=False, variance_fraction=fraction)

    for (fraction, num_steps), golden in GOLDEN.items():
        if num_steps <= 16:
            got = run(jnp.int32(num_steps), jnp.float32(fraction))
            assert float(jnp.std(got)) == pytest.approx(golden, rel=0.01)  # 3.6 standard errors
            assert abs(float(jnp.mean(got))) < 4 * golden / np.sqrt(count)
    assert len(traces) == 1


def test_variance_is_log_linear_between_its_bounds():
    t, s = np.float32(-1.5), np.float32(0.5)
    one = jnp.ones((1, 1, 1, 1))
    kept = 1 - np.exp(-2.0)
    lower, upper = kept / (1 + np.exp(0.5)), kept / (1 + np.exp(-1.5))
    for fraction in (0.0, 0.3, 1.0):
        got = float(ancestral.step(0 * one, 0 * one, one, t, s, fraction).squeeze()) ** 2
        assert got == pytest.approx(lower ** (1 - fraction) * upper**fraction, rel=3e-6)
    np.testing.assert_allclose(process.transition_variance(t, s), upper, rtol=1e-6)


def test_mean_is_the_posterior_mean():
    """Given the true x, the lower bound is the exact posterior: z_s keeps the moments of alpha_s x + sigma_s eps."""
    log_snr = np.linspace(-20, 20, 15)
    t, s = (a.ravel() for a in np.meshgrid(log_snr, log_snr))
    t, s = t[t < s], s[t < s]
    one = jnp.ones((len(t), 1, 1, 1))
    by_z, by_x, by_noise = (
        np.asarray(ancestral.step(x, z, e, np.float32(t), np.float32(s), 0.0), np.float64).squeeze(axis=(1, 2, 3))
        for x, z, e in ((0 * one, one, 0 * one), (one, 0 * one, 0 * one), (0 * one, 0 * one, one))
    )
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    np.testing.assert_allclose(by_x + by_z * np.sqrt(sigmoid(t)), np.sqrt(sigmoid(s)), atol=2e-6)
    np.testing.assert_allclose(by_z**2 * sigmoid(-t) + by_noise**2, sigmoid(-s), rtol=2e-5)


@pytest.mark.parametrize("log_snr", [-20.0, 0.0, 20.0])
def test_a_step_of_no_length_adds_nothing_and_has_finite_gradients(log_snr):
    def run(times):
        one = jnp.ones((1, 1, 1, 1))
        return ancestral.step(0.5 * one, one, one, times[0], times[1], 0.5).squeeze()

    value, gradient = jax.value_and_grad(run)(jnp.array([log_snr, log_snr]))
    assert float(value) == pytest.approx(1.0, abs=1e-6)
    assert np.isfinite(gradient).all()


def test_noise_of_step_i_for_image_k_comes_from_key_k_and_i():
    """The sampler against a plain loop over steps and images."""
    schedule, num_steps, keys = schedules.get("cosine"), 5, keys_of(3, 11)
    start = jnp.asarray(np.random.default_rng(9).standard_normal((2, 3, 3, 1)), jnp.float32)
    got = samplers.get("ancestral")(crooked, start, schedule, num_steps, keys=keys, clip=False, variance_fraction=0.4)
    draw, z = jax.jit(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), (3, 3, 1))), start
    for i in range(num_steps):
        t, s = (schedule.log_snr(jnp.full(2, (num_steps - i - j) / num_steps)) for j in (0, 1))
        x_hat = crooked(z, t)
        noise = jnp.stack([draw(keys[k], i) for k in range(2)])
        z = ancestral.step(x_hat, z, noise, t, s, 0.4) if i < num_steps - 1 else x_hat
    np.testing.assert_allclose(got, z, atol=1e-5)


def test_an_image_depends_on_its_own_key_alone():
    schedule, keys = schedules.get("cosine"), keys_of(0, 1, 2, 3, 4)
    z = jnp.asarray(np.random.default_rng(10).standard_normal((5, 3, 3, 1)), jnp.float32)
    run = jax.jit(lambda z, keys: ancestral.sample(crooked, z, schedule, 6, keys=keys))
    together = run(z, keys)
    for k in range(5):  # alone
        np.testing.assert_allclose(run(z[k : k + 1], keys[k : k + 1])[0], together[k], atol=1e-6)
    order = jnp.array([4, 2, 0, 1, 3])  # at another place
    np.testing.assert_allclose(run(z[order], keys[order]), together[order], atol=1e-6)
    other = run(z, keys_of(0, 1, 77, 3, 4))  # another key for image 2 changes image 2 and no other
    changed = np.abs(other - together).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(changed, [False, False, True, False, False])


def test_clipping_limits_every_prediction_and_can_be_left_off():
    """A denoiser that says 3 at t = 1 and hands z through at t = 1/2, where the step before it shows."""
    schedule, keys, z = schedules.get("cosine"), keys_of(0, 1), jnp.full((2, 3, 3, 1), -1e4)

    def through(z, log_snr):
        return jnp.where(process.expand(log_snr, z) < -19, 3.0, z)

    free, limited = (ancestral.sample(through, z, schedule, 2, keys=keys, clip=clip) for clip in (False, True))
    # A step keeps 3e-5 of z and takes alpha_s of the prediction, which without the clip is larger by 2.
    expected = np.clip(free - 2 * process.alpha(schedule.log_snr(0.5)), -1, 1)
    np.testing.assert_allclose(limited, expected, atol=1e-4)
    assert (free > 1).any()
    assert (np.abs(expected) < 1).any()


def test_strict_promotion_rules_are_kept():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out = ancestral.sample(
            gaussian, jnp.ones((2, 2, 2, 1)), schedules.get("cosine"), jnp.int32(3), keys=keys_of(0, 1)
        )
    assert out.shape == (2, 2, 2, 1)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("keys", [None, jnp.zeros((2, 2), jnp.uint32), jax.random.key(0)])
def test_missing_or_misshapen_keys_are_refused(keys):
    with pytest.raises(ValueError, match=r"one typed key per image, shape \(2,\), got"):
        ancestral.sample(gaussian, jnp.ones((2, 1, 1, 1)), schedules.get("cosine"), 2, keys=keys)
