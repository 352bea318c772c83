"""What is kept of features that stream by: their moments, and a capped random subset; both add up in any order.

float64 on the host: the covariances of good samples differ in digits that float32 does not have, and sums that do not
depend on how the samples were cut into batches let shards, hosts and restarts agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diffdistill.data.pipeline import mix64


@dataclass(frozen=True)
class Moments:
    """Sums over n feature vectors, from which mean and covariance follow at any time.

    `shift` (d,) is subtracted from every vector first (a rough mean, fixed in advance): sums of squares of numbers
    far from zero lose the digits that the covariance consists of. Two Moments with one shift merge by addition, so
    batches, hosts and restarts can be counted in any order. `dataclasses.asdict` gives what np.savez needs, and
    `Moments(**np.load(...))` reads it back.
    """

    count: int
    shift: np.ndarray
    total: np.ndarray
    outer: np.ndarray

    def mean(self) -> np.ndarray:
        """(d,) float64. Raises ValueError on an empty accumulator."""
        if self.count < 1:
            raise ValueError("the mean of no samples was asked for; add features first")
        return self.shift + self.total / self.count

    def covariance(self) -> np.ndarray:
        """(d, d) float64 with divisor N - 1. Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; given {self.count}")
        return (self.outer - np.outer(self.total, self.total) / self.count) / (self.count - 1)


def empty_moments(dimension: int, shift: np.ndarray | None = None) -> Moments:
    """An accumulator of nothing yet, for vectors of length `dimension`."""
    shift = np.zeros(dimension) if shift is None else np.asarray(shift, np.float64)
    if shift.shape != (dimension,):
        raise ValueError(f"shift must have shape ({dimension},); given {shift.shape}")
    return Moments(0, shift, np.zeros(dimension), np.zeros((dimension, dimension)))


def add_features(moments: Moments, features: np.ndarray, valid: np.ndarray | None = None) -> Moments:
    """features (B, d); `valid` (B,) bool leaves out padded rows. Returns new Moments."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1:] != moments.shift.shape:
        raise ValueError(f"expected features (B, {len(moments.shift)}); given {features.shape}")
    if valid is not None:
        valid = np.asarray(valid, bool)
        if valid.shape != features.shape[:1]:
            raise ValueError(f"expected one validity flag per row, ({len(features)},); given {valid.shape}")
        features = features[valid]
    if not np.isfinite(features).all():
        raise ValueError("the features hold a NaN or an infinity; the images or the feature network are broken")
    centred = features - moments.shift
    return replace(
        moments,
        count=moments.count + len(centred),
        total=moments.total + centred.sum(0),
        outer=moments.outer + centred.T @ centred,
    )


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of both sets together. Raises ValueError when their shifts differ."""
    if not np.array_equal(first.shift, second.shift):
        raise ValueError("moments with different shifts cannot be added; start both from the same empty_moments")
    return replace(
        first,
        count=int(first.count) + int(second.count),
        total=first.total + second.total,
        outer=first.outer + second.outer,
    )


def moments_of(features: np.ndarray) -> Moments:
    """The moments of one array (N, d), shifted by its own mean."""
    features = np.asarray(features, np.float64)
    return add_features(empty_moments(features.shape[1], features.mean(0)), features)


@dataclass(frozen=True)
class Reservoir:
    """At most `capacity` feature vectors out of any number: those whose sample numbers hash lowest.

    Which are kept depends on the numbers alone: any order, any sharding and a restart keep the same ones.

    Attributes:
      numbers: (n,) int64, of the samples kept, in rising order.
      features: (n, d) float32.
    """

    capacity: int
    numbers: np.ndarray
    features: np.ndarray


def empty_reservoir(dimension: int, capacity: int) -> Reservoir:
    """A reservoir of nothing yet, for vectors of length `dimension`."""
    if capacity < 1:
        raise ValueError(f"a reservoir needs room for at least 1 sample; given {capacity}")
    return Reservoir(capacity, np.zeros(0, np.int64), np.zeros((0, dimension), np.float32))


def keep(reservoir: Reservoir, features: np.ndarray, numbers: np.ndarray) -> Reservoir:
    """The reservoir after features (B, d) of the samples `numbers` (B,) went by."""
    if len(reservoir.numbers) == reservoir.capacity:
        chosen = _hash(numbers) < _hash(reservoir.numbers).max()
        features, numbers = features[chosen], numbers[chosen]
    if not len(numbers):
        return reservoir
    numbers = np.concatenate([reservoir.numbers, np.asarray(numbers, np.int64)])
    features = np.concatenate([reservoir.features, np.asarray(features, np.float32)])
    lowest = np.argsort(_hash(numbers), kind="stable")[: reservoir.capacity]
    order = lowest[np.argsort(numbers[lowest])]
    return Reservoir(reservoir.capacity, numbers[order], features[order])


def _hash(numbers: np.ndarray) -> np.ndarray:
    return mix64(np.asarray(numbers).astype(np.uint64))
