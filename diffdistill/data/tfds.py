"""TensorFlow Datasets, read without TensorFlow: ArrayRecord data sources with an `image` and perhaps a class `label`.

Whoever prepares a dataset must ask for `file_format="array_record"`; the default format has no random access.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from diffdistill.data.contract import DataError, Source
from diffdistill.data.paths import existing
from diffdistill.data.pixels import encoded_source
from diffdistill.data.remote import is_remote

_WITHOUT_CLASSES = ("all",)


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
    if (folder / "dataset_info.json").exists():
        builder = _tried(lambda: tfds.builder_from_directory(folder), path)
    else:
        builder = _tried(lambda: tfds.builder(path, data_dir=data_dir, file_format="array_record", try_gcs=False), path)
    features = dict(builder.info.features or {})
    if "image" not in features:
        raise DataError(f"TFDS dataset {path} has no feature named 'image', only {', '.join(features) or 'none'}")
    if not builder.info.splits:
        raise DataError(f"TFDS dataset {path} is not prepared under {builder.data_dir}. {_how_to_prepare(path)}")
    if split.split("[")[0] not in builder.info.splits:
        raise DataError(f"TFDS dataset {path} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    undecoded = {"image": tfds.decode.SkipDecoding()}
    examples: Any = _tried(lambda: builder.as_data_source(split=split, decoders=undecoded), path)
    labelled = isinstance(features.get("label"), tfds.features.ClassLabel)
    class_names = tuple(features["label"].names) if labelled else _WITHOUT_CLASSES
    name = f"{builder.info.full_name}:{split}"
    facts = [name, len(examples), [builder.info.splits[s].shard_lengths for s in sorted(builder.info.splits)]]

    def digest() -> str:
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def label_of(example: dict[str, Any]) -> int:
        label = int(example["label"]) if labelled else 0
        if not 0 <= label < len(class_names):
            raise DataError(f"{name} has an image of label {label}: this split is not labelled; choose another one")
        return label

    if len(examples) == 0:
        raise DataError(f"TFDS dataset {path} has no examples in {split!r}")

    def fetch(index: int) -> tuple[BinaryIO, int]:
        example = examples[index]
        return io.BytesIO(example["image"]), label_of(example)

    return encoded_source(
        name=name,
        class_names=class_names,
        length=len(examples),
        fetch=fetch,
        title=lambda index: f"image {index} of {name}",
        digest=digest,
        image_size=image_size,
        channels=channels,
    )


def _tried(action: Any, path: str) -> Any:
    try:
        return action()
    except Exception as error:  # TFDS raises a dozen types, some with its whole catalogue as the message
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise DataError(f"TFDS dataset {path} cannot be opened ({reason[:300]}). {_how_to_prepare(path)}") from error


def _how_to_prepare(path: str) -> str:
    return (
        "Prepare it once, with random access (TFDS's own builders need TensorFlow for this step alone): "
        f"pip install tensorflow-cpu && python -c \"import tensorflow_datasets as tfds; tfds.builder('{path}', "
        "file_format='array_record').download_and_prepare()\". CIFAR-10 and downsampled ImageNet can be prepared "
        "without TensorFlow from their archives by --mode=prepare"
    )
