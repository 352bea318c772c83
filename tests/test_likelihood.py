"""Bits per dimension: the bound by its terms, and what a perfect and an ignorant model of bytes need."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffdistill import likelihood
from diffdistill.diffusion import parameterisation, schedules, variational
from diffdistill.models.denoiser import Denoiser

STEPS = 60


class Constant(nn.Module):
    """Says the same image whatever it sees."""

    num_classes: int = 0
    output_channels: int = 1
    guidance_embedding: str = "none"

    @nn.compact
    def __call__(self, inputs, time, label=None, guidance=None, *, deterministic=True):
        return self.param("value", nn.initializers.zeros, ()) + jnp.zeros_like(inputs)


def model(value: float, schedule, clip: bool = True):
    denoiser = Denoiser(Constant(), parameterisation.get("x"), 0, (4, 4, 1))
    return types.SimpleNamespace(
        denoiser=denoiser,
        params={"value": jnp.float32(value)},
        schedule=schedule,
        clip=clip,
        settings={"variance_fraction": 0.0},
        chunk_size=lambda count: 2,
    )


LINEAR = schedules.get("discrete_linear", num_train_steps=STEPS)


def test_a_model_that_knows_the_image_needs_the_prior_and_the_last_byte():
    images = np.full((3, 4, 4, 1), 255, np.uint8)  # x = 1
    found = likelihood.bound(model(1.0, LINEAR), images, np.zeros(3))
    first, second, last = (LINEAR.log_snr(n / STEPS) for n in (1, 2, STEPS))
    one = jnp.ones((1, 1, 1, 1))
    log_variance = variational.first_log_variance(0.0, first[None], second[None], one)
    expected = variational.decoder(one, one, log_variance) / np.log(2)
    np.testing.assert_allclose(found.steps, expected[0], rtol=1e-4)
    bar = 1 / (1 + np.exp(-np.float64(last)))
    np.testing.assert_allclose(found.prior, 0.5 * (-np.log(1 - bar) - bar + bar) / np.log(2), rtol=1e-4)
    np.testing.assert_allclose(found.total, found.prior + found.steps)


def test_what_it_does_not_know_costs_the_sum_over_the_steps():
    """x_hat = 0 for x = 1 with the posterior's variance: (SNR of the cleanest step - SNR of the last) / 2 nats."""
    images = np.full((2, 4, 4, 1), 255, np.uint8)
    found = likelihood.bound(model(0.0, LINEAR), images, np.zeros(2))
    known = likelihood.bound(model(1.0, LINEAR), images, np.zeros(2))
    first, last = (float(jnp.exp(LINEAR.log_snr(n / STEPS))) for n in (1, STEPS))
    gained = (found.steps - known.steps) * np.log(2)
    one, zero = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    levels = [LINEAR.log_snr(n / STEPS)[None] for n in (1, 2)]
    log_variance = variational.first_log_variance(0.0, *levels, one)
    last_byte = variational.decoder(one, zero, log_variance) - variational.decoder(one, one, log_variance)
    np.testing.assert_allclose(gained, 0.5 * (first - last) + float(last_byte[0]), rtol=1e-3)


def test_clipping_is_that_of_sampling():
    images = np.full((2, 4, 4, 1), 255, np.uint8)
    clipped, free = (likelihood.bound(model(3.0, LINEAR, clip), images, np.zeros(2)) for clip in (True, False))
    known = likelihood.bound(model(1.0, LINEAR), images, np.zeros(2))
    np.testing.assert_allclose(clipped.steps, known.steps, rtol=1e-5)
    assert (free.steps > known.steps + 1).all()


def test_a_continuous_schedule_is_refused():
    with pytest.raises(ValueError, match="'cosine' has none"):
        likelihood.bound(model(0.0, schedules.get("cosine")), np.zeros((1, 4, 4, 1), np.uint8), np.zeros(1))
