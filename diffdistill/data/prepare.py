"""Turns a folder, zip, tar, published archive or file of latents into ArrayRecord folders once, resumably.

    destination/
      train/ images-00000-of-00003.array_record ... metadata.json
      test/  ...

Every shard appears under its name only when it is complete; metadata.json is written last. Killed at any moment and
started again with the same arguments, the work goes on behind the last finished shard, and the final files are
byte for byte those of an undisturbed run.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from diffdistill.data.archives import archive_splits
from diffdistill.data.containers import open_container
from diffdistill.data.contract import DataError, Source
from diffdistill.data.images import images_in, splits_of
from diffdistill.data.latents import holds_latents, open_latents
from diffdistill.data.paths import existing
from diffdistill.data.pipeline import gather
from diffdistill.data.pixels import fitted
from diffdistill.data.records import METADATA, MOST_SHARDS, Metadata, open_records, publish, read_metadata, write_shard
from diffdistill.data.remote import is_remote

SHARD_BYTES = 64 * 2**20

_PLAN = "unfinished.json"
_UNPACKED = "unpacked.tar"
_BLOCK = 1024  # images decoded together


def prepare(
    path: str | Path,
    destination: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    log: Callable[[str], None] | None = None,
) -> dict[str, Source]:
    """Writes every split found in `path` to `destination` and returns the prepared splits by name.

    A progress bar with rate and remaining time appears on a terminal.

    Args:
      path: a folder, zip or tar (plain, gz, bz2, xz) of pictures (see images.py), a published archive (archives.py) or
        an .npz file of latents (latents.py).
      destination: a folder; made when missing.
      image_size, channels: crop, resize and convert (see pixels.py).
      shard_bytes: roughly the size of one shard; at most 512 shards are made.
      log: called with one line per finished shard, for output that is no terminal.

    Raises:
      DataError: `path` cannot be used; `destination` holds other data, is in use, unwritable or full. Finished shards
        stay.
    """
    if is_remote(destination):
        raise DataError(
            f"destination {destination} is an address; give a folder, or mount the bucket and give its path"
        )
    path = existing(path)
    try:
        destination = Path(destination).expanduser()
    except RuntimeError as error:
        raise DataError(f"destination {destination} begins with the home of an unknown user; give a path") from error
    if path.is_dir() and destination.resolve().is_relative_to(path.resolve()):
        raise DataError(f"destination {destination} lies inside {path}, which is to be read; choose another place")
    with _writing(destination):
        destination.mkdir(parents=True, exist_ok=True)
        with _alone(destination):
            if holds_latents(path):
                name, openers = path.stem, {"train": partial(open_latents, path, "train", image_size, channels)}
            else:
                container = open_container(path, destination / _UNPACKED)
                name = container.name
                openers = archive_splits(container) or {
                    split: partial(images_in, container, split, image_size, channels) for split in splits_of(container)
                }
            for split, opener in openers.items():
                source = fitted(opener(), image_size, channels)
                _write_split(source, name, split, destination / split, shard_bytes, log)
            (destination / _UNPACKED).unlink(missing_ok=True)
    return {split: open_records(destination, split, None, None) for split in openers}


def _write_split(
    source: Source, name: str, split: str, folder: Path, shard_bytes: int, log: Callable[[str], None] | None
) -> None:
    from tqdm import tqdm

    metadata = Metadata(
        name=name,
        split=split,
        count=len(source),
        image_shape=source.image_shape,
        class_names=source.class_names,
        records_per_shard=max(1, shard_bytes * len(source) // source.num_bytes, -(-len(source) // MOST_SHARDS)),
        fingerprint=source.fingerprint(),
        dtype=source.dtype.name,
    )
    if not _agreed(metadata, folder):
        return
    waiting = [number for number in range(metadata.num_shards) if not (folder / metadata.shard(number)).exists()]
    finished = metadata.count - sum(len(metadata.rows(number)) for number in waiting)
    label = f"preparing {name}:{split}"
    with tqdm(total=metadata.count, initial=finished, desc=label, unit="image", disable=None) as bar:
        for number in waiting:
            rows = metadata.rows(number)
            write_shard(folder / metadata.shard(number), _counted(_examples(source, rows), bar.update))
            if log is not None:
                log(f"{label}: {rows.stop} of {metadata.count} images")
    _publish_text(metadata.to_json(), folder / METADATA)
    (folder / _PLAN).unlink(missing_ok=True)


def _agreed(metadata: Metadata, folder: Path) -> bool:
    """Returns whether there is something to write; makes the folder and its plan. Raises DataError on other data."""
    for file, unfinished in ((folder / METADATA, False), (folder / _PLAN, True)):
        if file.exists():
            stored = read_metadata(file)
            if stored != metadata:
                difference = _first_difference(stored, metadata)
                raise DataError(
                    f"{folder} was made from other data or with other settings ({difference}); "
                    "delete it or choose another destination"
                )
            if not unfinished:
                (folder / _PLAN).unlink(missing_ok=True)
            return unfinished or any(not (folder / metadata.shard(n)).exists() for n in range(metadata.num_shards))
    if folder.exists() and any(file.name != f"{_PLAN}.part" for file in folder.iterdir()):  # .part: killed right here
        raise DataError(f"{folder} holds files that are not ours; choose an empty destination")
    folder.mkdir(exist_ok=True)
    _publish_text(metadata.to_json(), folder / _PLAN)
    return True


def _first_difference(stored: Metadata, wanted: Metadata) -> str:
    for field, value in vars(stored).items():
        if value != getattr(wanted, field):
            return f"{field} was {str(value)[:80]}, now {str(getattr(wanted, field))[:80]}"
    return "nothing differs"


def _examples(source: Source, rows: range) -> Iterator[tuple[NDArray[Any], int]]:
    for first in range(rows.start, rows.stop, _BLOCK):
        batch = gather(source, range(first, min(first + _BLOCK, rows.stop)))
        yield from zip(batch["image"], batch["label"].tolist(), strict=True)


def _counted(
    examples: Iterator[tuple[NDArray[Any], int]], update: Callable[[int], object]
) -> Iterator[tuple[NDArray[Any], int]]:
    for example in examples:
        yield example
        update(1)


def _publish_text(text: str, file: Path) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    publish(part, file)


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {destination}: {error.strerror or error}. Finished shards are kept; when the cause is "
            "removed, run the same command again to continue"
        ) from error


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Holds the folder against a second process; the system lets go when this one ends, however it ends."""
    handle = os.open(destination, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another process is preparing {destination}; wait for it or choose another place") from error
    finally:
        os.close(handle)
