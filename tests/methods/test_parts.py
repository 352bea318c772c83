"""A batch taken in parts: the gradient and the metrics of the whole batch, each part with draws of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.methods import base

ARGUMENTS = {"num_updates": jnp.int32(1)}


class Keeps:
    """An updater that keeps the gradient."""

    def init(self, params):
        return params

    def apply(self, state, grads, num_updates):
        return grads, {}

    def averaged(self, state):
        return state


class State(dict):
    """Parameters by attribute, as a training state has them."""

    params = property(lambda self: self["params"])


def step(loss, parts: int, batch, key=None):
    method = base.from_loss("test", lambda key, sources: sources, loss, Keeps(), parts=parts)
    state = State(params={"a": jnp.array([0.3, -0.2]), "b": jnp.float32(1.5)})
    return jax.jit(lambda batch, key: method.step(state, {}, batch, key, ARGUMENTS))(
        batch, jax.random.key(0) if key is None else key
    )


def batch(size: int = 12):
    random = np.random.default_rng(0)
    return {
        "image": jnp.asarray(random.normal(size=(size, 2)), jnp.float32),
        "label": jnp.asarray(random.integers(0, 5, size), jnp.int32),
    }


def squared(params, frozen, batch, key, arguments):
    errors = jnp.square(batch["image"] @ params["a"] - params["b"] * batch["label"])
    return errors.mean(), {"loss": errors.mean(), "bins": jnp.stack([errors.mean(), jnp.nan])}


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_have_the_gradient_and_the_loss_of_the_whole(parts):
    (expected, metrics), (found, others) = step(squared, 1, batch()), step(squared, parts, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(others["bins"], metrics["bins"], rtol=1e-5)  # NaN stays NaN where no part has examples


def test_every_part_draws_for_itself_and_takes_every_so_many_rows():
    def drawn(params, frozen, batch, key, arguments):
        value = jax.random.normal(key, ()) * params["b"]
        return value, {"loss": value, "labels": batch["label"]}

    size, parts = 12, 3
    key = jax.random.key(7)
    found, metrics = step(drawn, parts, {**batch(size), "label": jnp.arange(size, dtype=jnp.int32)}, key)
    draws = [float(jax.random.normal(jax.random.fold_in(key, index), ())) for index in range(parts)]
    assert len(set(draws)) == parts
    assert float(found["b"]) == pytest.approx(np.mean(draws), rel=1e-5)
    np.testing.assert_allclose(metrics["labels"], [1, 4, 7, 10])  # the mean over parts of rows 0, 3, ... 1, 4, ... 2, 5


def test_a_part_at_a_time_is_in_memory():
    """The largest intermediate of the program is that of one part."""

    def wide(params, frozen, batch, key, arguments):
        values = jnp.tanh(batch["image"] @ params["a"][:, None] * jnp.ones((1, 4096)))
        return jnp.square(values @ jnp.ones(4096)).mean(), {"loss": jnp.float32(0)}

    def memory(parts: int) -> int:
        method = base.from_loss("test", lambda key, sources: sources, wide, Keeps(), parts=parts)
        state = State(params={"a": jnp.ones(2), "b": jnp.float32(1)})
        compiled = jax.jit(lambda batch, key: method.step(state, {}, batch, key, ARGUMENTS)).lower(
            batch(512), jax.random.key(0)
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < 0.3 * memory(1)
