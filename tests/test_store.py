"""A run at an address: what lies there is at any moment a run that another machine can continue.

fsspec's memory:// stands for an object store; a machine is a cache folder.
"""

import shutil
import threading
import time
from pathlib import Path

import pytest
from machines import (
    BUCKET,
    URL,
    at_address,
    in_folder,
    opened,
    say_nothing,
    see_that_the_later_machine_counts,
    train,
    write,
)

from diffdistill import mirror, runner, sample, store, workdir
from diffdistill.data import DataError
from diffdistill.store import StoreError
from diffdistill.training import checksums
from diffdistill.training.checkpoints import COMMITTED
from diffdistill.training.errors import Interrupted, OtherProcessFailed, ProcessesDisagree, ProcessLost


def test_a_run_is_copied_and_found_by_another_machine(machine):
    said: list[str] = []
    with store.kept(URL, say=said.append) as path:
        folder = Path(path)
        train(folder, range(1, 4))
        write(folder, "teacher/4.orbax-checkpoint-tmp/params/d/array", "half")
        write(folder, "evaluation/.partial/x/complete", "hidden")
    assert said == [f"{URL} is worked on in {folder}", f"{URL}: everything is copied"]
    kept = {name: text for name, text in in_folder(folder).items() if "tmp" not in name and "partial" not in name}
    assert at_address() == kept
    assert {name.split("/")[1] for name in kept if name.startswith("teacher")} == {"2", "3"}

    machine(2)
    with store.kept(URL, say=say_nothing) as path:
        assert path != str(folder)
        assert in_folder(Path(path)) == kept
        train(Path(path), range(4, 6))
    assert {name.split("/")[1] for name in at_address() if name.startswith("teacher")} == {"4", "5"}

    machine(1)
    with store.kept(URL, say=say_nothing) as path:
        assert path == str(folder)
        assert in_folder(folder) == at_address()


def test_a_path_is_left_alone(tmp_path):
    with store.kept(str(tmp_path / "run")) as path:
        assert path == str(tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_only_what_is_new_is_copied(machine, monkeypatch):
    put: list[str] = []
    honest = type(BUCKET).put_file
    monkeypatch.setattr(
        type(BUCKET),
        "put_file",
        lambda self, path, to, **k: put.append(to.split("run/", 1)[1]) or honest(self, path, to),
    )
    one = opened()
    train(one.folder, range(1, 3))
    one.copy()
    assert len(put) == 10
    put.clear()
    write(one.folder, "metrics.jsonl", "more\n")
    train(one.folder, range(3, 4))
    one.copy()
    assert set(put[:2]) == {"config.json", "metrics.jsonl"}  # never older than a checkpoint beside them
    assert set(put[2:5]) == {f"teacher/3/{name}" for name in ("params/d/array", "ema/d/array", "checksums.json")}
    assert put[5:] == [f"teacher/3/{COMMITTED}"]
    put.clear()
    one.close(say_nothing)
    with store.kept(URL, say=say_nothing):  # and nothing is fetched or copied again by the machine that has it
        pass
    assert put == []


class Killed(BaseException):
    """A kill, after which nothing runs."""


@pytest.mark.parametrize("operations", range(24))
def test_a_kill_at_any_moment_leaves_a_run_that_can_be_continued(machine, monkeypatch, operations):
    """Of the calls that change the store only the first so many happen."""
    one = opened()
    train(one.folder, range(1, 3))
    one.copy()
    monkeypatch.setattr(mirror, "_in_parallel", lambda function, names: [function(name) for name in names])
    train(one.folder, range(3, 5))
    left = operations

    def limited(name: str):
        honest = getattr(type(BUCKET), name)

        def call(self, *arguments, **more):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return honest(self, *arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("put_file", "rm_file"):
            patch.setattr(type(BUCKET), name, limited(name))
        try:
            one.copy()
            assert operations >= 18
        except Killed:
            assert operations < 18
    one._stop.set()
    one._lock.close()

    machine(2)
    with store.kept(URL, say=say_nothing) as path:
        there = [int(path.name) for path in (Path(path) / "teacher").iterdir()]
        assert max(there) >= 2
        for update in there:
            assert (Path(path) / "teacher" / str(update) / COMMITTED).exists()
            checksums.check(Path(path) / "teacher" / str(update), ["params", "ema"])
        assert len((Path(path) / "metrics.jsonl").read_text().splitlines()) >= max(there)
    assert in_folder(Path(path)) == at_address()  # and no torn checkpoint is left


def test_the_machine_that_was_killed_goes_on_with_what_it_had_not_copied(machine):
    one = opened()
    train(one.folder, range(1, 3))
    one.copy()
    train(one.folder, range(3, 4))
    one._stop.set()
    one._lock.close()
    with store.kept(URL, say=say_nothing) as path:
        assert (Path(path) / "teacher" / "3").is_dir()
    assert f"teacher/3/{COMMITTED}" in at_address()


def test_of_two_machines_the_later_one_counts(machine, monkeypatch, capsys):
    see_that_the_later_machine_counts(URL, at_address, machine, monkeypatch, capsys)


def test_two_threads_copy_one_after_the_other(machine, monkeypatch):
    one, inside, seen = opened(), [], []

    def copy(self):
        inside.append(self)
        time.sleep(0.05)
        seen.append(len(inside))
        inside.pop()

    monkeypatch.setattr(mirror.Mirror, "copy", copy)
    threads = [threading.Thread(target=one.copy) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.close(say_nothing)
    assert seen == [1, 1, 1, 1]


def test_a_program_that_copies_while_another_opens_the_run_harms_nothing(machine, monkeypatch):
    one = opened()
    train(one.folder, range(1, 3))
    one.copy()
    train(one.folder, range(3, 5))
    honest = type(BUCKET).put_file

    def put(self, path, to, **more):
        if to.endswith("teacher/4/ema/d/array"):
            machine(2)
            with store.kept(URL, say=say_nothing) as other:
                assert (Path(other) / "teacher" / "2").is_dir()
        honest(self, path, to)

    with monkeypatch.context() as patch:
        patch.setattr(type(BUCKET), "put_file", put)
        with pytest.raises(store.Lost):
            one.copy()
    one._stop.set()
    one._lock.close()
    assert f"teacher/4/{COMMITTED}" not in at_address()  # no mark after the other came
    assert f"teacher/2/{COMMITTED}" in at_address()


@pytest.mark.parametrize("name", ["staged", "fetched", "lock", "record.json"])
def test_a_run_may_have_any_name(machine, name):
    with store.kept(f"memory://bucket/{name}", say=say_nothing) as path:
        train(Path(path), range(1, 4))
    assert BUCKET.exists(f"/bucket/{name}/teacher/3/{COMMITTED}")
    assert (Path(path) / "teacher" / "3").exists()


def test_only_a_process_that_ends_with_the_others_waits_for_them():
    def ended(error: BaseException) -> BaseException:
        try:
            try:
                raise error
            except type(error):
                raise SystemExit(1)  # noqa: B904 - as the front door does
        except SystemExit as end:
            return end

    for error in (Interrupted("teacher", 1, 2, "SIGTERM"), OtherProcessFailed(), ProcessesDisagree("images")):
        assert store._ends_all(error)
        assert store._ends_all(ended(error))
    for error in (DataError("no such image"), ProcessLost("gone"), KeyboardInterrupt()):
        assert not store._ends_all(error)
        assert not store._ends_all(ended(error))


def test_an_address_where_nothing_was_begun_stays_empty(machine):
    with store.kept(URL, say=say_nothing):
        pass
    assert not BUCKET.exists("/bucket/run")


def test_a_run_at_an_address_can_be_read_without_working_on_it(machine, smoke_run):
    with store.kept(URL, say=say_nothing) as path:
        shutil.copytree(smoke_run.run.workdir.path, path, dirs_exist_ok=True)
    BUCKET.pipe_file("/bucket/run/teacher/99/params/d/array", b"half of it")  # being copied, or torn
    before = at_address()
    found = sample.locate(URL)[0]
    assert found.config == smoke_run.run.config
    assert [stage.name for stage in runner.finished(found)] == [stage.name for stage in smoke_run.run.stages]
    assert sample.locate(f"{URL}/teacher")[1] == "teacher"
    assert workdir.read_alone(URL).config == found.config
    assert at_address() == before


def test_one_machine_works_on_it_once(machine):
    one = opened()
    with pytest.raises(StoreError, match="Another program on this machine works on"):
        opened()
    one.close(say_nothing)


def test_an_unknown_kind_of_address_is_named(machine):
    with pytest.raises(DataError, match="nowhere://bucket/run cannot be opened"), store.kept("nowhere://bucket/run"):
        raise AssertionError
