"""The signals of score distillation on Gaussians, whose scores and divergences are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussians import SHAPE, posterior_mean

from diffdistill.diffusion import process
from diffdistill.methods import base, score_distillation

MEAN, COVARIANCE = jnp.array([0.4, -0.7]), jnp.array([[0.5, 0.2], [0.2, 0.3]])
M, A = jnp.array([-0.3, 0.2]), jnp.array([[1.1, 0.0], [-0.4, 0.3]])


def teacher(z, log_snr):
    return posterior_mean(z, log_snr, MEAN, COVARIANCE)


def fake(z, log_snr):
    return posterior_mean(z, log_snr, M, A @ A.T)


def samples(m, a, eps):
    return (m + eps @ a.T).reshape(-1, *SHAPE)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_the_gradient_of_diff_instruct_is_that_of_the_divergence_of_the_noised_distributions(sigma):
    """With x_g = m + A eps and exact scores: sigma^2 (P^-1 - Q^-1) A and sigma^2 P^-1 (m - mean), P, Q with noise."""
    size = 400_000
    eps = jax.random.normal(jax.random.key(0), (size, 2))
    log_snr = jnp.full((size,), process.log_snr_from_ve_sigma(sigma))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(m, a):
        return score_distillation.diff_instruct(samples(m, a, eps), teacher, fake, log_snr, jax.random.key(1))[0]

    by_mean, by_scale = gradient(M, A)
    noise = sigma**2 * np.eye(2)
    p, q = np.linalg.inv(COVARIANCE + noise), np.linalg.inv(A @ A.T + noise)
    np.testing.assert_allclose(by_mean, sigma**2 * p @ (M - MEAN), atol=0.01)
    np.testing.assert_allclose(by_scale, sigma**2 * (p - q) @ A, atol=0.01)
    assert np.abs(by_mean).max() > 0.05
    assert np.abs(by_scale).max() > 0.03


@pytest.fixture(scope="module")
def draw():
    """(x_g, log_snr, key, z, D_T, D_F) of a small batch."""
    x_g = samples(M, A, jax.random.normal(jax.random.key(2), (5, 2)))
    log_snr, key = jnp.linspace(-3.0, 3.0, 5), jax.random.key(3)
    z, _ = base.noised(key, x_g, log_snr)
    return x_g, log_snr, key, z, teacher(z, log_snr), fake(z, log_snr)


def distance(x_g, x_t):
    return np.mean(np.abs(np.asarray(x_g - x_t)), axis=(1, 2, 3), keepdims=True)


def gradient_of(signal, draw):
    x_g, log_snr, key, *_ = draw
    return jax.grad(lambda x_g: signal(x_g, teacher, fake, log_snr, key)[0])(x_g)


def test_the_signal_of_diff_instruct_is_the_difference_of_the_denoisers_and_passes_through_none(draw):
    *_, x_t, x_f = draw
    np.testing.assert_allclose(gradient_of(score_distillation.diff_instruct, draw), (x_f - x_t) / 5, rtol=1e-5)


def test_the_signal_of_dmd2_is_that_in_units_of_the_distance_to_the_teacher(draw):
    x_g, *_, x_t, x_f = draw
    np.testing.assert_allclose(
        gradient_of(score_distillation.dmd2, draw), (x_f - x_t) / distance(x_g, x_t) / 5, rtol=1e-5
    )


def test_the_gradient_of_sid_passes_through_both_denoisers(draw):
    """Of u ((D_T - x) - a u) / d with u = D_T - D_F, both linear in x: the product rule by hand."""
    x_g, log_snr, _, z, x_t, x_f = draw

    def slope(denoise):  # (B, 2, 2): of x_hat by x_g
        one = jax.vmap(jax.jacobian(lambda z, at: denoise(z.reshape(1, *SHAPE), at[None]).reshape(2)))
        return process.alpha(log_snr)[:, None, None] * one(z.reshape(-1, 2), log_snr)

    by_t, by_f = slope(teacher), slope(fake)
    u, rest = (x_t - x_f).reshape(-1, 2), (x_t - x_g).reshape(-1, 2)
    a = score_distillation.SID_ALPHA
    turned = jnp.einsum("bij,bi->bj", by_t - by_f, rest - 2 * a * u) + jnp.einsum("bij,bi->bj", by_t, u) - u
    expected = turned / distance(x_g, x_t).reshape(-1, 1) / 5
    np.testing.assert_allclose(gradient_of(score_distillation.sid, draw).reshape(-1, 2), expected, rtol=1e-4, atol=1e-6)


def test_sid_without_its_second_term_is_the_distance_of_the_scores(monkeypatch):
    """With D_F exact, E (D_T - D_F)(D_T - x_g) = E |D_T - D_F|^2, the identity after which SiD is named."""
    size = 400_000
    monkeypatch.setattr(score_distillation, "_distance", lambda x_g, x_t: 1.0)
    x_g = samples(M, A, jax.random.normal(jax.random.key(4), (size, 2)))
    log_snr = jnp.zeros((size,))
    for alpha in (0.0, 1.0):
        monkeypatch.setattr(score_distillation, "SID_ALPHA", alpha)
        loss, delta = score_distillation.sid(x_g, teacher, fake, log_snr, jax.random.key(5))
        expected = (1.0 - alpha) * float(jnp.sum(delta**2) / size)
        assert float(loss) == pytest.approx(expected, abs=0.005)
    assert float(jnp.sum(delta**2) / size) > 0.1


@pytest.mark.parametrize("name", score_distillation.SIGNALS)
def test_a_generator_whose_fake_denoiser_is_the_teacher_stays_where_it_is(name, draw):
    x_g, log_snr, key, *_ = draw
    signal = score_distillation.get(name)
    found = jax.grad(lambda x_g: signal(x_g, teacher, teacher, log_snr, key)[0])(x_g)
    np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("name", ["diff_instruct", "dmd2"])
def test_no_gradient_reaches_the_denoisers(name, draw):
    x_g, log_snr, key, *_ = draw

    def value(means):
        roles = [lambda z, at, mean=mean: posterior_mean(z, at, mean, COVARIANCE) for mean in means]
        return score_distillation.get(name)(x_g, *roles, log_snr, key)[0]

    for found in jax.grad(value)([MEAN, M]):
        np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("name", score_distillation.SIGNALS)
def test_every_signal_reports_the_difference_of_the_denoisers(name, draw):
    x_g, log_snr, key, _, x_t, x_f = draw
    _, delta = score_distillation.get(name)(x_g, teacher, fake, log_snr, key)
    np.testing.assert_allclose(delta, x_f - x_t, rtol=1e-5)


def test_an_unknown_signal_is_refused():
    with pytest.raises(ValueError, match="diff_instruct"):
        score_distillation.get("diff_instrct")
