"""DDIM: the step in its three forms, and the golden standard deviations of a closed-form denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill import samplers
from diffdistill.diffusion import process, schedules
from diffdistill.samplers import ddim

GOLDEN = {
    1: 0.0000113,
    2: 0.2000023,
    4: 0.3334384,
    8: 0.4113734,
    16: 0.4539266,
    64: 0.4880936,
    256: 0.4969970,
    1024: 0.4992476,
}  # spec 01, float64


def gaussian(z, log_snr):
    """The exact denoiser of data N(0, 0.25)."""
    a, s = process.alpha(log_snr), process.sigma(log_snr)
    return process.expand(0.25 * a / (0.25 * a**2 + s**2), z) * z


@pytest.fixture(scope="module")
def pairs():
    """Every pair of log-SNR of a grid, ends included, with some z and x_hat."""
    grid = np.linspace(-20, 20, 9).astype(np.float32)
    t, s = (a.ravel() for a in np.meshgrid(grid, grid))
    draw, shape = np.random.default_rng(6), (81, 3, 3, 2)
    arrays = draw.standard_normal(shape), draw.uniform(-1, 1, shape)
    return t, s, *(jnp.asarray(a, jnp.float32) for a in arrays)


def columns(*arrays):
    return [np.asarray(a, np.float64)[:, None, None, None] for a in arrays]


def test_step_is_the_alpha_sigma_form(pairs):
    """Any two times, in both directions, against float64; sigma_s/sigma_t amplifies where it is encoding."""
    t, s, z, x_hat = pairs
    alpha_t, alpha_s = columns(*(1 / np.sqrt(1 + np.exp(-a.astype(np.float64))) for a in (t, s)))
    sigma_t, sigma_s = columns(*(1 / np.sqrt(1 + np.exp(a.astype(np.float64))) for a in (t, s)))
    z64, x64 = np.asarray(z, np.float64), np.asarray(x_hat, np.float64)
    expected = alpha_s * x64 + sigma_s / sigma_t * (z64 - alpha_t * x64)
    scale = np.maximum(1, sigma_s / sigma_t)
    np.testing.assert_allclose(ddim.step(x_hat, z, t, s) / scale, expected / scale, atol=2e-6)


def test_step_is_a_rotation_by_v(pairs):
    t, s, z, x_hat = pairs
    a, b = columns(*(np.arctan(np.exp(-x.astype(np.float64) / 2)) for x in (t, s)))
    z64, x64 = np.asarray(z, np.float64), np.asarray(x_hat, np.float64)
    v_hat = (np.cos(a) * z64 - x64) / np.sin(a)
    scale = np.maximum(1, 1 / np.sin(a))
    np.testing.assert_allclose(
        ddim.step(x_hat, z, t, s) / scale, (np.cos(a - b) * z64 - np.sin(a - b) * v_hat) / scale, atol=2e-6
    )


def test_step_of_no_length_changes_nothing(pairs):
    t, _, z, x_hat = pairs
    np.testing.assert_allclose(ddim.step(x_hat, z, t, t), z, rtol=3e-7)


def test_true_data_stays_on_its_path(pairs):
    """With the true x, z at any time becomes the z of the same noise at any other."""
    t, s, eps, x = pairs
    got, expected = ddim.step(x, process.add_noise(x, eps, t), t, s), process.add_noise(x, eps, s)
    scale = np.asarray(process.expand(jnp.maximum(1, process.sigma(s) / process.sigma(t)), eps))
    np.testing.assert_allclose(got / scale, expected / scale, atol=2e-6)


def test_golden_deviations_from_one_compilation():
    """The denoiser is linear, so z = 1 in is the standard deviation out; eight step counts, one trace."""
    schedule, traces = schedules.get("cosine"), []

    @jax.jit
    def run(num_steps):
        traces.append(num_steps)
        return ddim.sample(gaussian, jnp.ones((1, 1, 1, 1)), schedule, num_steps, clip=False)

    for num_steps, golden in GOLDEN.items():
        assert float(run(jnp.int32(num_steps)).squeeze()) == pytest.approx(golden, abs=1e-6)
    assert len(traces) == 1


def test_a_plain_number_of_steps_gives_the_same():
    schedule = schedules.get("cosine")
    got = samplers.get("ddim")(gaussian, jnp.ones((2, 1, 1, 1)), schedule, 8, keys=None, clip=False)
    np.testing.assert_allclose(got.squeeze(), GOLDEN[8], atol=1e-6)


def test_the_network_is_asked_at_the_published_times():
    """N evaluations at t = 1, 1 - 1/N, ..., 1/N; the last returns x_hat itself."""
    schedule, seen = schedules.get("cosine"), []

    def record(z, log_snr):
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), log_snr, ordered=True)
        return jnp.full_like(z, 0.125)

    out = ddim.sample(record, jnp.ones((2, 1, 1, 1)), schedule, 4)
    jax.effects_barrier()
    np.testing.assert_array_equal(out, 0.125)
    np.testing.assert_allclose(np.stack(seen)[:, 1], schedule.log_snr(jnp.array([1.0, 0.75, 0.5, 0.25])), rtol=1e-6)
    assert np.stack(seen).shape == (4, 2)


def test_clipping_limits_every_prediction_and_can_be_left_off():
    z, schedule = jnp.ones((1, 2, 2, 1)), schedules.get("cosine")
    far = lambda z, log_snr: jnp.full_like(z, 3.0)  # noqa: E731
    np.testing.assert_array_equal(ddim.sample(far, z, schedule, 3), 1.0)
    np.testing.assert_array_equal(ddim.sample(far, z, schedule, 3, clip=False), 3.0)
    # The prediction inside a step is clipped too: from 3 at t = 1, and z itself at t = 1/2, where it shows.
    through = lambda z, log_snr: jnp.where(process.expand(log_snr, z) < -19, 3.0, z)  # noqa: E731
    middle = ddim.step(jnp.ones_like(z), -z, schedule.log_snr(1.0), schedule.log_snr(0.5))
    assert float(jnp.abs(middle).max()) < 0.1
    np.testing.assert_allclose(ddim.sample(through, -z, schedule, 2), middle, atol=1e-6)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_schedule_samples_without_nan(name):
    """And gradients reach z, also where a discrete schedule is asked for more steps than it has."""
    schedule = schedules.get(name, num_train_steps=32)

    @jax.jit
    def value_and_gradient(z):
        run = lambda z: jnp.sum(ddim.sample(gaussian, z, schedule, 64, clip=False))  # noqa: E731
        return jax.value_and_grad(run)(z)

    for value in value_and_gradient(jnp.ones((2, 1, 1, 1))):
        assert np.isfinite(value).all()


def test_strict_promotion_rules_are_kept():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out = ddim.sample(gaussian, jnp.ones((2, 2, 2, 1)), schedules.get("cosine"), jnp.int32(3))
    assert out.shape == (2, 2, 2, 1)
    assert out.dtype == jnp.float32


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="num_steps=0: a sampler takes at least 1 step"):
        ddim.sample(gaussian, jnp.ones((1, 1, 1, 1)), schedules.get("cosine"), 0)
    with pytest.raises(ValueError, match=r"unknown sampler 'dim'; known: ddim, ancestral, .*Did you mean 'ddim'"):
        samplers.get("dim")
