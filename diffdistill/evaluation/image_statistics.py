"""What is kept of a set of images: sums that parts of it can be added to and merged from, in any order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from diffdistill.evaluation import moments, scores
from diffdistill.evaluation.moments import Moments, Reservoir
from diffdistill.evaluation.scores import ScoreSums
from diffdistill.training import mesh as meshes

POOL, SPATIAL, LOGITS = "2048", "sfid", "logits_unbiased"
TAPS = (POOL, SPATIAL, LOGITS)


@dataclass(frozen=True)
class Chunk:
    """Images number first, ..., stop - 1 of a set: the first rows of `images` (B, H, W, C) uint8; the rest is padding.

    `images` is sharded over all devices of all processes.
    """

    images: jax.Array
    first: int
    stop: int


@dataclass(frozen=True)
class ImageStatistics:
    """What is kept of a set of images.

    Attributes:
      pool: moments of the 2048 pooled features, for FID.
      spatial: moments of the 2023 spatial features, for sFID.
      scores: sums of class probabilities, for the inception score.
      features: a capped random subset of the pooled features, for KID, precision and recall.
    """

    pool: Moments
    spatial: Moments
    scores: ScoreSums
    features: Reservoir


def empty(num: int, capacity: int) -> ImageStatistics:
    """Statistics of nothing yet, for a set of `num` images of which at most `capacity` keep their features."""
    return ImageStatistics(
        moments.empty_moments(2048),
        moments.empty_moments(2023),
        scores.empty_scores(num, 1008),
        moments.empty_reservoir(2048, capacity),
    )


def add(statistics: ImageStatistics, chunk: Chunk, taps: Mapping[str, jax.Array]) -> ImageStatistics:
    """The statistics after those rows of a chunk's taps that lie on this process went by; padding is left out.

    Raises ValueError for features that are not finite.
    """
    rows: dict[str, np.ndarray] = {}
    numbers = np.zeros(0, np.int64)
    for tap in TAPS:
        numbers, values = meshes.local_rows(taps[tap])
        numbers = numbers + chunk.first
        rows[tap] = values[numbers < chunk.stop]
    numbers = numbers[numbers < chunk.stop]
    return ImageStatistics(
        moments.add_features(statistics.pool, rows[POOL]),
        moments.add_features(statistics.spatial, rows[SPATIAL]),
        scores.add_logits(statistics.scores, rows[LOGITS], numbers),
        moments.keep(statistics.features, rows[POOL], numbers),
    )


def merge(first: ImageStatistics, second: ImageStatistics) -> ImageStatistics:
    """The statistics of two disjoint parts of one set of images together."""
    return ImageStatistics(
        moments.merge(first.pool, second.pool),
        moments.merge(first.spatial, second.spatial),
        scores.merge_scores(first.scores, second.scores),
        moments.keep(first.features, second.features.features, second.features.numbers),
    )


_PARTS = {"pool": Moments, "spatial": Moments, "scores": ScoreSums, "features": Reservoir}


def to_arrays(statistics: ImageStatistics) -> dict[str, Any]:
    """What numpy.savez needs to keep statistics."""
    return {
        f"{part}_{field.name}": getattr(getattr(statistics, part), field.name)
        for part, kind in _PARTS.items()
        for field in dataclasses.fields(kind)
    }


def from_arrays(arrays: Mapping[str, Any]) -> ImageStatistics:
    """The inverse of `to_arrays`."""

    def value(name: str) -> Any:
        array = arrays[name]
        return array if array.ndim else array.item()

    parts: dict[str, Any] = {
        part: kind(**{field.name: value(f"{part}_{field.name}") for field in dataclasses.fields(kind)})
        for part, kind in _PARTS.items()
    }
    return ImageStatistics(**parts)


def most_bytes(like: ImageStatistics) -> int:
    """A bound for the file of statistics of that kind, however many features it keeps."""
    kept = like.features
    rows = kept.capacity * (8 + kept.features.itemsize * kept.features.shape[1])
    return sum(np.asarray(array).nbytes for array in to_arrays(like).values()) + rows + (1 << 16)


def check_alike(found: ImageStatistics, like: ImageStatistics) -> None:
    """Raises ValueError where statistics are not of the same features."""
    expected = to_arrays(like)
    for name, value in to_arrays(found).items():
        one, other = np.asarray(value), np.asarray(expected[name])
        rows = int(name.startswith("features_") and one.ndim > 0)  # their number is free
        if one.dtype.kind != other.dtype.kind or one.ndim != other.ndim or one.shape[rows:] != other.shape[rows:]:
            raise ValueError(f"its {name} is {one.dtype}{list(one.shape)}, expected {other.dtype}{list(other.shape)}")
    if len(found.features.numbers) != len(found.features.features):
        raise ValueError("its features have not as many numbers")
