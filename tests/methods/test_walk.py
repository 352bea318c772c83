"""Which checkpoints of a path are targets, and when an adaptive walk leaves one."""

import jax.numpy as jnp
import pytest

from diffdistill.methods import walk

PACE = walk.Pace(window=2, fall=0.1, longest=6)


def walked(mismatches, num_targets=3, pace=PACE):
    """Position before every update, and the walk after the last."""
    state, positions = walk.start(), []
    for mismatch in mismatches:
        positions.append(int(state.position))
        state = walk.advance(state, pace, jnp.float32(mismatch), num_targets)
    return positions, state


def test_without_a_share_every_checkpoint_is_a_target_last_one_first():
    assert walk.apart([5.0, 5.0, 4.0], 0.0) == (0, 1, 2)
    assert walk.targets((0, 1, 2, 3), 3) == (2, 1, 0)
    assert walk.targets((0, 1), 1) == walk.targets((0,), 0) == (0,)


def test_targets_are_apart_by_a_share_of_the_loss_of_the_one_before():
    assert walk.apart([1.0, 0.95, 0.8, 0.75, 0.72, 0.5], 0.1) == (0, 2, 4, 5)
    assert walk.apart([1.0, 1.05, 1.2], 0.1) == (0, 2)  # whichever way it moves
    assert walk.apart([1.0, 0.99, 0.98], 0.1) == (0,)
    assert walk.targets((0, 2, 4, 5), 5) == (4, 2, 0)
    assert walk.targets((0, 2), 5) == (2, 0)


def test_a_target_stays_while_the_mismatch_falls_by_enough():
    """Windows of two: means 4, 3, 2, all a tenth below the one before; the longest stay ends it."""
    positions, state = walked([4, 4, 3, 3, 2, 2, 9, 9])
    assert positions == [0] * 6 + [1] * 2
    assert int(state.since) == 2
    assert float(state.before) == 9.0  # what the new target is compared with is its own


@pytest.mark.parametrize("second", [3.7, 4.0, 5.0])
def test_a_target_is_left_as_soon_as_a_window_is_not_below_the_one_before(second):
    positions, _ = walked([3, 5, second, second, 1, 1])
    assert positions == [0, 0, 0, 0, 1, 1]


def test_single_updates_say_nothing():
    assert walked([5, 3, 1, 5, 2, 2])[0] == [0] * 6  # means 4, 3, 2


def test_the_last_target_stays():
    positions, state = walked([1.0] * 20)
    assert positions[:9] == [0] * 4 + [1] * 4 + [2]
    assert int(state.position) == 2
    assert walked([1.0] * 9, num_targets=1)[0] == [0] * 9
