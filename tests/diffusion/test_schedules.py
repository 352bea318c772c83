"""Schedules: golden values, monotony, and no NaN anywhere between and at t = 0 and t = 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import parameterisation, process, schedules, weighting

NAMES = tuple(schedules.SCHEDULES)
DISCRETE = ("discrete_linear", "discrete_cosine")


def test_cosine_starts_and_ends_at_the_golden_angle():
    schedule = schedules.get("cosine")
    golden = 4.5399930e-05  # arctan(exp(-10))
    assert float(process.angle(schedule.log_snr(0.0))) == pytest.approx(golden, rel=3e-6)
    # At the noisy end the complementary angle is the one that float32 can hold.
    assert float(process.angle(-schedule.log_snr(1.0))) == pytest.approx(golden, rel=3e-6)


@pytest.mark.parametrize(("low", "high"), [(-20.0, 20.0), (-8.0, 14.0), (-30.0, 5.0)])
def test_cosine_is_accurate_from_both_ends(low, high):
    """-2 log tan(a t + b) in float64 of the same float32 times: the angle is computed from the nearer end."""
    t = np.concatenate([np.linspace(0, 1, 1025), [1e-6, 1e-4, 0.4999, 0.5001, 1 - 2**-20]]).astype(np.float32)
    exact = t.astype(np.float64)
    start, end = np.arctan(np.exp(-high / 2)), np.arctan(np.exp(low / 2))
    slope = np.pi / 2 - start - end
    late = exact > 0.5
    theta = slope * np.where(late, 1 - exact, exact) + np.where(late, end, start)
    expected = np.where(late, 2, -2) * np.log(np.tan(theta))
    got = schedules.get("cosine", log_snr_min=low, log_snr_max=high).log_snr(t)
    np.testing.assert_allclose(got, expected, atol=4e-6, rtol=2e-7)


def test_cosine_angle_is_linear_in_time():
    t = np.linspace(0, 1, 129).astype(np.float32)
    theta = process.angle(schedules.get("cosine").log_snr(t))
    np.testing.assert_allclose(theta, 4.53999e-05 + t * (np.pi / 2 - 2 * 4.53999e-05), atol=4e-7)


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_decreases_strictly_within_the_bounds(name):
    schedule = schedules.get(name)
    steps = schedule.num_train_steps or 8192
    values = np.asarray(schedule.log_snr(np.arange(steps + 1, dtype=np.float32) / np.float32(steps)))
    assert values.dtype == np.float32
    assert (np.diff(values) < 0).all()
    assert values[0] == 20.0
    assert values[-1] >= -20.0


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_keeps_to_narrower_bounds(name):
    values = schedules.get(name, log_snr_min=-3.0, log_snr_max=4.0).log_snr(jnp.linspace(0, 1, 101))
    np.testing.assert_allclose([values.max(), values.min()], [4.0, -3.0], atol=1e-6)
    assert values.max() <= 4.0
    assert values.min() >= -3.0


@pytest.fixture(scope="module")
def losses_and_gradients():
    """The sum over all (output, weight) pairs of the loss at 81 log-SNRs; its gradient by log-SNR and by the output."""
    draw, shape = np.random.default_rng(1), (81, 3, 3, 2)
    x = jnp.asarray(draw.uniform(-1, 1, shape), jnp.float32)
    eps = jnp.asarray(draw.standard_normal(shape), jnp.float32)

    def losses(log_snr, shift):
        z = process.add_noise(x, eps, log_snr)
        total = jnp.zeros_like(log_snr)
        for output in map(parameterisation.get, parameterisation.PARAMETERISATIONS):
            inputs = output.network_input(z, log_snr) + process.expand(output.network_time(log_snr), z)
            x_hat = output.to_x(output.target(x, eps, log_snr) + shift, z, log_snr) + 1e-3 * inputs
            error = jnp.mean((x_hat - x) ** 2, axis=(1, 2, 3))
            total += sum(weighting.get(weight)(log_snr) for weight in weighting.WEIGHTS) * error
        return total

    @jax.jit
    def run(log_snr):
        values, pull = jax.vjp(losses, log_snr, jnp.float32(0.1))
        return values, *pull(jnp.ones_like(values))

    return run


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_finite_at_both_ends(name, losses_and_gradients):
    """At t = 0, t = 1, next to them and between: values, gradients by the output and, through the schedule, by t."""
    schedule = schedules.get(name)
    t = jnp.concatenate([jnp.linspace(0, 1, 77), jnp.array([1e-7, 1e-3, 1 - 1e-3, 1 - 1e-7])])
    log_snr, pull = jax.vjp(schedule.log_snr, t)
    values, by_log_snr, by_output = losses_and_gradients(log_snr)
    for value in (values, by_output, by_log_snr, *pull(jnp.ones_like(t)), *pull(by_log_snr)):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in DISCRETE])
def test_gradient_by_time_is_the_slope(name):
    log_snr = schedules.get(name).log_snr
    t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
    slope = (log_snr(t + 1e-3) - log_snr(t - 1e-3)) / 2e-3
    np.testing.assert_allclose(jax.vmap(jax.grad(log_snr))(t), slope, rtol=5e-3)


def test_linear_table_against_a_plain_loop():
    for steps in (1000, 250):
        alpha_bar, values = 1.0, []
        for n in range(steps):
            alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * n / (steps - 1)) * 1000 / steps
            values.append(np.log(alpha_bar / (1 - alpha_bar)))
        schedule = schedules.get("discrete_linear", num_train_steps=steps)
        assert schedule.num_train_steps == steps
        got = schedule.log_snr(np.arange(1, steps + 1, dtype=np.float32) / np.float32(steps))
        np.testing.assert_allclose(got, values, rtol=2e-7, atol=1e-6)
    alpha_bar = schedules.alpha_bars(schedules.linear_betas(1000))
    assert alpha_bar.dtype == np.float64
    assert alpha_bar[0] == 1.0
    assert alpha_bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)


def test_cosine_table_against_the_published_iddpm_noise_levels():
    """spec 03: u_j of the iDDPM table is sigma_ve at n = 1000 - j, the capped last beta included."""
    golden = {0: 20291.17, 1: 641.6623, 7: 91.6625, 8: 80.2037, 9: 71.2912, 500: 1.01239, 999: 0.00642541}
    t = (1000 - np.array(list(golden))) / 1000
    got = process.ve_sigma(schedules.get("discrete_cosine").log_snr(np.float32(t)))
    np.testing.assert_allclose(got, list(golden.values()), rtol=5e-6)
    assert schedules.cosine_betas(1000)[-1] == 0.999


def test_discrete_times_are_rounded_to_the_nearest_index():
    log_snr = schedules.get("discrete_linear", num_train_steps=100).log_snr
    np.testing.assert_array_equal(
        log_snr(jnp.array([0.304, 0.296, -0.2, 1.7])), log_snr(jnp.array([0.3, 0.3, 0.0, 1.0]))
    )


def test_vp_against_golden_noise_levels():
    """spec 03 at t = 1e-5 and 1. Its .0104838 at 1e-3 is exp(.) - 1 rounded to float32; the formula says .0104860."""
    t = np.array([1e-5, 1e-3, 1.0])
    got = process.ve_sigma(schedules.get("vp").log_snr(t.astype(np.float32)))
    np.testing.assert_allclose(got[::2], [0.00100050, 152.167], rtol=5e-6)
    np.testing.assert_allclose(got, np.sqrt(np.expm1(19.9 * t**2 / 2 + 0.1 * t)), rtol=2e-6)


def test_ve_and_edm_are_native_time_over_its_end():
    t = jnp.array([1e-4, 0.25, 1.0])
    np.testing.assert_allclose(process.ve_sigma(schedules.get("ve").log_snr(t)), 100 * np.sqrt(t), rtol=2e-6)
    np.testing.assert_allclose(process.ve_sigma(schedules.get("edm").log_snr(t)), 80 * t, rtol=2e-6)


def test_integer_times_are_legal():
    assert float(schedules.get("cosine").log_snr(0)) == 20.0


def test_mistakes_are_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"unknown schedule 'cosin'.*discrete_linear.*Did you mean 'cosine'"):
        schedules.get("cosin")
    with pytest.raises(ValueError, match="log_snr_min < log_snr_max"):
        schedules.get("cosine", log_snr_min=5.0, log_snr_max=-5.0)
    with pytest.raises(ValueError, match="at least 21"):
        schedules.get("discrete_linear", num_train_steps=10)
