"""Steps of a discrete schedule drawn as often as their losses ask for (Nichol & Dhariwal 2021, section 3.3).

Step t is drawn in proportion to the root of the mean of its last ten squared losses, with a share of 1/1000 drawn
evenly, and each loss is divided by T p_t, so that its mean stays that of even draws. Until every step has ten losses
draws are even. The history is part of the training state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

History = dict[str, jax.Array]

KEPT = 10  # losses per step
EVEN_SHARE = 1e-3


def empty(num_train_steps: int) -> History:
    """No losses yet: {"losses": (T, KEPT) float32, "counts": (T,) int32 losses met so far}."""
    return {
        "losses": jnp.zeros((num_train_steps, KEPT), jnp.float32),
        "counts": jnp.zeros((num_train_steps,), jnp.int32),
    }


def probabilities(history: History) -> jax.Array:
    """(T,) probabilities of the steps; they sum to one."""
    size = jnp.sqrt(jnp.mean(jnp.square(history["losses"]), axis=1))
    share = (1.0 - EVEN_SHARE) * size / jnp.maximum(jnp.sum(size), 1e-30) + EVEN_SHARE / len(size)
    return jnp.where(jnp.all(history["counts"] >= KEPT), share, 1.0 / len(size))


def draw(uniform: jax.Array, history: History) -> tuple[jax.Array, jax.Array]:
    """(index, factor), each (B,), of uniform draws (B,) in [0, 1): which step, from 0, and 1 / (T p) for its loss."""
    p = probabilities(history)
    total = jnp.cumsum(p)
    index = jnp.searchsorted(total, uniform * total[-1], side="right")
    index = jnp.minimum(index, len(p) - 1).astype(jnp.int32)
    return index, 1.0 / (len(p) * p[index])


def record(history: History, index: jax.Array, losses: jax.Array) -> History:
    """The history after losses (B,) at the steps of index (B,): each takes the place of the oldest of its step."""
    earlier = jnp.tril(index[:, None] == index[None, :], k=-1).sum(axis=1)  # losses of the same step in this batch
    later = jnp.triu(index[:, None] == index[None, :], k=1).sum(axis=1)
    place = (history["counts"][index] + earlier) % KEPT
    # More than ten of one step: the last ten stay. The others are written nowhere.
    row = jnp.where(later < KEPT, index, len(history["counts"]))
    return {
        "losses": history["losses"].at[row, place].set(losses, mode="drop"),
        "counts": history["counts"].at[index].add(1),
    }
