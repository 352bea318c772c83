"""From a source to batches: batch number i is a function of (seed, i) alone.

The order is grain's shuffled, endlessly repeated MapDataset, indexed by global position p = i * batch_size + j. A host
that holds rows [start, stop) of the batch asks for just those positions, so any number of hosts sees the same global
batch, and resuming needs the update number alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from diffdistill.data.contract import DataError, Source
from diffdistill.data.parallel import for_each

# Sets that decode to at most this many bytes are decoded once and kept; larger ones are decoded as they are asked for.
MEMORY_LIMIT = 2 * 2**30

_BLOCK = 4096  # images that `read_many` is asked for at once


class Batch(TypedDict):
    """`image` (B, H, W, C), uint8 or float32 (latents), and `label` (B,) int32."""

    image: NDArray[Any]
    label: NDArray[np.int32]


def gather(source: Source, indices: Sequence[int] | NDArray[np.integer]) -> Batch:
    """Returns the examples with these numbers, in this order.

    Args:
      source: any source.
      indices: (B,) numbers in 0..len(source)-1.

    Raises:
      DataError: an image cannot be read; the message names its file.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if source.images is not None and source.labels is not None:
        return {"image": source.images[chosen], "label": source.labels[chosen]}
    return _decoded(source, chosen, None)


def _decoded(source: Source, chosen: NDArray[np.int64], describe: str | None) -> Batch:
    images = np.empty((len(chosen), *source.image_shape), source.dtype)
    labels = np.empty(len(chosen), np.int32)

    if source.read_many is not None:
        for first in range(0, len(chosen), _BLOCK):
            rows = slice(first, first + _BLOCK)
            images[rows], labels[rows] = source.read_many(chosen[rows])
        return {"image": images, "label": labels}

    def fill(row: int) -> None:
        images[row], labels[row] = source.read(int(chosen[row]))

    for_each(fill, len(chosen), describe)
    return {"image": images, "label": labels}


def in_memory(source: Source, limit: int = MEMORY_LIMIT) -> Source:
    """Returns the same source with all images decoded in one array, or the source itself if that exceeds `limit` bytes.

    Every stage of a chain can share the result. Reading everything at the start also finds a damaged file before the
    training begins. A progress bar appears on a terminal when it takes more than two seconds.

    Raises:
      DataError: an image cannot be read; the message names its file.
    """
    if source.images is not None or source.num_bytes > limit:
        return source
    everything = _decoded(source, np.arange(len(source)), f"reading {source.name}")
    images, labels = everything["image"], everything["label"]
    return replace(source, images=images, labels=labels, read=lambda index: (images[index], int(labels[index])))


def mix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit numbers whose output bits look independent."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class Batches:
    """Batches by number: `batches(i)` is a function of (seed, i) alone.

    Each epoch shows every image once in a new order; batches run over the ends of epochs, so a batch may be larger
    than the whole set. With `flip`, each shown image is mirrored left-right with probability 1/2, decided by (seed,
    global position). Rows [start, stop) of the global batch are returned: the same rows on any number of hosts.

    Args:
      source: any source; decoded once into memory when that takes at most `memory_limit` bytes (see `in_memory`).
      batch_size: rows of the global batch.
      seed: any non-negative integer.
      flip: mirror images at random.
      start, stop: this host's rows; the whole batch by default.
      memory_limit: bytes.

    Raises:
      DataError: an impossible batch size, seed or row range; a damaged file.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        flip: bool = False,
        start: int = 0,
        stop: int | None = None,
        *,
        memory_limit: int = MEMORY_LIMIT,
    ):
        stop = batch_size if stop is None else stop
        if batch_size < 1:
            raise DataError(f"batch size {batch_size}; give at least 1")
        if seed < 0:
            raise DataError(f"data seed {seed}; give a non-negative integer")
        if not 0 <= start < stop <= batch_size:
            raise DataError(f"rows {start}..{stop} of a batch of {batch_size}; need 0 <= start < stop <= batch size")
        self.source = in_memory(source, memory_limit)
        self.batch_size = batch_size
        self.rows = range(start, stop)
        self.flip = flip
        # grain seeds epoch e with seed + e: spread the seeds, or epoch 1 of seed 0 would be epoch 0 of seed 1.
        order_seed, flip_seed = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self._order = _shuffled(len(source), int(order_seed) % 2**32)
        self._flip_seed = flip_seed

    def indices(self, number: int) -> NDArray[np.int64]:
        """Returns the example numbers (stop - start,) of this host's rows of batch `number`."""
        first = number * self.batch_size
        return np.fromiter((self._order(first + row) for row in self.rows), np.int64, len(self.rows))

    def __call__(self, number: int) -> Batch:
        """Returns this host's rows of batch `number` >= 0: `image` (rows, H, W, C), `label` (rows,) int32."""
        if number < 0:
            raise DataError(f"batch number {number}; batches are numbered from 0")
        batch = gather(self.source, self.indices(number))
        if self.flip:
            positions = np.arange(self.rows.start, self.rows.stop, dtype=np.uint64) + np.uint64(
                number * self.batch_size
            )
            mirrored = (mix64(positions ^ self._flip_seed) >> np.uint64(63)).astype(bool)
            images = batch["image"][mirrored]
            turned = np.empty_like(images)
            for channel in range(images.shape[-1]):  # a third of the time of all channels at once
                turned[..., channel] = images[:, :, ::-1, channel]
            batch["image"][mirrored] = turned
        return batch


def _shuffled(length: int, seed: int) -> Callable[[int], int]:
    """The number that grain.MapDataset.range(length).shuffle(seed=seed).repeat() has at a position, for less time."""
    from grain.experimental import index_shuffle  # about a second to import: only when batches are made

    def order(position: int) -> int:
        epoch, place = divmod(position, length)
        return index_shuffle(place, length - 1, (seed + epoch) % 2**32, 4)

    return order
