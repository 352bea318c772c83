"""The feature network: cache, batching, refusals by a shortened recipe; the full recipe once, on the digits."""

from __future__ import annotations

import numpy as np
import pytest

from diffdistill.data.sources import open_source
from diffdistill.evaluation import features


def stripes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy horizontal (0), vertical (1) and no (2) stripes, 6x6."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    wave = np.where(np.arange(6) % 2, 60.0, -60.0)
    patterns = np.stack([np.tile(wave[:, None], (1, 6)), np.tile(wave, (6, 1)), np.zeros((6, 6))])
    images = 128 + patterns[labels] + random.normal(size=(count, 6, 6)) * 20
    return np.clip(images, 0, 255).astype(np.uint8)[..., None], labels


@pytest.fixture
def short_recipe(monkeypatch) -> None:
    monkeypatch.setattr(features, "UPDATES", 60)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def network(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "UPDATES", 60)
        return features.train_or_load(*stripes(300), 3, "stripes", cache)


def test_the_classifier_recognises_images_it_has_not_seen(network) -> None:
    images, labels = stripes(100, seed=1)
    assert network.record["hold_out_accuracy"] > 0.95
    assert network.record["hold_out_images"] == 60
    assert np.mean(network.predict(images) == labels) > 0.95


def test_the_full_recipe_reads_the_digits() -> None:
    source = open_source(source="digits")
    data = [source[index] for index in range(len(source))]
    images, labels = np.stack([item["image"] for item in data]), np.array([item["label"] for item in data])
    assert features.UPDATES == 1500
    network = features.train(images, labels, source.num_classes)
    assert network.record["hold_out_images"] == 359
    assert network.record["hold_out_accuracy"] >= 0.98
    values = np.linalg.eigvalsh(np.cov(network.features(images).T.astype(np.float64)))
    assert values[0] > 1e-4 * values[-1]  # a covariance far from singular


def test_features_do_not_depend_on_the_batch(network) -> None:
    images, _ = stripes(features.APPLY_BATCH + 50)
    together, predicted = network.measure(images)
    assert together.shape == (len(images), features.FEATURES)
    assert together.dtype == np.float32
    apart = np.concatenate([network.features(images[:1]), network.features(images[1:])])
    np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(network.predict(images), predicted)
    assert network.features(images[:0]).shape == (0, features.FEATURES)


def test_the_spread_of_the_data_is_one_per_dimension(network) -> None:
    assert network.features(stripes(300)[0]).var(0).mean() == pytest.approx(1.0, rel=1e-4)


def test_a_cached_network_is_loaded_and_equal(network, cache, monkeypatch) -> None:
    monkeypatch.setattr(features, "train", None)  # training again would fail
    again = features.train_or_load(*stripes(300), 3, "stripes", cache)
    assert again.record == network.record
    np.testing.assert_array_equal(again.features(stripes(20)[0]), network.features(stripes(20)[0]))


def test_other_data_or_another_recipe_is_another_file(network, cache, monkeypatch) -> None:
    (path,) = cache.glob("features-*.npz")
    key = features._cache_key("stripes", (6, 6, 1), 3)
    assert key in path.name
    others = {features._cache_key("dots", (6, 6, 1), 3), features._cache_key("stripes", (6, 6, 1), 4)}
    monkeypatch.setattr(features, "RECIPE", features.RECIPE + 1)
    assert key not in others | {features._cache_key("stripes", (6, 6, 1), 3)}


def test_training_is_repeatable_and_a_broken_cache_is_replaced(network, short_recipe, tmp_path, caplog) -> None:
    images, labels = stripes(300)
    path = tmp_path / f"features-{features._cache_key('stripes', (6, 6, 1), 3)}.npz"
    path.write_bytes(b"broken")
    again = features.train_or_load(images, labels, 3, "stripes", tmp_path)
    assert "training it again" in caplog.text
    assert path.stat().st_size > 1000
    np.testing.assert_allclose(again.features(images), network.features(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 4, 1), (8, 8, 1), (28, 28, 1), (17, 33, 3), (64, 64, 3)])
def test_any_small_image_has_64_features(shape) -> None:
    import jax
    import jax.numpy as jnp

    model = features.Classifier(5)
    spec = jax.ShapeDtypeStruct((2, *shape), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), spec)
    outputs, logits = jax.eval_shape(model.apply, variables, spec)
    assert outputs.shape == (2, 64)
    assert logits.shape == (2, 5)
    assert variables["params"]["penultimate"]["kernel"].shape[0] <= 16 * 64


def test_unusable_data_are_refused_with_reasons() -> None:
    images, labels = stripes(20)
    with pytest.raises(ValueError, match="at least 10 images"):
        features.train(images[:5], labels[:5], 3)
    with pytest.raises(ValueError, match="num_classes >= 2; given num_classes=1"):
        features.train(images, labels, 1)
    with pytest.raises(ValueError, match=r"labels from 0 to 2"):
        features.train(images, labels, 2)
    with pytest.raises(ValueError, match="uint8 images"):
        features.train(images.astype(np.float32), labels, 3)
