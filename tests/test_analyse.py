"""--mode=analyse: what the figures show, on distances and models that are known, and the files that it writes."""

import csv
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import edm, p2
from diffdistill import analyse, analysis_distances
from diffdistill.config import resolve
from diffdistill.data.digits import digits
from diffdistill.diffusion import parameterisation, process, schedules, weighting
from diffdistill.models.denoiser import Denoiser
from diffdistill.sample import load


class Two:
    """The least of a Source."""

    images = np.stack([np.zeros((6, 6, 1), np.uint8), np.full((6, 6, 1), 255, np.uint8)])
    labels = np.zeros(2, np.int32)
    image_shape, num_classes, name = (6, 6, 1), 0, "two"

    def __len__(self):
        return 2


def test_distances_of_pixels_are_those_of_the_noise_and_of_the_images():
    """Two noisings differ by sqrt(2) sigma; those of black and white by 2 alpha more, in squares."""
    curves = analyse.distances(Two(), analyse.root_mean_square, count=200)
    alpha, sigma = (np.asarray(f(curves.log_snr)) for f in (process.alpha, process.sigma))
    np.testing.assert_allclose(curves.same.mean(axis=1), np.sqrt(2) * sigma, rtol=0.03)
    np.testing.assert_allclose(curves.different.mean(axis=1), np.sqrt(2 * sigma**2 + 4 * alpha**2), rtol=0.03)
    np.testing.assert_allclose(np.exp(curves.log_snr[[0, -1]]), [1e-4, 1e4], rtol=1e-6)


def test_features_are_asked_for_bytes():
    seen = []

    def features(images):
        seen.append(images.dtype)
        return images.reshape(len(images), -1).astype(np.float32)

    one = np.full((2, 2, 2, 1), 3.0, np.float32)  # beyond the range, as noisy images are
    np.testing.assert_allclose(analyse.feature_distance(features)(one, -one), 255.0)
    assert seen == [np.uint8, np.uint8]


class Grey(nn.Module):
    """Predicts the same grey whatever it sees."""

    num_classes: int = 0
    output_channels: int = 1
    guidance_embedding: str = "none"

    @nn.compact
    def __call__(self, inputs, time, label=None, guidance=None, *, deterministic=True):
        return self.param("value", nn.initializers.zeros, ()) + jnp.zeros_like(inputs)


@pytest.mark.parametrize("schedule", ["cosine", "discrete_linear"])
def test_a_reconstruction_starts_at_its_noise_level(schedule):
    chosen = schedules.get(schedule)
    for snr in (1e-3, 1.0, 30.0):
        start = analyse.time_of(chosen, np.log(snr))
        assert float(chosen.log_snr(start)) == pytest.approx(np.log(snr), abs=0.03)
    generator = types.SimpleNamespace(
        denoiser=Denoiser(Grey(), parameterisation.get("x"), 0, (6, 6, 1)),
        params={"value": jnp.float32(0.5)},
        schedule=chosen,
        clip=True,
        settings={},
        learned_variance=False,
    )
    found = analyse.reconstruct(generator, Two.images, Two.labels, 0.1, num_steps=3)
    np.testing.assert_array_equal(found, 191)  # 127.5 x 0.5 + 128, whatever the image was


def test_weights_are_shares_of_those_of_the_training():
    found = analyse.weights(resolve(p2.get_config("digits-linear-1")))
    assert list(found.on_noise) == ["baseline", "p2"]
    for shares in (*found.on_noise.values(), *found.on_bound.values()):
        assert shares.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(found.on_noise["baseline"], 1e-3, rtol=1e-4)
    regime = np.asarray(weighting.regime(found.log_snr))
    np.testing.assert_allclose(np.bincount(regime, found.on_noise["p2"]), [0.449, 0.482, 0.069], atol=6e-4)
    # lambda_t of the paper, with the variance of the posterior: (1 - beta)(1 - abar before) / beta.
    betas = schedules.linear_betas(1000)
    before = np.append(1.0, np.cumprod(1 - betas))[:-1]
    expected = ((1 - betas) * (1 - before) / betas)[1:]
    np.testing.assert_allclose(
        found.on_bound["baseline"][1:] / found.on_bound["baseline"][500], expected / expected[499], rtol=2e-3
    )


def test_a_training_noise_of_its_own_is_what_is_shown():
    found = analyse.weights(resolve(edm.get_config("cifar10-uncond-ddpmpp-F")))
    assert np.exp(-0.5 * np.median(found.log_snr)) == pytest.approx(np.exp(-1.2), rel=0.01)


def test_a_run_gets_three_figures_with_their_numbers(smoke_run, tmp_path):
    generator, config = load(smoke_run.path, "teacher"), smoke_run.run.config
    written = analyse.to_files(
        config, tmp_path, digits(), generator, analyse.root_mean_square, title="distance", num=3, num_steps=4
    )
    assert {path.name for path in written} == {
        f"{name}.{kind}" for name in ("weights", "distance", "reconstruction") for kind in ("png", "csv")
    }
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "reconstruction.csv").open()))
    assert [float(row["snr"]) for row in rows] == list(analyse.SNR_LEVELS[::-1])
    distances = list(csv.DictReader((tmp_path / "distance.csv").open()))
    assert float(distances[-1]["same_mean"]) < float(distances[-1]["different_mean"])
    shares = list(csv.DictReader((tmp_path / "weights.csv").open()))
    assert sum(float(row["snr_trunc_on_noise"]) for row in shares) == pytest.approx(1.0, abs=1e-3)


def test_the_distance_is_chosen_by_the_images(tmp_path):
    lines = []
    config = resolve(p2.get_config("ffhq-linear-1"))
    assert analysis_distances.choose(config, tmp_path, "", lines.append)[0] is None
    assert "weights alone" in lines[0]
