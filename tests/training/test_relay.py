"""Frozen trees that take turns: each in its time, read ahead, at no cost in compilations or reproducibility."""

import threading

import jax
import numpy as np
import pytest
import toy_training as toy

from diffdistill.training import loop, mesh, prefetch
from diffdistill.training.errors import Interrupted
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.relay import Relay, timed

STARTS = (0, 5, 12)


def teacher(number):
    kernel = jax.random.normal(jax.random.key(10 + number), (toy.FEATURES, toy.FEATURES))
    return mesh.replicate(mesh.make_mesh(), {"kernel": kernel})


def test_every_tree_is_read_once_and_the_next_one_in_the_background():
    read, threads = [], []

    def reading(number):
        read.append(number)
        threads.append(threading.current_thread() is threading.main_thread())
        return number

    relay = timed(STARTS, reading)
    assert [relay.at(update, None) for update in range(14)] == [0] * 5 + [1] * 7 + [2] * 2
    relay.close()
    assert read == [0, 1, 2]
    assert threads == [True, False, False]


def test_a_later_beginning_reads_only_what_is_left():
    read = []
    relay = timed(STARTS, lambda number: read.append(number) or number)
    assert relay.at(11, None) == 1
    relay.close()
    assert read == [1, 2]


def test_what_goes_wrong_in_the_background_is_raised_when_the_tree_is_needed():
    def reading(number):
        if number == 1:
            raise ValueError("damaged")
        return number

    relay = timed(STARTS, reading)
    assert relay.at(4, None) == 0
    with pytest.raises(ValueError, match="damaged"):
        relay.at(5, None)
    relay.close()


@pytest.mark.parametrize("starts", [(), (1, 2), (0, 0), (0, 5, 3)])
def test_turns_that_make_no_sense_are_refused(starts):
    with pytest.raises(ValueError, match="expected increasing numbers"):
        timed(starts, lambda number: number)


def test_no_call_reaches_over_a_change():
    assert list(prefetch.cut(0, 20, 4, 10, (0, 5, 12))) == [(0, 4), (4, 1), (5, 4), (9, 1), (10, 2), (12, 4), (16, 4)]


@pytest.mark.parametrize("cut_at", [5, 7])
def test_the_loop_swaps_without_compiling_and_resumes_bit_for_bit(tmp_path, cut_at):
    traces = []

    def counted(*arguments):
        traces.append(1)
        return toy.step(*arguments)

    compiled = loop.compile_step(counted, mesh.make_mesh(), 3)
    whole = toy.train(tmp_path / "whole", 16, compiled=compiled, frozen=timed(STARTS, teacher))
    interrupt = Interrupt()

    def read(index):
        if index == cut_at:
            interrupt.request("test")
        return toy.batch(index)

    with pytest.raises(Interrupted):
        toy.train(
            tmp_path / "cut", 16, compiled=compiled, frozen=timed(STARTS, teacher), read=read, interrupt=interrupt
        )
    again = toy.train(tmp_path / "cut", 16, compiled=compiled, frozen=timed(STARTS, teacher))
    assert toy.same_bits(whole, again)
    assert len(traces) == 1
    other = toy.train(tmp_path / "other", 16, compiled=compiled, frozen=timed((0, 6, 12), teacher))
    assert not toy.same_bits(whole, other)  # the update of a swap matters


def test_the_trees_in_use_are_those_of_their_turn(tmp_path):
    """The loop by hand, with the tree of every update named."""
    found = toy.train(tmp_path, 14, frozen=timed(STARTS, teacher), updates_per_call=1)
    state, step = toy.init(), jax.jit(toy.step)
    for i in range(14):
        arguments = {"num_updates": np.int32(14), "noise": np.float32(0.1)}
        key = jax.random.fold_in(toy.stage_key(), i)
        state, _ = step(state, teacher(0 if i < 5 else 1 if i < 12 else 2), toy.batch(i), key, arguments)
    for name, value in toy.leaves(state).items():
        np.testing.assert_allclose(toy.leaves(found)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_state_may_say_whose_turn_it_is_and_is_asked_at_changes_alone(tmp_path):
    """Trees that change by what the updates led to: the same bits when the run is cut between two changes."""
    asked = []

    def number(update, state):
        asked.append(update)
        last_change = int(state.step) // 4 * 4  # between two changes the answer stays, wherever a run is cut
        return min(2, last_change // 5) if update < 10 else 1  # back to a tree that was left

    def relay():
        return Relay((0, 4, 8, 12), 3, number, teacher)

    compiled = loop.compile_step(toy.step, mesh.make_mesh(), 3)
    whole = toy.train(tmp_path / "whole", 16, compiled=compiled, frozen=relay())
    assert asked == [0, 4, 8, 12]
    timed_alike = toy.train(
        tmp_path / "timed", 16, compiled=compiled, frozen=Relay((0, 8), 2, lambda u, s: u >= 8, teacher)
    )
    assert toy.same_bits(whole, timed_alike)
    interrupt = Interrupt()

    def read(index):
        if index == 9:
            interrupt.request("test")
        return toy.batch(index)

    with pytest.raises(Interrupted):
        toy.train(tmp_path / "cut", 16, compiled=compiled, frozen=relay(), read=read, interrupt=interrupt)
    assert toy.same_bits(whole, toy.train(tmp_path / "cut", 16, compiled=compiled, frozen=relay()))
