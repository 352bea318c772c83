"""TensorFlow Datasets in ArrayRecord form, written and read without TensorFlow."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import DataError, gather, open_source

tfds = pytest.importorskip("tensorflow_datasets")


def png(value: int, size: int = 4) -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(file, "PNG")
    file.seek(0)
    return file


class Pets(tfds.core.GeneratorBasedBuilder):
    """Five 4x4 pictures of two classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names="cd")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": png(number), "label": number % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    builder = Pets(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_a_prepared_dataset(prepared):
    source = open_source(source="tfds", path=prepared)
    everything = gather(source, range(len(source)))
    numbers = everything["image"][:, 0, 0, 0]
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    assert source.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(everything["label"], numbers % 2)
    assert source.class_names == ("c", "d")
    assert source.name == "pets/1.0.0:train"
    assert len(open_source(source="tfds", path=prepared, split="train[:3]")) == 3
    small = open_source(source="tfds", path=prepared, split="test", image_size=2, channels=1)
    assert small[1]["image"].shape == (2, 2, 1)
    assert small.fingerprint() != source.fingerprint()
    assert "tensorflow" not in sys.modules


def test_names_are_looked_up_in_the_folder_of_tfds(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(Path(prepared).parents[1]))
    by_name = open_source(source="tfds", path="pets")
    assert by_name.fingerprint() == open_source(source="tfds", path=prepared).fingerprint()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for unprepared in ("cifar10", "imagenet_resized/64x64"):
        with pytest.raises(DataError, match=f"{unprepared} is not prepared under {tmp_path}.*array_record"):
            open_source(source="tfds", path=unprepared)


def test_what_is_missing_is_said(prepared):
    with pytest.raises(DataError, match="no split 'val'; it has"):
        open_source(source="tfds", path=prepared, split="val")
    with pytest.raises(DataError, match=r"no_such_thing cannot be opened.*Prepare it once"):
        open_source(source="tfds", path="no_such_thing")
