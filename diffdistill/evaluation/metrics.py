"""Numbers about images: Frechet distance between Gaussians fitted to features, paired error, class accuracy.

Everything here is float64 on the host: feature dimensions are small, and the covariances of good samples differ in
digits that float32 does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


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


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) between two Gaussians (Dowson & Landau 1982).

    The eigenvalues of cov1 cov2 are those of L' cov2 L for any cov1 = L L', which is symmetric: no complex numbers,
    no offset on the diagonal, and singular covariances are legal. Squared units of the features.
    """
    mean1, mean2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    cov1, cov2 = np.asarray(cov1, np.float64), np.asarray(cov2, np.float64)
    if mean1.ndim != 1 or mean1.shape != mean2.shape or not cov1.shape == cov2.shape == mean1.shape * 2:
        raise ValueError(
            f"expected means (d,) and covariances (d, d); given {mean1.shape}, {cov1.shape}, {mean2.shape}, "
            f"{cov2.shape}"
        )
    try:
        root = np.linalg.cholesky(cov1)
    except np.linalg.LinAlgError:  # singular, or negative by rounding
        values, vectors = np.linalg.eigh(cov1)
        root = vectors * np.sqrt(np.clip(values, 0.0, None))
    middle = root.T @ cov2 @ root
    eigenvalues = np.clip(np.linalg.eigvalsh((middle + middle.T) / 2), 0.0, None)
    return _distance(mean1, np.trace(cov1), mean2, np.trace(cov2), float(np.sqrt(eigenvalues).sum()))


def frechet_distance_from_features(features1: np.ndarray, features2: np.ndarray) -> float:
    """The Frechet distance of two feature arrays (N, d) and (M, d), exact also where N or M is below d.

    With centred features X, Y the trace of (cov1 cov2)^(1/2) is the nuclear norm of X Y' / sqrt((N-1)(M-1)): for
    few samples a small matrix, and no root of a rounded zero eigenvalue.
    """
    features1, features2 = np.asarray(features1, np.float64), np.asarray(features2, np.float64)
    if features1.ndim != 2 or features2.ndim != 2 or features1.shape[1] != features2.shape[1]:
        raise ValueError(f"expected features (N, d) and (M, d); given {features1.shape} and {features2.shape}")
    if min(len(features1), len(features2)) > features1.shape[1]:
        first, second = moments_of(features1), moments_of(features2)
        return frechet_distance(first.mean(), first.covariance(), second.mean(), second.covariance())
    if min(len(features1), len(features2)) < 2:
        raise ValueError(f"a covariance needs at least 2 samples; given {len(features1)} and {len(features2)}")
    mean1, mean2 = features1.mean(0), features2.mean(0)
    centred1 = (features1 - mean1) / np.sqrt(len(features1) - 1)
    centred2 = (features2 - mean2) / np.sqrt(len(features2) - 1)
    root = float(np.linalg.svd(centred1 @ centred2.T, compute_uv=False).sum())
    return _distance(mean1, np.sum(centred1**2), mean2, np.sum(centred2**2), root)


def _distance(mean1: np.ndarray, trace1: float, mean2: np.ndarray, trace2: float, root: float) -> float:
    # A distance is not negative; the difference of the traces may be, by rounding, when both Gaussians are equal.
    return max(0.0, float(np.sum((mean1 - mean2) ** 2) + trace1 + trace2 - 2.0 * root))


def paired_rmse(images1: np.ndarray, images2: np.ndarray) -> float:
    """Root mean square difference of corresponding uint8 images (N, H, W, C), in units of the [-1, 1] range."""
    images1, images2 = np.asarray(images1), np.asarray(images2)
    if images1.dtype != np.uint8 or images2.dtype != np.uint8 or images1.shape != images2.shape or not images1.size:
        raise ValueError(
            f"expected two uint8 arrays of one shape; given {images1.dtype} {images1.shape} and "
            f"{images2.dtype} {images2.shape}"
        )
    difference = images1.astype(np.float64) - images2.astype(np.float64)
    return float(np.sqrt(np.mean(difference**2)) / 127.5)


def class_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images recognised as the class they were made for, in [0, 1]; both arrays (N,)."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not predicted.size:
        raise ValueError(f"expected two label arrays (N,), N >= 1; given {predicted.shape} and {labels.shape}")
    return float(np.mean(predicted == labels))
