"""KID, inception score, precision and recall: golden values of torch-fidelity, closed forms, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from diffdistill.evaluation import metrics, scores


def features(count: int, dimension: int = 64, seed: int = 0) -> np.ndarray:
    """As in test_torch_parity.py, whose references gave the golden values."""
    random = np.random.default_rng(seed)
    return np.abs(random.normal(0.4 + 0.05 * seed, 0.3, (count, dimension))).astype(np.float32)


def whole(logits: np.ndarray) -> scores.ScoreSums:
    return scores.add_logits(scores.empty_scores(len(logits), logits.shape[1]), logits, np.arange(len(logits)))


def test_golden_values_of_torch_fidelity():
    """torch-fidelity 0.4.0, torch 2.13.0; KID and the score in float64."""
    distance = metrics.frechet_distance_from_features(features(500), features(700, seed=1))
    assert distance == pytest.approx(0.38684151978661063, rel=1e-6)
    kid = scores.kid(features(300), features(400, seed=1), num_subsets=20, subset_size=100)
    assert kid == pytest.approx((0.007368628841423264, 0.0016225325652283562), rel=1e-6)
    score = scores.inception_score(whole(3 * np.random.default_rng(2).normal(size=(137, 50)).astype(np.float32)))
    assert score == pytest.approx((5.69991443857531, 0.6868825202503044), rel=1e-6)
    found = scores.precision_recall(features(400, 8), features(500, 8, seed=3))
    assert found == pytest.approx((0.806, 0.8675), rel=1e-6)


def test_inception_score_of_one_class_and_of_all_classes_alike():
    alike = np.zeros((40, 7))
    assert scores.inception_score(whole(alike)) == pytest.approx((1.0, 0.0), abs=1e-12)
    # 700 samples, each certain of a class, all classes equally often: about 7, below for the chance in each split.
    certain = 100.0 * np.eye(7)[np.arange(700) % 7]
    mean, deviation = scores.inception_score(whole(certain))
    assert 6.5 < mean <= 7.0 + 1e-9
    assert 0.0 < deviation < 0.3


def test_sums_of_scores_do_not_depend_on_order_and_parts():
    logits = np.random.default_rng(3).normal(size=(103, 9))
    order = np.random.default_rng(4).permutation(103)
    parts = [
        scores.add_logits(scores.empty_scores(103, 9), logits[part], part) for part in np.array_split(order, [11, 60])
    ]
    merged = scores.merge_scores(parts[2], scores.merge_scores(parts[0], parts[1]))
    assert scores.inception_score(merged) == pytest.approx(scores.inception_score(whole(logits)), rel=1e-12)
    with pytest.raises(ValueError, match="92 of 103 are there"):
        scores.inception_score(scores.merge_scores(parts[1], parts[2]))
    with pytest.raises(ValueError, match="scores of 103 and of 9 samples"):
        scores.merge_scores(parts[0], scores.empty_scores(9, 9))


def test_kid_is_the_unbiased_estimate_of_its_definition():
    first, second = features(6, 3), features(6, 3, seed=1)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((np.dot(x.astype(np.float64), y) / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6)]
    expected = sum(kernel(a[i], a[j]) for a in (first, second) for i, j in pairs if i != j) / 30
    expected -= 2 * sum(kernel(first[i], second[j]) for i, j in pairs) / 36
    assert scores.kid(first, second, num_subsets=3, subset_size=6)[0] == pytest.approx(expected, rel=1e-6)


def test_kid_of_one_distribution_is_about_zero():
    mean, deviation = scores.kid(features(2000, 16), features(2000, 16)[::-1], num_subsets=50, subset_size=200)
    assert abs(mean) < 3 * deviation


def test_precision_and_recall_of_points_on_a_line():
    real = np.arange(10.0)[:, None]  # balls of radius 3 at the ends and 2 within cover [-3, 12]
    inside, outside = np.array([[-3.0], [4.4], [12.0]]), np.array([[-3.01], [12.01], [40.0], [50.0]])
    precision, recall = scores.precision_recall(real, np.concatenate([inside, outside]))
    assert precision == pytest.approx(3 / 7)
    assert recall == 1.0
    # Generated points that are all alike have balls of radius 0.
    assert scores.precision_recall(real, np.full((5, 1), 0.5)) == (1.0, 0.0)


def test_blocks_do_not_change_precision_and_recall(monkeypatch):
    real, generated = features(90, 5), features(70, 5, seed=2)
    expected = scores.precision_recall(real, generated)
    monkeypatch.setattr(scores, "_BLOCK", 13)
    assert scores.precision_recall(real, generated) == expected


def test_what_cannot_be_scored_is_refused():
    good, broken = features(20), features(20)
    broken[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        scores.kid(good, broken, subset_size=10)
    with pytest.raises(ValueError, match="NaN"):
        scores.precision_recall(broken, good)
    with pytest.raises(ValueError, match="NaN"):
        whole(broken)
    with pytest.raises(ValueError, match="subsets of 1000 out of 20 and 20 samples"):
        scores.kid(good, good)
    with pytest.raises(ValueError, match="need more samples than that; given 3 and 20"):
        scores.precision_recall(good[:3], good)
    with pytest.raises(ValueError, match=r"\(N, d\) and \(M, d\); given \(20, 64\) and \(20, 8\)"):
        scores.kid(good, features(20, 8), subset_size=10)
