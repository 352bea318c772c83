"""The three training methods: what they start from, what they aim at, and what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffdistill.diffusion import parameterisation, process, schedules, weighting
from diffdistill.methods import base
from diffdistill.methods.encoder import encoder_halving
from diffdistill.methods.guided import distillation
from diffdistill.methods.progressive import halving
from diffdistill.methods.teacher import teacher
from diffdistill.models.denoiser import Condition, Denoiser, guided
from diffdistill.models.unet import UNet
from diffdistill.samplers import ddim
from diffdistill.training.state import Optimization, Updater

SCHEDULE = schedules.get("cosine")
UPDATER = Updater(Optimization(learning_rate=1e-2))
CLASSES = 3
ARGUMENTS = {"num_steps": jnp.int32(2), "num_updates": jnp.int32(10)}


def denoiser(guidance_embedding: str = "none", num_classes: int = CLASSES) -> Denoiser:
    network = UNet(
        channels=8,
        multipliers=(1,),
        embedding=16,
        output_channels=1,
        blocks_per_level=1,
        num_groups=4,
        num_classes=num_classes,
        guidance_embedding=guidance_embedding,
    )
    return Denoiser(network, parameterisation.get("v"), num_classes, (4, 4, 1))


def randomised(params, seed: int = 0):
    """Parameters without the zero initialisation, so that outputs depend on everything that they may depend on."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "image": jnp.asarray(random.integers(0, 256, (6, 4, 4, 1)), jnp.uint8),
        "label": jnp.asarray(random.integers(0, CLASSES, 6), jnp.int32),
    }


@pytest.fixture(scope="module")
def teacher_params():
    return randomised(denoiser().init(jax.random.key(1)))


@pytest.mark.parametrize("w", [0.0, 0.3, 4.0])
def test_a_guided_student_starts_as_the_conditional_teacher_for_every_w(teacher_params, w):
    student = denoiser("mapped")
    method = distillation(student, denoiser(), SCHEDULE, weighting.get("snr"), UPDATER, w_min=0.0, w_max=4.0)
    params = method.export(method.init(jax.random.key(2), {"teacher": teacher_params}))
    z = jax.random.normal(jax.random.key(3), (5, 4, 4, 1))
    log_snr, label = jnp.linspace(-5.0, 5.0, 5), jnp.arange(5) % (CLASSES + 1)
    got = student(params, z, log_snr, Condition(label=label, guidance=jnp.float32(w)))
    expected = denoiser()(teacher_params, z, log_snr, Condition(label=label))
    np.testing.assert_array_equal(got, expected)
    assert float(jnp.abs(expected).max()) > 0.01


def test_guided_distillation_at_one_w_measures_the_distance_to_the_guided_teacher(teacher_params, batch):
    w = 1.5
    method = distillation(
        denoiser("mapped"), denoiser(), SCHEDULE, weighting.get("constant"), UPDATER, w_min=w, w_max=w
    )
    key, frozen = jax.random.key(5), {"teacher": teacher_params}
    state = method.init(jax.random.key(2), frozen)
    _, metrics = method.step(state, frozen, batch, key, ARGUMENTS)

    random = base.streams(key)
    log_snr = SCHEDULE.log_snr(base.training_times(random["time"], 6, SCHEDULE, stratified=False))
    z, _ = base.noised(random["noise"], base.images(batch), log_snr)
    condition = Condition(label=batch["label"], guidance=jnp.full((6,), w))
    target = guided(denoiser())(teacher_params, z, log_snr, condition)
    start = denoiser()(teacher_params, z, log_snr, Condition(label=batch["label"]))
    np.testing.assert_allclose(metrics["loss"], jnp.mean(jnp.square(start - target)), rtol=1e-4)
    assert float(metrics["loss"]) > 1e-6


def test_without_guidance_the_student_has_nothing_to_learn(teacher_params, batch):
    method = distillation(
        denoiser("mapped"), denoiser(), SCHEDULE, weighting.get("constant"), UPDATER, w_min=0.0, w_max=0.0
    )
    frozen = {"teacher": teacher_params}
    _, metrics = method.step(method.init(jax.random.key(2), frozen), frozen, batch, jax.random.key(5), ARGUMENTS)
    assert float(metrics["loss"]) < 1e-9


def test_the_loss_of_a_round_is_the_distance_to_the_target_of_the_samplers(batch):
    """The loss of a round is the distance to ddim.two_step_target at the N times of the student, and nothing else."""
    model = denoiser(num_classes=0)
    params = randomised(model.init(jax.random.key(1)))
    method = halving(model, SCHEDULE, weighting.get("snr_trunc"), UPDATER)
    key, steps = jax.random.key(9), 4
    state = method.init(jax.random.key(0), {"teacher": params})
    _, metrics = method.step(
        state, {"teacher": params}, batch, key, {"num_steps": jnp.int32(steps), "num_updates": jnp.int32(10)}
    )

    random = base.streams(key)
    index = np.floor(np.asarray(base.uniform(random["time"], 6, stratified=False)) * steps)
    assert set(index) <= set(range(steps))
    t, m, s = (jnp.float32((index + shift) / steps) for shift in (1, 0.5, 0))
    z, _ = base.noised(random["noise"], base.images(batch), SCHEDULE.log_snr(t))
    target, _, _ = ddim.two_step_target(lambda z, at: model(params, z, at, Condition()), z, SCHEDULE, t, m, s)
    x_hat = model(params, z, SCHEDULE.log_snr(t), Condition())
    losses = weighting.get("snr_trunc")(SCHEDULE.log_snr(t)) * jnp.mean(jnp.square(x_hat - target), axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["loss"], jnp.mean(losses), rtol=1e-3)


def test_a_student_of_the_stochastic_sampler_steps_as_far_as_two_whole_steps(batch):
    """Its target at t is that of one step to t - 2/N; at 1/N, where the sampler ends, the teacher's own prediction."""
    model = denoiser(num_classes=0)
    params = randomised(model.init(jax.random.key(1)))
    method = halving(model, SCHEDULE, weighting.get("constant"), UPDATER, stochastic=True)
    state, steps = method.init(jax.random.key(0), {"teacher": params}), 3
    arguments = {"num_steps": jnp.int32(steps), "num_updates": jnp.int32(10)}

    def teach(z, at):
        return model(params, z, at, Condition())

    met = set()
    for seed in range(4):
        key = jax.random.key(seed)
        _, metrics = method.step(state, {"teacher": params}, batch, key, arguments)
        random = base.streams(key)
        index = np.floor(np.asarray(base.uniform(random["time"], 6, stratified=False)) * steps)
        met |= set(index.astype(int).tolist())
        t, m, s = (jnp.float32((index + shift) / steps) for shift in (1, 0, -1))
        log_snr = SCHEDULE.log_snr(t)
        z, _ = base.noised(random["noise"], base.images(batch), log_snr)
        target = []
        for i in range(6):
            at = [value[i : i + 1] for value in (t, m, s)]
            one = z[i : i + 1]
            target.append(teach(one, log_snr[i : i + 1]) if index[i] == 0 else _inverted(teach, one, *at))
        errors = jnp.square(teach(z, log_snr) - jnp.concatenate(target))
        np.testing.assert_allclose(metrics["loss"], jnp.mean(errors), rtol=2e-3, atol=1e-7)
    assert met == {0, 1, 2}


def _inverted(teach, z, t, m, s):
    """The published inversion: the x_hat with which one step t -> s ends where the teacher's two do."""
    at = [SCHEDULE.log_snr(time) for time in (t, m, s)]
    z_m = ddim.step(teach(z, at[0]), z, at[0], at[1])
    x2 = teach(z_m, at[1])
    if float(s[0]) == 0.0:
        return x2
    z_s = ddim.step(x2, z_m, at[1], at[2])
    ratio = process.sigma(at[2]) / process.sigma(at[0])
    scale = process.alpha(at[2]) - ratio * process.alpha(at[0])
    return (z_s - process.expand(ratio, z) * z) / process.expand(scale, z)


def test_the_loss_of_an_encoder_is_the_distance_to_its_target_at_the_cleaner_time(batch):
    model = denoiser(num_classes=0)
    params = randomised(model.init(jax.random.key(1)))
    method = encoder_halving(model, SCHEDULE, weighting.get("snr_trunc"), UPDATER)
    key, steps = jax.random.key(9), 4
    state = method.init(jax.random.key(0), {"teacher": params})
    _, metrics = method.step(
        state, {"teacher": params}, batch, key, {"num_steps": jnp.int32(steps), "num_updates": jnp.int32(10)}
    )
    random = base.streams(key)
    index = np.floor(np.asarray(base.uniform(random["time"], 6, stratified=False)) * steps)
    s, m, t = (jnp.float32((index + shift) / steps) for shift in (0, 0.5, 1))
    log_snr = SCHEDULE.log_snr(s)
    z, _ = base.noised(random["noise"], base.images(batch), log_snr)
    target, _, _ = ddim.two_step_encoding_target(lambda z, at: model(params, z, at, Condition()), z, SCHEDULE, s, m, t)
    x_hat = model(params, z, log_snr, Condition())
    losses = weighting.get("snr_trunc")(log_snr) * jnp.mean(jnp.square(x_hat - target), axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["loss"], jnp.mean(losses), rtol=1e-2)
    assert float(metrics["loss"]) > 1e-4


def test_student_and_teacher_of_a_round_get_the_same_label_and_guidance_weight(batch):
    """A network that shows w and the label: were either drawn twice, the student would miss the teacher's output."""

    class Shown(nn.Module):
        num_classes: int = CLASSES
        output_channels: int = 1
        guidance_embedding: str = "mapped"

        @nn.compact
        def __call__(self, inputs, time, label=None, guidance=None, *, deterministic=True):
            scale = self.param("scale", nn.initializers.ones, ())
            return scale * jnp.broadcast_to((guidance + label)[:, None, None, None], inputs.shape)

    model = Denoiser(Shown(), parameterisation.get("x"), CLASSES, (4, 4, 1))
    method = halving(model, SCHEDULE, weighting.get("constant"), UPDATER, guidance_range=(0.0, 4.0))
    teacher_params = model.init(jax.random.key(0))
    state = method.init(jax.random.key(0), {"teacher": teacher_params})
    for seed in range(3):
        _, metrics = method.step(state, {"teacher": teacher_params}, batch, jax.random.key(seed), ARGUMENTS)
        assert float(metrics["loss"]) < 1e-8  # a constant x_hat is its own target
    twice = jax.tree.map(lambda leaf: 2 * leaf, teacher_params)
    _, metrics = method.step(state, {"teacher": twice}, batch, jax.random.key(0), ARGUMENTS)
    assert float(metrics["loss"]) > 0.1


def test_a_round_sees_every_step_of_the_student_and_no_other():
    seen = set()
    for seed in range(40):
        draws = base.uniform(jax.random.key(seed), 16, stratified=True)
        seen |= set(np.floor(np.asarray(draws) * 8).astype(int).tolist())
    assert seen == set(range(8))


def test_training_reduces_the_loss_of_a_round(batch):
    """A student of one step learns what the teacher does in two."""
    model = denoiser(num_classes=0)
    params = randomised(model.init(jax.random.key(1)))
    method = halving(model, SCHEDULE, weighting.get("snr_trunc"), Updater(Optimization(learning_rate=3e-3)))
    state = method.init(jax.random.key(0), {"teacher": params})
    step = jax.jit(method.step)
    arguments = {"num_steps": jnp.int32(1), "num_updates": jnp.int32(60)}
    losses = []
    for update in range(60):
        state, metrics = step(state, {"teacher": params}, batch, jax.random.key(update), arguments)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


class Recorder(nn.Module):
    """A network that shows which labels it was given: its output is the label, everywhere."""

    num_classes: int = CLASSES
    output_channels: int = 1
    guidance_embedding: str = "none"

    @nn.compact
    def __call__(self, inputs, time, label=None, guidance=None, *, deterministic=True):
        scale = self.param("scale", nn.initializers.ones, ())
        return scale * jnp.broadcast_to(label.astype(jnp.float32)[:, None, None, None], inputs.shape)


@pytest.mark.parametrize(("dropout", "null_share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_labels_are_dropped_to_the_null_class_as_often_as_asked(dropout, null_share):
    model = Denoiser(Recorder(), parameterisation.get("x"), CLASSES, (4, 4, 1))
    method = teacher(model, SCHEDULE, weighting.get("constant"), UPDATER, label_dropout=dropout)
    size = 2000
    batch = {"image": jnp.zeros((size, 4, 4, 1), jnp.float32), "label": jnp.zeros((size,), jnp.int32)}
    state = method.init(jax.random.key(0), {})
    _, metrics = method.step(state, {}, batch, jax.random.key(1), ARGUMENTS)
    # Label 0 costs nothing against the image 0, the null class CLASSES costs its square.
    share = float(metrics["loss"]) / CLASSES**2
    assert share == pytest.approx(null_share, abs=0.04 if 0 < null_share < 1 else 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_students_for_two_branches_learn_the_null_class_too(dropout):
    """Teacher and student of a round show their label: they differ by its scale, and the share of nulls is as asked."""
    model = Denoiser(Recorder(), parameterisation.get("x"), CLASSES, (4, 4, 1))
    method = halving(model, SCHEDULE, weighting.get("constant"), UPDATER, label_dropout=dropout)
    size = 2000
    batch = {"image": jnp.zeros((size, 4, 4, 1), jnp.float32), "label": jnp.zeros((size,), jnp.int32)}
    params = model.init(jax.random.key(0))
    state = method.init(jax.random.key(0), {"teacher": params})
    twice = jax.tree.map(lambda leaf: 2 * leaf, params)
    _, metrics = method.step(state, {"teacher": twice}, batch, jax.random.key(1), ARGUMENTS)
    assert float(metrics["loss"]) / CLASSES**2 == pytest.approx(dropout, abs=0.04 if dropout else 1e-6)


def test_the_loss_per_log_snr_bin_adds_up_to_the_loss(teacher_params, batch):
    method = teacher(denoiser(), SCHEDULE, weighting.get("snr_trunc"), UPDATER, label_dropout=0.1)
    state = method.init(jax.random.key(0), {})
    _, metrics = method.step(state, {}, batch, jax.random.key(1), ARGUMENTS)
    random = base.streams(jax.random.key(1))
    log_snr = np.asarray(SCHEDULE.log_snr(base.training_times(random["time"], 6, SCHEDULE, stratified=False)))
    counts = np.histogram(log_snr, bins=base.LOG_SNR_BINS, range=(-20, 20))[0]
    bins = np.asarray(metrics["loss_by_log_snr"])
    np.testing.assert_array_equal(np.isnan(bins), counts == 0)
    np.testing.assert_allclose(np.nansum(bins * counts) / 6, metrics["loss"], rtol=1e-5)


def test_every_output_trains_with_every_weight(batch):
    for output in ("x", "eps", "v", "both", "edm"):
        parameters = parameterisation.get(output)
        network = UNet(
            channels=8,
            multipliers=(1,),
            embedding=16,
            output_channels=parameters.output_channels(1),
            blocks_per_level=1,
            num_groups=4,
            num_classes=CLASSES,
        )
        model = Denoiser(network, parameters, CLASSES, (4, 4, 1))
        params = randomised(model.init(jax.random.key(0)))

        @jax.jit
        def step(state, index, model=model):
            def weight(log_snr):
                return jax.lax.switch(index, [weighting.get(name) for name in weighting.WEIGHTS], log_snr)

            method = teacher(model, SCHEDULE, weight, UPDATER)  # one compilation for all weights
            return method.step(state, {}, batch, jax.random.key(1), ARGUMENTS)[1]

        state = UPDATER.init(params)
        for index, name in enumerate(weighting.WEIGHTS):
            metrics = step(state, index)
            assert np.isfinite(float(metrics["loss"])), (output, name)
            assert float(metrics["gradient_norm"]) > 0, (output, name)


def test_discrete_teachers_are_trained_at_their_own_times():
    discrete = schedules.get("discrete_linear", num_train_steps=50)
    times = np.asarray(base.training_times(jax.random.key(0), 4000, discrete, stratified=False)) * 50
    np.testing.assert_allclose(times, np.round(times), atol=1e-4)
    assert times.min() == 1
    assert times.max() == 50


@pytest.mark.parametrize("stratified", [False, True])
def test_uniform_draws_stay_below_one_and_have_uniform_marginals(stratified):
    draws = np.stack([base.uniform(jax.random.key(seed), 64, stratified=stratified) for seed in range(200)])
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.1)  # of every row, not only of the whole batch
    np.testing.assert_allclose(draws.std(axis=0), 12**-0.5, atol=0.06)
    gaps = np.diff(np.sort(draws, axis=1), axis=1)
    assert np.allclose(gaps, 1 / 64, atol=1e-6) == stratified


def test_bytes_become_the_range_of_the_model_and_floats_are_left_alone():
    image = jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(base.images({"image": image}).ravel(), [-1.0, 1.0])
    latents = jnp.array([-3.5, 7.0], jnp.float32).reshape(2, 1, 1, 1)
    np.testing.assert_array_equal(base.images({"image": latents}), latents)
