"""The way of DisBack back along a recorded path: which of its checkpoints are targets, and when the next one's turn is.

The paper (Zhang et al. 2025, algorithm 2) takes checkpoints at even intervals, each for a fixed number of updates. Two
options go beyond it: targets that are apart in what they know instead of in updates (`apart`), and a target that is
left when the fake denoiser has stopped coming nearer to it (`advance`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct


def apart(losses: Sequence[float], share: float) -> tuple[int, ...]:
    """Numbers of the checkpoints whose loss has moved by a share of that of the one chosen before; the first is always.

    Args:
      losses: of the checkpoints of a path on the samples of the initial generator, the teacher's first.
      share: 0 chooses all.
    """
    chosen = [0]
    for number, loss in enumerate(losses):
        if number and (not share or abs(loss - losses[chosen[-1]]) >= share * abs(losses[chosen[-1]])):
            chosen.append(number)
    return tuple(chosen)


def targets(chosen: Sequence[int], path: int) -> tuple[int, ...]:
    """Numbers of the checkpoints that are targets, in order: those chosen, last one first; the last target is 0.

    The end of a path of `path` checkpoints, where the fake denoiser starts, is none of them.
    """
    return tuple(number for number in sorted(chosen, reverse=True) if number < path or not number)


@struct.dataclass
class Walk:
    """Where a generator is on its way, as a part of its training state.

    position: () int32, number of the target in its order. since: () int32, updates that it has been the target for.
    total: () float32, of the mismatch in the window that runs. before: () float32, its mean in the window before.
    """

    position: jax.Array
    since: jax.Array
    total: jax.Array
    before: jax.Array


@dataclass(frozen=True)
class Pace:
    """When a target is left.

    window: updates over which the mismatch is averaged. fall: the share by which its mean has to be below that of the
    window before for the target to stay. longest: updates after which it is left in any case, a multiple of window.
    """

    window: int
    fall: float
    longest: int


def start() -> Walk:
    """At the first target, with nothing known of it."""
    return Walk(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.full((), jnp.inf))


def advance(walk: Walk, pace: Pace, mismatch: jax.Array, num_targets: jax.Array | int) -> Walk:
    """The walk after an update at which the two denoisers were `mismatch` () apart; the last target stays."""
    since, total = walk.since + 1, walk.total + mismatch
    whole = since % pace.window == 0
    mean = total / pace.window
    stalled = mean > (1.0 - pace.fall) * walk.before
    leaves = whole & (stalled | (since >= pace.longest)) & (walk.position < num_targets - 1)
    return Walk(
        position=walk.position + leaves.astype(jnp.int32),
        since=jnp.where(leaves, 0, since),
        total=jnp.where(whole, 0.0, total),
        before=jnp.where(leaves, jnp.inf, jnp.where(whole, mean, walk.before)),
    )
