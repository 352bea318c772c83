"""The distillation target: one student step lands where two teacher steps land."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.diffusion import process, schedules
from diffdistill.samplers import ddim

COSINE = schedules.get("cosine")
LENGTHS = (1, 2, 4, 16, 128, 1024, 4096)
BATCH = 81  # steps of a student looked at; one shape for every length, so that everything compiles once


def crooked(z, log_snr):
    """A bounded teacher that is neither linear nor the same at every time."""
    return jnp.tanh(jnp.sin(3 * z) + 0.3 * process.expand(log_snr, z) * jnp.roll(z, 1, axis=2))


def times_of(num_steps):
    """Times t, m, s of steps i of an N-step student, the first ones, the last ones and some between."""
    i = np.concatenate([np.arange(8), np.linspace(8, num_steps - 9, BATCH - 16).round(), num_steps - 8 + np.arange(8)])
    i = np.clip(i, 0, num_steps - 1).astype(np.int64)
    return tuple(jnp.asarray(((i + d) / num_steps).astype(np.float32)) for d in (1.0, 0.5, 0.0))


two_step_target = jax.jit(lambda z_t, t, m, s: ddim.two_step_target(crooked, z_t, COSINE, t, m, s))


def noisy(t, schedule=COSINE):
    draw, shape = np.random.default_rng(12), (BATCH, 3, 3, 2)
    x = jnp.asarray(draw.uniform(-1, 1, shape), jnp.float32)
    eps = jnp.asarray(draw.standard_normal(shape), jnp.float32)
    return process.add_noise(x, eps, schedule.log_snr(t))


def two_teacher_steps(teacher, z_t, t, m, s, schedule=COSINE):
    """(z_m, x2, z_s) by two plain DDIM steps."""
    log_snr_t, log_snr_m, log_snr_s = (schedule.log_snr(a) for a in (t, m, s))
    z_m = ddim.step(teacher(z_t, log_snr_t), z_t, log_snr_t, log_snr_m)
    x2 = teacher(z_m, log_snr_m)
    return z_m, x2, ddim.step(x2, z_m, log_snr_m, log_snr_s)


def published_target(z_t, x1, x2, t, m, s):
    """Salimans & Ho 2022, algorithm 2, in float64 from the teacher's two predictions; x2 where s = 0."""

    def columns(time):
        start, exact = np.arctan(np.exp(-10.0)), np.asarray(time, np.float64)
        theta = start + exact * (np.pi / 2 - 2 * start)
        return np.cos(theta)[:, None, None, None], np.sin(theta)[:, None, None, None]

    (alpha_t, sigma_t), (alpha_m, sigma_m), (alpha_s, sigma_s) = columns(t), columns(m), columns(s)
    z_t, x1, x2 = (np.asarray(a, np.float64) for a in (z_t, x1, x2))
    z_m = alpha_m * x1 + sigma_m / sigma_t * (z_t - alpha_t * x1)
    z_s = alpha_s * x2 + sigma_s / sigma_m * (z_m - alpha_m * x2)
    ratio = sigma_s / sigma_t
    at_end = np.asarray(s == 0)[:, None, None, None]
    return np.where(at_end, x2, (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t))


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_target_lies_between_the_two_predictions(num_steps):
    t, m, s = times_of(num_steps)
    target, x1, x2 = two_step_target(noisy(t), t, m, s)
    assert float(jnp.abs(x2 - x1).max()) > 1e-3
    assert (target >= jnp.minimum(x1, x2) - 2e-7).all()
    assert (target <= jnp.maximum(x1, x2) + 2e-7).all()


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_target_is_the_published_inversion(num_steps):
    t, m, s = times_of(num_steps)
    z_t = noisy(t)
    target, x1, x2 = two_step_target(z_t, t, m, s)
    np.testing.assert_allclose(target, published_target(z_t, x1, x2, t, m, s), atol=2e-6)


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_an_exact_student_lands_where_the_teacher_does(num_steps):
    """One DDIM step with x~ from t to s = the teacher's two; at s = 0 the step returns x~, the teacher x2."""
    t, m, s = times_of(num_steps)
    z_t = noisy(t)
    target, _, predicted = two_step_target(z_t, t, m, s)
    _, x2, z_s = two_teacher_steps(crooked, z_t, t, m, s)
    inner = np.asarray(s) > 0
    student = ddim.step(target, z_t, COSINE.log_snr(t), COSINE.log_snr(s))
    np.testing.assert_allclose(student[inner], z_s[inner], atol=5e-6)
    np.testing.assert_allclose(target[~inner], x2[~inner], atol=5e-6)
    np.testing.assert_allclose(predicted, x2, atol=5e-6)
    assert (~inner).any()


def test_a_perfect_student_samples_the_teachers_path():
    """A student that answers with the target draws, in N steps, the teacher's images of 2N steps."""
    for num_steps in (1, 4):
        z = jnp.asarray(np.random.default_rng(13).standard_normal((BATCH, 3, 3, 2)), jnp.float32)
        seen = iter(np.arange(num_steps, 0, -1))

        def student(z, log_snr, num_steps=num_steps, seen=seen):
            i = next(seen)
            t, m, s = (jnp.full(BATCH, a / num_steps, jnp.float32) for a in (i, i - 0.5, i - 1))
            np.testing.assert_allclose(log_snr, COSINE.log_snr(t), rtol=1e-6)
            return ddim.two_step_target(crooked, z, COSINE, t, m, s)[0]

        with jax.disable_jit():  # a plain loop, so that the student can count its calls
            few = ddim.sample(student, z, COSINE, num_steps, clip=False)
        many = ddim.sample(crooked, z, COSINE, 2 * num_steps, clip=False)
        np.testing.assert_allclose(few, many, atol=2e-4)


def test_weight_of_the_second_prediction():
    """Read off a teacher that says 0 at t and 1 at m: 1 at s = 0, then 0.66, 0.60, ... down to 0.50."""
    t, m, s = times_of(128)
    low = COSINE.log_snr(t)
    teacher = lambda z, log_snr: jnp.where(process.expand(log_snr > low, z), jnp.ones_like(z), 0.0)  # noqa: E731
    weight = ddim.two_step_target(teacher, noisy(t), COSINE, t, m, s)[0][:, 0, 0, 0]
    assert float(weight[0]) == 1.0
    np.testing.assert_allclose(weight[1:3], [0.667, 0.600], atol=1e-3)
    assert float(weight[-1]) == pytest.approx(0.5, abs=1e-3)
    assert (np.diff(weight) < 0).all()


def test_two_full_steps_of_the_stochastic_sampler_use_the_same_target():
    """t -> t - 1/N -> t - 2/N (Meng et al. 2023): nothing in the target assumes that m is half a step."""
    t, m, s = (jnp.linspace(0.3, 1.0, BATCH) - d for d in (0.0, 0.05, 0.25))
    z_t = noisy(t)
    target, _, _ = two_step_target(z_t, t, m, s)
    _, _, z_s = two_teacher_steps(crooked, z_t, t, m, s)
    np.testing.assert_allclose(ddim.step(target, z_t, COSINE.log_snr(t), COSINE.log_snr(s)), z_s, atol=3e-6)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_schedule_gives_a_finite_target_that_lands_right(name):
    schedule = schedules.get(name)
    t, m, s = times_of(250)
    z_t = noisy(t, schedule)
    target, x1, x2 = ddim.two_step_target(crooked, z_t, schedule, t, m, s)
    _, _, z_s = two_teacher_steps(crooked, z_t, t, m, s, schedule)
    inner = np.asarray(s) > 0
    student = ddim.step(target, z_t, schedule.log_snr(t), schedule.log_snr(s))
    np.testing.assert_allclose(student[inner], z_s[inner], atol=5e-6)
    assert (target >= jnp.minimum(x1, x2) - 2e-7).all()
    assert (target <= jnp.maximum(x1, x2) + 2e-7).all()


def test_a_discrete_schedule_asked_for_too_many_steps_stays_finite():
    """512 half steps on 100 training steps: t, m and s may be one point; the target is then its prediction."""
    schedule = schedules.get("discrete_linear", num_train_steps=100)
    t, m, s = times_of(512)
    target, _, _ = ddim.two_step_target(crooked, noisy(t, schedule), schedule, t, m, s)
    assert np.isfinite(target).all()


def test_gradients_through_the_target_are_finite():
    t, m, s = times_of(16)
    gradient = jax.grad(lambda z: jnp.sum(ddim.two_step_target(crooked, z, COSINE, t, m, s)[0] ** 2))(noisy(t))
    assert np.isfinite(gradient).all()
