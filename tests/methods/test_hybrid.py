"""The hybrid loss against a float64 reference written from the papers, and the draws of steps by their losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from diffdistill.diffusion import parameterisation, process, schedules, variational, weighting
from diffdistill.methods import base, hybrid, importance
from diffdistill.methods.teacher import teacher
from diffdistill.models.denoiser import Denoiser, Prediction
from diffdistill.training.state import Optimization, Updater

STEPS = 50
SCHEDULES = {name: schedules.get(name, num_train_steps=STEPS) for name in ("discrete_linear", "discrete_cosine")}
UPDATER = Updater(Optimization(learning_rate=1e-3))
ARGUMENTS = {"num_steps": jnp.int32(1), "num_updates": jnp.int32(10)}


def reference(name: str, index: int, x, z, eps_hat, v):
    """Term of the bound in bits per dimension at step `index` from 0, in float64, as Nichol & Dhariwal write it."""
    log_snr = np.asarray(SCHEDULES[name].log_snr(np.arange(1, STEPS + 1, dtype=np.float32) / STEPS), np.float64)
    bars = 1 / (1 + np.exp(-log_snr))  # of the table in float32, which tests/diffusion compares with the papers' betas
    before = np.append(1.0, bars[:-1])
    betas = 1 - bars / before
    posterior = betas * (1 - before) / (1 - bars)
    clipped = np.append(posterior[1], posterior[1:])
    fraction = (v + 1) / 2
    log_variance = fraction * np.log(betas[index]) + (1 - fraction) * np.log(clipped[index])
    x_hat = (z - np.sqrt(1 - bars[index]) * eps_hat) / np.sqrt(bars[index])
    from_x = np.sqrt(before[index]) * betas[index] / (1 - bars[index])
    from_z = np.sqrt(1 - betas[index]) * (1 - before[index]) / (1 - bars[index])
    mean = from_x * x_hat + from_z * z
    if index:
        difference = from_x * x + from_z * z - mean
        log_true = np.log(clipped[index])
        nats = 0.5 * (
            log_variance - log_true - 1 + np.exp(log_true - log_variance) + difference**2 * np.exp(-log_variance)
        )
        return nats.mean() / np.log(2)
    scale = np.exp(-0.5 * log_variance)
    upper, lower = (x - mean + 1 / 255) * scale, (x - mean - 1 / 255) * scale
    mass = np.where(upper + lower > 0, _mass(-upper, -lower), _mass(lower, upper))
    log_mass = np.where(x < -0.999, scipy.special.log_ndtr(upper), np.log(mass))
    return -np.where(x > 0.999, scipy.special.log_ndtr(-lower), log_mass).mean() / np.log(2)


def _mass(low, high):
    return scipy.special.ndtr(high) - scipy.special.ndtr(low)


@pytest.fixture(scope="module")
def drawn():
    """Bytes as data, the outermost ones among them, noise, noisy images and what a network may say of each step."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (STEPS, 2, 2, 2))
    images[:, 0, 0] = 0, 255
    x = images / 127.5 - 1
    eps, error, v = random.standard_normal((3, *x.shape))
    return x, eps, eps + 0.2 * error, v


def with_gradients(function):
    """(values, gradients of their sum by the arguments) of a function, compiled whole."""

    @jax.jit
    def run(*arguments):
        values, pull = jax.vjp(function, *arguments)
        return values, pull(jnp.ones_like(values))

    return run


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_is_the_reference_in_value_and_gradient(name, drawn):
    x, eps, eps_hat, v = drawn
    schedule, step = SCHEDULES[name], jnp.arange(1, STEPS + 1)
    with jax.enable_x64(True):
        log_snr = schedule.log_snr(step / STEPS).astype(jnp.float64)
        z = process.add_noise(jnp.asarray(x), jnp.asarray(eps), log_snr)

        def bits(v, eps_hat):
            x_hat = parameterisation.x_from_eps(eps_hat, z, log_snr)
            return hybrid.bits(Prediction(x_hat, 0.5 * (v + 1)), jnp.asarray(x), step, schedule)

        found, (by_v, by_eps) = with_gradients(bits)(jnp.asarray(v), jnp.asarray(eps_hat))
    z = np.asarray(z)
    expected = [reference(name, i, x[i], z[i], eps_hat[i], v[i]) for i in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(by_eps, 0.0)
    h = 1e-5
    for i in (0, 1, 7, STEPS - 1):
        for pixel in ((0, 0, 0), (0, 0, 1), (1, 1, 0)):
            shift = np.zeros_like(v[i])
            shift[pixel] = h
            slope = (
                reference(name, i, x[i], z[i], eps_hat[i], v[i] + shift)
                - reference(name, i, x[i], z[i], eps_hat[i], v[i] - shift)
            ) / (2 * h)
            assert float(by_v[i][pixel]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_gives_the_same_bound_and_finite_gradients(name, drawn):
    x, eps, eps_hat, v = (jnp.asarray(value, jnp.float32) for value in drawn)
    schedule, step = SCHEDULES[name], jnp.arange(1, STEPS + 1)
    log_snr = schedule.log_snr(step / STEPS)
    z = process.add_noise(x, eps, log_snr)

    def bits(v, eps_hat):
        x_hat = parameterisation.x_from_eps(eps_hat, z, log_snr)
        return hybrid.bits(Prediction(x_hat, 0.5 * (v + 1)), x, step, schedule)

    run = with_gradients(bits)
    found, (by_v, _) = run(v, eps_hat)
    expected = [reference(name, i, *(np.float64(value[i]) for value in (x, z, eps_hat, v))) for i in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert np.isfinite(by_v).all()
    # A network that is wrong by far at the noisy end: x_hat is huge there, the gradient is a number.
    assert np.isfinite(run(v, 50 * eps_hat)[1][0]).all()


def test_at_the_posteriors_variance_the_bound_is_the_weighted_error():
    """f = 0: (SNR_s - SNR_t) (x - x_hat)^2 / 2, which no variance beats where x_hat is right."""
    x, x_hat = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    t, s = jnp.array([-2.0, 0.0, 3.0]), jnp.array([-1.5, 0.5, 3.2])
    divergence = jax.jit(variational.step_divergence)
    found = divergence(x, x_hat, 0.0, t, s)
    error = jnp.mean(jnp.square(x - x_hat), axis=(1, 2, 3))
    np.testing.assert_allclose(found, 0.5 * (jnp.exp(s) - jnp.exp(t)) * error, rtol=1e-5)
    np.testing.assert_allclose(divergence(x, x, 0.0, t, s), 0.0, atol=1e-7)
    assert (divergence(x, x, 0.3, t, s) > 0).all()


def test_the_decoder_gives_all_bytes_a_probability_of_one_together():
    values = jnp.arange(256.0).reshape(-1, 1, 1, 1) / 127.5 - 1
    for centre, log_variance in ((0.0, -3.0), (0.9, -9.0), (-1.2, 0.0)):
        nats = jax.jit(variational.decoder)(values, jnp.full_like(values, centre), jnp.full_like(values, log_variance))
        assert float(jnp.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-5)


class Flat(nn.Module):
    """Puts out the same number everywhere, one parameter for the noise and one for the variance."""

    num_classes: int = 0
    output_channels: int = 2
    guidance_embedding: str = "none"

    @nn.compact
    def __call__(self, inputs, time, label=None, guidance=None, *, deterministic=True):
        values = [self.param(name, nn.initializers.constant(0.3), ()) for name in ("eps", "variance")]
        return jnp.stack([jnp.broadcast_to(value, inputs.shape[:3]) for value in values], axis=-1)


def flat(schedule, weight="p2", **options):
    output = parameterisation.with_variance(parameterisation.get("iddpm", num_train_steps=STEPS))
    return teacher(Denoiser(Flat(), output, 0, (4, 4, 1)), schedule, weighting.get(weight), UPDATER, **options)


def batch(size: int = 8):
    return {"image": jax.random.uniform(jax.random.key(5), (size, 4, 4, 1), minval=-1.0)}


def test_the_loss_is_the_weighted_error_plus_the_bound():
    """0.001 T bits; the weight touches the first part only, and each part has one of the two parameters."""
    schedule, key = SCHEDULES["discrete_cosine"], jax.random.key(2)
    method = flat(schedule)
    state = method.init(jax.random.key(0), {})
    _, metrics = jax.jit(method.step)(state, {}, batch(), key, ARGUMENTS)
    random = base.streams(key)
    times = base.training_times(random["time"], 8, schedule, stratified=False)
    log_snr, x = schedule.log_snr(times), batch()["image"]
    z, eps = base.noised(random["noise"], x, log_snr)
    prediction = Prediction(parameterisation.x_from_eps(jnp.full_like(z, 0.3), z, log_snr), jnp.full_like(z, 0.65))
    bits = jax.jit(lambda *args: hybrid.bits(*args, schedule))(
        prediction, x, jnp.round(times * STEPS).astype(jnp.int32)
    )
    on_noise = process.sigma(log_snr) ** 2  # P2 with k = 1, gamma = 1
    simple = jnp.mean(on_noise * jnp.mean(jnp.square(eps - 0.3), axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics["bits_per_dim"], STEPS * jnp.mean(bits), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], simple + 1e-3 * STEPS * jnp.mean(bits), rtol=1e-4)


def test_steps_are_drawn_by_the_roots_of_their_mean_squared_losses():
    history = importance.empty(4)
    np.testing.assert_allclose(importance.probabilities(history), 0.25)
    for value in range(importance.KEPT):
        history = jax.jit(importance.record)(history, jnp.arange(4), jnp.array([1.0, 2.0, 3.0, float(value)]))
    sizes = np.array([1, 2, 3, np.sqrt(np.mean(np.arange(10.0) ** 2))])
    expected = 0.999 * sizes / sizes.sum() + 0.001 / 4
    np.testing.assert_allclose(importance.probabilities(history), expected, rtol=1e-5)
    index, factor = importance.draw(jnp.linspace(0, 0.99999, 5000), history)
    np.testing.assert_allclose(jnp.bincount(index, length=4) / 5000, expected, atol=1e-3)
    np.testing.assert_allclose(factor, 0.25 / expected[index], rtol=1e-4)


def test_a_history_keeps_the_last_ten_losses_of_each_step():
    """Against a plain loop over the examples, also where one step is met often in one batch."""
    random = np.random.default_rng(0)
    history, lists = importance.empty(3), [[], [], []]
    for size in (5, 40, 7, 1):
        index, losses = random.integers(0, 3, size), random.standard_normal(size).astype(np.float32)
        history = jax.jit(importance.record)(history, jnp.asarray(index), jnp.asarray(losses))
        for i, loss in zip(index, losses, strict=True):
            lists[i].append(loss)
    for found, met in zip(np.asarray(history["losses"]), lists, strict=True):
        np.testing.assert_array_equal(np.sort(found), np.sort(met[-importance.KEPT :]))
    np.testing.assert_array_equal(history["counts"], [len(met) for met in lists])


@pytest.mark.parametrize("parts", [1, 2])
def test_importance_sampling_keeps_its_history_in_the_state(parts):
    method = flat(SCHEDULES["discrete_cosine"], importance_sampling=True, parts=parts)
    state = method.init(jax.random.key(0), {})
    step = jax.jit(method.step)
    for update in range(2):
        state, metrics = step(state, {}, batch(), jax.random.key(update), ARGUMENTS)
        assert base.RECORD not in metrics
    assert int(state.memory["counts"].sum()) == 16
    assert int((state.memory["losses"] > 0).sum()) == 16
    # As long as draws are even, the loss is the mean of what was remembered.
    once, metrics = step(method.init(jax.random.key(0), {}), {}, batch(), jax.random.key(0), ARGUMENTS)
    np.testing.assert_allclose(once.memory["losses"].sum() / 8, metrics["loss"], rtol=1e-5)


def test_the_loss_of_drawn_steps_is_in_the_mean_that_of_even_draws():
    schedule = SCHEDULES["discrete_cosine"]
    method = flat(schedule, "snr", importance_sampling=True, stratified=True)
    state = method.init(jax.random.key(0), {})
    ready = {"losses": jnp.broadcast_to(jnp.linspace(1, 4, STEPS)[:, None], (STEPS, 10)), "counts": jnp.full(STEPS, 10)}
    losses = [
        jax.jit(chosen.step)(initial, {}, batch(4_000), jax.random.key(7), ARGUMENTS)[1]["loss"]
        for chosen, initial in (
            (method, state.replace(memory=ready)),
            (flat(schedule, "snr", stratified=True), state.replace(memory=None)),
        )
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=0.03)


def test_a_continuous_schedule_is_refused():
    with pytest.raises(ValueError, match="steps of a discrete schedule"):
        flat(schedules.get("cosine"))
    with pytest.raises(ValueError, match="'cosine', the variance missing"):
        hybrid.bits(Prediction(jnp.zeros(1), None), jnp.zeros(1), jnp.zeros(1), schedules.get("cosine"))
