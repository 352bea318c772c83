"""A linear student of a linear teacher: everything the training machinery needs, in 40 parameters.

Also a script, so that tests can run it in other processes: python toy_training.py WORKDIR NUM_UPDATES [options].
"""

import argparse
import dataclasses
import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill.training import interrupt as interrupts
from diffdistill.training import loop, mesh, processes
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.metrics import MetricWriter
from diffdistill.training.state import Optimization, TrainState, Updater

BATCH, FEATURES = 8, 4
UPDATER = Updater(Optimization(learning_rate=0.05, warmup_updates=5, anneal="linear", weight_decay=1e-3, ema_decay=0.9))


def stage_key() -> jax.Array:
    """The key of the stage (a function, since several processes may touch no device on import)."""
    return jax.random.fold_in(jax.random.key(7), 1)


def init() -> TrainState:
    """The student at update 0."""
    w = jax.random.normal(jax.random.key(1), (FEATURES, FEATURES))
    return UPDATER.init({"dense": {"kernel": w, "bias": jnp.zeros(FEATURES)}})


def teacher() -> dict[str, jax.Array]:
    """What the student imitates."""
    return {"kernel": jax.random.normal(jax.random.key(2), (FEATURES, FEATURES))}


def step(state: Any, frozen: Any, batch: Any, key: jax.Array, arguments: Any) -> tuple[Any, dict[str, jax.Array]]:
    """One update on noisy rows; the noise comes from the key and so is the same on any number of devices."""

    def loss(params: Any) -> jax.Array:
        x = batch["image"] + arguments["noise"] * jax.random.normal(key, batch["image"].shape)
        out = x @ params["dense"]["kernel"] + params["dense"]["bias"]
        return jnp.mean((out - batch["image"] @ frozen["kernel"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    state, metrics = UPDATER.apply(state, grads, arguments["num_updates"])
    return state, {"loss": value, **metrics, "bins": jnp.stack([value, jnp.nan])}


def batch(index: int, start: int = 0, stop: int = BATCH) -> dict[str, np.ndarray]:
    """Rows [start, stop) of batch number `index`."""
    rows = np.random.default_rng(index).normal(size=(BATCH, FEATURES)).astype(np.float32)
    return {"image": rows[start:stop]}


@functools.cache
def compile_once(updates_per_call: int, shard: bool = False) -> loop.CompiledStep:
    """The compiled step, shared by all runs of this process. shard: spread optimiser state and average over devices."""
    devices = mesh.make_mesh()
    spread = mesh.state_sharding(devices, jax.eval_shape(init)) if shard else None
    return loop.compile_step(step, devices, updates_per_call, spread)


def train(
    workdir: str | os.PathLike[str],
    num_updates: int,
    *,
    stage: str = "toy",
    save_every: int = 10,
    updates_per_call: int = 3,
    keep: int = 2,
    compiled: loop.CompiledStep | None = None,
    log_every: int = 1,
    read: Any = batch,
    frozen: Any = None,
    start: Any = init,
    **options: Any,
) -> TrainState:
    """Start or resume the stage in `workdir` and train it to `num_updates`."""
    compiled = compiled or compile_once(updates_per_call)
    devices = compiled.mesh
    with StageCheckpoints(Path(workdir) / stage, save_every, keep) as checkpoints:
        state, meta = loop.resume_or_start(checkpoints, compiled, start)
        writer = MetricWriter(workdir, stage, int(state.step), tensorboard=False)
        try:
            return loop.fit(
                compiled,
                state,
                mesh.replicate(devices, teacher()) if frozen is None else frozen,
                {"num_updates": num_updates, "noise": 0.1},
                stage=stage,
                batches=read,
                stage_key=stage_key(),
                num_updates=num_updates,
                checkpoints=checkpoints,
                writer=writer,
                log_every=log_every,
                meta=meta,
                **options,
            )
        finally:
            writer.close()


def leaves(state: Any) -> dict[str, np.ndarray]:
    """Tensors of a state by path, on the host."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def same_bits(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    x, y = leaves(a), leaves(b)
    return x.keys() == y.keys() and all(x[name].tobytes() == y[name].tobytes() for name in x)


def main() -> int:
    """Train in this process; exit code 3 when interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("num_updates", type=int)
    parser.add_argument("--stage", default="toy")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds a batch takes to read")
    parser.add_argument("--save_every", type=int, default=10)
    parser.add_argument("--process", type=int, nargs=3, metavar=("PORT", "COUNT", "ID"))
    parser.add_argument("--shard", action="store_true", help="spread optimiser state and average over the devices")
    parser.add_argument("--diverge", type=int, default=-1, help="update after which every process changes parameters")
    parser.add_argument("--signal_at", type=int, nargs=2, default=[-1, -1], metavar=("PROCESS", "BATCH"))
    args = parser.parse_args()
    if args.process:
        port, count, identity = args.process
        processes.initialize(True, coordinator=f"127.0.0.1:{port}", num_processes=count, process_id=identity)
    start, stop = mesh.process_slice(BATCH)
    interrupted = 0

    def read(index: int) -> dict[str, np.ndarray]:
        time.sleep(args.pause)
        if args.signal_at == [jax.process_index(), index]:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(index, start, stop)

    compiled = compile_once(3, args.shard)

    def diverged(state: TrainState) -> TrainState:
        """Other parameters in every process, where that is asked for."""
        if int(state.step) != args.diverge:
            return state
        changed = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(jax.process_index()), state.params)
        return state.replace(params=mesh.replicate(compiled.mesh, changed))

    def call(state: TrainState, *rest: Any) -> Any:
        state, *others = compiled.function(state, *rest)
        return diverged(state), *others

    with interrupts.catch_signals() as stop_request:
        print("ready", flush=True)
        try:
            state = train(
                args.workdir,
                args.num_updates,
                stage=args.stage,
                save_every=args.save_every,
                read=read,
                interrupt=stop_request,
                start=init if args.diverge else lambda: diverged(init()),  # the former also gives shapes
                compiled=dataclasses.replace(compiled, function=call),
            )
            if args.shard:
                held = jax.tree.leaves((state.optimizer, state.ema))
                here = sum(leaf.addressable_shards[0].data.nbytes for leaf in held)
                print(f"one device holds {here} of {sum(leaf.nbytes for leaf in held)} bytes", flush=True)
        except loop.Interrupted as stopped:
            print(f"interrupted after {stopped.update}", flush=True)
            interrupted = 3
    return interrupted


if __name__ == "__main__":
    sys.exit(main())
