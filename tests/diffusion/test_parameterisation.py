"""Network outputs: every conversion comes back to where it started, at every log-SNR."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import parameterisation, process

LOG_SNR = np.linspace(-20.0, 20.0, 81).astype(np.float32)
NAMES = tuple(parameterisation.PARAMETERISATIONS)
ROUNDING = 1e-6  # a few float32 roundings of numbers of size one to four


@pytest.fixture(scope="module")
def batch():
    draw, shape = np.random.default_rng(2), (len(LOG_SNR), 3, 3, 2)
    x = jnp.asarray(draw.uniform(-1, 1, shape), jnp.float32)
    eps = jnp.asarray(draw.standard_normal(shape), jnp.float32)
    return x, eps, process.add_noise(x, eps, LOG_SNR)


def worst(difference):
    """The largest error of each example."""
    return np.abs(np.asarray(difference)).max(axis=(1, 2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_the_target_gives_back_the_data(name, batch):
    """Up to what the conversion loses: noise -> x divides the rounding of z by alpha, the others lose nothing."""
    x, eps, z = batch
    output = parameterisation.get(name)
    x_hat = output.to_x(output.target(x, eps, LOG_SNR), z, LOG_SNR)
    assert x_hat.dtype == jnp.float32
    loss = 1 / process.alpha(LOG_SNR) if name in ("eps", "vp", "ve", "iddpm", "ddpm") else 1.0
    assert (worst(x_hat - x) <= ROUNDING * loss).all()


def test_x_to_eps_and_back(batch):
    x, eps, z = batch
    eps_hat = parameterisation.eps_from_x(x, z, LOG_SNR)
    assert (worst(eps_hat - eps) <= ROUNDING / process.sigma(LOG_SNR)).all()
    x_hat = parameterisation.x_from_eps(eps_hat, z, LOG_SNR)
    assert (worst(x_hat - x) <= ROUNDING / process.alpha(LOG_SNR)).all()


def test_x_to_v_and_back(batch):
    x, eps, z = batch
    v = process.expand(process.alpha(LOG_SNR), x) * eps - process.expand(process.sigma(LOG_SNR), x) * x
    v_hat = parameterisation.v_from_x(x, z, LOG_SNR)
    assert (worst(v_hat - v) <= ROUNDING / process.sigma(LOG_SNR)).all()
    assert (worst(parameterisation.x_from_v(v_hat, z, LOG_SNR) - x) <= ROUNDING).all()
    assert (worst(parameterisation.x_from_v(v, z, LOG_SNR) - x) <= ROUNDING).all()


def test_v_is_alpha_eps_minus_sigma_x(batch):
    """v_from_x on any prediction, not only the true one: v_hat = alpha eps_hat - sigma x_hat."""
    _, _, z = batch
    x_hat = jnp.sin(3 * z)
    eps_hat = parameterisation.eps_from_x(x_hat, z, LOG_SNR)
    alpha, sigma = process.expand(process.alpha(LOG_SNR), z), process.expand(process.sigma(LOG_SNR), z)
    difference = parameterisation.v_from_x(x_hat, z, LOG_SNR) - (alpha * eps_hat - sigma * x_hat)
    assert (worst(difference) <= 2 * ROUNDING / process.sigma(LOG_SNR)).all()


def test_both_weighs_its_halves_by_sigma_squared_and_alpha_squared(batch):
    """An error in the x half counts sigma^2, one in the eps half counts alpha sigma."""
    x, eps, z = batch
    both = parameterisation.get("both")
    assert both.output_channels(3) == 6
    right = both.to_x(jnp.concatenate([x, eps], -1), z, LOG_SNR)
    sigma, alpha = process.sigma(LOG_SNR), process.alpha(LOG_SNR)
    in_x = both.to_x(jnp.concatenate([x + 1, eps], -1), z, LOG_SNR) - right
    in_eps = both.to_x(jnp.concatenate([x, eps + 1], -1), z, LOG_SNR) - right
    np.testing.assert_allclose(worst(in_x), sigma**2, atol=ROUNDING)
    np.testing.assert_allclose(worst(in_eps), alpha * sigma, atol=ROUNDING)


def test_both_refuses_a_network_of_the_wrong_width(batch):
    x, _, z = batch
    with pytest.raises(ValueError, match="expected 4 channels"):
        parameterisation.get("both").to_x(x, z, LOG_SNR)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "both"])
def test_the_others_keep_the_channels(name):
    assert parameterisation.get(name).output_channels(5) == 5


def test_edm_coefficients_against_golden_values():
    """spec 03: (c_skip, c_out, c_in, c_noise) read off the conversions at z_ve = 1, F = 0 or 1."""
    golden = {
        0.002: (0.999984, 0.001999984, 1.999984, -1.553652),
        0.5: (0.5, 0.35355339, 1.4142136, -0.1732868),
        1.0: (0.2, 0.4472136, 0.89442719, 0.0),
        80.0: (3.9060974e-5, 0.49999023, 0.012499756, 1.0955067),
    }
    edm = parameterisation.get("edm")
    for s, (c_skip, c_out, c_in, c_noise) in golden.items():
        log_snr = process.log_snr_from_ve_sigma(jnp.float32(s))
        one = jnp.ones((1, 1, 1, 1))
        z = process.ve_to_vp(one, log_snr)
        assert float(edm.to_x(0 * one, z, log_snr).squeeze()) == pytest.approx(c_skip, rel=1e-6)
        assert float(edm.to_x(one, 0 * z, log_snr).squeeze()) == pytest.approx(c_out, rel=1e-6)
        assert float(edm.network_input(z, log_snr).squeeze()) == pytest.approx(c_in, rel=1e-6)
        assert float(edm.network_time(log_snr)) == pytest.approx(c_noise, rel=1e-6, abs=1e-7)


def test_edm_input_and_target_have_unit_variance_at_every_log_snr():
    """What the preconditioning is for, with data of the standard deviation it was told."""
    draw, shape = np.random.default_rng(3), (9, 64, 64, 4)
    x = jnp.asarray(0.3 * draw.standard_normal(shape), jnp.float32)
    eps = jnp.asarray(draw.standard_normal(shape), jnp.float32)
    log_snr = jnp.linspace(-20, 20, 9)
    edm = parameterisation.get("edm", sigma_data=0.3)
    z = process.add_noise(x, eps, log_snr)
    for value in (edm.network_input(z, log_snr), edm.target(x, eps, log_snr)):
        np.testing.assert_allclose(np.std(value, axis=(1, 2, 3)), 1.0, atol=0.025)


@pytest.mark.parametrize("name", ["x", "eps", "v", "both"])
def test_network_time_is_a_thousand_times_the_angle(name):
    time = parameterisation.get(name).network_time
    log_snr = jnp.array([20.0, 0.0, -20.0])
    expected = 1000 * np.arctan(np.exp([-10.0, 0.0, 10.0])) / (np.pi / 2)
    np.testing.assert_allclose(time(log_snr), expected, rtol=2e-6)
    np.testing.assert_array_equal(time(jnp.array([50.0, -50.0])), time(jnp.array([20.0, -20.0])))


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match="unknown network output 'epsilon'; known: x, eps, v, both, edm"):
        parameterisation.get("epsilon")
    with pytest.raises(ValueError, match=r"'sigma_date'.*Did you mean 'sigma_data'"):
        parameterisation.get("edm", sigma_date=0.5)
    with pytest.raises(ValueError, match="takes no settings"):
        parameterisation.get("v", sigma_data=0.5)
    with pytest.raises(ValueError, match="sigma_data=0"):
        parameterisation.get("edm", sigma_data=0.0)
