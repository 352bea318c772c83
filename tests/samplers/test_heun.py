"""The samplers of EDM: golden ends of a closed-form denoiser, order, identities with DDIM, churn, evaluations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill import samplers
from diffdistill.diffusion import parameterisation, process, schedules
from diffdistill.samplers import ddim, heun, sigmas

COSINE = schedules.get("cosine")
ONE = jnp.ones((1, 1, 1, 1))
EXACT = 80 * np.sqrt(0.25 / (0.25 + 80**2))  # of the ODE from x = 80 at s = 80
assert round(EXACT, 7) == 0.4999902  # spec 03


def gaussian(z, log_snr):
    """The exact denoiser of data N(0, 0.25)."""
    a, s = process.alpha(log_snr), process.sigma(log_snr)
    return process.expand(0.25 * a / (0.25 * a**2 + s**2), z) * z


def crooked(z, log_snr):
    """A denoiser that is neither linear nor the same for every image or pixel."""
    return jnp.tanh(jnp.sin(3 * z) + 0.1 * process.expand(log_snr, z) + jnp.roll(z, 1, axis=1))


def noise(count=3):
    return jnp.asarray(np.random.default_rng(10).standard_normal((count, 3, 3, 1)), jnp.float32)


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


@functools.cache
def ends(name, **settings):
    """num_steps -> the end from x = 80, from one compilation."""
    keys = keys_of(0) if name == "churn" else None
    run = lambda n: samplers.get(name)(gaussian, ONE, COSINE, n, keys=keys, clip=False, **settings).squeeze()  # noqa: E731
    compiled = jax.jit(run)
    return lambda num_steps: float(compiled(jnp.int32(num_steps)))


@pytest.mark.parametrize(
    ("num_steps", "golden"), [(5, 1.2578863), (10, 0.6097980), (18, 0.5276246), (40, 0.5048769), (256, 0.5000954)]
)
def test_golden_ends_of_heun(num_steps, golden):
    assert ends("heun")(num_steps) == pytest.approx(golden, abs=1e-5)


@pytest.mark.parametrize(("alpha", "golden"), [(0.5, 0.4977746), (2 / 3, 0.5060942)])
def test_golden_ends_of_midpoint_and_ralston(alpha, golden):
    assert ends("heun", alpha=alpha)(18) == pytest.approx(golden, abs=1e-5)


def errors(run, counts):
    return np.abs([run(num_steps) - EXACT for num_steps in counts])


def test_heun_converges_with_the_square():
    found = errors(ends("heun"), (32, 64, 128))
    np.testing.assert_allclose(found[:-1] / found[1:], 4, rtol=0.2)


@pytest.mark.parametrize(("alpha", "counts"), [(0.5, (16, 32, 64)), (2 / 3, (32, 64, 128))])
def test_the_family_converges_at_least_with_the_square(alpha, counts):
    """For this denoiser the leading error of the midpoint rule cancels: 8 instead of 4."""
    found = errors(ends("heun", alpha=alpha), counts)
    assert (found[:-1] / found[1:] > 3.2).all()


def test_euler_converges_linearly_and_is_far_behind():
    found = errors(ends("euler"), (128, 256, 512))
    np.testing.assert_allclose(found[:-1] / found[1:], 2, rtol=0.1)
    assert found[1] > 10 * errors(ends("heun"), (128,))[0]  # at equal cost


def test_one_step_returns_the_prediction_at_the_highest_level():
    z = noise()
    log_snr = jnp.full(3, process.log_snr_from_ve_sigma(80.0))
    expected = crooked(80 / np.sqrt(1 + 80**2) * z, log_snr)
    for name in ("euler", "heun", "churn"):
        got = samplers.get(name)(crooked, z, COSINE, 1, keys=keys_of(0, 1, 2), clip=False, **quiet(name))
        np.testing.assert_allclose(got, expected, atol=2e-5)


def quiet(name):
    return {"s_churn": 0.0} if name == "churn" else {}


def test_a_euler_step_is_a_ddim_step():
    """DDIM, a rotation in the VP form, at EDM's levels is Euler in sigma in the VE form, over a whole path."""
    num_steps = 7
    own = sigmas.DISCRETISATIONS["edm"].make(0.002, 80.0, 7.0)

    def log_snr(t):
        i = jnp.round(num_steps * (1 - jnp.asarray(t, dtype=float))).astype(jnp.int32)
        return process.log_snr_from_ve_sigma(own(jnp.minimum(i, num_steps - 1), jnp.int32(num_steps)))

    at_its_levels = schedules.Schedule("edm levels", log_snr)
    z = noise()
    # Both start from the state 80 z of the VE form.
    start = process.ve_to_vp(80.0 * z, jnp.full(3, process.log_snr_from_ve_sigma(80.0)))
    for clip in (False, True):
        by_rotation = ddim.sample(crooked, start, at_its_levels, num_steps, clip=clip)
        np.testing.assert_allclose(heun.euler(crooked, z, COSINE, num_steps, clip=clip), by_rotation, atol=3e-5)


def test_the_path_is_that_of_the_denoiser_whatever_network_or_schedule_it_comes_from():
    """One D as an edm network, as a v network of a cosine schedule, and under three schedules: one image."""
    z = noise()

    def through(name):
        output = parameterisation.get(name)

        def denoise(z, log_snr):
            x_hat = crooked(z, log_snr)
            a, s = process.expand(process.alpha(log_snr), z), process.expand(process.sigma(log_snr), z)
            network = output.target(x_hat, (z - a * x_hat) / s, log_snr)
            return output.to_x(network, z, log_snr)

        return denoise

    expected = heun.sample(crooked, z, schedules.get("edm"), 9, clip=False)
    for name, schedule in (("edm", "edm"), ("v", "cosine"), ("v", "ve"), ("x", "vp")):
        got = heun.sample(through(name), z, schedules.get(schedule), 9, clip=False)
        np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.parametrize(("num_steps", "golden"), [(18, 1.6933846), (256, 3.7559039)])
def test_golden_ends_of_churn(num_steps, golden, monkeypatch):
    """Every draw replaced by +1; the settings are the defaults, 40/.05/50/1.003."""
    monkeypatch.setattr(heun, "step_noise", lambda keys, i, like: jnp.ones_like(like))
    got = heun.churn(gaussian, ONE, COSINE, num_steps, keys=keys_of(0), clip=False)
    assert float(got.squeeze()) == pytest.approx(golden, abs=1e-5)


def test_churn_of_nothing_is_heun_bit_for_bit():
    keys, z = keys_of(0, 1, 2), noise()
    for alpha in (1.0, 0.5):
        expected = heun.sample(crooked, z, COSINE, 9, alpha=alpha)
        np.testing.assert_array_equal(heun.churn(crooked, z, COSINE, 9, keys=keys, alpha=alpha, s_churn=0.0), expected)
        outside = heun.churn(crooked, z, COSINE, 9, keys=keys, alpha=alpha, s_tmin=90.0, s_tmax=100.0)
        np.testing.assert_allclose(outside, expected, atol=2e-5)
    assert (
        float(jnp.abs(heun.churn(crooked, z, COSINE, 9, keys=keys) - heun.sample(crooked, z, COSINE, 9)).max()) > 0.01
    )


def test_churn_draws_the_gaussian_that_it_denoises():
    """Fresh noise at every level, and the spread of the data stays, up to the error of the steps."""
    count = 1 << 14
    z = jnp.asarray(np.random.default_rng(8).standard_normal((count, 1, 1, 1)), jnp.float32)
    run = jax.jit(lambda n: heun.churn(gaussian, z, COSINE, n, keys=keys_of(*range(count)), clip=False, s_noise=1.0))
    got = run(jnp.int32(64))
    assert float(jnp.std(got)) == pytest.approx(0.5, rel=0.03)
    correlation = np.corrcoef(np.asarray(got).ravel(), np.asarray(z).ravel())[0, 1]
    assert abs(correlation) < 0.1  # of the first noise little is left; Heun's correlation is 1


def test_noise_of_image_k_comes_from_key_k_alone():
    keys, z = keys_of(0, 1, 2, 3, 4), noise(5)
    run = jax.jit(lambda z, keys: heun.churn(crooked, z, COSINE, 6, keys=keys))
    together = run(z, keys)
    for k in range(5):
        np.testing.assert_allclose(run(z[k : k + 1], keys[k : k + 1])[0], together[k], atol=1e-5)
    changed = np.abs(run(z, keys_of(0, 1, 77, 3, 4)) - together).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(changed, [False, False, True, False, False])
    with pytest.raises(ValueError, match="the churn sampler needs one typed key per image"):
        heun.churn(crooked, z, COSINE, 6, keys=None)


@pytest.mark.parametrize("choice", heun.TUNED_CHURN)
def test_published_settings_are_settings_of_churn(choice):
    tuned = heun.TUNED_CHURN[choice]
    assert samplers.settings_of("churn", tuned) == tuned
    got = heun.churn(crooked, noise(), COSINE, 4, keys=keys_of(0, 1, 2), **tuned)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("num_steps", [1, 5, 10, 18, 40, 256])
def test_the_network_is_asked_as_often_as_is_said(num_steps):
    seen = []

    def counted(z, log_snr):
        jax.debug.callback(lambda level: seen.append(float(level)), log_snr[0])
        return gaussian(z, log_snr)

    for name, settings, expected in (
        ("ddim", {}, num_steps),
        ("ancestral", {}, num_steps),
        ("euler", {}, num_steps),
        ("heun", {}, 2 * num_steps - 1),
        ("churn", {}, 2 * num_steps - 1),
        ("ablation", {}, 2 * num_steps - 1),
        ("ablation", {"solver": "euler"}, num_steps),
    ):
        seen.clear()
        jax.block_until_ready(samplers.get(name)(counted, ONE, COSINE, num_steps, keys=keys_of(0), **settings))
        jax.effects_barrier()
        assert len(seen) == expected == samplers.num_evaluations(name, num_steps, settings)


@pytest.mark.parametrize("name", ["euler", "heun", "churn", "ablation"])
def test_one_program_with_one_network_serves_every_number_of_steps(name):
    traces = []

    def counted(z, log_snr):
        traces.append(name)
        return gaussian(z, log_snr)

    run = jax.jit(lambda n: samplers.get(name)(counted, ONE, COSINE, n, keys=keys_of(0)))
    for num_steps in (1, 2, 18):
        assert np.isfinite(run(jnp.int32(num_steps))).all()
    assert len(traces) == 1


def levels_seen(sampler, schedule, num_steps, **settings):
    seen = []

    def denoise(z, log_snr):
        jax.debug.callback(lambda level: seen.append(float(np.exp(-0.5 * level))), log_snr[0], ordered=True)
        return gaussian(z, log_snr)

    jax.block_until_ready(samplers.get(sampler)(denoise, ONE, schedule, num_steps, keys=keys_of(0), **settings))
    jax.effects_barrier()
    return np.array(seen)


@pytest.mark.parametrize("sampler", ["euler", "heun", "churn"])
def test_a_discrete_model_is_asked_at_levels_of_its_table_alone(sampler):
    schedule = schedules.get("discrete_cosine")
    table = np.asarray(schedule.nearest_sigma(schedules.discrete_sigmas(schedules.cosine_betas(1000))), np.float64)
    found = levels_seen(sampler, schedule, 12)
    assert (np.abs(found[:, None] / table - 1).min(axis=1) < 1e-5).all()
    if sampler != "churn":
        assert found.max() == pytest.approx(80.2037, rel=1e-5)  # nearest to 80
    assert found.min() == pytest.approx(0.00642541, rel=1e-5)


def test_levels_stay_within_the_process_and_the_range_that_was_asked_for():
    narrow = schedules.get("ve", log_snr_max=-2 * np.log(0.02))
    assert levels_seen("heun", narrow, 5)[[0, -1]] == pytest.approx([80, 0.02], rel=1e-5)
    assert levels_seen("heun", COSINE, 5, sigma_min=0.1, sigma_max=5.0)[[0, -1]] == pytest.approx([5, 0.1], rel=1e-5)


def test_clipping_limits_every_prediction_and_can_be_left_off():
    far = lambda z, log_snr: jnp.full_like(z, 3.0)  # noqa: E731
    for name in ("euler", "heun"):
        np.testing.assert_allclose(samplers.get(name)(far, ONE, COSINE, 4), 1.0, atol=1e-5)
        np.testing.assert_allclose(samplers.get(name)(far, ONE, COSINE, 4, clip=False), 3.0, atol=1e-5)


def test_a_plain_number_of_steps_gives_the_same_and_has_gradients():
    run = lambda z: heun.sample(crooked, z, COSINE, 4, clip=False)  # noqa: E731
    traced = jax.jit(lambda n: heun.sample(crooked, noise(), COSINE, n, clip=False))(jnp.int32(4))
    np.testing.assert_allclose(run(noise()), traced, atol=1e-5)
    gradient = jax.grad(lambda z: run(z).sum())(noise())
    assert np.isfinite(gradient).all()
    assert float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize("name", ["euler", "heun", "churn", "ablation"])
def test_strict_promotion_rules_are_kept(name):
    settings = {"discretisation": "iddpm", "noise_schedule": "vp", "scaling": "vp"} if name == "ablation" else {}
    for schedule in (COSINE, schedules.get("discrete_cosine")):
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            out = samplers.get(name)(
                gaussian, jnp.ones((2, 2, 2, 1)), schedule, jnp.int32(3), keys=keys_of(0, 1), **settings
            )
        assert out.shape == (2, 2, 2, 1)
        assert out.dtype == jnp.float32


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="num_steps=0: a sampler takes at least 1 step"):
        heun.sample(gaussian, ONE, COSINE, 0)
    for setting, what in (("solver", "solver"), ("scaling", "scaling"), ("noise_schedule", "noise schedule")):
        with pytest.raises(ValueError, match=f"unknown {what} 'rk4'"):
            heun.ablation(gaussian, ONE, COSINE, 3, **{setting: "rk4"})
    with pytest.raises(ValueError, match="leave no noise levels"):
        heun.sample(gaussian, ONE, COSINE, 3, sigma_min=100.0)
