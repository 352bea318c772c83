"""Images made elsewhere are one set without classes, in sorted order, however they are stored."""

import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import DataError, gather
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluation.images import save_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3), np.uint8)


def picture(file: Path, image: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file)


def everything(source) -> np.ndarray:
    return gather(source, range(len(source)))["image"]


def refused(path: Path, message: str, **settings) -> None:
    with pytest.raises(DataError, match=message) as caught:
        everything(open_unlabelled(path, **settings))
    assert path.name in str(caught.value)


LAYOUTS = {
    "flat": [f"{n:06d}.png" for n in range(12)],
    "as EDM writes them": [f"{n // 5:05d}/img{n:08d}.png" for n in range(12)],
    "class folders": [f"{'abc'[n // 4]}/{n:02d}.png" for n in range(12)],
    "splits": [f"{('test', 'train')[n // 6]}/x/{n:02d}.png" for n in range(12)],
    "loose beside folders": [f"{n:02d}.png" if n < 6 else f"more/below/{n:02d}.png" for n in range(12)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_pictures_may_lie_in_any_way(tmp_path, layout, kind):
    root = path = tmp_path / "samples"
    for name, image in zip(LAYOUTS[layout], IMAGES, strict=True):
        picture(root / name, image)
    picture(root / ".thumbnails/x.png", IMAGES[0])
    (root / "log.txt").write_text("not a picture")
    if kind == "zip":
        path = tmp_path / "samples.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(root.rglob("*"), reverse=True):
                archive.write(file, file.relative_to(root))
    elif kind == "tar":
        path = tmp_path / "samples.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(root, ".")
    source = open_unlabelled(path)
    np.testing.assert_array_equal(everything(source), IMAGES)
    assert (source.name, source.image_shape, source.class_names) == (path.name, (4, 6, 3), ("all",))
    assert gather(source, [3, 1])["label"].tolist() == [0, 0]


def arrays_in(folder: Path, images: np.ndarray) -> dict[str, Path]:
    """The same images in every form of an array file."""
    labels = np.arange(len(images))
    np.save(folder / "plain.npy", images)
    np.savez(folder / "adm.npz", images, labels)
    np.savez_compressed(folder / "adm_compressed.npz", images, labels)
    save_npz(folder / "ours.npz", images, labels, labels)
    np.savez(folder / "reference.npz", arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays(tmp_path, channels):
    images = IMAGES[..., :channels]
    for name, path in arrays_in(tmp_path, images).items():
        source = open_unlabelled(path)
        assert (source.name, len(source), source.image_shape) == (name, 12, (4, 6, channels))
        np.testing.assert_array_equal(everything(source), images)
        for indices in ([4, 5, 6], [11, 11, 11], [0, 3, 4, 9, 9], [7, 2, 5, 2], [10], [0]):  # also back to the start
            batch = gather(source, indices)
            np.testing.assert_array_equal(batch["image"], images[indices])
            assert batch["label"].tolist() == [0] * len(indices)
        np.testing.assert_array_equal(source[8]["image"], images[8])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, lambda path, images: np.save(path, images)])
def test_arrays_pass_through_little_memory(tmp_path, save):
    images = np.random.default_rng(1).integers(0, 256, (2000, 32, 32, 3), np.uint8)
    path = tmp_path / ("images.npz" if save in (np.savez, np.savez_compressed) else "images.npy")
    save(path, images)
    tracemalloc.start()
    source = open_unlabelled(path)
    total = 0
    for first in range(0, 2000, 50):
        total += int(gather(source, np.arange(first, first + 50))["image"].sum(dtype=np.int64))
    source.fingerprint()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == images.sum(dtype=np.int64)
    assert peak < images.nbytes / 4


def test_fingerprints_tell_samples_apart(tmp_path):
    other = IMAGES.copy()
    other[5] ^= 1
    seen = []
    for number, images in enumerate((IMAGES, other, IMAGES)):
        folder = tmp_path / str(number)
        (folder / "arrays").mkdir(parents=True)
        for n, image in enumerate(images):
            picture(folder / f"pictures/{n}.bmp", image)  # names and sizes are the same for all three
        paths = [*arrays_in(folder / "arrays", images).values(), folder / "pictures"]
        seen.append({path.name: open_unlabelled(path).fingerprint() for path in paths})
    assert seen[0] == seen[2]
    assert all(seen[0][name] != seen[1][name] for name in seen[0])


def test_sizes_and_channels(tmp_path):
    folder = tmp_path / "mixed"
    picture(folder / "a.png", IMAGES[0])
    picture(folder / "b.png", IMAGES[1, :3])
    refused(folder, r"a.png is 6x4.*b.png is 6x3.*config.data.image_size")
    assert everything(open_unlabelled(folder, image_size=3)).shape == (2, 3, 3, 3)
    picture(folder / "b.png", IMAGES[1, ..., :1])
    refused(folder, r"a.png is colour.*b.png is grey.*config.data.channels")
    assert everything(open_unlabelled(folder, channels=3)).shape == (2, 4, 6, 3)
    np.save(tmp_path / "wide.npy", IMAGES)
    source = open_unlabelled(tmp_path / "wide.npy", image_size=4, channels=1)
    assert source.image_shape == (4, 4, 1)
    picture(folder / "b.png", IMAGES[1])
    expected = everything(open_unlabelled(folder, image_size=4, channels=1))  # one rule for arrays and pictures
    np.testing.assert_array_equal(gather(source, [0, 1])["image"], expected)
    assert open_unlabelled(tmp_path / "wide.npy", image_size=0, channels=0).image_shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES / np.float32(255), r"float32 numbers \(12, 4, 6, 3\).*bytes, 0 \(black\) to 255"),
        (IMAGES.astype(np.int64), "int64"),
        (IMAGES[0], r"an array \(4, 6, 3\).*\(N, H, W, 1 or 3\)"),
        (IMAGES.transpose(0, 3, 1, 2).copy(), r"\(12, 3, 4, 6\).*Move the channels to the end"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"\(2, 4, 4, 4\).*1 or 3"),
        (IMAGES[:0], r"\(0, 4, 6, 3\)"),
        (IMAGES[:1], "1 image; statistics need at least 2"),
        (np.asfortranarray(IMAGES), "np.ascontiguousarray"),
        (np.array([{}, {}]), "object numbers"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    refused(tmp_path / "x.npy", message)
    np.savez(tmp_path / "x.npz", array)
    refused(tmp_path / "x.npz", message)


def test_damaged_arrays(tmp_path):
    content = {name: path.read_bytes() for name, path in arrays_in(tmp_path, IMAGES).items()}
    middle = IMAGES[6].tobytes()
    for name, whole in content.items():
        path = tmp_path / name
        path.write_bytes(whole[: len(whole) // 2])
        refused(path, "truncated")
        path.write_bytes(whole[:4] + bytes(60) + whole[64:])
        refused(path, r"fetch|neither")
        if middle in whole and name.endswith(".npz"):  # stored as it is, with a checksum
            flipped = bytearray(whole)
            flipped[whole.index(middle)] ^= 1
            path.write_bytes(flipped)
            refused(path, r"damaged.*CRC")
    compressed = content["ours.npz"]
    flipped = bytearray(compressed)
    flipped[200:230] = bytes(30)
    (tmp_path / "ours.npz").write_bytes(flipped)
    refused(tmp_path / "ours.npz", "damaged")


def test_what_holds_no_images(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    np.savez(tmp_path / "fid.npz", mu=np.zeros(3), sigma=np.eye(3))
    refused(tmp_path / "fid.npz", "holds mu, sigma, but no images.*--reference")
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    refused(tmp_path / "other.npz", "holds labels, but no images: an array named images or arr_0")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "neither a folder nor a zip")
    folder = tmp_path / "one"
    picture(folder / "x.png", IMAGES[0])
    refused(folder, "fewer than 2 pictures .*found x.png")
    (folder / "x.png").rename(folder / "batch.npy")
    refused(folder, "fewer than 2 pictures .*found batch.npy.*an .npz or .npy file")


def test_a_damaged_picture_is_named(tmp_path):
    for n in range(3):
        picture(tmp_path / f"set/{n}.png", IMAGES[n])
    file = tmp_path / "set/1.png"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"set/1.png is damaged or truncated"):
        everything(open_unlabelled(tmp_path / "set"))


def test_rows_larger_than_any_picture_are_refused(tmp_path):
    path = tmp_path / "rows.npy"
    with path.open("wb") as file:
        facts = {"descr": "|u1", "fortran_order": False, "shape": (2, 10**5, 10**4, 1)}
        np.lib.format.write_array_header_1_0(file, facts)
        file.truncate(file.tell() + 2 * 10**9)  # holes: takes no disk
    refused(path, "images of 10000x100000 pixels")
    bomb = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {**facts, "shape": (2, 12_000, 12_000, 1)})
        for _ in range(288):
            file.write(bytes(10**6))
    refused(bomb, "would unpack")
