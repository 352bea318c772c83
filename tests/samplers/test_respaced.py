"""Sampling on some of the steps of a discrete schedule: golden indices, and steps in the betas of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill import samplers
from diffdistill.config import ConfigError, default_config, resolve
from diffdistill.diffusion import process, schedules
from diffdistill.models.denoiser import Condition, Prediction, _Guided
from diffdistill.samplers import respaced

STEPS = 40
BETAS = schedules.cosine_betas(STEPS)
SCHEDULE = schedules.get("discrete_cosine", num_train_steps=STEPS)


def test_golden_indices():
    of = respaced.even_indices
    assert of(1000, 250)[:4] == [0, 4, 8, 12]
    assert of(1000, 250)[-3:] == [991, 995, 999]
    assert of(1000, 100)[:4] == [0, 10, 20, 30]
    assert of(1000, 100)[-3:] == [979, 989, 999]
    assert of(1000, 1000) == list(range(1000))
    assert (of(1000, 2), of(1000, 3), of(1000, 1)) == ([0, 999], [0, 500, 999], [999])
    strided = respaced.strided_indices
    assert strided(1000, 25) == list(range(0, 1000, 40))
    assert strided(1000, 50)[-1] == 980
    assert strided(1000, 1000) == list(range(1000))
    assert strided(1000, 3) == [0, 334, 668]


@pytest.mark.parametrize("steps", [1, 2, 7, 43, 250, 999])
def test_indices_increase_from_the_first_to_the_last(steps):
    """43 is one of the counts at which the rounding errors of the sum decide a tie."""
    found = respaced.even_indices(1000, steps)
    assert len(set(found)) == steps
    assert found == sorted(found)
    assert found[-1] == 999
    total, stride = 0.0, 999 / max(steps - 1, 1)
    for index in found if steps > 1 else ():
        assert index == round(total)
        total += stride


def test_a_count_that_no_stride_gives_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"num_steps=300.*the nearest is 334"):
        respaced.strided_indices(1000, 300)
    with pytest.raises(ValueError, match="expected 1 to 1000"):
        respaced.even_indices(1000, 1001)


def crooked(z, log_snr):
    """A denoiser that is neither linear nor the same for every image or pixel, in numpy and in jax."""
    return 1.3 * jnp.tanh(jnp.sin(3 * z) + 0.1 * process.expand(log_snr, z) + jnp.roll(z, 1, axis=1))


def fraction(z, log_snr):
    return 0.5 + 0.4 * jnp.cos(5 * z + process.expand(log_snr, z))


@pytest.fixture(scope="module")
def start():
    return jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 3, 1)), jnp.float32)


def keys(count: int = 2):
    return jax.vmap(jax.random.key)(jnp.arange(count))


def noise_of(i: int) -> np.ndarray:
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), (3, 3, 1))  # noqa: E731
    return np.asarray(jax.vmap(draw)(keys()), np.float64)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_steps_are_those_of_the_respaced_betas(start, learned, clip):
    """float64, as the papers write it: new betas 1 - abar_i / abar_previous, and the model told the original time."""
    bars = np.cumprod(1 - BETAS)
    indices = respaced.even_indices(STEPS, 7)
    z = np.asarray(start, np.float64)
    for number, k in enumerate(range(6, -1, -1)):
        bar, before = bars[indices[k]], bars[indices[k - 1]] if k else 1.0
        beta = 1 - bar / before
        log_snr = SCHEDULE.log_snr(jnp.full(2, (indices[k] + 1) / STEPS))
        x_hat = np.asarray(crooked(jnp.float32(z), log_snr), np.float64)
        x_hat = np.clip(x_hat, -1, 1) if clip else x_hat
        mean = (np.sqrt(before) * beta * x_hat + np.sqrt(1 - beta) * (1 - before) * z) / (1 - bar)
        if k:
            posterior = beta * (1 - before) / (1 - bar)
            share = np.asarray(fraction(jnp.float32(z), log_snr), np.float64) if learned else 0.25
            mean += np.exp(0.5 * (share * np.log(beta) + (1 - share) * np.log(posterior))) * noise_of(number)
        z = mean

    def denoise(z, log_snr):
        return (crooked(z, log_snr), fraction(z, log_snr)) if learned else crooked(z, log_snr)

    found = samplers.get("respaced")(denoise, start, SCHEDULE, 7, keys=keys(), clip=clip, variance_fraction=0.25)
    np.testing.assert_allclose(found, z, atol=2e-4)


def test_strided_ddim_is_the_papers(start):
    bars = np.cumprod(1 - BETAS)
    indices = respaced.strided_indices(STEPS, 5)
    assert indices == [0, 8, 16, 24, 32]
    z = np.asarray(start, np.float64)
    for k in range(4, -1, -1):
        bar, before = bars[indices[k]], bars[indices[k - 1]] if k else 1.0
        x_hat = np.clip(crooked(jnp.float32(z), SCHEDULE.log_snr(jnp.full(2, (indices[k] + 1) / STEPS))), -1, 1)
        eps = (z - np.sqrt(bar) * x_hat) / np.sqrt(1 - bar)
        z = np.sqrt(before) * x_hat + np.sqrt(1 - before) * eps
    np.testing.assert_allclose(samplers.get("respaced_ddim")(crooked, start, SCHEDULE, 5), z, atol=2e-4)


def test_on_all_steps_respacing_changes_nothing(start):
    every = samplers.get("respaced")(crooked, start, SCHEDULE, STEPS, keys=keys())
    np.testing.assert_allclose(
        every, samplers.get("ancestral")(crooked, start, SCHEDULE, STEPS, keys=keys()), atol=2e-5
    )


def test_what_has_no_steps_to_choose_from_is_refused(start):
    for name, instead in (("respaced", "ancestral"), ("respaced_ddim", "ddim")):
        with pytest.raises(ValueError, match=f"'cosine' has none; use {instead}"):
            samplers.get(name)(crooked, start, schedules.get("cosine"), 5, keys=keys())
    with pytest.raises(ValueError, match="not traced"):
        jax.jit(lambda n: samplers.get("respaced")(crooked, start, SCHEDULE, n, keys=keys()))(5)
    settings = default_config()
    settings.teacher.num_updates, settings.process.schedule = 1, "discrete_cosine"
    settings.evaluation.samplers, settings.evaluation.num_steps = ("respaced_ddim",), (300,)
    with pytest.raises(ConfigError, match=r"config.evaluation.num_steps.*the nearest is 334"):
        resolve(settings)
    settings.evaluation.num_steps, settings.progressive.num_updates = (250,), 1
    settings.progressive.start_steps = 512
    with pytest.raises(ConfigError, match=r"num_steps=512: no whole stride"):
        resolve(settings)


def test_guidance_takes_the_variance_of_the_conditional_branch():
    class Spoken:
        num_classes = 2

        def predict(self, params, z, log_snr, condition, *, dropout_key=None):
            value = process.expand(jnp.asarray(condition.label, jnp.float32), z) + 0 * z
            return Prediction(value, 10 * value)

    condition = Condition(label=jnp.array([0, 1]), guidance=0.5)
    found = _Guided(Spoken()).predict({}, jnp.zeros((2, 1, 1, 1)), 0.0, condition)
    np.testing.assert_allclose(found.x.ravel(), [-1.0, 0.5])  # 1.5 label - 0.5 null class
    np.testing.assert_allclose(found.variance_fraction.ravel(), [0.0, 10.0])
