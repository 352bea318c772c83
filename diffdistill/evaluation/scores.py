"""Scores of generated images from their features: inception score, KID, improved precision and recall.

float64 on the host, and exact: nothing is approximated but by the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

SPLITS = 10
NEIGHBOURS = 3  # of the balls of precision and recall
SEED = 2020  # of the shuffles and subsets, as torch-fidelity draws them
_BLOCK = 1000  # rows of a matrix of distances that are held at once


@dataclass(frozen=True)
class ScoreSums:
    """Sums over class probabilities p from which the inception score follows, one per split of the samples.

    Which split a sample belongs to is decided by its number: shuffled, because samples often come sorted by class.

    Attributes:
      num_samples: how many samples there will be, which the cut into splits depends on.
      counts: (S,) samples so far.
      probabilities: (S, K) sums of p.
      entropies: (S,) sums of sum_k p_k log p_k.
    """

    num_samples: int
    counts: np.ndarray
    probabilities: np.ndarray
    entropies: np.ndarray


def empty_scores(num_samples: int, num_classes: int) -> ScoreSums:
    """Sums of nothing yet."""
    return ScoreSums(num_samples, np.zeros(SPLITS, np.int64), np.zeros((SPLITS, num_classes)), np.zeros(SPLITS))


def add_logits(sums: ScoreSums, logits: np.ndarray, numbers: np.ndarray) -> ScoreSums:
    """The sums after the logits (B, K) of the samples `numbers` (B,), each in 0..num_samples-1, went by."""
    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise ValueError("the logits hold a NaN or an infinity; the images or the network are broken")
    logits = logits - logits.max(1, keepdims=True)
    logarithms = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    probabilities = np.exp(logarithms)
    chosen = _splits(sums.num_samples)[numbers]
    counts, summed, entropies = sums.counts.copy(), sums.probabilities.copy(), sums.entropies.copy()
    np.add.at(counts, chosen, 1)
    np.add.at(summed, chosen, probabilities)
    np.add.at(entropies, chosen, (probabilities * logarithms).sum(1))
    return replace(sums, counts=counts, probabilities=summed, entropies=entropies)


def merge_scores(first: ScoreSums, second: ScoreSums) -> ScoreSums:
    """The sums of both sets together. Raises ValueError where they are parts of sets of different sizes."""
    if first.num_samples != second.num_samples:
        raise ValueError(f"scores of {first.num_samples} and of {second.num_samples} samples cannot be added")
    return replace(
        first,
        counts=first.counts + second.counts,
        probabilities=first.probabilities + second.probabilities,
        entropies=first.entropies + second.entropies,
    )


def inception_score(sums: ScoreSums) -> tuple[float, float]:
    """exp of the mean divergence of p from its mean (Salimans et al. 2016): mean and standard deviation over splits.

    Raises ValueError while samples are missing, and for fewer samples than splits.
    """
    if sums.counts.sum() != sums.num_samples or sums.counts.min() < 1:
        raise ValueError(
            f"the inception score needs all of its samples, {SPLITS} or more; {sums.counts.sum()} of "
            f"{sums.num_samples} are there"
        )
    mean = sums.probabilities / sums.counts[:, None]
    logarithms = np.log(np.where(mean > 0, mean, 1.0))
    scores = np.exp(sums.entropies / sums.counts - (mean * logarithms).sum(1))
    return float(scores.mean()), float(scores.std())


def _splits(num_samples: int) -> np.ndarray:
    """(N,) the split of every sample."""
    ends = [(index + 1) * num_samples // SPLITS for index in range(SPLITS)]
    places = np.searchsorted(ends, np.arange(num_samples), side="right")
    splits = np.empty(num_samples, np.int64)
    splits[np.random.RandomState(SEED).permutation(num_samples)] = places
    return splits


def kid(
    features1: np.ndarray, features2: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): mean and standard deviation over random subsets.

    features (N, d) and (M, d). The squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, unbiased, so that
    values about 0 and below are legal. Raises ValueError where there are fewer samples than a subset takes.
    """
    features1, features2 = _pair(features1, features2)
    if not 2 <= subset_size <= min(len(features1), len(features2)):
        raise ValueError(
            f"KID was asked for subsets of {subset_size} out of {len(features1)} and {len(features2)} samples; a "
            "subset holds at least 2 and at most as many as there are. Use more samples or smaller subsets"
        )
    random = np.random.RandomState(SEED)
    values = []
    for _ in range(num_subsets):
        first = features1[random.choice(len(features1), subset_size, replace=False)]
        second = features2[random.choice(len(features2), subset_size, replace=False)]
        values.append(_discrepancy(first, second))
    return float(np.mean(values)), float(np.std(values))


def _discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    size = len(first)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    within = sum(float(k.sum() - np.trace(k)) for k in (kernel(first, first), kernel(second, second)))
    return within / (size * (size - 1)) - 2.0 * float(kernel(first, second).mean())


def precision_recall(real: np.ndarray, generated: np.ndarray, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), both in [0, 1].

    Precision is the fraction of generated features (N, d) that lie in the manifold of the real ones (M, d), the union
    of balls that reach to each one's third neighbour; recall exchanges the two. Raises ValueError for too few samples.
    """
    real, generated = _pair(real, generated)
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"precision and recall look at {neighbours} neighbours and need more samples than that; given {len(real)} "
            f"and {len(generated)}"
        )
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    """The fraction of points inside the ball of any point of the manifold."""
    # Each point is at distance 0 of itself: its own place counts as one neighbour more.
    radii = np.concatenate(
        [np.partition(block, neighbours, axis=1)[:, neighbours] for block in _squared(manifold, manifold)]
    )
    inside = [(block <= radii).any(1) for block in _squared(points, manifold)]
    return float(np.concatenate(inside).mean())


def _squared(first: np.ndarray, second: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of first (N, d) to second (M, d), in blocks of rows."""
    lengths = (second**2).sum(1)
    for start in range(0, len(first), _BLOCK):
        rows = first[start : start + _BLOCK]
        yield np.maximum((rows**2).sum(1)[:, None] + lengths - 2.0 * rows @ second.T, 0.0)


def _pair(features1: np.ndarray, features2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features1, features2 = np.asarray(features1, np.float64), np.asarray(features2, np.float64)
    if features1.ndim != 2 or features2.ndim != 2 or features1.shape[1] != features2.shape[1]:
        raise ValueError(f"expected features (N, d) and (M, d); given {features1.shape} and {features2.shape}")
    if not (np.isfinite(features1).all() and np.isfinite(features2).all()):
        raise ValueError("the features hold a NaN or an infinity; the images or the feature network are broken")
    return features1, features2
