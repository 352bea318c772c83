"""IDX files, gzipped or not, checked to the byte."""

import gzip
import struct

import numpy as np
import pytest

from diffdistill.data import DataError, gather, open_source


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder of five training images (gzipped) and two test images (plain), 4x4."""
    images = np.arange(7 * 16, dtype=np.uint8).reshape(7, 4, 4)
    labels = np.array([2, 0, 1, 1, 2, 0, 2], np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:5])))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[:5])))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images[5:]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[5:]))
    return tmp_path, images, labels


def test_both_splits(mnist):
    folder, images, labels = mnist
    for split, rows in (("train", slice(0, 5)), ("test", slice(5, 7))):
        source = open_source(source="idx", path=folder, split=split)
        everything = gather(source, range(len(source)))
        np.testing.assert_array_equal(everything["image"][..., 0], images[rows])
        np.testing.assert_array_equal(everything["label"], labels[rows])
        assert source.image_shape == (4, 4, 1)
        assert source.class_names == ("0", "1", "2")


def test_resized(mnist):
    source = open_source(source="idx", path=mnist[0], image_size=2, channels=3)
    assert source[0]["image"].shape == source.image_shape == (2, 2, 3)


def test_names_with_a_dot_and_a_prefix(mnist):
    folder = mnist[0]
    for file in list(folder.iterdir()):
        file.rename(folder / f"emnist-letters-{file.name.replace('-idx', '.idx')}")
    assert len(open_source(source="idx", path=folder)) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(np.zeros((5, 4, 4), np.uint8)))[:-9], "damaged or truncated"),
        (idx(np.zeros((5, 4, 4), np.uint8))[:-9], "holds 71 bytes after its header, which says 80"),
        (idx(np.zeros((5, 4, 4), np.uint8))[:9], "ends inside its header"),
        (idx(np.zeros((5, 4, 4), np.uint8), kind=13), "begins with 00 00 0d 03, expected 00 00 08 03"),
        (idx(np.zeros((6, 4, 4), np.uint8)), "holds 6 images, .*labels-idx1-ubyte.gz 5 labels"),
    ],
    ids=["gzip", "data", "header", "type", "counts"],
)
def test_damage(mnist, content, message):
    folder = mnist[0]
    (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.gz.*{message}"):
        open_source(source="idx", path=folder)


def test_missing_and_ambiguous_files(mnist):
    folder = mnist[0]
    with pytest.raises(DataError, match="splits train and test; 'val'"):
        open_source(source="idx", path=folder, split="val")
    (folder / "other-train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match="several sets"):
        open_source(source="idx", path=folder)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="holds no t10k-labels-idx1-ubyte"):
        open_source(source="idx", path=folder, split="test")
    with pytest.raises(DataError, match=f"nearest parent that does is the folder {folder}"):
        open_source(source="idx", path=folder / "no" / "where")
    with pytest.raises(DataError, match="is a file"):
        open_source(source="idx", path=folder / "t10k-images-idx3-ubyte")
