"""Data behind an address is that of the same files on disk, fetched once; fsspec's memory:// stands for a store."""

import io

import fsspec
import numpy as np
import pytest
from PIL import Image

from diffdistill.data import DataError, gather
from diffdistill.data.remote import is_remote, local
from diffdistill.data.sources import open_source
from diffdistill.data.unlabelled import open_unlabelled

STORE = fsspec.filesystem("memory")


def picture(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two classes of two pictures in memory://set; returns a function that counts and clears the fetches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetched = []
    honest = type(STORE).get_file
    monkeypatch.setattr(
        type(STORE), "get_file", lambda self, path, *a, **k: fetched.append(path) or honest(self, path, *a, **k)
    )
    for number, name in enumerate(("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")):
        STORE.pipe_file(f"/set/{name}", picture(10 * number))

    def fetches() -> list[str]:
        seen = sorted(fetched)
        fetched.clear()
        return seen

    yield fetches
    STORE.rm("/set", recursive=True)


def test_a_folder_is_fetched_once_and_followed(store):
    source = open_source(source="images", path="memory://set")
    assert source.class_names == ("cat", "dog")
    assert gather(source, range(4))["image"][:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert len(store()) == 4
    again = open_source(source="images", path="memory://set")
    assert store() == []
    assert again.fingerprint() == source.fingerprint()

    STORE.pipe_file("/set/dog/1.png", picture(99))
    STORE.rm("/set/cat/1.png")
    changed = open_source(source="images", path="memory://set")
    assert store() == ["/set/dog/1.png"]
    assert gather(changed, range(3))["image"][:, 0, 0, 0].tolist() == [0, 20, 99]


def test_a_file_is_fetched_and_a_fetch_that_was_cut_short_goes_on(store, monkeypatch):
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros((3, 4, 4, 3), np.uint8))
    STORE.pipe_file("/set/samples.npz", stream.getvalue())
    assert len(open_unlabelled("memory://set/samples.npz")) == 3
    assert store() == ["/set/samples.npz"]

    honest = type(STORE).get_file

    def breaks(self, path, *arguments, **options):
        if path.endswith("dog/1.png"):
            raise ConnectionError("the network is gone")
        return honest(self, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(STORE), "get_file", breaks)
        with pytest.raises(DataError, match=r"memory://set cannot be copied .*the network is gone.*start again"):
            local("memory://set")
    folder = local("memory://set")
    assert (folder / "dog/1.png").read_bytes() == picture(30)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nothing/there", "does not exist, or is empty"),
        ("nosuch://bucket/x", "nosuch://bucket/x cannot be opened .*an address that fsspec knows"),
        ("gs://bucket/x", "pip install gcsfs"),
        ("az://bucket/x", "pip install adlfs"),
    ],
)
def test_what_cannot_be_fetched_is_named(tmp_path, monkeypatch, address, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=message):
        open_source(source="idx", path=address)


def test_paths_are_no_addresses(tmp_path):
    assert not is_remote(tmp_path)
    assert not is_remote("C:/data")
    assert is_remote("gs://bucket/folder")
