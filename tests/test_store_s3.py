"""Runs and data at s3:// addresses, by S3's own protocol: what test_store.py says of any store, where S3 is unlike it.

Keys are names without folders, listings are kept by each program, large files go in parts, errors are the client's.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from fsspec.registry import _registry
from machines import in_folder, say_nothing, see_that_the_later_machine_counts, train, write
from s3_server import Server, no_trouble

from diffdistill import store
from diffdistill.data import DataError
from diffdistill.data.remote import local
from diffdistill.store import Store, StoreError
from diffdistill.training import checksums
from diffdistill.training.checkpoints import COMMITTED

URL = "s3://bucket/run"
ODD = ("a b", "ü", "e\u0301", "+", "%20", "#", "a?b", "&=;@$,!'()", "~", "[x]*", '"<>|\\', "{y}", "日本", " lead ")


class Bucket:
    """The bucket as it is, whatever the programs under test believe: a client that keeps no listings."""

    def __init__(self) -> None:
        self.files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def write(self, name: str, content: bytes) -> None:
        self.files.call_s3("put_object", Bucket="bucket", Key=name, Body=content)

    def read(self, folder: str) -> dict[str, bytes]:
        names = {path: path.removeprefix(f"bucket/{folder}/") for path in self.files.find(f"bucket/{folder}")}
        names = {path: name for path, name in names.items() if name and name != store._SESSION}
        return {name: self.files.cat_file(path) for path, name in names.items()}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Server, Bucket]]:
    s3fs.S3FileSystem.clear_instance_cache()
    with Server().running() as server:
        yield server, Bucket()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(running) -> Iterator[Bucket]:
    """An empty bucket on a server without trouble."""
    server, bucket = running
    bucket.files.mkdir("bucket")
    server.requests.clear()
    yield bucket
    server.trouble = no_trouble
    bucket.files.rm("bucket", recursive=True)


@pytest.fixture
def server(running, bucket) -> Server:
    return running[0]


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch):
    """Goes to a machine, by number."""

    def go(number: int) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine_{number}"))

    go(1)
    return go


def opened() -> Store:
    opened = Store(URL)
    opened.open()
    return opened


def killed(one: Store) -> None:
    """As after a kill: nothing more is copied."""
    one._stop.set()
    one._thread.join()
    one._lock.close()


def checkpoints(names) -> set[str]:
    return {name.split("/")[1] for name in names if name.startswith("teacher/")}


def test_a_run_is_copied_and_found_by_another_machine(machine, bucket):
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 4))
        write(Path(path), "evaluation/empty.jsonl", "")
        for name in ODD:
            write(Path(path), f"evaluation/{name}/{name}.txt", name)
    kept = in_folder(Path(path))
    assert bucket.read("run") == kept
    assert checkpoints(kept) == {"2", "3"}
    machine(2)
    s3fs.S3FileSystem.clear_instance_cache()  # its client knows nothing yet
    with store.kept(URL, say=say_nothing) as other:
        assert other != path
        assert in_folder(Path(other)) == kept
        train(Path(other), range(4, 6))
    assert checkpoints(bucket.read("run")) == {"4", "5"}
    machine(1)
    with store.kept(URL, say=say_nothing):
        assert in_folder(Path(path)) == bucket.read("run")


def test_a_large_file_goes_in_parts(machine, server, bucket):
    block = b"".join(number.to_bytes(4, "little") for number in range(2**18))
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 2))
        with (Path(path) / "teacher/1/large").open("wb") as file:
            for number in range(102):  # MB
                file.write(number.to_bytes(4, "little") + block[4:])
    assert sum("PUT bucket/run/teacher/1/large?partNumber=" in request for request in server.requests) == 3
    machine(2)
    with store.kept(URL, say=say_nothing) as other:
        assert (Path(other) / "teacher/1/large").read_bytes() == (Path(path) / "teacher/1/large").read_bytes()


def test_only_what_is_new_is_copied(machine, server, monkeypatch):
    def changes() -> list[str]:
        seen = [request.replace("bucket/run/", "") for request in server.changing()]
        server.requests.clear()
        return seen

    one = opened()
    assert changes() == [f"PUT {store._SESSION}"]
    train(one.folder, range(1, 3))
    one.copy()
    assert len(changes()) == 10
    train(one.folder, range(3, 4))
    one.copy()
    new = changes()
    assert set(new[:2]) == {"PUT config.json", "PUT metrics.jsonl"}
    assert new[5] == f"PUT teacher/3/{COMMITTED}"
    assert new[6] == f"DELETE teacher/1/{COMMITTED}"
    assert len(new) == 10
    one.close(say_nothing)
    assert changes() == []


@pytest.mark.parametrize("requests", [0, 3, 9, 13, 17, 18])
def test_a_kill_at_any_moment_leaves_a_run_that_can_be_continued(machine, server, bucket, requests):
    """Of the requests that change the store only the first so many are answered; which they are, threads decide."""
    one = opened()
    train(one.folder, range(1, 3))
    one.copy()
    train(one.folder, range(3, 5))
    before = len(server.changing())
    server.trouble = lambda request: "refused" if len(server.changing()) - before > requests else ""
    try:
        one.copy()
        assert requests >= 18
    except StoreError:
        assert requests < 18
    killed(one)
    server.trouble = no_trouble

    machine(2)
    with store.kept(URL, say=say_nothing) as path:
        there = [int(path.name) for path in (Path(path) / "teacher").iterdir()]
        assert max(there) >= 2
        for update in there:
            assert (Path(path) / "teacher" / str(update) / COMMITTED).exists()
            checksums.check(Path(path) / "teacher" / str(update), ["params", "ema"])
        assert len((Path(path) / "metrics.jsonl").read_text().splitlines()) >= max(there)
    assert in_folder(Path(path)) == bucket.read("run")  # and no torn checkpoint is left


def test_of_two_machines_the_later_one_counts(machine, bucket, monkeypatch, capsys):
    see_that_the_later_machine_counts(URL, lambda: bucket.read("run"), machine, monkeypatch, capsys)


def test_what_others_change_is_seen_though_listings_are_kept(machine, bucket):
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 4))
    bucket.files.rm("bucket/run/teacher/3/params/d/array")
    bucket.write("run/teacher/9/params/d/array", b"another's, without its mark")
    with store.kept(URL, say=say_nothing):
        assert in_folder(Path(path))["teacher/3/params/d/array"] == b"params after 3"
    there = bucket.read("run")
    assert there["teacher/3/params/d/array"] == b"params after 3"
    bucket.files.rm("bucket/run", recursive=True)
    with pytest.raises(StoreError, match="Nothing is at s3://bucket/run any more, but"), store.kept(URL):
        raise AssertionError


def test_a_store_that_fails_is_tried_again_and_named(machine, server, bucket, monkeypatch, capsys):
    monkeypatch.setattr(store, "PERIOD", 0.01)
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    one = opened()
    server.trouble = lambda request: "refused" if request.startswith("PUT") else ""
    train(one.folder, range(1, 2))
    one._thread.join(0.5)  # many copies
    assert capsys.readouterr().err.count("Warning: The run cannot be copied") == 1
    with pytest.raises(StoreError, match=r"copied to s3://bucket/run \(PermissionError: Access Denied\)"):
        one.close(say_nothing)
    server.trouble = no_trouble
    with store.kept(URL, say=say_nothing):
        pass
    assert bucket.read("run") == in_folder(one.folder)


@pytest.mark.parametrize("name", ["run/", "run/teacher/"])
def test_a_folder_that_the_console_has_made_is_empty(machine, bucket, name):
    """It writes a key of no bytes that ends with a slash."""
    bucket.write(name, b"")
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 2))
    machine(2)
    with store.kept(URL, say=say_nothing) as path:
        assert (Path(path) / "teacher" / "1" / COMMITTED).exists()
        assert checkpoints(in_folder(Path(path))) == {"1"}


def test_a_bucket_can_be_a_run(machine, bucket):
    with store.kept("s3://bucket", say=say_nothing) as path:
        train(Path(path), range(1, 2))
    assert bucket.files.exists(f"bucket/teacher/1/{COMMITTED}")
    machine(2)
    with store.kept("s3://bucket/", say=say_nothing) as path:
        assert (Path(path) / "teacher" / "1").is_dir()


def test_a_bucket_that_is_not_there_is_named(machine):
    with pytest.raises(StoreError, match=r"s3://nowhere/run cannot be opened \(.*bucket does not exist"):
        Store("s3://nowhere/run").open()
    with pytest.raises(DataError, match="s3://nowhere/data does not exist"):
        local("s3://nowhere/data")


@pytest.mark.parametrize("ask", [lambda: Store(URL).open(), lambda: local(URL)])
def test_what_is_wrong_with_the_client_is_said(machine, server, monkeypatch, ask):
    def said(problem: str, what: str = "check the address, the network and the credentials") -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(DataError, match=f"^s3://bucket/run cannot be opened .*{problem}.*; {what}$"):
            ask()

    server.trouble = lambda request: "refused"
    said("Forbidden")
    server.trouble = no_trouble
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        said("profile.*nobody")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.address.removeprefix("http://"))
        said("Invalid endpoint")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        said("credentials")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        patch.delitem(_registry, "s3", raising=False)
        said("s3fs", "install it with: pip install s3fs")


def test_data_is_fetched_once_and_followed(machine, server, bucket):
    def fetched() -> list[str]:
        seen = [request for request in server.requests if request.startswith("GET bucket/set/")]
        server.requests.clear()
        return sorted(seen)

    bucket.write("set/", b"")  # folders that the console has made
    bucket.write("set/cat/", b"")
    content = {"cat/0.png": b"zero", "cat/1.png": b"one", "empty": b"", **{f"{name}/x": name.encode() for name in ODD}}
    content["dog//0.png"] = b"a key with an empty part"
    for name, text in content.items():
        bucket.write(f"set/{name}", text)
    server.requests.clear()
    folder = local("s3://bucket/set")
    assert len(fetched()) == len(content)
    content["dog/0.png"] = content.pop("dog//0.png")
    assert in_folder(folder) == content
    local("s3://bucket/set")
    assert fetched() == []

    bucket.write("set/cat/0.png", b"nil!")  # as long as before
    bucket.files.rm("bucket/set/cat/1.png")
    local("s3://bucket/set")
    assert fetched() == ["GET bucket/set/cat/0.png"]
    assert (folder / "cat/0.png").read_bytes() == b"nil!"
    assert not (folder / "cat/1.png").exists()
    for text in (b"nil!", b"new!"):  # of a single file the client asks the listing that it keeps
        bucket.write("set/cat/0.png", text)
        assert local("s3://bucket/set/cat/0.png").read_bytes() == text


@pytest.mark.parametrize("trouble", ["cut", "refused"])
def test_a_fetch_that_was_cut_short_is_repeated(machine, server, bucket, monkeypatch, trouble):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    for number in range(4):
        bucket.write(f"set/{number}", bytes([number]) * 10**6)
    server.trouble = lambda request: trouble if request.startswith("GET bucket/set/2") else ""
    with pytest.raises(DataError, match=r"s3://bucket/set cannot be copied .*bucket/set/2.*start again"):
        local("s3://bucket/set")
    assert sum(request.startswith("GET bucket/set/2") for request in server.requests) >= 2
    server.trouble = no_trouble
    server.requests.clear()
    folder = local("s3://bucket/set")
    assert in_folder(folder) == {str(number): bytes([number]) * 10**6 for number in range(4)}
    assert sum(request.startswith("GET bucket/set/") for request in server.requests) < 4  # the others were there


@pytest.mark.parametrize("key", ["set//0", "set/../0", "set/a/../../0"])
def test_a_key_that_cannot_be_a_file_is_named(machine, bucket, key):
    bucket.write("set/1", b"one")
    bucket.write(key, b"outside")
    with pytest.raises(DataError, match=r"it lists bucket/set/.*, which cannot be a file in a folder"):
        local("s3://bucket/set")
