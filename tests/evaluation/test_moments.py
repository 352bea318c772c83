"""What streams by: moments against numpy, and the random subset that is kept, in any order and any number of parts."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from diffdistill.evaluation import moments


def test_accumulated_moments_equal_those_of_all_features() -> None:
    random = np.random.default_rng(8)
    features = 1000.0 + random.normal(size=(250, 5))
    gathered = moments.empty_moments(5, shift=features[:10].mean(0))
    for start in range(0, 250, 64):
        batch = np.full((64, 5), 1e9)  # padded rows hold rubbish
        rows = features[start : start + 64]
        batch[: len(rows)] = rows
        gathered = moments.add_features(gathered, batch, valid=np.arange(64) < len(rows))
    assert gathered.count == 250
    np.testing.assert_allclose(gathered.mean(), features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(gathered.covariance(), np.cov(features.T), rtol=1e-10, atol=1e-12)


def test_moments_merge_and_survive_a_file(tmp_path) -> None:
    random = np.random.default_rng(9)
    features = random.normal(size=(100, 4)).astype(np.float32)
    start = moments.empty_moments(4, shift=features[0])
    first, second = moments.add_features(start, features[:30]), moments.add_features(start, features[30:])
    np.savez(tmp_path / "part.npz", **asdict(first))
    with np.load(tmp_path / "part.npz") as file:
        first = moments.Moments(**file)
    merged = moments.merge(first, second)
    assert merged.count == 100
    np.testing.assert_allclose(merged.covariance(), np.cov(features.T.astype(np.float64)), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance(), moments.moments_of(features).covariance(), rtol=1e-12)


def test_moments_refuse_what_they_cannot_count() -> None:
    empty = moments.empty_moments(3)
    with pytest.raises(ValueError, match="different shifts"):
        moments.merge(empty, moments.empty_moments(3, shift=np.ones(3)))
    with pytest.raises(ValueError, match=r"\(B, 3\).*given \(2, 4\)"):
        moments.add_features(empty, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="NaN"):
        moments.add_features(empty, np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="at least 2 samples; given 0"):
        empty.covariance()


def test_the_subset_depends_on_the_sample_numbers_alone() -> None:
    features = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    numbers = np.arange(500)
    whole = moments.keep(moments.empty_reservoir(3, 40), features, numbers)
    assert whole.features.shape == (40, 3)
    np.testing.assert_array_equal(whole.features, features[whole.numbers])
    order = np.random.default_rng(1).permutation(500)
    parts = [order[:7], order[7:200], order[200:]]
    kept = [moments.keep(moments.empty_reservoir(3, 40), features[part], numbers[part]) for part in parts]
    merged = kept[2]
    for other in (kept[0], kept[1]):
        merged = moments.keep(merged, other.features, other.numbers)
    np.testing.assert_array_equal(merged.numbers, whole.numbers)
    np.testing.assert_array_equal(merged.features, whole.features)


def test_the_subset_is_spread_over_the_samples() -> None:
    numbers = np.arange(20_000)
    kept = moments.keep(moments.empty_reservoir(1, 2000), numbers[:, None], numbers)
    counts = np.histogram(kept.numbers, bins=20, range=(0, 20_000))[0]
    assert np.all(np.abs(counts - 100) < 5 * np.sqrt(100))


def test_fewer_samples_than_room_are_all_kept() -> None:
    kept = moments.keep(moments.empty_reservoir(2, 9), np.ones((4, 2)), np.arange(4))
    np.testing.assert_array_equal(kept.numbers, np.arange(4))
    with pytest.raises(ValueError, match="at least 1 sample; given 0"):
        moments.empty_reservoir(2, 0)
