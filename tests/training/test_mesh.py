"""Placing arrays. More than one device: tests/multidevice; more than one process: tests/multiprocess."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from diffdistill.training import mesh, processes


def test_one_auto_axis_over_all_devices():
    devices = mesh.make_mesh()
    assert devices.axis_names == ("data",)
    assert devices.size == jax.device_count()
    assert devices.axis_types == (AxisType.Auto,)
    assert "cpu" in mesh.describe(devices)
    assert processes.is_main()


def test_devices_lie_in_the_order_of_their_processes(monkeypatch):
    """As batches are cut, in whatever order JAX names them."""
    named = [types.SimpleNamespace(process_index=process, id=number) for process, number in ((1, 2), (0, 0), (1, 1))]
    monkeypatch.setattr(jax, "devices", lambda: named)
    monkeypatch.setattr(mesh, "Mesh", lambda devices, *rest, **more: [device.id for device in devices])
    assert mesh.make_mesh() == [0, 1, 2]


@pytest.mark.parametrize("source", ["numpy", "jax", "placed"])
def test_replicate_never_shares_memory(source):
    devices = mesh.make_mesh()
    tree = {"a": np.arange(64, dtype=np.float32)}
    if source != "numpy":
        tree = {"a": jnp.asarray(tree["a"])}
    if source == "placed":
        tree = mesh.replicate(devices, tree)
    copy = mesh.replicate(devices, tree)
    jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)(copy)
    np.testing.assert_array_equal(tree["a"], np.arange(64))
    if source == "placed":
        assert mesh.replicate(devices, tree, copy=False)["a"] is tree["a"]


def test_replicate_takes_typed_keys():
    key = mesh.replicate(mesh.make_mesh(), {"key": jax.random.key(3)})["key"]
    np.testing.assert_array_equal(jax.random.normal(key, (4,)), jax.random.normal(jax.random.key(3), (4,)))


def test_shard_batch_keeps_the_rows_in_order():
    rows = np.arange(2 * 8 * 3).reshape(2, 8, 3).astype(np.uint8)
    placed = mesh.shard_batch(mesh.make_mesh(), {"image": rows}, axis=1)["image"]
    assert placed.dtype == np.uint8
    np.testing.assert_array_equal(placed, rows)


def test_process_slice(monkeypatch):
    assert mesh.process_slice(8) == (0, 8)
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert mesh.process_slice(12) == (8, 12)
    with pytest.raises(
        ValueError, match="Batch size 16 does not divide over 6 devices: use a multiple of 6, such as 18"
    ):
        mesh.process_slice(16)


def test_several_processes_are_asked_for_or_refused():
    processes.initialize(False)  # nothing to do
    with pytest.raises(ValueError, match="could not be joined"):
        processes.initialize(True)
