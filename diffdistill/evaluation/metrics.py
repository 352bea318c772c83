"""Numbers about images: Frechet distance between Gaussians fitted to features, paired error, class accuracy.

Everything here is float64 on the host: the covariances of good samples differ in digits that float32 does not have.
"""

from __future__ import annotations

import numpy as np

from diffdistill.evaluation.moments import moments_of


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) between two Gaussians (Dowson & Landau 1982).

    The eigenvalues of cov1 cov2 are those of L' cov2 L for any cov1 = L L', which is symmetric: no complex numbers and
    no offset on the diagonal. Of singular covariances (fewer samples than features) the directions that are zero up
    to rounding are left out: the root of a rounding error is a thousand times too large. Squared units of the features.
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
        np.linalg.cholesky(cov2)  # both must have one
    except np.linalg.LinAlgError:
        trace = float(np.linalg.svd(_root(cov1).T @ _root(cov2), compute_uv=False).sum())
    else:
        middle = root.T @ cov2 @ root
        trace = float(np.sqrt(np.clip(np.linalg.eigvalsh((middle + middle.T) / 2), 0.0, None)).sum())
    return _distance(mean1, np.trace(cov1), mean2, np.trace(cov2), trace)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (d, r) with R R' = covariance of rank r."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


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
