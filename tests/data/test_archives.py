"""CIFAR-10 and downsampled ImageNet are read from their published archives, executing nothing."""

import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from diffdistill.data import DataError, gather, pickles
from diffdistill.data.archives import archive_splits
from diffdistill.data.containers import open_container
from diffdistill.data.prepare import prepare

RANDOM = np.random.default_rng(0)
NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def batch(count: int, side: int, first_label: int = 0) -> dict:
    data = RANDOM.integers(0, 256, (count, 3 * side * side), np.uint8)
    return {"data": data, "labels": [int(n) + first_label for n in RANDOM.integers(0, 10, count)]}


def cifar(folder, protocol: int) -> dict[str, dict]:
    batches = {f"data_batch_{n}": batch(3, 32) for n in range(1, 6)} | {"test_batch": batch(2, 32)}
    folder.mkdir()
    for name, content in batches.items():
        as_python_2 = {key.encode(): value for key, value in content.items()} if protocol == 2 else content
        (folder / name).write_bytes(pickle.dumps(as_python_2, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}, protocol))
    return batches


def check(source, batches: list[dict], side: int, first_label: int = 0) -> None:
    everything = gather(source, range(len(source)))
    data = np.concatenate([content["data"] for content in batches])
    np.testing.assert_array_equal(everything["image"], data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))
    labels = np.concatenate([content["labels"] for content in batches])
    np.testing.assert_array_equal(everything["label"], labels - first_label)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_python_version(tmp_path, protocol):
    batches = cifar(tmp_path / "cifar-10-batches-py", protocol)
    file = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    prepared = prepare(file, tmp_path / "out")
    assert list(prepared) == ["train", "test"]
    assert prepared["train"].class_names == tuple(NAMES)
    check(prepared["train"], [batches[f"data_batch_{n}"] for n in range(1, 6)], 32)
    check(prepared["test"], [batches["test_batch"]], 32)
    assert prepare(file, tmp_path / "grey", channels=1, image_size=16)["test"].image_shape == (16, 16, 1)


def test_cifar10_binary_version(tmp_path):
    batches = {f"data_batch_{n}.bin": batch(3, 32) for n in range(1, 6)} | {"test_batch.bin": batch(2, 32)}
    for name, content in batches.items():
        rows = np.concatenate([np.array(content["labels"], np.uint8)[:, None], content["data"]], axis=1)
        (tmp_path / name).write_bytes(rows.tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    splits = archive_splits(open_container(tmp_path))
    assert splits["test"]().class_names == tuple(NAMES)
    check(splits["train"](), [batches[f"data_batch_{n}.bin"] for n in range(1, 6)], 32)
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"test_batch.bin is truncated"):
        splits["test"]()
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_4.bin"):
        archive_splits(open_container(tmp_path))


@pytest.mark.parametrize("kind", ["pickle", "npz"])
def test_downsampled_imagenet(tmp_path, kind):
    names = [f"train_data_batch_{n}" for n in range(1, 11)]
    batches = {name: batch(2, 8, first_label=1) for name in [*names, "val_data"]}
    file = tmp_path / "imagenet8.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in batches.items():
            if kind == "pickle":
                archive.writestr(name, pickle.dumps({**content, "mean": np.zeros(192)}, 3))
            else:
                np.savez(tmp_path / f"{name}.npz", **content)
                archive.write(tmp_path / f"{name}.npz", f"{name}.npz")
    prepared = prepare(file, tmp_path / "out")
    assert prepared["train"].num_classes == 1000
    assert prepared["val"].image_shape == (8, 8, 3)
    check(prepared["train"], [batches[name] for name in names], 8, first_label=1)
    check(prepared["val"], [batches["val_data"]], 8, first_label=1)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize("value", [Bomb(), {"labels": [Bomb()]}, np.array([Bomb()], object), np.zeros(2, "O,i4")])
def test_pickles_execute_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "batch"
    file.write_bytes(pickle.dumps({"data": value}, 4))
    with file.open("rb") as opened, pytest.raises(DataError, match=r"batch is refused: the pickle"):
        pickles.load(opened, "batch")
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"data": np.zeros(9)})[:-20]])
def test_damaged_pickles_are_named(tmp_path, content):
    file = tmp_path / "batch"
    file.write_bytes(content)
    with file.open("rb") as opened, pytest.raises(DataError, match=r"batch is damaged or truncated"):
        pickles.load(opened, "batch")


def test_contents_that_are_no_batch(tmp_path):
    batches = cifar(tmp_path / "cifar", 4)

    def refused(message: str, content) -> None:
        (tmp_path / "cifar/test_batch").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=message):
            archive_splits(open_container(tmp_path / "cifar"))["test"]()

    good = batches["test_batch"]
    refused("holds a list, expected a dict", [1, 2])
    refused("has no 'data'.*found .*'labels'", {"labels": [1]})
    refused("has no 'data'", {**good, "data": good["data"].astype(np.float32)})
    refused("2 images", {**good, "labels": [1]})
    refused(r"holds labels 3\.\.10, expected 0\.\.9", {**good, "labels": [3, 10]})


def test_names_and_labels_of_other_types(tmp_path):
    batches = cifar(tmp_path / "cifar", 4)
    good = batches["test_batch"]

    def refused(message: str, name: str, content: bytes) -> None:
        (tmp_path / "cifar" / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            archive_splits(open_container(tmp_path / "cifar"))["test"]()

    for labels in (["x", "y"], 5, [10**30, 1], np.zeros((2, 2), int), [[1], [1, 2]], None):
        refused("labels", "test_batch", pickle.dumps({**good, "labels": labels}))
    refused("no 'data'", "test_batch", pickle.dumps({**good, "data": np.zeros((0, 3072), np.uint8)}))
    for names in (5, [5], None):
        refused("has no list of 'label_names'", "batches.meta", pickle.dumps({"label_names": names}))
    refused("batches.meta is truncated, damaged", "batches.meta", pickle.dumps({"label_names": [b"\xff"]}))
    (tmp_path / "cifar/batches.meta").unlink()
    for name in batches:
        (tmp_path / "cifar" / f"{name}.bin").write_bytes(bytes(3073))
        (tmp_path / "cifar" / name).unlink()
    refused("batches.meta.txt is truncated, damaged", "batches.meta.txt", b"\xff\n")


def test_a_bomb_in_an_archive_in_an_archive(tmp_path):
    inner, file = tmp_path / "val_data.npz", tmp_path / "imagenet.zip"
    with (
        zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("data.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(270):
            member.write(bytes(10**6))
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(inner, "val_data.npz")
    with pytest.raises(DataError, match=r"val_data.npz: data.npy would unpack"):
        archive_splits(open_container(file))["val"]()
