"""The preconditionings of table 1 of Karras et al. 2022 beside EDM's: coefficients read off the conversions."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import parameterisation, process, schedules, weighting

SIGMAS = (0.002, 0.5, 1.0, 80.0)
ONE = jnp.ones((1, 1, 1, 1))


def coefficients(name: str, s: float):
    """(c_skip, c_out, c_in, c_noise) at the level s: the answer at z_ve = 1 with F = 0, F = 1, and what F is given."""
    output, log_snr = parameterisation.get(name), process.log_snr_from_ve_sigma(jnp.float32(s))
    z = process.ve_to_vp(ONE, log_snr)
    return (
        float(output.to_x(0 * ONE, z, log_snr).squeeze()),
        float(output.to_x(ONE, 0 * z, log_snr).squeeze()),
        float(output.network_input(z, log_snr).squeeze()),
        float(output.network_time(log_snr)),
    )


@pytest.mark.parametrize("s", SIGMAS)
def test_coefficients_of_vp_ve_and_iddpm(s):
    exact = {
        "vp": (1.0, -s, 1 / np.sqrt(s**2 + 1)),
        "ve": (1.0, s, 1.0),
        "iddpm": (1.0, -s, 1 / np.sqrt(s**2 + 1)),
    }
    for name, expected in exact.items():
        # The level itself has been through a float32 logarithm.
        assert coefficients(name, s)[:3] == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize(
    ("s", "c_noise"), [(0.002, 0.0398021), (0.5, 144.669106), (80.0, 932.577632)]
)  # spec 03, measured on the reference
def test_golden_time_of_vp(s, c_noise):
    assert coefficients("vp", s)[3] == pytest.approx(c_noise, rel=2e-6)


@pytest.mark.parametrize("s", [1e-4, 1e-3, 1e-2, 1.0, 150.0])
def test_time_of_vp_against_float64(s):
    """At small levels 1 + s^2 rounds to 1 and a plain logarithm would answer 0."""
    exponent = np.log1p(np.float64(s) ** 2)
    t = (np.sqrt(0.1**2 + 2 * 19.9 * exponent) - 0.1) / 19.9
    assert coefficients("vp", s)[3] == pytest.approx(999 * t, rel=3e-6)


@pytest.mark.parametrize("s", SIGMAS)
def test_time_of_ve_is_the_logarithm_of_half_the_level(s):
    assert coefficients("ve", s)[3] == pytest.approx(np.log(s / 2), rel=1e-6)


def test_golden_levels_of_vp():
    for t, s in ((1e-3, 0.01048599), (1.0, 152.167), (1e-5, 0.00100050)):
        assert float(jnp.sqrt(jnp.expm1(schedules.vp_exponent(t)))) == pytest.approx(s, rel=3e-6)
        assert float(schedules.vp_time(schedules.vp_exponent(t))) == pytest.approx(t, rel=1e-6)
    # Spec 03 has .0104838 for t = 1e-3: the reference subtracts 1 from an exponential rounded to float32.
    rounded = np.exp(np.float32(0.5 * 19.9e-6 + 1e-4)) - np.float32(1)
    assert np.sqrt(rounded) == pytest.approx(0.0104838, rel=5e-6)


IDDPM = {0: 20291.17, 1: 641.6623, 7: 91.6625, 8: 80.2037, 9: 71.2912, 500: 1.01239, 999: 0.00642541}  # u_j


@pytest.mark.parametrize("j", IDDPM)
def test_golden_table_of_iddpm_and_the_times_of_its_network(j):
    sigmas = schedules.discrete_sigmas(schedules.cosine_betas(1000))
    assert sigmas[999 - j] == pytest.approx(IDDPM[j], rel=5e-6)
    assert coefficients("iddpm", IDDPM[j])[3] == 999 - j
    schedule = schedules.get("discrete_cosine", log_snr_min=-25)
    assert float(schedule.nearest_sigma(1.0001 * IDDPM[j])) == pytest.approx(IDDPM[j], rel=5e-6)
    log_snr = schedule.log_snr((1000 - j) / 1000)
    assert float(process.ve_sigma(log_snr)) == pytest.approx(IDDPM[j], rel=5e-6)


def test_levels_between_two_entries_go_to_the_nearer():
    low, high = 71.2911981, 80.2037018
    between = jnp.array([low + 0.49 * (high - low), low + 0.51 * (high - low)])
    assert schedules.get("discrete_cosine").nearest_sigma(between) == pytest.approx([low, high], rel=1e-6)
    time = parameterisation.get("iddpm").network_time(process.log_snr_from_ve_sigma(between))
    np.testing.assert_array_equal(time, [990.0, 991.0])
    beyond = parameterisation.get("iddpm").network_time(jnp.array([40.0, -40.0]))
    np.testing.assert_array_equal(beyond, [0.0, 999.0])


def test_a_continuous_schedule_rounds_nothing():
    s = jnp.array([1e-3, 1.0, 77.7])
    np.testing.assert_array_equal(schedules.get("cosine").nearest_sigma(s), s)


@pytest.mark.parametrize("s", SIGMAS)
def test_loss_weights(s):
    """The other three presets weigh by 1/s^2, which is the SNR; EDM by (s^2 + sigma_data^2) / (s sigma_data)^2."""
    log_snr = process.log_snr_from_ve_sigma(jnp.float32(s))
    assert float(weighting.get("snr")(log_snr)) == pytest.approx(1 / s**2, rel=2e-6)
    golden = {0.002: 250004, 0.5: 8, 1.0: 5, 80.0: 4.0001562}[s]
    assert float(weighting.get("edm")(log_snr)) == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("edm", 4.54e-5, 80), ("vp", 4.54e-5, 152.167), ("ve", 4.54e-5, 100), ("discrete_cosine", 0.00642541, 20291.17)],
)
def test_range_of_noise_levels_of_a_schedule(name, low, high):
    assert schedules.get(name).sigma_range() == pytest.approx((low, high), rel=1e-5)
    inner = schedules.get("cosine", log_snr_min=-2 * np.log(80), log_snr_max=-2 * np.log(0.002))
    assert inner.sigma_range() == pytest.approx((0.002, 80), rel=1e-5)
