"""Geometry of grids, and files that are whole or absent."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from PIL import Image

from diffdistill.evaluation import files, images


def numbered(count: int, side: int = 8, channels: int = 1) -> np.ndarray:
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, channels)).copy()


def test_every_image_lies_in_its_tile_with_gaps_between() -> None:
    picture = images.grid(numbered(6), rows=2, columns=3, gap=2, scale=5)
    assert picture.shape == (2 * 42 + 2, 3 * 42 + 2, 1)
    for index in range(6):
        top, left = 2 + index // 3 * 42, 2 + index % 3 * 42
        assert (picture[top : top + 40, left : left + 40] == index).all()
        picture[top : top + 40, left : left + 40] = images.BACKGROUND
    assert (picture == images.BACKGROUND).all()


@pytest.mark.parametrize(("side", "factor"), [(4, 10), (8, 5), (28, 2), (32, 2), (40, 1), (64, 1), (256, 1)])
def test_small_images_are_enlarged_by_whole_factors(side: int, factor: int) -> None:
    assert images.enlargement(side, side) == factor
    picture = images.grid(numbered(1, side, 3), 1, 1, gap=1)
    assert picture.shape == (side * factor + 2, side * factor + 2, 3)


def test_enlarged_pixels_stay_hard_squares() -> None:
    image = np.array([[0, 255], [255, 0]], np.uint8)[None, :, :, None]
    picture = images.grid(image, 1, 1, gap=0, scale=3)[:, :, 0]
    np.testing.assert_array_equal(picture, np.kron(image[0, :, :, 0], np.ones((3, 3), np.uint8)))


def test_places_without_an_image_stay_white() -> None:
    picture = images.grid(numbered(3), 2, 2, gap=2, scale=1)
    assert (picture[12:20, 12:20] == 255).all()


def test_row_labels_add_a_margin_on_the_left() -> None:
    plain = images.grid(numbered(4), 2, 2)
    labelled = images.grid(numbered(4), 2, 2, row_labels=["teacher", "student"])
    assert labelled.shape[0] == plain.shape[0]
    np.testing.assert_array_equal(labelled[:, -plain.shape[1] :], plain)
    margin = labelled[:, : -plain.shape[1]]
    half = plain.shape[0] // 2
    assert (margin[:half] < 200).any()
    assert (margin[half:] < 200).any()


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images do not fit into a grid of 2 rows and 2 columns"):
        images.grid(numbered(5), 2, 2)
    with pytest.raises(ValueError, match="uint8 images"):
        images.grid(np.zeros((1, 8, 8, 1), np.float32), 1, 1)
    with pytest.raises(ValueError, match="2 row labels"):
        images.grid(numbered(4), 2, 2, row_labels=["one"])
    with pytest.raises(ValueError, match="whole factor"):
        images.grid(numbered(1), 1, 1, scale=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_same_pixels(tmp_path, channels: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, channels)).astype(np.uint8)
    path = images.save_png(tmp_path / "new" / "folder" / "grid.png", picture)
    read = np.asarray(Image.open(path)).reshape(picture.shape)
    np.testing.assert_array_equal(read, picture)


def test_npz_holds_images_labels_and_seeds(tmp_path) -> None:
    path = images.save_npz(tmp_path / "samples.npz", numbered(3), np.arange(3), np.array([7, 8, 9]), w=np.float32(1.5))
    with np.load(path) as file:
        assert set(file.files) == {"images", "labels", "seeds", "w"}
        np.testing.assert_array_equal(file["images"], numbered(3))
        np.testing.assert_array_equal(file["seeds"], [7, 8, 9])
    with pytest.raises(ValueError, match="expected 3 labels"):
        images.save_npz(tmp_path / "other.npz", numbered(3), np.arange(2))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
