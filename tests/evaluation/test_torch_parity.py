"""Features and figures beside torch-fidelity's own functions, where torch is there (pip install -e '.[parity]').

Without torch the same network is checked against golden values in test_inception.py, and the figures in test_scores.py.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("torch and torch-fidelity are not installed", allow_module_level=True)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_golden_inception
import random_inception
import torch

from diffdistill.evaluation import inception, metrics, moments, scores


@pytest.fixture(scope="module")
def both():
    ours = inception.FeatureExtractor(inception.variables_from_state_dict(random_inception.state_dict()), "tf", "")
    return make_golden_inception.extractor(), ours


@pytest.mark.parametrize("size", random_inception.SIZES)
@pytest.mark.parametrize("kind", ["waves", "noise"])
def test_taps_in_float32(both, size, kind):
    theirs, ours = both
    images = random_inception.images(size)
    if kind == "noise":
        images = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
    expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    found = ours(images, make_golden_inception.TAPS)
    for tap, value in zip(make_golden_inception.TAPS, expected, strict=True):
        value = value.numpy()
        difference = np.abs(np.asarray(found[tap]) - value).max() / np.abs(value).max()
        assert difference < 2e-6, (tap, difference)


@pytest.fixture(scope="module")
def functions():
    """torch-fidelity's metric modules, with a stub for the part of it that needs torchvision."""
    make_golden_inception.stand_in()
    stub = types.ModuleType("torch_fidelity.utils")
    for name in (
        "create_feature_extractor",
        "extract_featuresdict_from_input_id_cached",
        "resolve_feature_extractor",
        "resolve_feature_layer_for_metric",
        "cache_lookup_one_recompute_on_miss",
        "get_cacheable_input_name",
    ):
        setattr(stub, name, None)
    sys.modules["torch_fidelity.utils"] = stub
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    return types.SimpleNamespace(fid=metric_fid, isc=metric_isc, kid=metric_kid, prc=metric_prc)


def features(count: int, dimension: int = 64, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.abs(random.normal(0.4 + 0.05 * seed, 0.3, (count, dimension))).astype(np.float32)


def test_fid(functions):
    first, second = features(500), features(700, seed=1)
    statistics = [functions.fid.fid_features_to_statistics(torch.from_numpy(part)) for part in (first, second)]
    expected = functions.fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    gathered = [moments.moments_of(part) for part in (first, second)]
    found = metrics.frechet_distance(*(value for part in gathered for value in (part.mean(), part.covariance())))
    assert found == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance_from_features(first, second) == pytest.approx(expected, rel=1e-6)


def test_kid(functions):
    # float64 on both sides: in float32 a difference of nearly equal sums has few digits left.
    first, second = features(300).astype(np.float64), features(400, seed=1).astype(np.float64)
    expected = functions.kid.kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), kid_subsets=20, kid_subset_size=100, verbose=False
    )
    mean, deviation = scores.kid(first, second, num_subsets=20, subset_size=100)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


@pytest.mark.parametrize("count", [10, 137, 1000])
def test_inception_score(functions, count):
    logits = 3 * np.random.default_rng(2).normal(size=(count, 50)).astype(np.float32)
    expected = functions.isc.isc_features_to_metric(torch.from_numpy(logits))
    sums = scores.add_logits(scores.empty_scores(count, 50), logits, np.arange(count))
    mean, deviation = scores.inception_score(sums)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-9)


def test_precision_and_recall(functions):
    real, generated = features(400, 8), features(500, 8, seed=3)
    expected = functions.prc.prc_features_to_metric(
        torch.from_numpy(generated).double(), torch.from_numpy(real).double(), verbose=False
    )
    precision, recall = scores.precision_recall(real, generated)
    assert 0.05 < recall < 0.95
    assert 0.05 < precision < 0.95
    assert precision == pytest.approx(expected["precision"], rel=1e-6)
    assert recall == pytest.approx(expected["recall"], rel=1e-6)
