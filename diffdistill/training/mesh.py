"""Devices: how many there are, and what lies on which. No other file knows.

Data parallelism over every device of every process: one mesh axis, the batch sharded along it, everything else
replicated. `jax.jit` sees global arrays and inserts the collectives itself, so a mean over the batch is the mean over
the whole batch, a random draw is the same draw on 1, 2 or 8 devices, and no method ever says `pmean`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffdistill.training import processes

AXIS = "data"
"""Name of the one mesh axis."""

SPREAD = ("optimizer", "ema", "averages")
"""Fields of training states that `state_sharding` spreads over the devices."""


def make_mesh(num_devices: int = 0) -> Mesh:
    """A one-axis mesh ("data") over every device of every process, or over the first `num_devices` of them.

    The devices of a process lie side by side, in the order of the processes, as `process_slice` has it; `jax.make_mesh`
    would order those of a TPU slice by their place in it. Auto axes: the sharding of intermediate values is the
    compiler's business. (Explicit axes refuse the reshapes of attention.)
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices[: num_devices or None]), (AXIS,), axis_types=(AxisType.Auto,))


def describe(mesh: Mesh) -> str:
    """One line for a person, such as "8 x cpu in 2 processes"."""
    processes = jax.process_count()
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{where}"


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

    with processes.shared():
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))


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


def fetch(tree: Any) -> Any:
    """The values of arrays on the host. Raises ProcessLost where a computation failed that several processes share."""
    with processes.shared():
        return jax.device_get(tree)


def to_main(tree: Any) -> Any:
    """A private copy of all values on the host of the main process; elsewhere None. All processes call it together."""
    from jax.experimental import multihost_utils

    def whole(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.array(leaf) if processes.is_main() else None
        found = multihost_utils.process_allgather(leaf, tiled=True)  # a tensor that is spread over them
        return np.array(found) if processes.is_main() else None

    with processes.shared():
        found = jax.tree.map(whole, tree)
    return found if processes.is_main() else None
