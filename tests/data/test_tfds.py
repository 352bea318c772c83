"""TensorFlow Datasets in ArrayRecord form, written and read without TensorFlow."""

import io
import json
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
    with pytest.raises(DataError, match=r"no_such_thing cannot be opened or read.*Prepare it once"):
        open_source(source="tfds", path="no_such_thing")


def described(folder: Path, image: object, label: object = None) -> str:
    """A folder as TFDS prepares it, without data."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {"image": image} | ({} if label is None else {"label": label})
    written = {"pythonClassName": f"{FEATURES}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(written))
    split = {"name": "train", "shardLengths": ["2"], "numBytes": "10"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "mine", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(folder)


FEATURES = "tensorflow_datasets.core.features"
IMAGE = {"pythonClassName": f"{FEATURES}.image_feature.Image", "image": {"dtype": "uint8", "encodingFormat": "png"}}
CLASSES = f"{FEATURES}.class_label_feature.ClassLabel"
STRANGE = {
    "new": {"pythonClassName": "payload.Image", "json": {"json": "{}"}},
    "as protobuf names it": {"python_class_name": "payload.Image", "json": {"json": "{}"}},
    "old": {"type": "payload.Image", "content": {}},
    "nested": {"type": f"{FEATURES}.features_dict.FeaturesDict", "content": {"x": [{"type": "payload.X"}]}},
    "as text": {
        "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict",
        "json": {"json": json.dumps({"x": {"type": "payload.Image", "content": {}}})},
    },
}


@pytest.mark.parametrize("kind", STRANGE)
def test_no_code_is_imported_for_a_feature(tmp_path, monkeypatch, kind):
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    folder = described(tmp_path / "mine" / "1.0.0", STRANGE[kind])
    for path in (folder, "mine", "Mine:1.0.0"):
        with pytest.raises(DataError, match=r"has a feature 'payload\.\w+'; read are .*ClassLabel"):
            open_source(source="tfds", path=path)
    assert not (tmp_path / "owned").exists()
    assert "payload" not in sys.modules


def test_boxes_beside_the_images_and_other_versions_are_no_reason_to_refuse(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    described(tmp_path / "mine" / "1.0.0", IMAGE, {"pythonClassName": f"{FEATURES}.bounding_boxes.BBoxFeature"})
    described(tmp_path / "mine" / "2.0.0", STRANGE["old"])
    with pytest.raises(DataError, match="cannot be opened or read"):  # by TFDS: there are no shards
        open_source(source="tfds", path="mine:1.0.0")
    with pytest.raises(DataError, match=r"has a feature 'payload\.Image'"):
        open_source(source="tfds", path="mine")


def test_descriptions_out_of_range(tmp_path):
    def refused(message: str, *features: object) -> None:
        with pytest.raises(DataError, match=message):
            open_source(source="tfds", path=described(tmp_path / "mine", *features))

    refused(
        "says 10000000000 classes", IMAGE, {"pythonClassName": CLASSES, "classLabel": {"numClasses": "10000000000"}}
    )
    refused("takes names from another file", IMAGE, {"type": CLASSES, "content": {"names_file": "/dev/zero"}})
    refused(
        "cannot be opened or read .*No such file", IMAGE, {"pythonClassName": CLASSES, "classLabel": {"numClasses": 2}}
    )
    (tmp_path / "mine/features.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"features.json is truncated, damaged"):
        open_source(source="tfds", path=str(tmp_path / "mine"))
