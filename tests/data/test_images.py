"""Pictures in a folder, a zip or a tar give the same source; what cannot be used is refused by name."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import Batches, DataError, containers, gather, open_source


def picture(file: Path, value: int, size=(4, 4), mode="RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "P") else (value, 2, 3, 99)[: len(mode)]).save(file)


@pytest.fixture
def folder(tmp_path):
    """train/{cat,dog} with three and two pictures, test/{cat,dog} with one each."""
    root = tmp_path / "pets"
    for number, name in enumerate(("cat/2", "cat/0", "dog/10", "cat/1", "dog/9")):
        picture(root / "train" / f"{name}.png", 10 * number)
    picture(root / "test/cat/0.png", 100)
    picture(root / "test/dog/0.png", 110)
    (root / "README.txt").write_text("not a picture")
    (root / ".cache").mkdir()
    return root


def packed(folder: Path, kind: str, inside: str = "") -> Path:
    file = folder.with_name(f"pets.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for entry in sorted(folder.rglob("*"), reverse=True):
                archive.write(entry, Path(inside) / entry.relative_to(folder))
    else:
        compression = kind.partition(".")[2]
        with tarfile.open(file, f"w:{compression}") as archive:  # pyright: ignore
            archive.add(folder, inside or ".")
    return file


def test_classes_are_numbered_in_sorted_order(folder):
    source = open_source(source="images", path=folder)
    everything = gather(source, range(len(source)))
    assert source.class_names == ("cat", "dog")
    assert source.image_shape == (4, 4, 3)
    assert everything["label"].tolist() == [0, 0, 0, 1, 1]
    assert everything["image"][:, 0, 0, 0].tolist() == [10, 30, 0, 20, 40]  # cat/0 1 2, dog/10 9
    assert gather(open_source(source="images", path=folder, split="test"), [0, 1])["label"].tolist() == [0, 1]


@pytest.mark.parametrize("inside", ["", "wrapper"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_archives_equal_the_folder(folder, kind, inside):
    plain = open_source(source="images", path=folder)
    archive = open_source(source="images", path=packed(folder, kind, inside))
    assert archive.fingerprint() == plain.fingerprint()
    ours, theirs = Batches(archive, 7, seed=0)(2), Batches(plain, 7, seed=0)(2)
    np.testing.assert_array_equal(ours["image"], theirs["image"])
    np.testing.assert_array_equal(ours["label"], theirs["label"])


def test_links_in_tars_lead_to_their_files(folder):
    (folder / "train/dog/link.png").hardlink_to(folder / "train/dog/9.png")
    (folder / "train/dog/soft.png").symlink_to("10.png")
    for path in (folder, packed(folder, "tar")):
        everything = gather(open_source(source="images", path=path), range(7))
        assert everything["image"][:, 0, 0, 0].tolist() == [10, 30, 0, 20, 40, 40, 20]


def test_classes_without_splits_and_pictures_without_classes(tmp_path):
    picture(tmp_path / "data/a/deep/below/x.png", 1)
    picture(tmp_path / "data/b/y.JPEG", 2)
    assert open_source(source="images", path=tmp_path / "data").class_names == ("a", "b")
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(source="images", path=tmp_path / "data", split="test")
    picture(tmp_path / "flat/x.png", 1)
    picture(tmp_path / "flat/y.png", 1)
    flat = open_source(source="images", path=tmp_path / "flat")
    assert flat.class_names == ("all",)
    assert len(flat) == 2
    picture(tmp_path / "single/cats/x.png", 1)
    assert open_source(source="images", path=tmp_path / "single").class_names == ("cats",)


def test_a_compressed_tar_too_large_for_memory_must_be_prepared(folder, monkeypatch):
    monkeypatch.setattr(containers, "MEMORY_LIMIT", 5000)
    with pytest.raises(DataError, match=r"compressed tar of more than .*--mode=prepare"):
        open_source(source="images", path=packed(folder, "tar.gz"))
    assert len(open_source(source="images", path=packed(folder, "tar"))) == 5


def test_mixed_sizes_and_colours_name_two_files(folder):
    picture(folder / "train/dog/11.png", 5, size=(6, 4))
    with pytest.raises(DataError, match=r"cat/0.png is 4x4.*dog/11.png is 6x4.*config.data.image_size"):
        open_source(source="images", path=folder)
    assert open_source(source="images", path=folder, image_size=4).image_shape == (4, 4, 3)
    picture(folder / "train/dog/11.png", 5, mode="L")
    with pytest.raises(DataError, match=r"cat/0.png is colour.*dog/11.png is grey.*config.data.channels"):
        open_source(source="images", path=folder)
    assert open_source(source="images", path=folder, channels=1).image_shape == (4, 4, 1)
    picture(folder / "train/dog/11.png", 0, mode="RGBA")
    picture(folder / "train/dog/12.png", 0, mode="P")
    assert gather(open_source(source="images", path=folder), range(7))["image"].shape == (7, 4, 4, 3)


def test_a_truncated_picture_is_named(folder):
    file = folder / "train/dog/9.png"
    file.write_bytes(file.read_bytes()[:50])
    source = open_source(source="images", path=folder)
    with pytest.raises(DataError, match=r"train/dog/9.png is damaged or truncated"):
        Batches(source, 2, seed=0)


def test_unusable_folders(folder, tmp_path):
    def refused(message: str, **settings):
        with pytest.raises(DataError, match=message):
            open_source(source="images", **settings)

    refused(
        f"nowhere/x does not exist; the nearest parent that does is the folder {tmp_path}", path=tmp_path / "nowhere/x"
    )
    refused("needs a path", path="")
    refused("no split 'val'; it has test, train", path=folder, split="val")
    (folder / "train/emu").mkdir()
    refused("class folder .*train/emu holds no pictures", path=folder)
    picture(folder / "train/stray.png", 1)
    refused("stray.png lies beside class folders", path=folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("holds no pictures .* found nothing at all", path=empty)
    (empty / "data_batch_1").write_text("")
    refused("found data_batch_1.*--mode=prepare", path=empty)
    refused("neither a folder nor a zip", path=folder / "README.txt")


def test_damaged_archives(folder):
    for kind in ("zip", "tar", "tar.gz", "tar.xz"):
        file = packed(folder, kind)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"pets.{kind}"):
            open_source(source="images", path=file)


def test_names_and_numbers_out_of_range(folder):
    with pytest.raises(DataError, match="did you mean 'images'"):
        open_source(source="image", path=folder)
    with pytest.raises(DataError, match="2 channels"):
        open_source(source="images", path=folder, channels=2)
    with pytest.raises(DataError, match="image size -3"):
        open_source(source="images", path=folder, image_size=-3)
    with pytest.raises(DataError, match="digits are part of the package"):
        open_source(path=folder)
    with pytest.raises(IndexError, match="example 5"):
        open_source(source="images", path=folder)[5]
