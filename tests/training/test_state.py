"""What one gradient does to the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffdistill.training.state import Optimization, TrainState, Updater, ema_decay, learning_rate


def params() -> dict[str, jax.Array]:
    return {"w": jnp.arange(6.0).reshape(2, 3) / 3, "b": jnp.array([0.5, -1.0, 2.0])}


def gradient(step: int) -> dict[str, jax.Array]:
    key = jax.random.key(step)
    return {"w": jax.random.normal(key, (2, 3)), "b": jax.random.normal(jax.random.fold_in(key, 1), (3,))}


def run(optimization: Optimization, num_updates: int) -> tuple[TrainState, list[dict[str, jax.Array]], list[dict]]:
    updater = Updater(optimization)
    state, path, metrics = updater.init(params()), [], []
    apply = jax.jit(updater.apply)
    for step in range(num_updates):
        state, numbers = apply(state, gradient(step), num_updates)
        path.append(state.params)
        metrics.append(numbers)
    return state, path, metrics


@pytest.mark.parametrize("anneal", ["constant", "linear"])
def test_equals_the_optax_chain(anneal):
    """clip -> Adam -> decoupled decay -> scheduled rate, against optax's own pieces put together."""
    updates, warmup = 12, 4
    ours, _, metrics = run(
        Optimization(0.02, warmup_updates=warmup, anneal=anneal, weight_decay=0.1, gradient_clip=1.5, b2=0.99), updates
    )

    def schedule(count):
        fall = 1 - count / updates if anneal == "linear" else 1.0
        return 0.02 * jnp.minimum(1.0, (count + 1) / warmup) * fall

    reference = optax.chain(
        optax.clip_by_global_norm(1.5), optax.adamw(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)
    )
    expected, opt_state = params(), reference.init(params())
    update = jax.jit(reference.update)
    for step in range(updates):
        direction, opt_state = update(gradient(step), opt_state, expected)
        expected = optax.apply_updates(expected, direction)
        np.testing.assert_allclose(metrics[step]["learning_rate"], schedule(step), rtol=1e-6)
        np.testing.assert_allclose(metrics[step]["gradient_norm"], optax.tree.norm(gradient(step)), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours.params, expected)
    assert int(ours.step) == updates
    assert ours.ema is None


def test_rate_at_the_ends():
    constant = Optimization(0.3, warmup_updates=10)
    linear = Optimization(0.3, anneal="linear")
    assert learning_rate(constant, 0, 100) == pytest.approx(0.03)  # the first update moves
    assert learning_rate(constant, 9, 100) == learning_rate(constant, 99, 100) == pytest.approx(0.3)
    assert learning_rate(linear, 0, 100) == pytest.approx(0.3)  # the first update has the full rate
    assert learning_rate(linear, 99, 100) == pytest.approx(0.003, rel=1e-4)  # the last one 1/num_updates of it
    assert learning_rate(linear, 100, 100) == 0.0
    assert learning_rate(linear, 200, 100) == 0.0  # never negative


def test_the_length_of_the_anneal_is_traced():
    rate = jax.jit(lambda step, length: learning_rate(Optimization(1.0, anneal="linear"), step, length))
    assert rate(jnp.int32(5), jnp.int32(10)) == pytest.approx(0.5)
    assert rate(jnp.int32(5), jnp.int32(20)) == pytest.approx(0.75)
    assert rate._cache_size() == 1


def test_ema_is_the_weighted_sum_it_claims_to_be():
    decay, updates = 0.8, 9
    state, path, _ = run(Optimization(0.1, ema_decay=decay, ema_ramp=False), updates)
    weights = [decay**updates] + [(1 - decay) * decay ** (updates - 1 - i) for i in range(updates)]
    expected = jax.tree.map(lambda *leaves: sum(w * p for w, p in zip(weights, leaves, strict=True)), params(), *path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema, expected)
    assert Updater(Optimization(0.1)).averaged(state) is state.ema


def test_ema_ramp_starts_low_and_ends_at_the_decay():
    ramp = Optimization(0.1, ema_decay=0.99)
    assert ema_decay(ramp, 1) == pytest.approx(2 / 11)
    assert ema_decay(ramp, 10_000) == pytest.approx(0.99)


def test_the_average_of_edm_halves_in_its_half_life():
    """0.5^(1 / min(half-life, ratio x updates done)); the first update copies the parameters (Karras et al. 2022)."""
    optimization = Optimization(0.1, ema_half_life=8.0, ema_ramp_ratio=0.5)
    decays = [float(ema_decay(optimization, jnp.int32(step))) for step in range(1, 30)]
    assert decays[0] == 0.0
    expected = [0.5 ** (1 / min(8.0, 0.5 * (step - 1))) for step in range(2, 30)]
    np.testing.assert_allclose(decays[1:], expected, rtol=1e-6)
    state, path, _ = run(optimization, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema, path[0])
    unbounded = Optimization(0.1, ema_half_life=8.0)
    assert float(np.prod([float(ema_decay(unbounded, jnp.int32(step))) for step in range(1, 9)])) == pytest.approx(0.5)


def test_the_warm_up_of_edm_begins_at_rate_zero():
    optimization = Optimization(0.2, warmup_updates=2.5, warmup_from_zero=True)
    rates = [float(learning_rate(optimization, jnp.int32(step), 10)) for step in range(5)]
    np.testing.assert_allclose(rates, [0.0, 0.08, 0.16, 0.2, 0.2], rtol=1e-6)


def test_gradients_that_are_not_finite_are_replaced_where_asked():
    broken = {"w": gradient(0)["w"].at[0, 1].set(jnp.nan), "b": gradient(0)["b"].at[2].set(-jnp.inf)}
    whole = {"w": gradient(0)["w"].at[0, 1].set(0.0), "b": gradient(0)["b"].at[2].set(-1e5)}
    kept = Updater(Optimization(0.1, gradient_clip=0.0))
    replacing = Updater(Optimization(0.1, gradient_clip=0.0, replace_non_finite=True))
    found, metrics = replacing.apply(replacing.init(params()), broken, 3)
    expected, _ = kept.apply(kept.init(params()), whole, 3)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.isfinite(metrics["gradient_norm"])
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.apply(kept.init(params()), broken, 3)[0]))


def test_nothing_shares_memory():
    """A state that is donated must own every buffer, once; also when it is made inside jit."""
    source = params()
    updater = Updater(Optimization(0.1, ema_decay=0.9))
    for state in (updater.init(source), jax.jit(updater.init)(source)):
        arrays = [*jax.tree.leaves(source), *jax.tree.leaves(state)]
        pointers = [leaf.unsafe_buffer_pointer() for leaf in arrays]
        assert len(set(pointers)) == len(pointers)
        jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
        np.testing.assert_array_equal(source["b"], params()["b"])


@pytest.mark.parametrize(
    "wrong",
    [{"anneal": "cosine"}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"warmup_updates": -1}, {"gradient_clip": -1.0}],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Optimization(**{"learning_rate": 0.1, **wrong})
