"""Devices and processes. The only file of the project that knows how many of either there are.

Data parallelism over every device of every process: one mesh axis, the batch sharded along it, everything else
replicated. `jax.jit` sees global arrays and inserts the collectives itself, so a mean over the batch is the mean over
the whole batch, a random draw is the same draw on 1, 2 or 8 devices, and no method ever says `pmean`.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffdistill.training.errors import ProcessesDisagree, ProcessLost

AXIS = "data"
"""Name of the one mesh axis."""

SPREAD = ("optimizer", "ema", "averages")
"""Fields of training states that `state_sharding` spreads over the devices."""

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life from a process of the job, JAX ends the others."""


def initialize(
    distributed: bool,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of a job. Call before anything touches a device; does nothing unless `distributed`.

    coordinator: "host:port" of process 0; None lets JAX read the cluster environment (SLURM, MPI, Cloud TPU, ...).
    Raises ValueError where the other processes cannot be found: never falls back to a lonely run.
    """
    if not distributed:
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "A run on several processes was asked for, but the others could not be joined "
            f"(coordinator={coordinator!r}, num_processes={num_processes}, process_id={process_id}): {error}. "
            "Outside a known cluster give all three (coordinator as host:port of process 0), start every process "
            "with its own process_id, and touch no device before; for one process leave the flag away."
        ) from error


def make_mesh(num_devices: int = 0) -> Mesh:
    """A one-axis mesh ("data") over every device of every process, or over the first `num_devices` of them.

    Auto axes: the sharding of intermediate values is the compiler's business. (Explicit axes, the default of
    `jax.make_mesh`, refuse the reshapes of attention.)
    """
    devices = jax.devices()[: num_devices or None]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def describe(mesh: Mesh) -> str:
    """One line for a person, such as "8 x cpu in 2 processes"."""
    processes = jax.process_count()
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{where}"


def is_main() -> bool:
    """True on the one process that writes logs, metrics and pictures."""
    return jax.process_index() == 0


def is_accelerator(mesh: Mesh) -> bool:
    """True where the mesh is made of GPUs or TPUs."""
    return mesh.devices.flat[0].platform != "cpu"


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of everything that is not a batch: a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a batch: `axis` split over the devices, the other axes whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXIS))


def process_slice(batch_size: int) -> tuple[int, int]:
    """Rows [start, stop) of the global batch that this process must supply.

    Raises ValueError where batch_size does not divide over all devices of all processes.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(
            f"Batch size {batch_size} does not divide over {devices} devices: "
            f"use a multiple of {devices}, such as {max(1, round(batch_size / devices)) * devices}."
        )
    local = batch_size // jax.process_count()
    start = jax.process_index() * local
    return start, start + local


def shard_batch(mesh: Mesh, batch: Any, axis: int = 0) -> Any:
    """Global arrays, sharded along `axis`, out of this process's rows (a tree of numpy arrays)."""
    sharding = batch_sharding(mesh, axis)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)


def shard_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """A global array, sharded along its first axis, out of all its rows, which every process holds."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def per_device(mesh: Mesh, function: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
    """`function(everywhere, rows)` applied on each device to its own rows; what it returns is sharded by rows again."""
    rows = PartitionSpec(AXIS)
    return jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)


def local_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """This process's rows of an array that is sharded along its first axis: (numbers (R,), values (R, ...))."""
    parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    numbers = [np.arange(start, start + len(values)) for start, values in sorted(parts.items())]
    return np.concatenate(numbers), np.concatenate([values for _, values in sorted(parts.items())])


def all_rows(array: jax.Array) -> np.ndarray:
    """The whole of an array that is sharded along its first axis, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_all(where: str) -> None:
    """Returns once every process has come here. No-op on a single process."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(where)


def replicate(mesh: Mesh, tree: Any, *, copy: bool = True) -> Any:
    """`tree` on every device; see `place`."""
    return place(tree, replicated(mesh), copy=copy)


def place(tree: Any, sharding: Any, *, copy: bool = True) -> Any:
    """`tree` on the devices. Every process must hold equal values.

    sharding: of all leaves, or a tree of one for each.
    copy: the result never shares memory with `tree`, so it may be donated while the source lives on. Without it,
    leaves that already lie where they belong are handed through.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return jax.device_put(leaf, sharding, may_alias=False) if copy else leaf
        # A private host copy: device_put may keep the memory of what it is given, whatever it is told.
        host = np.array(leaf, copy=True)
        if jax.process_count() == 1:
            return jax.device_put(host, sharding)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, _of_each_leaf(sharding, tree))


def abstract(tree: Any, sharding: Any) -> Any:
    """Shapes and dtypes of `tree` (arrays or `jax.eval_shape` results), each with its sharding, as `place` takes it.

    What a checkpoint is restored into: it says where the arrays go, whatever devices they were saved from.
    """
    each = _of_each_leaf(sharding, tree)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, each)


def _of_each_leaf(sharding: Any, tree: Any) -> Any:
    return jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, NamedSharding) else sharding


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """The sharding of a training state whose optimiser state and averages are spread over the devices.

    Of every tensor below a field of SPREAD the longest axis that divides over the devices is split; where none does,
    and everywhere else, each device has the whole. The updates are the same: only who keeps what differs.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        spread = any(getattr(key, "name", None) in SPREAD for key in path)
        axes = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0 and length]
        if not spread or not axes:
            return replicated(mesh)
        return batch_sharding(mesh, max(axes, key=lambda axis: leaf.shape[axis]))

    return jax.tree_util.tree_map_with_path(of, state)


def per_device_flag(mesh: Mesh, flag: bool) -> jax.Array:
    """This process's flag as an int32 array with one entry per device; its maximum says whether any process set it."""
    local = np.full((mesh.local_mesh.size,), int(flag), np.int32)
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local)


def assert_same(value: str, what: str, advice: str = "start all of them with the same command and files.") -> None:
    """Refuses to go on where processes hold different text: ProcessesDisagree naming `what`. No-op on a single one."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
    with _shared():
        gathered = np.asarray(multihost_utils.process_allgather(digest))
    differing = [str(process) for process, row in enumerate(gathered) if (row != gathered[0]).any()]
    if differing:
        raise ProcessesDisagree(
            f"The processes of this run disagree on {what} (not as in process 0: {', '.join(differing)}): {advice}"
        )


def fetch(tree: Any) -> Any:
    """The values of arrays on the host. Raises ProcessLost where a computation failed that several processes share."""
    with _shared():
        return jax.device_get(tree)


@contextlib.contextmanager
def _shared() -> Iterator[None]:
    """Translates the failure of something that several processes do together."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise ProcessLost(
            f"A computation that {jax.process_count()} processes share has failed: another of them has probably ended; "
            f"see its own message ({str(error).splitlines()[0][:200]}). Checkpoints that were complete before are "
            "intact; start the same command on all hosts again to continue."
        ) from error


def from_main(values: np.ndarray) -> np.ndarray:
    """The main process's `values` (same shape and dtype everywhere) on every process: one decides, all act alike."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def any_process(flag: bool) -> bool:
    """True on every process where `flag` is true on any. All processes must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
