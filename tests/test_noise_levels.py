"""Proposed noise levels: closed forms, what enlarging and contrast do to them, and flags that the config accepts."""

import dataclasses
import math
import re

import numpy as np
import pytest

from diffdistill import noise_levels
from diffdistill.config import default_config, resolve
from diffdistill.data import DataError, array_source, gather, open_source
from diffdistill.noise_levels import propose

COMPONENT_STD = math.pi / math.sqrt(12.0)  # in ln sigma, of the levels at which one component is lost
BYTE = 1 / 127.5


def source(pixels):
    """Images (N, H, W, C) in [-1, 1] as a source of bytes."""
    images = np.clip(np.round((np.asarray(pixels, np.float64) + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return array_source("images", images, np.zeros(len(images), np.int64), ("all",))


def white(std, shape=(400, 8, 8, 3), seed=0):
    return std * np.random.default_rng(seed).standard_normal(shape)


def smooth(num=300, size=8):
    """Grey images with 1/f amplitudes, standard deviation 0.15."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) * size
    noise = np.fft.fft2(white(1.0, (num, size, size)))
    images = np.fft.ifft2(noise / np.maximum(frequency, 1.0)).real
    return (0.15 * images / images.std())[..., None]


def enlarged(images, factor=2):
    """Images with `factor` times the side: the same cosines, sampled more finely."""
    size = images.shape[1]
    # Row j: position j of the large image; the cosines of the small one, at the large one's pixel centres.
    frequency = np.arange(size)
    large = np.cos(np.pi * frequency * (np.arange(factor * size)[:, None] + 0.5) / (factor * size))
    small = np.cos(np.pi * frequency * (np.arange(size)[:, None] + 0.5) / size)
    matrix = large @ np.linalg.inv(small)
    return np.einsum("ph,bhwc,qw->bpqc", matrix, images, matrix)


def test_white_images_have_one_level():
    """Every component has the standard deviation of the pixels."""
    proposal = propose(source(white(0.25)))
    assert proposal.sigma_data == pytest.approx(0.25, rel=0.01)
    assert proposal.root_mean_square == pytest.approx(proposal.sigma_data, rel=1e-3)
    assert proposal.level_mean == pytest.approx(math.log(0.25), abs=0.01)
    assert proposal.level_spread < 0.05
    assert proposal.p_mean == pytest.approx(math.log(0.25), abs=0.03)
    assert proposal.p_std == pytest.approx(COMPONENT_STD, abs=0.01)
    assert proposal.largest_component == pytest.approx(0.25, rel=0.2)


def test_two_levels_are_weighted_by_amplitude():
    """A grey level per image beside white detail: one component of deviation 8 a, 63 of deviation b."""
    a, b = 0.2, 0.1
    images = white(b, (6000, 8, 8, 1)) + white(a, (6000, 1, 1, 1), seed=1)
    deviations = np.array([math.hypot(8 * a, b), *[b] * 63])
    weights = deviations / deviations.sum()
    mean = weights @ np.log(deviations)
    proposal = propose(source(images), limit=6000)
    assert proposal.level_mean == pytest.approx(mean, abs=0.02)
    spread = math.sqrt(weights @ (np.log(deviations) - mean) ** 2)
    assert proposal.level_spread == pytest.approx(spread, abs=0.02)
    assert proposal.largest_component == pytest.approx(deviations[0], rel=0.03)


def test_colours_are_taken_apart():
    """Grey images in three equal channels: a third of the components, sqrt(3) times as strong."""
    grey = white(0.2, (300, 8, 8, 1))
    one, three = propose(source(grey)), propose(source(np.repeat(grey, 3, axis=-1)))
    assert three.p_mean - one.p_mean == pytest.approx(math.log(3.0) / 2, abs=0.02)
    assert three.p_std == pytest.approx(one.p_std, abs=0.01)


def test_contrast_scales_the_levels():
    images = smooth()
    low, high = propose(source(images)), propose(source(1.5 * images))
    assert high.sigma_data == pytest.approx(1.5 * low.sigma_data, rel=1e-2)
    assert high.sigma_max == pytest.approx(1.5 * low.sigma_max, rel=1e-2)
    assert high.p_mean - low.p_mean == pytest.approx(math.log(1.5), abs=0.01)
    assert high.p_std == pytest.approx(low.p_std, rel=1e-2)


def test_enlarging_moves_the_levels_up():
    """Twice the side: every component is twice as strong, and the new ones are empty."""
    small, large = propose(source(smooth())), propose(source(enlarged(smooth())))
    assert large.p_mean - small.p_mean == pytest.approx(math.log(2.0), abs=0.1)
    assert large.p_std == pytest.approx(small.p_std, abs=0.1)
    assert large.sigma_max == pytest.approx(2.0 * small.sigma_max, rel=0.02)


def test_real_images_enlarged_move_up():
    """At a contrast that leaves room for overshoot: clipping it would add detail."""
    digits = 0.5 * (gather(open_source(), range(500))["image"] / 127.5 - 1.0)
    small, large = propose(source(digits)), propose(source(enlarged(digits)))
    assert large.p_mean - small.p_mean == pytest.approx(math.log(2.0), abs=0.1)
    assert large.p_std == pytest.approx(small.p_std, abs=0.1)


def test_cifar10_gets_the_values_of_edm(monkeypatch):
    """Images whose levels are those of CIFAR-10."""
    levels = (noise_levels.CIFAR10_MEAN, noise_levels.CIFAR10_SPREAD)
    monkeypatch.setattr(noise_levels, "_levels", lambda deviations: levels)
    proposal = propose(source(white(0.25, (10, 4, 4, 3))))
    assert (proposal.p_mean, proposal.p_std) == pytest.approx((-1.2, 1.2))


def test_sigma_data_is_around_the_mean_of_every_channel():
    """A mean per channel does not count, a mean image does."""
    channel = np.array([-0.5, 0.0, 0.5])
    image = np.where(np.arange(8) < 4, -0.3, 0.3)[:, None]
    proposal = propose(source(white(0.05) + channel + image))
    assert proposal.sigma_data == pytest.approx(math.hypot(0.05, 0.3), rel=0.01)
    assert proposal.centred == pytest.approx(0.05, rel=0.02)
    assert proposal.root_mean_square == pytest.approx(math.sqrt(0.05**2 + 0.3**2 + np.mean(channel**2)), rel=0.01)
    assert re.search(r"Around 0 it would be 0\.5\d+.*around the mean image 0\.05", proposal.text())
    assert "Around 0" not in propose(source(white(0.25))).text()


@pytest.mark.parametrize(("gap", "levels"), [(1, 256), (5, 52), (10, 26)])
def test_sigma_min_is_the_noise_of_rounding(gap, levels):
    values = np.random.default_rng(0).integers(0, levels, (200, 8, 8, 1)) * gap
    proposal = propose(source(values * BYTE - 1.0))
    assert (proposal.level_gap, proposal.num_levels) == (gap, levels)
    assert proposal.sigma_min == pytest.approx(gap * BYTE / math.sqrt(12.0))


def test_sigma_min_of_digits_and_of_two_levels():
    """Seventeen levels are rounding; black and white is the picture itself."""
    digits = propose(open_source())
    assert (digits.num_levels, digits.level_gap) == (17, 15)
    assert digits.sigma_min == pytest.approx(15 * BYTE / math.sqrt(12.0))
    binary = propose(source(np.sign(white(1.0, (100, 8, 8, 1)))))
    assert binary.sigma_min == pytest.approx(binary.sigma_data / 20.0)
    assert binary.level_mean == pytest.approx(0.0, abs=0.05)
    assert "coarse beside sigma_data" in binary.text()
    assert "coarse" not in digits.text()


def test_sigma_max_is_the_largest_distance():
    """Against every pair, with more images than one block holds; and by hand."""
    pixels = white(0.3, (300, 3, 5, 2))
    images = source(pixels)
    flat = gather(images, range(300))["image"].reshape(300, -1) / 127.5
    largest = max(np.linalg.norm(flat - one, axis=1).max() for one in flat)
    assert propose(images).sigma_max == pytest.approx(largest, rel=1e-5)
    corners = np.zeros((3, 2, 2, 1))
    corners[0], corners[1] = -1.0, 1.0
    assert propose(source(corners)).sigma_max == pytest.approx(4.0)  # 2 in each of 4 pixels


def test_a_part_of_the_images_is_chosen_by_the_seed():
    images = source(white(0.25, (300, 4, 4, 1)))
    first = propose(images, limit=100)
    assert (first.num_images, first.num_all) == (100, 300)
    assert first == propose(images, limit=100)
    assert first != propose(images, limit=100, seed=1)
    assert "100 of 300 images" in first.text()
    assert "all 300 images" in propose(images).text()
    assert "rough" in propose(images, limit=99).text()
    assert "rough" not in first.text()


@pytest.mark.parametrize("images", [white(0.25), np.sign(white(1.0)), smooth()], ids=["white", "binary", "smooth"])
def test_the_flags_set_the_config(images):
    """Read from the text as a person would copy them: the sampler runs over the whole range that was trained."""
    proposal = propose(source(images))
    settings = default_config()
    settings.process.schedule, settings.teacher.num_updates = "edm", 1
    given = re.findall(r"^    --config\.(\S+)=(\S+?)(?: \\)?$", proposal.text(), re.MULTILINE)
    settings.update_from_flattened_dict({name: float(value) for name, value in given})
    config = resolve(settings)
    assert config.model.sigma_data == pytest.approx(proposal.sigma_data, rel=5e-3)
    assert config.teacher.p_mean == pytest.approx(proposal.p_mean, abs=5e-3)
    assert config.teacher.p_std == pytest.approx(proposal.p_std, abs=5e-3)
    assert config.sampling.sigma_min == pytest.approx(proposal.sigma_min, rel=5e-3)
    assert config.sampling.sigma_max == pytest.approx(proposal.sigma_max, rel=5e-3)
    assert math.exp(-0.5 * config.process.log_snr_min) == pytest.approx(config.sampling.sigma_max, rel=1e-6)
    assert math.exp(-0.5 * config.process.log_snr_max) == pytest.approx(config.sampling.sigma_min, rel=1e-6)
    assert len(given) == 7


def test_the_text_explains_every_value():
    proposal = dataclasses.replace(propose(source(white(0.25))), p_mean=-3.25)
    said = proposal.text()
    for name in ("sigma_data", "P_mean", "P_std", "sigma_min", "sigma_max"):
        assert f"{name} = " in said
    assert "P_mean = -3.25" in said
    assert "--config.teacher.p_mean=-3.25" in said


@pytest.mark.parametrize(
    ("images", "limit", "said"),
    [
        (white(0.2, (1, 4, 4, 1)), 2000, "images: noise levels need 2 images or more; it has 1"),
        (white(0.2, (9, 4, 4, 1)), 1, "the limit is 1"),
        (np.full((9, 4, 4, 1), 0.5), 2000, "all 9 images looked at are the same"),
        (np.repeat(white(0.2, (1, 4, 4, 1)), 9, axis=0), 2000, "all 9 images looked at are the same"),
    ],
    ids=["one image", "limit", "constant", "copies"],
)
def test_what_has_no_noise_levels_is_refused(images, limit, said):
    with pytest.raises(DataError, match=re.escape(said)):
        propose(source(images), limit=limit)


def test_images_that_differ_by_rounding_alone_are_refused():
    images = np.repeat(white(0.3, (1, 8, 8, 1)), 50, axis=0)
    images[0, 0, 0] += BYTE
    with pytest.raises(DataError, match="differ by rounding alone"):
        propose(source(images))
