"""DisBack and Diff-Instruct on Gaussians: three roles, what each learns, and what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussians import SHAPE, denoiser, params, posterior_mean

from diffdistill.diffusion import noise, process, weighting
from diffdistill.methods import base, disback, score_distillation, walk
from diffdistill.samplers import one_step
from diffdistill.training.relay import Relay, timed
from diffdistill.training.state import Optimization, Updater

MODEL = denoiser()
ORIGIN = disback.Origin(MODEL, float(process.log_snr_from_ve_sigma(1.0)))
TEACHER = params([0.8, -0.5], [0.35, 0.5])
UPDATER = Updater(Optimization(learning_rate=2e-2, b1=0.0, gradient_clip=0.0, anneal="linear"))
FAKE_UPDATER = Updater(Optimization(learning_rate=2e-2, b1=0.0, gradient_clip=0.0))
BATCH = {"label": jnp.zeros((512,), jnp.int32)}
ARGUMENTS = {"num_steps": jnp.int32(1), "num_updates": jnp.int32(300)}


def levels(key, batch_size):
    return noise.lognormal(jax.random.uniform(key, (batch_size,)))


def distillation(signal="diff_instruct", **options):
    weight = weighting.get("edm")
    return disback.distillation(
        "disback",
        ORIGIN,
        MODEL,
        score_distillation.get(signal),
        levels,
        levels,
        weight,
        UPDATER,
        FAKE_UPDATER,
        **options,
    )


def degradation():
    return disback.degradation(ORIGIN, MODEL, levels, weighting.get("edm"), FAKE_UPDATER)


def moments(generator):
    """Mean and standard deviation of what a generator makes, in closed form."""
    variance = np.exp(2 * np.asarray(generator["log_std"]))
    return np.asarray(generator["mean"]) / (1 + variance), variance / (1 + variance)


def generator_of(mean, std):
    """Parameters of the generator that makes N(mean, std^2), std below 1: the inverse of `moments`."""
    variance = np.asarray(std) / (1 - np.asarray(std))
    return params(np.asarray(mean) * (1 + variance), np.sqrt(variance))


def run(method, state, frozen, updates):
    step = jax.jit(method.step)
    rows = []
    for update in range(updates):
        key = jax.random.fold_in(jax.random.key(1), update)
        state, metrics = step(state, frozen(update), BATCH, key, ARGUMENTS)
        rows.append(metrics)
    return state, rows


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)))


@pytest.fixture(scope="module")
def path():
    """The checkpoints s'_0 .. s'_4 of a degradation, and the loss before each."""
    method = degradation()
    sources = {"teacher": TEACHER}
    state, checkpoints, losses = method.init(jax.random.key(0), sources), [TEACHER], []
    step = jax.jit(method.step)
    for update in range(80):
        key = jax.random.fold_in(jax.random.key(2), update)
        state, metrics = step(state, {"generator": TEACHER}, BATCH, key, ARGUMENTS)
        losses.append(float(metrics["loss"]))
        if (update + 1) % 20 == 0:
            checkpoints.append(method.export(state))
    return checkpoints, np.array(losses).reshape(4, 20).mean(axis=1)


def test_samples_are_the_denoised_noise_of_one_level():
    eps = jax.random.normal(jax.random.key(0), (7, *SHAPE))
    sigma = 1.5
    log_snr = process.log_snr_from_ve_sigma(sigma)
    found = one_step.generate(lambda z, at: MODEL(TEACHER, z, at, disback.Condition()), eps, log_snr)
    std = np.exp(np.asarray(TEACHER["log_std"]))
    expected = TEACHER["mean"] + std**2 / (std**2 + sigma**2) * (sigma * eps.reshape(-1, 2) - TEACHER["mean"])
    np.testing.assert_allclose(found.reshape(-1, 2), expected, rtol=1e-4, atol=1e-5)


def test_the_denoising_loss_falls_along_the_path_and_its_end_knows_the_generator(path):
    checkpoints, losses = path
    assert (np.diff(losses[:3]) < 0).all()
    assert losses[3] < 1.02 * losses[2]  # it has arrived
    mean, std = moments(TEACHER)

    def distance(checkpoint):
        return np.abs(checkpoint["mean"] - mean).max() + np.abs(np.exp(checkpoint["log_std"]) - std).max()

    distances = [distance(checkpoint) for checkpoint in checkpoints]
    assert (np.diff(distances[:4]) < 0).all()
    assert distances[-1] < 0.2 * distances[0]


def test_stage_two_starts_as_it_is_told_and_bit_for_bit(path):
    end = path[0][-1]
    state = distillation().init(jax.random.key(0), {"generator": TEACHER, "fake": end})
    assert same(state.params, TEACHER)
    assert same(state.fake.params, end)
    assert int(state.step) == 0


def test_an_adaptive_walk_takes_every_target_and_ends_at_the_teacher(path):
    """Each target is left when the two denoisers come no nearer, long before the updates that a fixed walk gives it."""
    checkpoints = path[0]
    method, longest = distillation(pace=walk.Pace(5, 0.02, 100)), 100
    state = method.init(jax.random.key(0), {"generator": TEACHER, "fake": checkpoints[-1]})
    order = walk.targets(range(5), 4)
    relay = Relay(range(0, 300, 5), 4, lambda n, state: int(state.walk.position), lambda k: checkpoints[order[k]])
    rows, arguments = [], {**ARGUMENTS, "num_targets": jnp.int32(4)}
    step = jax.jit(method.step)
    for update in range(300):
        target = relay.at(update, state)
        assert target is checkpoints[order[int(state.walk.position)]]
        state, metrics = step(state, {"teacher": target}, BATCH, jax.random.key(update), arguments)
        rows.append(int(metrics["target"]))
    relay.close()
    assert sorted(set(rows)) == [0, 1, 2, 3]
    lengths = [rows.count(number) for number in range(3)]
    assert all(10 <= length <= longest and length % 5 == 0 for length in lengths)  # one window is no comparison
    assert sum(lengths) < 3 * longest
    np.testing.assert_allclose(moments(state.params)[0], TEACHER["mean"], atol=0.06)


def test_the_generator_comes_to_make_what_the_teacher_knows(path):
    """Both with and without the path; both from samples that are far from the teacher's."""
    checkpoints = path[0]
    mean, std = np.asarray(TEACHER["mean"]), np.exp(np.asarray(TEACHER["log_std"]))
    before = moments(TEACHER)
    assert np.abs(before[1] - std).max() > 0.2
    for end, back in ((checkpoints[-1], True), (TEACHER, False)):
        order = walk.targets(range(5), 4) if back else (0,)
        state = distillation().init(jax.random.key(0), {"generator": TEACHER, "fake": end})
        relay = timed(range(0, 40 * len(order), 40), lambda k, order=order: {"teacher": checkpoints[order[k]]})
        state, rows = run(distillation(), state, lambda update, relay=relay: relay.at(update, None), 300)
        relay.close()
        found = moments(state.params)
        np.testing.assert_allclose(found[0], mean, atol=0.06)
        np.testing.assert_allclose(found[1], std, atol=0.06)
        learnt = state.fake.params
        np.testing.assert_allclose(learnt["mean"], found[0], atol=0.06)
        first, last = (np.mean([row["mismatch"] for row in part]) for part in (rows[:20], rows[-20:]))
        assert back or last < 0.5 * first


def test_swapping_the_target_traces_nothing_and_changes_the_update(path):
    checkpoints = path[0]
    method, traces = distillation(), []

    @jax.jit
    def step(state, frozen, key):
        traces.append(1)
        return method.step(state, frozen, BATCH, key, ARGUMENTS)

    start = method.init(jax.random.key(0), {"generator": TEACHER, "fake": checkpoints[-1]})
    moved = [step(start, {"teacher": target}, jax.random.key(5))[0] for target in checkpoints]
    assert len(traces) == 1
    assert not any(same(moved[i].params, moved[i + 1].params) for i in range(4))
    assert same(moved[0].fake, moved[1].fake)  # which has nothing to do with the target


def test_the_first_update_follows_the_exact_signal():
    """One update of the generator alone, by hand: plain gradient of the closed form on the draws of the step."""

    class Keeps:
        init = staticmethod(UPDATER.init)
        averaged = staticmethod(UPDATER.averaged)

        def apply(self, state, grads, num_updates):
            return state.replace(params=grads, step=state.step + 1), {"gradient_norm": jnp.float32(0)}

    fake = params([0.1, 0.2], [0.6, 0.3])
    method = disback.distillation(
        "diff_instruct",
        ORIGIN,
        MODEL,
        score_distillation.diff_instruct,
        levels,
        levels,
        weighting.get("edm"),
        Keeps(),
        FAKE_UPDATER,
        fake_first=False,
    )
    state = method.init(jax.random.key(0), {"generator": TEACHER, "fake": fake})
    key = jax.random.key(8)
    found, _ = jax.jit(method.step)(state, {"teacher": TEACHER}, BATCH, key, ARGUMENTS)

    random = base.streams(jax.random.fold_in(key, 0))
    eps = jax.random.normal(random["latent"], (512, *SHAPE))
    log_snr = levels(random["time"], 512)

    def make(generator):
        return one_step.generate(lambda z, at: MODEL(generator, z, at, disback.Condition()), eps, ORIGIN.log_snr)

    z, _ = base.noised(random["noise"], make(TEACHER), log_snr)
    delta = [
        posterior_mean(z, log_snr, role["mean"], jnp.diag(jnp.exp(2 * role["log_std"]))) for role in (fake, TEACHER)
    ]
    _, back = jax.vjp(make, TEACHER)
    (expected,) = back((delta[0] - delta[1]) / 512)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), found.params, expected)
    assert not same(found.fake.params, fake)


@pytest.mark.parametrize("fake_first", [True, False])
def test_cadence_and_order(fake_first):
    """So many updates of the fake denoiser to one of the generator, which sees the newest only if it comes last."""
    method = distillation(fake_updates=3, fake_first=fake_first)
    sources = {"generator": TEACHER, "fake": TEACHER}  # equal to the target: only a fake that has learnt says anything
    state, _ = jax.jit(method.step)(
        method.init(jax.random.key(0), sources), {"teacher": TEACHER}, BATCH, jax.random.key(1), ARGUMENTS
    )
    assert (int(state.step), int(state.fake.step)) == (1, 3)
    assert same(state.params, TEACHER) != fake_first


@pytest.mark.parametrize("signal", ["dmd2", "sid"])
def test_the_other_signals_bring_the_generator_to_the_teacher_too(signal):
    method = distillation(signal, fake_updates=2)
    state = method.init(jax.random.key(0), {"generator": TEACHER, "fake": TEACHER})
    state, _ = run(method, state, lambda n: {"teacher": TEACHER}, 300)
    found = moments(state.params)
    np.testing.assert_allclose(found[0], TEACHER["mean"], atol=0.08)
    np.testing.assert_allclose(found[1], np.exp(np.asarray(TEACHER["log_std"])), atol=0.08)


def test_a_batch_in_parts_is_an_update_of_both(path):
    state = distillation(parts=4).init(jax.random.key(0), {"generator": TEACHER, "fake": path[0][-1]})
    state, rows = run(distillation(parts=4), state, lambda n: {"teacher": TEACHER}, 2)
    assert int(state.step) == 2
    assert np.isfinite([float(row[name]) for row in rows for name in ("loss", "mismatch", "fake_gradient_norm")]).all()


def test_the_mismatch_by_level_adds_up(path):
    _, rows = run(
        distillation(),
        distillation().init(jax.random.key(0), {"generator": TEACHER, "fake": path[0][-1]}),
        lambda n: {"teacher": TEACHER},
        1,
    )
    log_snr = levels(base.streams(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 0))["time"], 512)
    counts = np.histogram(np.clip(log_snr, -8, 7.999), bins=base.LOG_SNR_BINS, range=disback.MISMATCH_RANGE)[0]
    bins = np.asarray(rows[0]["mismatch_by_log_snr"])
    np.testing.assert_allclose(np.nansum(bins * counts) / 512, rows[0]["mismatch"], rtol=1e-4)
    assert (counts > 0).sum() > 3
