"""Our own ArrayRecord folders, written by prepare.py: one folder per split, shards and a small metadata.json.

Record layout (fixed length): the label as a little-endian int32, then the image (H, W, C), row by row, uint8 or, for
latents, little-endian float32. Shards are uncompressed: photographs gain nothing from general compression, and reading
stays a copy. metadata.json is written last, so its presence means that the split is complete:

    {"format": "diffdistill-images", "version": 1, "name": ..., "split": ..., "count": N, "image_shape": [H, W, C],
     "class_names": [...], "records_per_shard": R, "fingerprint": sha256 of the source it was made from,
     "dtype": "uint8" or "float32"; uint8 where it is not said}
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffdistill.data.contract import DataError, Source, reading
from diffdistill.data.paths import existing
from diffdistill.data.pixels import fitted

FORMAT, VERSION = "diffdistill-images", 1
METADATA = "metadata.json"
MOST_SHARDS = 512  # a reader keeps every shard open, and systems allow about a thousand open files
_LABEL_BYTES = 4
_RECORD_LIMIT = 2**28  # bytes


@dataclass(frozen=True)
class Metadata:
    """What metadata.json says (see the top of this file)."""

    name: str
    split: str
    count: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    records_per_shard: int
    fingerprint: str
    dtype: str = "uint8"

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.records_per_shard)

    @property
    def record_bytes(self) -> int:
        """What one example takes: the label and the image."""
        return _LABEL_BYTES + math.prod(self.image_shape) * np.dtype(self.dtype).itemsize

    def shard(self, number: int) -> str:
        """Returns the file name of a shard."""
        return f"images-{number:05d}-of-{self.num_shards:05d}.array_record"

    def rows(self, number: int) -> range:
        """Returns the examples of a shard."""
        first = number * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.count))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"


def read_metadata(file: Path) -> Metadata:
    """Returns the metadata in a file. Raises DataError if it is not ours, of another version or damaged."""
    try:
        stored: dict[str, Any] = json.loads(file.read_text())
        kind, version = stored.pop("format"), stored.pop("version")
        if kind == FORMAT and version == VERSION:
            stored["image_shape"] = tuple(stored["image_shape"])
            stored["class_names"] = tuple(stored["class_names"])
            metadata = Metadata(**stored)
            _check(metadata)
            return metadata
    except Exception as error:  # RecursionError for one
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(f"{file} is not readable metadata ({reason}); run --mode=prepare again") from error
    raise DataError(
        f"{file} says format {kind!r} version {version!r}; this version of diffdistill reads {FORMAT!r} version "
        f"{VERSION}. Run --mode=prepare again"
    )


def _check(metadata: Metadata) -> None:
    """Raises ValueError for what `prepare` never writes."""
    shape = metadata.image_shape
    if not all(isinstance(text, str) for text in (metadata.name, metadata.split, metadata.fingerprint)):
        raise ValueError("name, split and fingerprint must be text")
    if not metadata.class_names or not all(isinstance(name, str) for name in metadata.class_names):
        raise ValueError("class_names must be a list of names")
    if metadata.dtype not in ("uint8", "float32"):
        raise ValueError(f"dtype {metadata.dtype!r}, expected uint8 or float32")
    for number in (metadata.count, metadata.records_per_shard, *shape):
        if type(number) is not int or not 0 < number < 2**31:
            raise ValueError(f"{number!r} where a positive whole number was expected")
    if len(shape) != 3 or metadata.record_bytes > _RECORD_LIMIT:
        raise ValueError(f"image_shape {shape}, expected (H, W, C) of at most {_RECORD_LIMIT} bytes")
    if metadata.num_shards > MOST_SHARDS:
        raise ValueError(f"{metadata.num_shards} shards, at most {MOST_SHARDS} are made")


def write_shard(file: Path, images: Iterable[tuple[NDArray[Any], int]]) -> None:
    """Writes one shard; the file appears under its name only when it is complete and on disk. Raises OSError."""
    # by name, because compiled modules without stubs are unknown to type checkers
    array_record_module = import_module("array_record.python.array_record_module")
    part = file.with_name(file.name + ".part")
    try:
        writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        try:
            for image, label in images:
                writer.write(label.to_bytes(_LABEL_BYTES, "little", signed=True) + image.tobytes())
        finally:
            writer.close()
    except RuntimeError as error:  # how the writer reports a full disk
        part.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    publish(part, file)


def publish(part: Path, file: Path) -> None:
    """Renames a finished file so that a crash leaves either all of it or nothing."""
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(file)


def open_records(path: str | Path, split: str, image_size: int | None, channels: int | None) -> Source:
    """Returns one split of a folder that `prepare` has written.

    Args:
      path: the destination that was given to prepare.
      split: one of its folders.
      image_size, channels: crop, resize and convert further (see pixels.py).

    Raises:
      DataError: nothing there, unfinished, shards missing, or a count that is not what the metadata says.
    """
    from array_record.python import array_record_data_source

    reader_of = import_module("array_record.python.array_record_module").ArrayRecordReader
    folder = existing(path)
    file = folder / split / METADATA
    if not file.exists():
        finished = sorted(metadata.parent.name for metadata in folder.glob(f"*/{METADATA}"))
        if (folder / split).is_dir():
            raise DataError(f"{folder / split} is not finished; run the same --mode=prepare again to complete it")
        raise DataError(f"{folder} has no prepared split {split!r}; it has {', '.join(finished) or 'none at all'}")
    metadata = read_metadata(file)
    shards = [folder / split / metadata.shard(number) for number in range(metadata.num_shards)]
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        raise DataError(f"{missing[0]} is missing; delete {file} and run --mode=prepare again to restore it")
    for shard in shards:
        with reading(f"{shard}, a damaged shard,"), contextlib.closing(reader_of(str(shard))) as reader:
            options = reader.writer_options_string()
        if "uncompressed" not in options:  # a small record may unpack to anything
            raise DataError(f"{shard} is compressed ({options[:100]}), which prepare never does; prepare it again")
    with reading(f"{folder / split}, of which a shard is damaged,"):
        records = array_record_data_source.ArrayRecordDataSource([str(shard) for shard in shards])
    if len(records) != metadata.count:
        raise DataError(f"{folder / split} holds {len(records)} images, {file} says {metadata.count}; prepare it again")
    shape, dtype = metadata.image_shape, np.dtype(metadata.dtype)
    record_bytes, num_classes = metadata.record_bytes, len(metadata.class_names)

    def stored(indices: list[int]) -> Sequence[bytes]:
        with reading(f"{folder / split}, of which a shard is damaged,"):
            found = records.__getitems__(indices) if len(indices) > 1 else [records[indices[0]]]
        for index, record in zip(indices, found, strict=True):
            if len(record) != record_bytes:
                raise DataError(
                    f"{folder / split}: record {index} has {len(record)} bytes, expected {record_bytes}; prepare it "
                    "again"
                )
        return found

    def read(index: int) -> tuple[NDArray[Any], int]:
        images, labels = read_many(np.array([index]))
        return images[0], int(labels[0])

    def read_many(indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int32]]:
        rows = np.frombuffer(b"".join(stored(indices.tolist())), np.uint8).reshape(len(indices), -1)
        labels = np.ascontiguousarray(rows[:, :_LABEL_BYTES]).view("<i4")[:, 0].astype(np.int32)
        for wrong in np.flatnonzero((labels < 0) | (labels >= num_classes)):
            raise DataError(
                f"{folder / split}: record {indices[wrong]} has label {labels[wrong]}, expected 0..{num_classes - 1}; "
                "prepare it again"
            )
        pixels = np.ascontiguousarray(rows[:, _LABEL_BYTES:]).view(dtype.newbyteorder("<"))
        return pixels.reshape(-1, *shape), labels

    source = Source(
        name=f"{metadata.name}:{split}",
        image_shape=shape,
        class_names=metadata.class_names,
        length=metadata.count,
        read=read,
        digest=lambda: metadata.fingerprint,
        read_many=read_many,
        dtype=dtype,
    )
    return fitted(source, image_size, channels)
