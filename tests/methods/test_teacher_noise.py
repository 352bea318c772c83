"""What a teacher trains on: the noise distribution is a choice of its own, and EDM's loss starts at one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffdistill import chain
from diffdistill.config import TeacherConfig, default_config, resolve
from diffdistill.diffusion import noise, parameterisation, process, schedules, weighting
from diffdistill.methods import base
from diffdistill.methods.teacher import teacher
from diffdistill.models.denoiser import Denoiser
from diffdistill.training.state import Optimization, Updater

ARGUMENTS = {"num_steps": jnp.int32(1), "num_updates": jnp.int32(10)}
UPDATER = Updater(Optimization(learning_rate=1e-3))


class Untrained(nn.Module):
    """A network whose last layer is zero, as before training."""

    num_classes: int = 0
    output_channels: int = 1
    guidance_embedding: str = "none"

    @nn.compact
    def __call__(self, inputs, time, label=None, guidance=None, *, deterministic=True):
        return self.param("scale", nn.initializers.zeros, ()) * inputs


def loss_of(prediction: str, weight: str, noises, x, *, key: int = 0, stratified: bool = False, **settings) -> float:
    model = Denoiser(Untrained(), parameterisation.get(prediction, **settings), 0, x.shape[1:])
    method = teacher(
        model,
        schedules.get("cosine"),
        weighting.get(weight, **settings),
        UPDATER,
        noise=noises,
        stratified=stratified,
    )
    state = method.init(jax.random.key(0), {})
    _, metrics = method.step(state, {}, {"image": x}, jax.random.key(key), ARGUMENTS)
    return float(metrics["loss"])


@pytest.mark.parametrize("deviation", [0.5, 0.25])
def test_the_loss_of_an_untrained_edm_network_is_one(deviation):
    x = deviation * jax.random.normal(jax.random.key(1), (4096, 4, 4, 1))
    found = loss_of("edm", "edm", noise.get("lognormal"), x, sigma_data=deviation)
    assert found == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(("prediction", "name"), [("vp", "vp"), ("ve", "ve"), ("iddpm", "iddpm")])
def test_the_loss_of_the_other_untrained_presets_is_that_of_the_noise(prediction, name):
    """x_hat = z_ve, so 1/s^2 times its error is the mean square of the noise."""
    x = jax.random.uniform(jax.random.key(1), (4096, 4, 4, 1), minval=-1.0)
    # At the least levels z_ve - x = s eps is what float32 keeps of it.
    assert loss_of(prediction, "snr", noise.get(name), x) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("name", noise.NOISES)
@pytest.mark.parametrize("stratified", [False, True])
def test_the_levels_of_a_batch_are_quantiles_of_its_uniform_draws(name, stratified):
    """Seen from the loss by log-SNR: with the weight SNR and x_hat = z_ve each example's loss is about one."""
    x, key = jnp.zeros((512, 2, 2, 1)), jax.random.key(3)
    draws = base.uniform(base.streams(key)["time"], 512, stratified=stratified)
    log_snr = np.asarray(noise.get(name)(draws))
    model = Denoiser(Untrained(), parameterisation.get("vp"), 0, (2, 2, 1))
    method = teacher(
        model,
        schedules.get("cosine"),
        weighting.get("snr"),
        UPDATER,
        noise=noise.get(name),
        stratified=stratified,
    )
    _, metrics = method.step(method.init(key, {}), {}, {"image": x}, key, ARGUMENTS)
    counts = np.histogram(np.clip(log_snr, -19.99, 19.99), bins=base.LOG_SNR_BINS, range=(-20, 20))[0]
    np.testing.assert_array_equal(np.isnan(metrics["loss_by_log_snr"]), counts == 0)
    eps = jax.random.normal(base.streams(key)["noise"], x.shape)
    assert float(metrics["loss"]) == pytest.approx(float(jnp.mean(eps**2)), rel=1e-3)


def test_the_config_says_the_noise():
    assert chain.noise_of(TeacherConfig()) is None
    draws = jnp.linspace(0.01, 0.99, 9)
    told = {
        "lognormal": (TeacherConfig(noise="lognormal", p_mean=0.3, p_std=0.7), {"p_mean": 0.3, "p_std": 0.7}),
        "ve": (
            TeacherConfig(noise="ve", noise_sigma_min=0.1, noise_sigma_max=3.0),
            {"sigma_min": 0.1, "sigma_max": 3.0},
        ),
        "vp": (TeacherConfig(noise="vp"), {}),
        "iddpm": (TeacherConfig(noise="iddpm"), {}),
        "karras": (
            TeacherConfig(noise="karras", noise_sigma_min=0.1, noise_sigma_max=3.0),
            {"sigma_min": 0.1, "sigma_max": 3.0},
        ),
    }
    assert set(told) == set(noise.NOISES)
    for name, (settings, own) in told.items():
        found = chain.noise_of(settings)
        assert found is not None
        np.testing.assert_array_equal(found(draws), noise.get(name, **own)(draws))


def test_the_config_says_the_deviation_of_the_data():
    settings = default_config()
    settings.teacher.num_updates, settings.model.prediction, settings.model.sigma_data = 1, "edm", 0.2
    config = resolve(settings)
    facts = chain.DataFacts((8, 8, 1), 10)
    denoiser = chain.denoiser_of(config, chain.plan(config)[0], facts)
    z, log_snr = jnp.ones((1, 1, 1, 1)), jnp.zeros(1)
    expected = 1.0 / np.sqrt(process.sigma(0.0) ** 2 + (0.2 * process.alpha(0.0)) ** 2)
    assert float(denoiser.parameterisation.network_input(z, log_snr).squeeze()) == pytest.approx(expected, rel=1e-6)
    assert float(chain.weight_of(config.model, "edm")(0.0)) == pytest.approx(1 + 1 / 0.2**2, rel=1e-6)
    assert float(chain.weight_of(config.model, "snr")(0.0)) == 1.0


class Told(nn.Module):
    """Says the first entry of what it is told of the augmentation, everywhere."""

    num_classes: int = 0
    output_channels: int = 1
    guidance_embedding: str = "none"
    augmentation_features: int = 2

    @nn.compact
    def __call__(self, inputs, time, label=None, guidance=None, *, augmentation=None, deterministic=True):
        augmentation = jnp.zeros((len(inputs), 2)) if augmentation is None else augmentation
        told = self.param("scale", nn.initializers.ones, ()) * augmentation[:, 0]
        return jnp.broadcast_to(process.expand(told, inputs), inputs.shape)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_teacher_learns_the_augmented_image_and_is_told_what_was_done(parts):
    """A network that repeats what it is told is right about images that are filled with it, and about no others."""

    def augment(key, x):
        value = jax.random.uniform(key, (x.shape[0],))
        return jnp.broadcast_to(process.expand(value, x), x.shape), jnp.stack([value, value], axis=1)

    model = Denoiser(Told(), parameterisation.get("x"), 0, (4, 4, 1))
    x = jax.random.normal(jax.random.key(1), (8, 4, 4, 1))

    def loss(augment):
        method = teacher(
            model, schedules.get("cosine"), weighting.get("constant"), UPDATER, augment=augment, parts=parts
        )
        state = method.init(jax.random.key(0), {})
        return method.step(state, {}, {"image": x}, jax.random.key(0), ARGUMENTS)[1]["loss"]

    assert float(loss(augment)) == 0.0
    assert float(loss(lambda key, x: (x, augment(key, x)[1]))) > 0.5
