"""The training loop. Knows a pure step function, batches by number, and checkpoints; no method, no model, no data.

The step is `step(state, frozen, batch, key, arguments) -> (state, metrics)`: `state` has an int32 field `step` that
counts its updates, `frozen` (a teacher) is read only, `arguments` is a dict of scalars. Everything is traced, so one
compilation serves every round of a chain.
"""

import collections
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffdistill.training import mesh as meshes
from diffdistill.training import processes, xla
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.errors import Interrupted, NonFiniteLoss
from diffdistill.training.interrupt import Interrupt, catch_signals
from diffdistill.training.metrics import MetricWriter, Window
from diffdistill.training.prefetch import Batch, Calls
from diffdistill.training.progress import Progress
from diffdistill.training.relay import Relay

State = Any
Metrics = dict[str, jax.Array]
MAX_IN_FLIGHT = 2
"""Calls that are handed to the device and not yet waited for."""
Step = Callable[[State, Any, Batch, jax.Array, Mapping[str, jax.Array]], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Up to `updates_per_call` updates in one device call. Made by `compile_step`.

    function(state, frozen, batches (K, B, ...), stage_key, arguments, count, stop) -> (state, metrics (K, ...), stop):
    runs the first `count` of K batches; `stop` in: one flag per device, out: their maximum.
    state_sharding: of all leaves of the state, or a tree of one for each.
    """

    function: Any
    mesh: Mesh
    updates_per_call: int
    state_sharding: Any


def default_updates_per_call(mesh: Mesh) -> int:
    """10 on accelerators, where it hides the host's latency; 1 on CPUs.

    XLA:CPU does not bring the convolutions of a loop body into the layout its fast kernels take (measured with jax
    0.10.2: a step of a small convolutional network takes 18 times as long inside a loop as alone).
    """
    return 10 if meshes.is_accelerator(mesh) else 1


def compile_step(
    step: Step, mesh: Mesh, updates_per_call: int | None = None, state_sharding: Any = None
) -> CompiledStep:
    """Compile `step` for `mesh`: state donated, batch sharded, all else replicated, `step` traced exactly once.

    state_sharding: `mesh.state_sharding` of the state; by default it is replicated too.

    The number of updates of a call is traced and every call runs the same executable, so how a run is cut into calls
    (by checkpoints, by an interruption) never changes a bit. With updates_per_call = 1 there is no loop at all.
    """
    size = default_updates_per_call(mesh) if updates_per_call is None else updates_per_call
    if size < 1:
        raise ValueError(f"updates_per_call={updates_per_call}: expected 1 or more.")
    # An inner jit, because its trace is kept: asking for the shapes of the metrics costs no second trace.
    inner = jax.jit(step, inline=True)

    def update(state: State, frozen: Any, batch: Batch, stage_key: jax.Array, arguments: Any) -> tuple[State, Metrics]:
        return inner(state, frozen, batch, jax.random.fold_in(stage_key, state.step), arguments)

    def call(state, frozen, batches, stage_key, arguments, count, stop):
        if size == 1:
            state, metrics = update(state, frozen, jax.tree.map(lambda b: b[0], batches), stage_key, arguments)
            return state, jax.tree.map(lambda m: m[None], metrics), jnp.max(stop)

        def pick(i: Any) -> Batch:
            return jax.tree.map(lambda b: jax.lax.dynamic_index_in_dim(b, i, keepdims=False), batches)

        def body(i: jax.Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
            state, rows = carry
            state, metrics = update(state, frozen, pick(i), stage_key, arguments)
            return state, jax.tree.map(lambda r, m: r.at[i].set(m), rows, metrics)

        shapes = jax.eval_shape(update, state, frozen, pick(0), stage_key, arguments)[1]
        rows = jax.tree.map(lambda m: jnp.zeros((size, *m.shape), m.dtype), shapes)
        state, rows = jax.lax.fori_loop(0, count, body, (state, rows))
        return state, rows, jnp.max(stop)

    everywhere = meshes.replicated(mesh)
    of_state = everywhere if state_sharding is None else state_sharding
    function = jax.jit(
        call,
        donate_argnums=(0,),
        in_shardings=(
            of_state,
            everywhere,
            meshes.batch_sharding(mesh, axis=1),
            everywhere,
            everywhere,
            everywhere,
            meshes.batch_sharding(mesh),
        ),
        out_shardings=(of_state, everywhere, everywhere),
        compiler_options=xla.compiler_options(mesh),
    )
    return CompiledStep(function=function, mesh=mesh, updates_per_call=size, state_sharding=of_state)


def resume_or_start(
    checkpoints: StageCheckpoints, compiled: CompiledStep, init: Callable[[], State]
) -> tuple[State, dict[str, Any]]:
    """The newest checkpoint of the stage, placed as the step wants it, or `init()` where there is none; and its meta.

    init: pure, gives the state of update 0; on a resume only its shapes are computed.
    Raises CheckpointError where the checkpoint belongs to another network or optimiser.
    """
    if checkpoints.latest() is None:
        return meshes.place(init(), compiled.state_sharding), {}
    return checkpoints.restore(meshes.abstract(jax.eval_shape(init), compiled.state_sharding))


def fit(
    compiled: CompiledStep,
    state: State,
    frozen: Any,
    arguments: Mapping[str, Any],
    *,
    stage: str,
    batches: Callable[[int], Batch],
    stage_key: jax.Array,
    num_updates: int,
    checkpoints: StageCheckpoints,
    writer: MetricWriter | None = None,
    progress: Progress | None = None,
    log_every: int = 100,
    meta: Mapping[str, Any] | None = None,
    interrupt: Interrupt | None = None,
    stop_at_non_finite: bool = True,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> State:
    """Train from update `state.step` to `num_updates`; the last update is always saved. Returns the final state.

    state: donated, do not use it again. frozen: never donated; a Relay for trees that take turns, which is closed at
    the end. arguments: scalars handed to the step (int32/float32).
    batches: i -> this process's rows of batch i, a dict of numpy arrays; called in a background thread, in order.
    The update after i finished ones uses batch i and key fold_in(stage_key, i), so nothing but `state` needs saving.
    checkpoints: says how often to save. writer gets the mean of each metric over the last `log_every` updates.
    meta: JSON values kept in every checkpoint ("step" and "seconds", the time spent in the stage, are added).
    interrupt: what tells the loop to stop; by default SIGTERM and SIGINT are caught while it runs.
    stop_at_non_finite: whether a loss or gradient that is not finite ends the stage. Parameters that are not finite
      always do.
    max_in_flight: calls handed to the device and not yet waited for.

    Raises NonFiniteLoss, Interrupted (after saving), CheckpointError, MetricsError, ProcessLost, and what `batches`
    raises.
    """
    mesh = compiled.mesh
    state = meshes.place(state, compiled.state_sharding, copy=False)
    arguments, stage_key = meshes.replicate(
        mesh, ({k: _scalar(v) for k, v in arguments.items()}, stage_key), copy=False
    )
    relay = frozen if isinstance(frozen, Relay) else None
    if relay is None:
        frozen = meshes.replicate(mesh, frozen, copy=False)
    start = int(state.step)
    clock = _Clock(float((meta or {}).get("seconds", 0.0)))
    in_flight: collections.deque[_Call] = collections.deque()
    window = Window(log_every)
    stopping = False
    saved = checkpoints.latest() == start

    def settle(keep: int) -> None:
        """Wait for all calls but the newest `keep`; check and report what they did."""
        nonlocal stopping
        while len(in_flight) > keep:
            call = in_flight.popleft()
            metrics = {name: rows[: call.count] for name, rows in meshes.fetch(call.metrics).items()}
            stopping = stopping or bool(call.stop)
            if stop_at_non_finite:
                _check_finite(metrics, stage, call.first, num_updates, checkpoints)
            done = call.first + call.count
            for update, means in window.add(call.first, metrics, last=num_updates):
                if writer is not None:
                    writer.write_scalars(update, {**means, "seconds": clock.seconds()})
            if progress is not None:
                progress.advance(done, {name: float(np.mean(m)) for name, m in metrics.items() if m.ndim == 1})

    def save(update: int) -> None:
        _check_state(state, stage, update, num_updates, checkpoints)
        checkpoints.save(state, {**(meta or {}), "seconds": clock.seconds()}, force=update == num_updates or stopping)

    if jax.process_count() > 1:
        _assert_same(state, stage, start)
    done = start
    no_flag = meshes.per_device_flag(mesh, False)
    alone = jax.process_count() == 1
    changes = () if relay is None else relay.changes
    calls = Calls(batches, mesh, start, num_updates, compiled.updates_per_call, checkpoints.save_every, changes)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.wait)  # the main process saves alone, also when another one is lost
        if relay is not None:
            stack.callback(relay.close)
        if writer is not None:
            stack.callback(writer.flush)
        if progress is not None:
            stack.callback(progress.close)
        stack.callback(calls.close)
        if interrupt is None:
            interrupt = stack.enter_context(catch_signals())
        for first, count, rows in calls:
            flag = no_flag if alone else meshes.per_device_flag(mesh, interrupt.requested)
            if relay is not None:
                frozen = relay.at(first, state)
            state, metrics, stop = compiled.function(state, frozen, rows, stage_key, arguments, np.int32(count), flag)
            in_flight.append(_Call(first, count, metrics, stop))
            done, saved = first + count, False
            settle(keep=max_in_flight)
            # Several processes learn of a signal from the flags that went through the device, each at the same call;
            # a single one need not wait for that.
            stopping = stopping or (alone and interrupt.requested)
            if stopping or done == num_updates or (checkpoints.save_every and done % checkpoints.save_every == 0):
                settle(keep=0)
                save(done)
                saved = True
            if stopping:
                break
        if not saved:
            save(done)
    if stopping:
        raise Interrupted(stage, done, num_updates, interrupt.reason or "a signal to another process")
    return state


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call in flight: the updates first+1 .. first+count, their metrics and the agreed stop flag, on the device."""

    first: int
    count: int
    metrics: Metrics
    stop: jax.Array


class _Clock:
    """Seconds spent in the stage, over all the runs that worked on it."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 3)


def _scalar(value: Any) -> jax.Array:
    """int32 or float32, never weakly typed, so that Python and numpy scalars share one compilation."""
    array = jnp.asarray(value)
    kind = jnp.int32 if jnp.issubdtype(array.dtype, jnp.integer) else jnp.float32
    return jax.lax.convert_element_type(array, kind)


def _check_finite(
    metrics: Mapping[str, np.ndarray], stage: str, first: int, num_updates: int, checkpoints: StageCheckpoints
) -> None:
    """Stop at the first update whose loss or gradient norm is not finite. Other metrics may be NaN (an empty bin)."""
    for name in ("loss", "gradient_norm"):
        if name not in metrics:
            continue
        bad = np.flatnonzero(~np.isfinite(metrics[name]))
        if bad.size:
            batch = first + int(bad[0])
            value = float(metrics[name][bad[0]])
            raise NonFiniteLoss(
                f"Stage {stage}: {name} is {value} at update {batch + 1} of {num_updates} (batch {batch}). "
                + _advice(checkpoints)
            )


def _check_state(state: State, stage: str, update: int, num_updates: int, checkpoints: StageCheckpoints) -> None:
    """Looks at the parameters before they become the last good checkpoint: a finite loss does not promise that they are
    finite, and processes that are meant to hold the same may not."""
    params = _assert_same(state, stage, update)  # first: then all processes judge alike
    if not all(np.isfinite(leaf).all() for leaf in params):
        raise NonFiniteLoss(
            f"Stage {stage}: the parameters are no longer finite after update {update} of {num_updates} "
            f"(batch {update - 1}). " + _advice(checkpoints)
        )


def _assert_same(state: State, stage: str, update: int) -> list[np.ndarray]:
    """The parameters on the host; all processes must hold the same ones, after the same number of updates."""
    # On the host: compiling a reduction over some hundred tensors takes longer than all the checks of a run.
    leaves = jax.tree_util.tree_leaves_with_path(state)
    params, step = meshes.fetch(
        ([leaf for path, leaf in leaves if any(getattr(k, "name", None) == "params" for k in path)], state.step)
    )
    if jax.process_count() > 1:
        digest = hashlib.blake2b(f"{update} {step}".encode())
        for leaf in params:
            digest.update(np.ascontiguousarray(leaf).data)
        processes.assert_same(
            digest.hexdigest(),
            f"the parameters of stage {stage} after update {update}",
            "they were not saved. A device, memory or network of these may be broken, or they are of different kinds: "
            "leave that host out and start the same command again, which continues from the newest checkpoint.",
        )
    return params


def _advice(checkpoints: StageCheckpoints) -> str:
    checkpoints.wait()
    last = checkpoints.latest()
    kept = (
        "no checkpoint was saved yet" if last is None else f"last good checkpoint: {checkpoints.directory / str(last)}"
    )
    return f"Training stopped; {kept}. Try a lower learning rate, a longer warm-up or float32 compute."
