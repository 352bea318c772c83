"""Frechet distance against closed forms and scipy, and the two simple metrics."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from diffdistill.evaluation import metrics, moments


def covariance(random: np.random.Generator, dimension: int, samples: int | None = None) -> np.ndarray:
    factor = random.normal(size=(dimension, samples or 3 * dimension))
    return factor @ factor.T / factor.shape[1]


def test_equal_gaussians_have_distance_zero() -> None:
    random = np.random.default_rng(0)
    mean, cov = random.normal(size=8), covariance(random, 8)
    assert metrics.frechet_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-12)


def test_shifted_gaussian_has_the_squared_shift() -> None:
    random = np.random.default_rng(1)
    cov, shift = covariance(random, 6), random.normal(size=6)
    assert metrics.frechet_distance(np.zeros(6), cov, shift, cov) == pytest.approx(np.sum(shift**2), rel=1e-12)


def test_diagonal_gaussians_have_the_difference_of_deviations() -> None:
    random = np.random.default_rng(2)
    first, second = random.uniform(0.1, 3.0, size=(2, 7))
    expected = np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    zero = np.zeros(7)
    assert metrics.frechet_distance(zero, np.diag(first), zero, np.diag(second)) == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_have_the_difference_of_roots() -> None:
    random = np.random.default_rng(3)
    basis = np.linalg.qr(random.normal(size=(9, 9)))[0]
    first, second = random.uniform(0.1, 3.0, size=(2, 9))
    zero, expected = np.zeros(9), np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    cov1, cov2 = (basis * first) @ basis.T, (basis * second) @ basis.T
    assert metrics.frechet_distance(zero, cov1, zero, cov2) == pytest.approx(expected, rel=1e-11)


def test_general_covariances_agree_with_the_matrix_root_of_scipy() -> None:
    random = np.random.default_rng(4)
    cov1, cov2, mean1, mean2 = covariance(random, 12), covariance(random, 12), *random.normal(size=(2, 12))
    root = np.trace(np.real(scipy.linalg.sqrtm(cov1 @ cov2)))
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2) - 2 * root
    assert metrics.frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_covariances_are_legal(rank: int) -> None:
    variances = np.where(np.arange(6) < rank, 2.0, 0.0)
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    singular = (basis * variances) @ basis.T
    expected = rank * (np.sqrt(2.0) - 1.0) ** 2 + (6 - rank)
    for order in ((singular, np.eye(6)), (np.eye(6), singular)):
        assert metrics.frechet_distance(np.zeros(6), order[0], np.zeros(6), order[1]) == pytest.approx(
            expected, rel=1e-7
        )


@pytest.mark.parametrize(("first", "second"), [(5, 7), (5, 200), (200, 5)])
def test_fewer_samples_than_dimensions_are_exact(first: int, second: int) -> None:
    random = np.random.default_rng(6)
    features1, features2 = random.normal(size=(first, 30)), 2 * random.normal(size=(second, 30)) + 0.3
    cov1, cov2 = np.cov(features1.T), np.cov(features2.T)
    # Rotated into the span of the smaller set, the problem is regular and scipy can be trusted.
    basis = scipy.linalg.orth(cov1 if first < second else cov2)
    root = np.trace(np.real(scipy.linalg.sqrtm(basis.T @ _product(cov1, cov2, first < second) @ basis)))
    expected = np.sum((features1.mean(0) - features2.mean(0)) ** 2) + np.trace(cov1 + cov2) - 2 * root
    assert metrics.frechet_distance_from_features(features1, features2) == pytest.approx(expected, rel=1e-6)
    # From moments alone, as a stream of samples leaves them.
    given = features1.mean(0), cov1, features2.mean(0), cov2
    assert metrics.frechet_distance(*given) == pytest.approx(expected, rel=1e-9)


def _product(cov1: np.ndarray, cov2: np.ndarray, first_smaller: bool) -> np.ndarray:
    return cov1 @ cov2 if first_smaller else cov2 @ cov1


def test_many_samples_agree_with_the_covariances() -> None:
    random = np.random.default_rng(7)
    features1, features2 = random.normal(size=(60, 10)), random.normal(size=(80, 10)) * 1.5
    direct = metrics.frechet_distance(features1.mean(0), np.cov(features1.T), features2.mean(0), np.cov(features2.T))
    assert metrics.frechet_distance_from_features(features1, features2) == pytest.approx(direct, rel=1e-10)


def test_paired_rmse_is_in_units_of_the_pixel_range() -> None:
    black, white = np.zeros((3, 4, 4, 1), np.uint8), np.full((3, 4, 4, 1), 255, np.uint8)
    assert metrics.paired_rmse(black, white) == 2.0
    assert metrics.paired_rmse(white, white) == 0.0
    random = np.random.default_rng(10)
    first, second = random.integers(0, 256, (2, 5, 4, 4, 3)).astype(np.uint8)
    expected = np.sqrt(np.mean((first / 127.5 - second / 127.5) ** 2))
    assert metrics.paired_rmse(first, second) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="uint8 arrays of one shape"):
        metrics.paired_rmse(first, second[:2])


def test_class_accuracy_counts_agreement() -> None:
    assert metrics.class_accuracy(np.array([1, 2, 3, 3]), np.array([1, 2, 3, 0])) == 0.75
    with pytest.raises(ValueError, match="two label arrays"):
        metrics.class_accuracy(np.array([1, 2]), np.array([1]))


def test_fewer_samples_than_inception_features_from_moments() -> None:
    random = np.random.default_rng(11)
    scale = np.exp(-np.arange(512) / 100)
    features1, features2 = random.normal(size=(90, 512)) * scale, 1.1 * random.normal(size=(2000, 512)) * scale + 0.01
    exact = metrics.frechet_distance_from_features(features1, features2)
    first, second = moments.moments_of(features1), moments.moments_of(features2)
    given = first.mean(), first.covariance(), second.mean(), second.covariance()
    assert metrics.frechet_distance(*given) == pytest.approx(exact, rel=1e-9)
    assert metrics.frechet_distance(*given[2:], *given[:2]) == pytest.approx(exact, rel=1e-9)


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.frechet_distance_from_features(np.zeros((1, 3)), np.zeros((9, 3)))
