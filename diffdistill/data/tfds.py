"""TensorFlow Datasets, read without TensorFlow: ArrayRecord data sources with an `image` and perhaps a class `label`.

Whoever prepares a dataset must ask for `file_format="array_record"`; the default format has no random access.
"""

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from diffdistill.data.contract import DataError, Source, reading
from diffdistill.data.paths import existing
from diffdistill.data.pixels import encoded_source
from diffdistill.data.remote import is_remote

_WITHOUT_CLASSES = ("all",)
_MOST_CLASSES = 100_000
_DESCRIPTION = "features.json"
_FEATURES = "tensorflow_datasets.core.features"
_KNOWN = {
    f"{_FEATURES}.{module}.{name}"
    for module, name in (
        ("bounding_boxes", "BBoxFeature"),
        ("class_label_feature", "ClassLabel"),
        ("features_dict", "FeaturesDict"),
        ("image_feature", "Image"),
        ("labeled_image", "LabeledImage"),
        ("scalar", "Scalar"),
        ("sequence_feature", "Sequence"),
        ("tensor_feature", "Tensor"),
        ("text_feature", "Text"),
        ("translation_feature", "Translation"),
        ("translation_feature", "TranslationVariableLanguages"),
        ("video_feature", "Video"),
    )
}


def open_tfds(path: str, split: str, image_size: int | None, channels: int | None) -> Source:
    """Returns one split of a dataset that TFDS has prepared on this machine.

    Args:
      path: a name such as "cifar10" or "imagenet_resized/64x64", looked up in TFDS's own folder (TFDS_DATA_DIR, else
        ~/tensorflow_datasets), or the folder of a prepared dataset (the one with dataset_info.json).
      split: "train", "test", also slices such as "train[:1000]".
      image_size, channels: see pixels.py.

    Raises:
      DataError: unknown or unprepared dataset, another file format, no such split, no image feature.
    """
    import tensorflow_datasets as tfds

    folder = existing(path) if is_remote(path) else Path(path).expanduser()
    data_dir = os.environ.get("TFDS_DATA_DIR")  # TFDS itself looks at it only while it is imported
    prepared = (folder / "dataset_info.json").exists()
    for file in [folder / _DESCRIPTION] if prepared else _descriptions(path, data_dir):
        _check_description(file, path)
    if prepared:
        builder = _tried(lambda: tfds.builder_from_directory(folder), path)
    else:
        builder = _tried(lambda: tfds.builder(path, data_dir=data_dir, file_format="array_record", try_gcs=False), path)
    features = _tried(lambda: dict(builder.info.features or {}), path)
    if "image" not in features:
        raise DataError(f"TFDS dataset {path} has no feature named 'image', only {', '.join(features) or 'none'}")
    if not builder.info.splits:
        raise DataError(f"TFDS dataset {path} is not prepared under {builder.data_dir}. {_how_to_prepare(path)}")
    if split.split("[")[0] not in builder.info.splits:
        raise DataError(f"TFDS dataset {path} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    undecoded = {"image": tfds.decode.SkipDecoding()}
    examples: Any = _tried(lambda: builder.as_data_source(split=split, decoders=undecoded), path)
    length = _tried(lambda: len(examples), path)
    labelled = isinstance(features.get("label"), tfds.features.ClassLabel)
    class_names = _tried(lambda: tuple(features["label"].names), path) if labelled else _WITHOUT_CLASSES
    name = f"{builder.info.full_name}:{split}"
    facts = [name, length, [builder.info.splits[s].shard_lengths for s in sorted(builder.info.splits)]]

    def digest() -> str:
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def label_of(example: dict[str, Any]) -> int:
        label = int(example["label"]) if labelled else 0
        if not 0 <= label < len(class_names):
            raise DataError(f"{name} has an image of label {label}: this split is not labelled; choose another one")
        return label

    if length == 0:
        raise DataError(f"TFDS dataset {path} has no examples in {split!r}")

    def fetch(index: int) -> tuple[BinaryIO, int]:
        def found() -> tuple[BinaryIO, int]:
            example = examples[index]
            return io.BytesIO(example["image"]), label_of(example)

        return _tried(found, path)

    return encoded_source(
        name=name,
        class_names=class_names,
        length=length,
        fetch=fetch,
        title=lambda index: f"image {index} of {name}",
        digest=digest,
        image_size=image_size,
        channels=channels,
    )


def _descriptions(name: str, data_dir: str | None) -> list[Path]:
    """The descriptions that TFDS may read for a name such as "my_set/config:1.0.0"."""
    root = Path(data_dir or "~/tensorflow_datasets").expanduser()
    whole, _, version = name.partition(":")
    wanted, _, config = whole.partition("/")
    wanted = wanted.replace("_", "").lower()  # MySet is my_set
    folders = root.iterdir() if root.is_dir() else ()
    found = [file for each in folders if each.name.replace("_", "") == wanted for file in each.rglob(_DESCRIPTION)]
    if re.fullmatch(r"[\d.]+", version):  # another one is not read
        found = [file for file in found if file.parent.name == version]
    return [file for file in found if not config or config in file.parts[-4:-1]]


def _check_description(file: Path, path: str) -> None:
    """Refuses a features.json that names anything but the features of `_KNOWN`: TFDS imports whatever is named there.

    Raises DataError.
    """
    if not file.exists():
        return
    with reading(file):
        waiting = [json.loads(file.read_text())]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(value)
            if not isinstance(value, dict):
                continue
            for key, content in value.items():
                if isinstance(content, dict | list):
                    waiting.append(content)
                elif key in ("type", "pythonClassName", "python_class_name") and content not in _KNOWN:
                    raise DataError(
                        f"{file} of TFDS dataset {path} has a feature {str(content)[:200]!r}; read are "
                        f"{', '.join(sorted(name.rpartition('.')[2] for name in _KNOWN))}. Prepare a set of these alone"
                    )
                elif key in ("content", "json") and isinstance(content, str):  # a description within the description
                    waiting.append(json.loads(content or "{}"))
                elif key in ("num_classes", "numClasses") and not 0 <= float(content or 0) <= _MOST_CLASSES:
                    raise DataError(f"{file} says {str(content)[:40]} classes; at most {_MOST_CLASSES} are read")
                elif key in ("names_file", "namesFile"):
                    raise DataError(f"{file} takes names from another file, {str(content)[:200]!r}; that is not read")


def _tried(action: Any, path: str) -> Any:
    try:
        return action()
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # a dozen types, some with TFDS's whole catalogue as the message
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise DataError(
            f"TFDS dataset {path} cannot be opened or read ({reason[:300]}). {_how_to_prepare(path)}"
        ) from error


def _how_to_prepare(path: str) -> str:
    return (
        "Prepare it once, with random access (TFDS's own builders need TensorFlow for this step alone): "
        f"pip install tensorflow-cpu && python -c \"import tensorflow_datasets as tfds; tfds.builder('{path}', "
        "file_format='array_record').download_and_prepare()\". CIFAR-10 and downsampled ImageNet can be prepared "
        "without TensorFlow from their archives by --mode=prepare"
    )
