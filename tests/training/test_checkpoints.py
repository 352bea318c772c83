"""What is written, what is read back, and what is said when that cannot be done."""

import errno
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.training import mesh
from diffdistill.training.checkpoints import CheckpointError, StageCheckpoints
from diffdistill.training.state import Optimization, TrainState, Updater


def state(step: int = 0, width: int = 3, ema: bool = True, clip: float = 1.0) -> TrainState:
    """A state with different numbers in every tensor."""
    updater = Updater(Optimization(0.1, ema_decay=0.9 if ema else 0.0, gradient_clip=clip))
    blank = updater.init({"dense": {"kernel": jnp.zeros((2, width)), "bias": jnp.zeros(width)}})
    values, structure = jax.tree.flatten(blank.replace(step=None))
    filled = [
        jax.random.normal(jax.random.key(100 * step + i), v.shape) if v.dtype == jnp.float32 else v + step
        for i, v in enumerate(values)
    ]
    return jax.tree.unflatten(structure, filled).replace(step=jnp.int32(step))


def abstract(like: TrainState) -> TrainState:
    return mesh.abstract(like, mesh.replicated(mesh.make_mesh()))


def equal(a: TrainState, b: TrainState) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_by_items(tmp_path):
    """Four items on disk; the state comes back bit for bit with its meta; nothing is warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with StageCheckpoints(tmp_path / "stage", save_every=2) as checkpoints:
            assert checkpoints.latest() is None
            assert checkpoints.save(state(1), {}) is False  # not due
            assert checkpoints.save(state(2), {"note": "kept"}) is True
            assert checkpoints.save(state(2), {}, force=True) is False  # never replaced
            assert checkpoints.save(state(3), {}, force=True) is True
            assert checkpoints.save(state(4), {"note": "kept"}) is True
        assert steps(tmp_path / "stage") == ["3", "4"]  # the newest two
        assert {"params", "ema", "optimizer", "meta"} <= set(steps(tmp_path / "stage" / "4"))
        with StageCheckpoints(tmp_path / "stage") as checkpoints:
            assert checkpoints.latest() == 4
            restored, meta = checkpoints.restore(abstract(state()))
    assert equal(restored, state(4))
    assert int(restored.step) == 4
    assert meta == {"note": "kept", "step": 4}


def test_the_next_stage_reads_one_item(tmp_path):
    """The moving average where there is one; the other items need not even exist."""
    with StageCheckpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(state(5), {"seconds": 1.0}, force=True)
    shutil.rmtree(tmp_path / "a" / "5" / "optimizer")
    with StageCheckpoints(tmp_path / "a", read_only=True) as checkpoints:
        averaged = checkpoints.restore_params(state().params)
        plain = checkpoints.restore_params(jax.eval_shape(lambda: state().params), ema=False)
        assert checkpoints.meta() == {"seconds": 1.0, "step": 5}
        with pytest.raises(CheckpointError, match="reading only"):
            checkpoints.save(state(6), {}, force=True)
    assert equal(averaged, state(5).ema)
    assert equal(plain, state(5).params)
    with StageCheckpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(state(5, ema=False), {}, force=True)
        assert equal(checkpoints.restore_params(state().params), state(5, ema=False).params)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (state(width=4), r"tensor params/dense/bias is float32 \(3,\) in the checkpoint and float32 \(4,\) in this"),
        (state(ema=False), r"tensor ema/dense/bias is float32 \(3,\) in the checkpoint and absent in this"),
        (state(clip=0.0), r"tensor optimizer/0/count is absent in the checkpoint and int32 \(\) in this"),
    ],
)
def test_another_network_or_optimiser_is_named(tmp_path, other, message):
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), {}, force=True)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(abstract(other))
        assert equal(checkpoints.restore(abstract(state()))[0], state(1))


def test_what_a_kill_leaves_is_ignored_and_removed(tmp_path):
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), {}, force=True)
        checkpoints.save(state(2), {}, force=True)
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")  # killed while writing
    for name in ("_CHECKPOINT_METADATA", "meta/metadata"):
        (tmp_path / "1" / name).unlink()  # killed while deleting
    with StageCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 2
    assert len(steps(tmp_path)) == 3  # a reader touches nothing
    with StageCheckpoints(tmp_path) as checkpoints:
        assert "1" not in steps(tmp_path)
        assert checkpoints.latest() == 2
        assert equal(checkpoints.restore(abstract(state()))[0], state(2))
        assert checkpoints.save(state(3), {}, force=True)
    assert steps(tmp_path) == ["2", "3"]


@pytest.mark.parametrize(("step", "torn", "keep_every"), [(3, False, 0), (3, True, 0), (2, False, 0), (1, True, 1)])
def test_a_checkpoint_that_was_to_stay_is_never_removed_for_a_lost_mark(tmp_path, step, torn, keep_every):
    """The newest, one that is whole but for it, and one of a path: no kill leaves them so."""
    with StageCheckpoints(tmp_path, keep=3) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(state(number), {}, force=True)
    (tmp_path / str(step) / "_CHECKPOINT_METADATA").unlink()
    if torn:
        (tmp_path / str(step) / "meta" / "metadata").unlink()
    what = "and the later ones of its stage (2, 3)" if keep_every else "away"
    missing = re.escape(f"/{step} is damaged: its file _CHECKPOINT_METADATA is missing. Move that directory {what}")
    with pytest.raises(CheckpointError, match=missing):
        StageCheckpoints(tmp_path, keep_every=keep_every)
    assert (tmp_path / str(step) / "params").is_dir()


def test_damaged_and_missing_checkpoints_are_named(tmp_path):
    nothing = pytest.raises(CheckpointError, match=r"no complete checkpoint in .*none: train this stage first")
    with StageCheckpoints(tmp_path / "none") as checkpoints, nothing:
        checkpoints.restore(abstract(state()))
    with StageCheckpoints(tmp_path / "gone", read_only=True) as checkpoints:
        assert checkpoints.latest() is None
    assert not (tmp_path / "gone").exists()
    with StageCheckpoints(tmp_path / "torn") as checkpoints:
        checkpoints.save(state(7), {}, force=True)
    for path in (tmp_path / "torn" / "7" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    damaged = pytest.raises(CheckpointError, match="torn/7 is damaged: its file params/")
    with StageCheckpoints(tmp_path / "torn") as checkpoints, damaged:
        checkpoints.restore(abstract(state()))


def test_any_damaged_or_missing_file_is_named_before_anything_is_read(tmp_path):
    with StageCheckpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save(state(7), {}, force=True)
    whole = tmp_path / "whole" / "7"
    assert (whole / "checksums.json").exists()
    files = [path.relative_to(whole) for item in whole.iterdir() if item.is_dir() for path in item.rglob("*")]
    files = [name for name in files if (whole / name).is_file()]
    assert {name.parts[0] for name in files} == {"params", "ema", "optimizer", "meta"}
    for number, name in enumerate(files):
        damaged = tmp_path / str(number) / "7"
        shutil.copytree(whole, damaged)
        content = bytearray((damaged / name).read_bytes())
        if number % 2 and content:
            content[len(content) // 2] ^= 1
            (damaged / name).write_bytes(content)
        else:
            (damaged / name).unlink()
        with (
            StageCheckpoints(damaged.parent, read_only=True) as checkpoints,
            pytest.raises(CheckpointError, match=rf"{number}/7 is damaged: its file {name} .*Move that directory"),
        ):
            checkpoints.restore(abstract(state()))
    (whole / "checksums.json").unlink()
    (whole / "checksums.json").mkdir()  # there, but not to be read: of the file system, not of the checkpoint
    unreadable = pytest.raises(CheckpointError, match=r"7 cannot be read: .*Is a directory.*If the disk or the network")
    with StageCheckpoints(whole.parent, read_only=True) as checkpoints, unreadable:
        checkpoints.restore_params(abstract(state()).params)
    (whole / "checksums.json").rmdir()
    (whole / "checksums.json").write_text("{")
    with (
        StageCheckpoints(whole.parent, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"its checksums\.json cannot be read"),
    ):
        checkpoints.restore_params(abstract(state()).params)
    (whole / "checksums.json").unlink()  # a checkpoint that is older than they are
    with StageCheckpoints(whole.parent) as checkpoints:
        assert equal(checkpoints.restore(abstract(state()))[0], state(7))


@pytest.mark.parametrize("where", ["under_a_file", "proc"])
def test_a_directory_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "stage" if where == "under_a_file" else Path("/proc/nowhere")
    with pytest.raises(CheckpointError, match=f"Cannot open a checkpoint in {directory}.*Choose a workdir"):
        StageCheckpoints(directory)


def test_full_disk_seen_before_writing(tmp_path, monkeypatch):
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), {}, force=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(CheckpointError, match=r"the disk is full .*MB needed.*before are intact"):
            checkpoints.save(state(2), {}, force=True)
        assert checkpoints.latest() == 1
        assert equal(checkpoints.restore(abstract(state()))[0], state(1))


def save_and_wait(checkpoints: StageCheckpoints, state: TrainState) -> None:
    """The disk may be found full at either."""
    checkpoints.save(state, {}, force=True)
    checkpoints.wait()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_while_writing(tiny_disk, monkeypatch, capfd, caplog):
    """The disk fills up during the background write: one message, no tracebacks, earlier checkpoints intact."""
    with StageCheckpoints(tiny_disk / "stage") as checkpoints:
        checkpoints.save(state(1), {}, force=True)
        checkpoints.wait()
        filler = tiny_disk / "filler"
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            filler.write_bytes(bytes(2 << 20))
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - 16384)  # room to begin, not to finish
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 1 << 40))
        with pytest.raises(CheckpointError, match=r"the disk is full\. Free some space\. .*before are intact"):
            save_and_wait(checkpoints, state(2))
        assert checkpoints.latest() == 1
        filler.unlink()
        assert checkpoints.save(state(3), {}, force=True)
    with StageCheckpoints(tiny_disk / "stage", read_only=True) as checkpoints:
        assert checkpoints.latest() == 3
        assert equal(checkpoints.restore(abstract(state()))[0], state(3))
    assert "Traceback" not in capfd.readouterr().err
    assert not caplog.records


def test_a_path_of_checkpoints_stays_and_each_can_be_read(tmp_path):
    """Multiples of keep_every stay beside the newest; a stop between two adds none to them."""
    with StageCheckpoints(tmp_path, save_every=2, keep=1, keep_every=2) as checkpoints:
        for step in (2, 3, 4, 5, 6):
            checkpoints.save(state(step), {"number": step}, force=True)
        checkpoints.wait()
        assert checkpoints.all() == [2, 4, 6]
    with StageCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.all() == [2, 4, 6]
        like = abstract(state()).params
        for step in (2, 4, 6):
            restored = checkpoints.restore_params(like, step=step)
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, restored, state(step).ema)))
            assert checkpoints.meta(step)["number"] == step
        with pytest.raises(
            CheckpointError, match=r"no complete checkpoint of update 3.*; there are 2, 4, 6\. Move.*4, 6"
        ):
            checkpoints.restore_params(like, step=3)
        (tmp_path / "4" / "ema" / "manifest.ocdbt").unlink()
        with pytest.raises(CheckpointError, match=r"/4 is damaged: .*and the later ones of its stage \(6\)"):
            checkpoints.restore_params(like, step=4)


def test_an_average_that_is_lost_is_not_replaced_by_the_parameters(tmp_path):
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state(5), {}, force=True)
    shutil.rmtree(tmp_path / "5" / "ema")
    lost = pytest.raises(CheckpointError, match=r"/5 is damaged: its file ema/\S+ is missing")
    with StageCheckpoints(tmp_path, read_only=True) as checkpoints, lost:
        checkpoints.restore_params(state().params)


def test_of_two_programs_the_later_one_replaces_nothing(tmp_path):
    with StageCheckpoints(tmp_path) as late, StageCheckpoints(tmp_path) as early:
        early.save(state(4), {"by": "the first"}, force=True)
        early.wait()
        with pytest.raises(CheckpointError, match=r"/4 is there already, but another program has written it"):
            late.save(state(4), {"by": "the second"}, force=True)
    with StageCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(state()))[1] == {"by": "the first", "step": 4}


def test_what_counts_is_on_the_disk_first(tmp_path, monkeypatch):
    """All files and folders of a checkpoint have been synchronised when it appears: a power cut leaves all of it."""
    synchronised, original = set(), os.fsync

    def fsync(number: int) -> None:
        synchronised.add(Path(os.readlink(f"/proc/self/fd/{number}")).relative_to(tmp_path).as_posix())
        original(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state(5), {}, force=True)
    found = {name.partition("/")[2] for name in synchronised}
    files = {path.relative_to(tmp_path / "5").as_posix() for path in (tmp_path / "5").rglob("*")}
    assert found == files - {"commit_success.txt"} | {""}  # Orbax's own, which nothing reads on such a file system
