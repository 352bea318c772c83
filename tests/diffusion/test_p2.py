"""P2 (Choi et al. 2022): golden tables of its discrete schedules, its weight, means and shares by regime (spec 05)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill import chain
from diffdistill.config import default_config, resolve
from diffdistill.diffusion import parameterisation, process, schedules, weighting
from diffdistill.methods import base

GOLDEN = {  # t from 0: abar, log-SNR
    "discrete_linear": {
        0: (0.999900, 9.2102),
        1: (0.9997801, 8.4221),
        100: (0.8951416, 2.1444),
        250: (0.5214230, 0.0857),
        500: (0.07779666, -2.4727),
        750: (3.300158e-3, -5.7105),
        999: (4.035830e-5, -10.1177),
    },
    "discrete_cosine": {
        0: (0.9999587, 10.0950),
        1: (0.9999126, 9.3447),
        100: (0.9715757, 3.5317),
        250: (0.8458880, 1.7027),
        500: (0.4922852, -0.0309),
        750: (0.1431786, -1.7891),
        999: (2.428767e-9, -19.8359),
    },
}
STEPS = {"discrete_linear": (326, 415, 259), "discrete_cosine": (64, 440, 496)}
MEANS = {
    ("discrete_linear", 0.5): 0.8059,
    ("discrete_linear", 1.0): 0.7245,
    ("discrete_cosine", 0.5): 0.6419,
    ("discrete_cosine", 1.0): 0.5044,
}
SHARES = {  # coarse, content, clean-up; for gamma 0, 1/2 and 1
    "discrete_linear": ((0.326, 0.415, 0.259), (0.404, 0.470, 0.126), (0.449, 0.482, 0.069)),
    "discrete_cosine": ((0.064, 0.440, 0.496), (0.100, 0.608, 0.293), (0.127, 0.692, 0.182)),
}
NETWORK = {"discrete_linear": "ddpm", "discrete_cosine": "iddpm"}


def table(name: str, steps: int = 1000) -> jax.Array:
    """Log-SNR of all times of a schedule, (T,)."""
    return schedules.get(name, num_train_steps=steps).log_snr(jnp.arange(1, steps + 1) / steps)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tables(name):
    index = np.array(list(GOLDEN[name]))
    alpha_bar, log_snr = np.array(list(GOLDEN[name].values())).T
    found = table(name)[index]
    np.testing.assert_allclose(found, log_snr, atol=6e-5)
    np.testing.assert_allclose(process.alpha(found) ** 2, alpha_bar, rtol=3e-6)


@pytest.mark.parametrize(("name", "gamma"), MEANS)
def test_golden_means_of_the_weight(name, gamma):
    weight = weighting.get("p2", gamma=gamma)
    assert float(jnp.mean(weighting.on_noise(weight, table(name)))) == pytest.approx(MEANS[name, gamma], abs=6e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_steps_and_shares_of_the_weight_by_regime(name):
    log_snr = table(name)
    regime = weighting.regime(log_snr)
    np.testing.assert_array_equal(jnp.bincount(regime, length=3), STEPS[name])
    for gamma, shares in zip((0.0, 0.5, 1.0), SHARES[name], strict=True):
        on_noise = weighting.on_noise(weighting.get("p2", gamma=gamma), log_snr)
        found = jnp.bincount(regime, weights=on_noise, length=3) / on_noise.sum()
        np.testing.assert_allclose(found, shares, atol=6e-4)


def test_on_the_noise_the_weight_is_a_power_of_sigma():
    """k = 1: (1 + SNR)^-gamma = sigma^(2 gamma), to the last digits also where SNR overflows a square."""
    log_snr = jnp.linspace(-50.0, 50.0, 101)
    for gamma in (0.0, 0.5, 1.0, 2.0):
        found = weighting.on_noise(weighting.get("p2", gamma=gamma), log_snr)
        np.testing.assert_allclose(found, process.sigma(log_snr) ** (2 * gamma), rtol=2e-5)


def test_relatives_of_the_weight():
    log_snr = jnp.linspace(-20.0, 20.0, 81)

    def values(name, **settings):
        return weighting.get(name, **settings)(log_snr)

    close = {"rtol": 3e-6}
    np.testing.assert_allclose(values("soft_min_snr", g=4.0), 4.0 * values("p2", k=4.0, gamma=1.0), **close)
    np.testing.assert_allclose(values("debiased"), values("p2", k=0.0, gamma=0.5), **close)
    np.testing.assert_allclose(values("max_snr"), values("snr_trunc"), **close)
    np.testing.assert_allclose(
        values("sigmoid", shift=1.5), 0.5 * np.exp(1.5) * values("p2", k=np.exp(1.5), gamma=1.0), **close
    )
    softly = values("soft_min_snr", g=5.0)
    hard = values("min_snr", g=5.0)
    assert ((softly <= hard * (1 + 1e-6)) & (softly >= 0.5 * hard * (1 - 1e-6))).all()


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("steps", [1000, 64])
def test_a_network_with_a_table_is_told_the_index_of_its_step(name, steps):
    parameters = parameterisation.get(NETWORK[name], num_train_steps=steps)
    np.testing.assert_array_equal(parameters.network_time(table(name, steps)), np.arange(steps))


def test_the_bound_in_log_snr_is_that_of_the_steps():
    """vdm with the rate of a table: T/2 (SNR_{n-1} - SNR_n), the term of step n = 2..T (Kingma et al. 2021, eq. 14)."""
    for name in GOLDEN:
        schedule = schedules.get(name, num_train_steps=100)
        snr = np.exp(np.asarray(table(name, 100), np.float64))
        found = weighting.get("vdm", rate=schedules.rate(schedule))(table(name, 100))
        np.testing.assert_allclose(found[1:], 50 * (snr[:-1] - snr[1:]), rtol=2e-4)


@pytest.mark.parametrize("name", [name for name in schedules.SCHEDULES if not name.startswith("discrete")])
def test_with_its_rate_a_weight_per_log_snr_does_not_depend_on_the_schedule(name):
    """The mean over uniform times of rate(log_snr) f(log_snr) is the integral of f over log-SNR.

    The bump lies at high noise, where schedules that are linear in the noise level have enough of their times.
    """
    schedule = schedules.get(name, log_snr_min=-8.0, log_snr_max=8.0)
    log_snr = np.asarray(schedule.log_snr((np.arange(200_000, dtype=np.float32) + 0.5) / 200_000))
    inside = (log_snr > -7.999) & (log_snr < 7.999)  # elsewhere the schedule waits at a bound
    rates = np.asarray(schedules.rate(schedule)(log_snr), np.float64)
    found = np.mean(np.where(inside, rates * np.exp(-0.5 * (log_snr + 5) ** 2), 0.0))
    assert found == pytest.approx(2.5032, rel=2e-3)  # sqrt(2 pi) but for what lies below -8


def settings(schedule: str = "discrete_cosine", **weight):
    values = default_config()
    values.teacher.num_updates, values.process.schedule = 1, schedule
    values.progressive.num_updates = 0
    values.teacher.update(weight)
    return resolve(values)


def test_the_config_says_the_weight_and_may_ask_for_its_mean_to_be_one():
    log_snr = table("discrete_cosine")
    plain = settings(weight="p2", weight_gamma=0.5, weight_k=2.0)
    weight = chain.stage_weight(plain, plain.teacher)
    np.testing.assert_allclose(weight(log_snr), weighting.get("p2", k=2.0, gamma=0.5)(log_snr), rtol=1e-6)
    normed = settings(weight="p2", weight_gamma=0.5, weight_normalised=True)
    weight = chain.stage_weight(normed, normed.teacher)
    assert float(jnp.mean(weighting.on_noise(weight, log_snr))) == pytest.approx(1.0, rel=1e-4)
    np.testing.assert_allclose(weight(log_snr) * 0.6419, weighting.get("p2", gamma=0.5)(log_snr), rtol=2e-4)
    bounded = settings(weight="min_snr")
    assert float(chain.stage_weight(bounded, bounded.teacher)(9.0)) == 5.0
    bounded = settings(weight="min_snr", weight_g=2.0)
    assert float(chain.stage_weight(bounded, bounded.teacher)(9.0)) == 2.0
    bound = settings("cosine", weight="sigmoid", weight_shift=1.0)
    expected = weighting.get("sigmoid", shift=1.0, rate=schedules.rate(chain.schedule_of(bound.process)))(log_snr)
    np.testing.assert_allclose(chain.stage_weight(bound, bound.teacher)(log_snr), expected, rtol=1e-6)


def test_the_loss_by_regime_adds_up_to_the_loss():
    log_snr = jnp.array([-9.0, -4.0, 2.0, 5.0, -1.0])
    x_hat, target = jax.random.normal(jax.random.key(0), (2, 5, 2, 2, 1))
    loss, metrics = base.weighted_loss(x_hat, target, log_snr, weighting.get("p2"))
    np.testing.assert_allclose(metrics["loss_by_regime"] @ np.array([1, 2, 2]) / 5, loss, rtol=1e-5)
    _, metrics = base.weighted_loss(x_hat[2:4], target[2:4], log_snr[2:4], weighting.get("p2"))
    np.testing.assert_array_equal(np.isnan(metrics["loss_by_regime"]), [True, True, False])


@pytest.mark.parametrize("start", [512, 96])
def test_rounds_of_halving_step_on_times_of_the_teachers_table(start):
    """Whatever divides T: the times of a student are among those of the model that it learns from, to the bit."""
    log_snr = jax.jit(schedules.get("discrete_linear").log_snr)
    num_steps, before = start, None
    while num_steps:
        times = np.arange(1, start + 1, dtype=np.float32) / np.float32(num_steps)  # as the sampler computes them
        levels = np.asarray(log_snr(times))[:num_steps]
        assert len(np.unique(levels)) == num_steps
        assert before is None or set(levels) <= set(before)
        num_steps, before = num_steps // 2 if num_steps % 2 == 0 else 0, levels
