"""The loop: one compilation, the same bits however a run is cut, and what it says when it stops."""

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy

from diffdistill.training import loop, mesh, prefetch
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.interrupt import Interrupt, catch_signals

UPDATES = 25


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run that every interrupted one is compared with."""
    return toy.train(tmp_path_factory.mktemp("whole"), UPDATES)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("updates_per_call", [1, 4])
def test_one_compilation_for_a_whole_chain(tmp_path, updates_per_call):
    """Stages of different length, other teachers, other arguments, short calls: one trace, one executable."""
    traces = []

    def counted(*args):
        traces.append(1)
        return toy.step(*args)

    compiled = loop.compile_step(counted, mesh.make_mesh(), updates_per_call)
    for stage, updates in (("a", 10), ("b", 7), ("c", 3)):
        final = toy.train(tmp_path, updates, stage=stage, compiled=compiled)
        assert int(final.step) == updates
    assert len(traces) == 1
    assert compiled.function._cache_size() == 1


def test_the_loop_is_the_step_repeated(tmp_path):
    """Several updates in a call are the updates one by one, with key fold_in(stage_key, i) and batch i."""
    many = toy.train(tmp_path / "many", 8, updates_per_call=5)
    state, frozen, step = toy.init(), toy.teacher(), jax.jit(toy.step)
    for i in range(8):
        arguments = {"num_updates": jnp.int32(8), "noise": jnp.float32(0.1)}
        state, _ = step(state, frozen, toy.batch(i), jax.random.fold_in(toy.stage_key(), i), arguments)
    for name, value in toy.leaves(state).items():
        np.testing.assert_allclose(toy.leaves(many)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("cut_at", [1, 8, 10, 24])
def test_stopped_and_resumed_is_bit_exact(tmp_path, uninterrupted, cut_at):
    """Stop at odd places (calls of 3, saves every 10): the resumed run ends with the same bits and metrics."""
    stop = Interrupt()

    def read(index):
        if index >= cut_at:
            stop.request("a test")
        return toy.batch(index)

    with pytest.raises(loop.Interrupted, match=r"stopped by a test after update .* is saved") as stopped:
        toy.train(tmp_path, UPDATES, read=read, interrupt=stop)
    assert StageCheckpoints(tmp_path / "toy", read_only=True).latest() == stopped.value.update
    final = toy.train(tmp_path, UPDATES)
    assert toy.same_bits(final, uninterrupted)
    entries = lines(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, UPDATES + 1))
    assert entries[0]["bins"][1] is None
    assert all(np.diff([entry["seconds"] for entry in entries]) >= 0)


def test_a_finished_stage_is_left_alone(tmp_path, uninterrupted):
    toy.train(tmp_path, UPDATES)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")}

    def read(index):
        raise AssertionError("nothing is left to read")

    assert toy.same_bits(toy.train(tmp_path, UPDATES, read=read), uninterrupted)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")}


def test_sigterm_saves_and_says_so(tmp_path, uninterrupted):
    def read(index):
        if index == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.batch(index)

    with pytest.raises(loop.Interrupted, match="SIGTERM"):
        toy.train(tmp_path, UPDATES, read=read)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert toy.same_bits(toy.train(tmp_path, UPDATES), uninterrupted)


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with catch_signals() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        assert interrupt.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_non_finite_loss_is_located(tmp_path):
    def read(index):
        return {"image": toy.batch(index)["image"] * (np.nan if index == 13 else 1)}

    with pytest.raises(
        loop.NonFiniteLoss,
        match=r"Stage toy: loss is nan at update 14 of 25 \(batch 13\). .*last good checkpoint: .*toy/10\.",
    ):
        toy.train(tmp_path, UPDATES, read=read)
    with StageCheckpoints(tmp_path / "toy", read_only=True) as checkpoints:
        kept, _ = checkpoints.restore(mesh.abstract(toy.init(), mesh.replicated(mesh.make_mesh())))
    assert int(kept.step) == 10
    assert all(np.isfinite(leaf).all() for leaf in toy.leaves(kept).values())


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """A finite loss whose update breaks the parameters just before a save, by a step that reports the loss alone."""

    def broken(state, frozen, batch, key, arguments):
        state, metrics = toy.step(state, frozen, batch, key, arguments)
        scale = jnp.where(state.step == 20, jnp.inf, 1.0)
        return state.replace(params=jax.tree.map(lambda p: p * scale, state.params)), {"loss": metrics["loss"]}

    compiled = loop.compile_step(broken, mesh.make_mesh(), 3)
    with pytest.raises(loop.NonFiniteLoss, match=r"no longer finite after update 20 .*checkpoint: .*toy/10\."):
        toy.train(tmp_path, UPDATES, compiled=compiled)
    assert StageCheckpoints(tmp_path / "toy", read_only=True).latest() == 10


def test_an_error_while_reading_a_batch_reaches_the_caller(tmp_path):
    def read(index):
        if index == 11:
            raise OSError("image 11 is truncated")
        return toy.batch(index)

    with pytest.raises(OSError, match="image 11 is truncated"):
        toy.train(tmp_path, UPDATES, read=read)
    assert StageCheckpoints(tmp_path / "toy", read_only=True).latest() == 10  # and what was due is on disk


def test_the_teacher_is_never_donated(tmp_path):
    """Not even where the student starts from the very same arrays."""
    devices = mesh.make_mesh()
    shared = mesh.replicate(devices, {"kernel": jnp.eye(toy.FEATURES), "bias": jnp.zeros(toy.FEATURES)})
    state = mesh.replicate(devices, toy.UPDATER.init({"dense": shared}))
    with StageCheckpoints(tmp_path) as checkpoints:
        loop.fit(
            loop.compile_step(toy.step, devices, 2),
            state,
            shared,
            {"num_updates": 4, "noise": 0.0},
            stage="s",
            batches=toy.batch,
            stage_key=toy.stage_key(),
            num_updates=4,
            checkpoints=checkpoints,
        )
    np.testing.assert_array_equal(shared["kernel"], np.eye(toy.FEATURES))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.params["dense"]["kernel"])  # the state was donated


class _Late:
    """A metric on a slow device: notes when it is fetched."""

    def __init__(self, call, log):
        self.call, self.log = call, log

    def __array__(self, *args, **kwargs):
        self.log.append(f"fetch {self.call}")
        return np.zeros(1, np.float32)


def test_metrics_are_fetched_late_and_few_calls_are_in_flight(tmp_path):
    log: list[str] = []

    def function(state, *_):
        call = sum(entry.startswith("call") for entry in log)
        log.append(f"call {call}")
        return state.replace(step=state.step + 1), {"loss": _Late(call, log)}, np.int32(0)

    devices = mesh.make_mesh()
    compiled = loop.CompiledStep(function, devices, updates_per_call=1, state_sharding=mesh.replicated(devices))
    toy.train(tmp_path, 5, compiled=compiled, save_every=0)
    assert log == [
        "call 0", "call 1", "call 2", "fetch 0", "call 3", "fetch 1", "call 4", "fetch 2", "fetch 3", "fetch 4",
    ]  # fmt: skip


def test_calls_stop_at_save_points():
    assert list(prefetch.cut(4, 17, 5, 6)) == [(4, 2), (6, 5), (11, 1), (12, 5)]
    assert list(prefetch.cut(0, 4, 3, 0)) == [(0, 3), (3, 1)]
    assert list(prefetch.cut(4, 4, 3, 0)) == []


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="updates_per_call=0"):
        loop.compile_step(toy.step, mesh.make_mesh(), 0)
    with pytest.raises(ValueError, match="save_every=-1"):
        StageCheckpoints("unused", save_every=-1)
