"""Loss weights: each is some other loss in disguise, and pulls the network the same way as that loss does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import parameterisation, process, weighting

# Beyond +-12 the float32 residual x_hat - x of the two sides is rounding, not formula; the ends are in test_schedules.
LOG_SNR = np.linspace(-12.0, 12.0, 81).astype(np.float32)
OUTPUTS = tuple(parameterisation.PARAMETERISATIONS)


def mse(a, b):
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def mse_x(x_hat, x, eps, z):
    return mse(x_hat, x)


def mse_eps(x_hat, x, eps, z):
    return mse(parameterisation.eps_from_x(x_hat, z, LOG_SNR), eps)


def mse_v(x_hat, x, eps, z):
    return mse(parameterisation.v_from_x(x_hat, z, LOG_SNR), parameterisation.get("v").target(x, eps, LOG_SNR))


def worse_of_x_and_eps(x_hat, x, eps, z):
    return jnp.maximum(mse_x(x_hat, x, eps, z), mse_eps(x_hat, x, eps, z))


def mse_f(x_hat, x, eps, z):
    """The error of EDM's network output F, by undoing c_skip and c_out in the published (VE) form."""
    s, z_ve = process.expand(process.ve_sigma(LOG_SNR), z), process.vp_to_ve(z, LOG_SNR)
    c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / jnp.sqrt(s**2 + 0.25)
    return mse((x_hat - c_skip * z_ve) / c_out, (x - c_skip * z_ve) / c_out)


TWINS = {
    "constant": mse_x,
    "snr": mse_eps,
    "snr_plus_one": mse_v,
    "snr_trunc": worse_of_x_and_eps,
    "edm": mse_f,
}


@pytest.fixture(scope="module")
def batch():
    draw, shape = np.random.default_rng(4), (len(LOG_SNR), 3, 3, 2)
    arrays = draw.uniform(-1, 1, shape), draw.standard_normal(shape), draw.standard_normal((*shape[:3], 4))
    x, eps, output = (jnp.asarray(a, jnp.float32) for a in arrays)
    return x, eps, process.add_noise(x, eps, LOG_SNR), output


@pytest.mark.parametrize("output_name", OUTPUTS)
@pytest.mark.parametrize("weight_name", TWINS)
def test_weighted_mse_of_x_is_its_twin_in_loss_and_gradient(weight_name, output_name, batch):
    """Loss and gradient by the network output, per example, for every (output, weight) pair."""
    x, eps, z, output = batch
    to = parameterisation.get(output_name)
    output = output[..., : to.output_channels(2)]
    weight, twin = weighting.get(weight_name), TWINS[weight_name]

    def both_losses(output):
        x_hat = to.to_x(output, z, LOG_SNR)
        return weight(LOG_SNR) * mse(x_hat, x), twin(x_hat, x, eps, z)

    (loss, twin_loss), pull = jax.vjp(both_losses, output)
    one, zero = jnp.ones_like(loss), jnp.zeros_like(loss)
    (gradient,), (twin_gradient,) = pull((one, zero)), pull((zero, one))
    np.testing.assert_allclose(loss, twin_loss, rtol=2e-3)
    size = np.sqrt(np.sum(np.square(twin_gradient), axis=(1, 2, 3)))
    assert (size > 0).all()
    difference = np.sqrt(np.sum(np.square(gradient - twin_gradient), axis=(1, 2, 3)))
    assert (difference / size < 2e-3).all()


@pytest.mark.parametrize(
    ("output_name", "weight_name"), [("x", "constant"), ("eps", "snr"), ("v", "snr_plus_one"), ("edm", "edm")]
)
def test_the_natural_weight_of_an_output_is_plain_regression(output_name, weight_name, batch):
    """x with constant, eps with snr, v with snr_plus_one, F with edm: mean squared error of the output itself."""
    x, eps, z, output = batch
    to = parameterisation.get(output_name)
    output = output[..., :2]
    weighted = weighting.get(weight_name)(LOG_SNR) * mse(to.to_x(output, z, LOG_SNR), x)
    np.testing.assert_allclose(weighted, mse(output, to.target(x, eps, LOG_SNR)), rtol=1e-3)


def test_closed_forms_over_the_whole_range():
    log_snr = np.linspace(-20, 20, 81)
    ratio = np.exp(log_snr)
    s = np.exp(-log_snr / 2)
    expected = {
        "constant": np.ones_like(ratio),
        "snr": ratio,
        "snr_trunc": np.maximum(ratio, 1),
        "snr_plus_one": 1 + ratio,
        "p2": ratio / (1 + ratio),
        "min_snr": np.minimum(ratio, 5),
        "max_snr": np.maximum(ratio, 1),
        "soft_min_snr": 5 * ratio / (5 + ratio),
        "debiased": np.sqrt(ratio),
        "edm": (s**2 + 0.25) / (s * 0.5) ** 2,
        "vdm": ratio / 2,
        "sigmoid": ratio / 2 / (1 + np.exp(log_snr - 2)),
    }
    assert set(expected) == set(weighting.WEIGHTS)
    for name, values in expected.items():
        np.testing.assert_allclose(weighting.get(name)(log_snr.astype(np.float32)), values, rtol=3e-6)


def test_edm_weight_against_golden_values():
    got = weighting.get("edm")(process.log_snr_from_ve_sigma(jnp.array([0.002, 0.5, 1.0, 80.0])))
    np.testing.assert_allclose(got, [250004.0, 8.0, 5.0, 4.0001562], rtol=3e-6)


def test_settings_change_the_weight():
    log_snr = jnp.array([-3.0, 0.0, 3.0])
    np.testing.assert_allclose(weighting.get("p2", gamma=0.0)(log_snr), weighting.snr(log_snr), rtol=1e-6)
    np.testing.assert_allclose(weighting.get("p2", k=2.0, gamma=0.5)(0.0), 1 / np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(weighting.get("min_snr", g=2.0)(log_snr), [np.exp(-3), 1, 2], rtol=1e-6)
    np.testing.assert_allclose(
        weighting.get("edm", sigma_data=1.0)(log_snr), weighting.snr_plus_one(log_snr), rtol=1e-6
    )


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"unknown loss weight 'snr_truncated'; known: constant.*mean 'snr_trunc'"):
        weighting.get("snr_truncated")
    with pytest.raises(ValueError, match=r"unknown setting of loss weight 'p2' 'gama'.*mean 'gamma'"):
        weighting.get("p2", gama=1.0)
    with pytest.raises(ValueError, match="takes no settings"):
        weighting.get("snr", k=1.0)
