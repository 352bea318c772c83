"""Which noise levels suit a set of images: proposals for EDM's sigma_data, P_mean, P_std, sigma_min and sigma_max.

Everything comes from one look at the images in [-1, 1]; nothing is trained. No formula gives P_mean and P_std: Karras
et al. 2022 found -1.2 and 1.2 by trying. They are carried over to other images by the spectrum:

* Written in components (cosines along both sides, principal colours), an image loses component i to noise around
  sigma_i, the standard deviation of that component over the images: the optimal linear denoiser keeps the share
  sigma_i^2 / (sigma_i^2 + sigma^2) of it, a logistic curve in ln sigma with centre ln sigma_i and variance pi^2 / 12.
* The centres ln sigma_i have a mean m and a standard deviation s, each component weighted by sigma_i. The weight is a
  choice: halfway between 1, where details that nobody sees would rule, and sigma_i^2, where the average colour would.
  What rounding to bytes adds to every sigma_i^2 is taken off first.
* P_mean = m - a s and P_std^2 = pi^2 / 12 + (b s)^2, with a and b such that CIFAR-10 gets EDM's values. The first
  term is a floor: digits trained with P_mean -1.33 came out as the class asked for in 95 % with P_std 1.2, 88 % with
  0.67 (700 updates, one run each).

Images of c times the contrast get ln c more, white noise its own level, and images enlarged twice without new detail
ln 2 more, as averages of four pixels stand out of twice the noise (compare Hoogeboom et al. 2023, "simple diffusion").
New detail, be it the ringing of a resize filter or the edges of repeated pixels, pulls m down and widens s.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffdistill.data.contract import DataError, Source
from diffdistill.data.pipeline import gather

_COMPONENT_VARIANCE = math.pi**2 / 12.0  # of a logistic distribution of scale 1/2

EDM_P_MEAN, EDM_P_STD = -1.2, 1.2
# m and s of the 50,000 training images of a JPEG copy of CIFAR-10, by `propose` itself. The copy lacks some fine
# detail: with white noise of 0.02 added in its place, m comes out 0.16 lower and s 0.07 larger.
CIFAR10_MEAN, CIFAR10_SPREAD = -0.483, 1.546
_BELOW = (CIFAR10_MEAN - EDM_P_MEAN) / CIFAR10_SPREAD  # a
_NARROWER = math.sqrt(EDM_P_STD**2 - _COMPONENT_VARIANCE) / CIFAR10_SPREAD  # b

_LEAST_RATIO = 20.0  # of sigma_data to sigma_min, so that the last step of a sampler has little left to do
_BLOCK = 256  # images that are turned into float32 at once


@dataclass(frozen=True)
class Proposal:
    """Noise levels for one set of images, and what they were made of; all in units of pixels in [-1, 1].

    Attributes:
      sigma_data: standard deviation of the pixels around the mean of their channel.
      p_mean, p_std: mean and standard deviation of ln sigma in training.
      sigma_min, sigma_max: range of the noise levels.
      source: name of the source.
      num_images: how many of its images were looked at.
      num_all: how many it has.
      root_mean_square: of the pixels, around 0.
      centred: standard deviation of the pixels around the mean image.
      level_mean, level_spread: m and s of the top of this file.
      largest_component: the largest standard deviation of a component.
      num_levels: how many of the 256 byte values occur.
      level_gap: the least distance between two that do, in bytes.
    """

    sigma_data: float
    p_mean: float
    p_std: float
    sigma_min: float
    sigma_max: float
    source: str
    num_images: int
    num_all: int
    root_mean_square: float
    centred: float
    level_mean: float
    level_spread: float
    largest_component: float
    num_levels: int
    level_gap: int

    @property
    def flags(self) -> dict[str, str]:
        """Field of the config -> its value in the command line, rounded to what the measurement is good for."""
        # The bounds of log-SNR come from the rounded levels: a sampler must find its ends within the process.
        sigma_min, sigma_max = f"{self.sigma_min:.3g}", f"{self.sigma_max:.3g}"
        return {
            "config.model.sigma_data": f"{self.sigma_data:.3g}",
            "config.teacher.p_mean": f"{self.p_mean:.2f}",
            "config.teacher.p_std": f"{self.p_std:.2f}",
            "config.process.log_snr_min": f"{-2.0 * math.log(float(sigma_max)):.8g}",
            "config.process.log_snr_max": f"{-2.0 * math.log(float(sigma_min)):.8g}",
            "config.sampling.sigma_min": sigma_min,
            "config.sampling.sigma_max": sigma_max,
        }

    def text(self) -> str:
        """Every value, how it was found and the flags that set it, for a person."""
        parts = (self._images(), self._sigma_data(), self._training(), self._sigma_min(), self._sigma_max())
        flags = " \\\n".join(f"    --{name}={value}" for name, value in self.flags.items())
        return "\n\n".join(
            (*parts, f"Flags, for a config with EDM's process, network and training noise (configs/edm.py):\n{flags}")
        )

    def _images(self) -> str:
        looked = "all" if self.num_images == self.num_all else f"{self.num_images} of"
        few = " That is few: take the figures as rough." if self.num_images < 100 else ""
        return (
            f"Noise levels for {self.source}, from {looked} {self.num_all} images with pixels in [-1, 1].{few} These "
            "are starting points: nothing was trained on the images."
        )

    def _sigma_data(self) -> str:
        said = (
            f"sigma_data = {self.sigma_data:.3g} (EDM: 0.5). The standard deviation of the pixels around the mean of "
            "their channel, which a network's output bias can supply."
        )
        if max(self.root_mean_square / self.sigma_data, self.sigma_data / self.centred) > 1.1:
            said += (
                f" Around 0 it would be {self.root_mean_square:.3g}, which EDM's formulas mean if they are taken word "
                f"by word; around the mean image {self.centred:.3g}, what is left once a network knows that image."
            )
        return said

    def _training(self) -> str:
        return (
            f"P_mean = {self.p_mean:.2f}, P_std = {self.p_std:.2f} (EDM: {EDM_P_MEAN} and {EDM_P_STD}, found by "
            "trying). Noise swamps every component of an image (cosine waves, in principal colours) around the noise "
            "level that equals its standard deviation. In ln sigma these levels have mean "
            f"{self.level_mean:.2f} and standard deviation {self.level_spread:.2f}, weighted by themselves; those of "
            f"CIFAR-10 have {CIFAR10_MEAN:.2f} and {CIFAR10_SPREAD:.2f}. P_mean lies as many standard deviations below "
            f"the mean, {_BELOW:.2f}, as EDM's {EDM_P_MEAN} does for CIFAR-10; P_std is {_NARROWER:.2f} times the "
            f"standard deviation, which gives EDM's {EDM_P_STD} for CIFAR-10, and the width of one component, "
            f"{math.sqrt(_COMPONENT_VARIANCE):.2f}, added in squares."
        )

    def _sigma_min(self) -> str:
        rounding = _rounding(self.level_gap)
        said = (
            f"sigma_min = {self.sigma_min:.3g} (EDM: 0.002). {self.num_levels} of the 256 byte values occur, "
            f"{self.level_gap} apart at the closest; rounding to such steps is itself noise of standard deviation "
            f"{rounding:.3g}"
        )
        if self.sigma_min < rounding:
            return f"{said}. That is coarse beside sigma_data, of which a {_LEAST_RATIO:g}th is taken instead."
        return f"{said}, and no image is known more closely."

    def _sigma_max(self) -> str:
        return (
            f"sigma_max = {self.sigma_max:.3g} (EDM: 80). The largest distance between two of the images looked at "
            "(Song & Ermon 2020, technique 1; it grows a little with their number): beside such noise all images look "
            "alike. The strongest component of the "
            f"images, of standard deviation {self.largest_component:.3g}, is then "
            f"{self.sigma_max / self.largest_component:.2g} times weaker than the noise."
        )


def propose(source: Source, *, limit: int = 2000, seed: int = 0) -> Proposal:
    """Returns noise levels for the images of a source, by the rules at the top of this file.

    Args:
      source: images (H, W, C) uint8.
      limit: how many images are looked at, a random choice where the source has more. The work grows with its square.
      seed: of that choice.

    Raises:
      DataError: fewer than two images, images that are all the same, or one that cannot be read.
    """
    count = min(len(source), limit)
    if count < 2:
        raise DataError(
            f"{source.name}: noise levels need 2 images or more; it has {len(source)}, and the limit is {limit}. Give "
            "more images"
        )
    if source.dtype != np.uint8:
        raise DataError(f"{source.name}: noise levels are proposed for images of bytes, not for {source.dtype} latents")
    chosen = np.random.default_rng(seed).choice(len(source), count, replace=False)
    images = gather(source, np.sort(chosen))["image"]
    if not np.any(images != images[0]):
        raise DataError(f"{source.name}: all {count} images looked at are the same; noise levels need images that vary")

    occurrences = sum(np.bincount(block.ravel(), minlength=256) for block in _blocks(images))
    values = np.arange(256) / 127.5 - 1.0
    mean_image = images.mean(axis=0, dtype=np.float64) / 127.5 - 1.0
    square = float(np.dot(occurrences, values**2)) / images.size
    levels = np.flatnonzero(occurrences)
    level_gap = int(np.diff(levels).min())
    sigma_data = math.sqrt(square - np.mean(mean_image.mean(axis=(0, 1)) ** 2))
    sigma_min = min(_rounding(level_gap), sigma_data / _LEAST_RATIO)
    deviations = _component_deviations(images, mean_image, sigma_min)
    if not deviations.any():
        raise DataError(f"{source.name}: the {count} images looked at differ by rounding alone; give images that vary")
    level_mean, level_spread = _levels(deviations)
    return Proposal(
        sigma_data=sigma_data,
        p_mean=level_mean - _BELOW * level_spread,
        p_std=math.sqrt(_COMPONENT_VARIANCE + (_NARROWER * level_spread) ** 2),
        sigma_min=sigma_min,
        sigma_max=_largest_distance(images, mean_image),
        source=source.name,
        num_images=count,
        num_all=len(source),
        root_mean_square=math.sqrt(square),
        centred=math.sqrt(square - np.mean(mean_image**2)),
        level_mean=level_mean,
        level_spread=level_spread,
        largest_component=float(deviations.max()),
        num_levels=len(levels),
        level_gap=level_gap,
    )


def _rounding(level_gap: int) -> float:
    """The standard deviation of the error of rounding to steps of so many bytes: uniform over one step."""
    return level_gap / 127.5 / math.sqrt(12.0)


def _blocks(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for first in range(0, len(images), _BLOCK):
        yield images[first : first + _BLOCK]


def _centred(block: NDArray[np.uint8], mean_image: NDArray[np.float64]) -> NDArray[np.float32]:
    return block.astype(np.float32) / np.float32(127.5) - (mean_image + 1.0).astype(np.float32)


def _cosines(size: int) -> NDArray[np.float32]:
    """The orthonormal matrix (frequency, position) of the discrete cosine transform."""
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    basis = np.cos(np.pi * frequency * (position + 0.5) / size) * math.sqrt(2.0 / size)
    basis[0] = math.sqrt(1.0 / size)
    return basis.astype(np.float32)


def _component_deviations(
    images: NDArray[np.uint8], mean_image: NDArray[np.float64], rounding: float
) -> NDArray[np.float64]:
    """Standard deviations (H, W, C), over the images, of cosine components in principal colours, without rounding's."""
    height, width, channels = mean_image.shape
    colours = np.zeros((channels, channels))
    for block in _blocks(images):
        pixels = _centred(block, mean_image).reshape(-1, channels)
        colours += pixels.T @ pixels
    principal = np.linalg.eigh(colours)[1].astype(np.float32)
    rows, columns = _cosines(height), _cosines(width)
    energies = np.zeros(mean_image.shape)
    for block in _blocks(images):
        centred = _centred(block, mean_image)
        components = np.einsum("kh,bhwc,lw,cd->bkld", rows, centred, columns, principal, optimize=True)
        energies += np.square(components).sum(axis=0)
    return np.sqrt(np.maximum(energies / (len(images) - 1) - rounding**2, 0.0))


def _levels(deviations: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard deviation of the logarithms of the deviations, weighted by the deviations."""
    present = deviations[deviations > 0.0]
    levels, weights = np.log(present), present / present.sum()
    mean = float(np.dot(weights, levels))
    return mean, math.sqrt(float(np.dot(weights, (levels - mean) ** 2)))


def _largest_distance(images: NDArray[np.uint8], mean_image: NDArray[np.float64]) -> float:
    """The largest Euclidean distance between two images."""
    largest = 0.0
    for number, block in enumerate(_blocks(images)):
        these = _centred(block, mean_image).reshape(len(block), -1)
        for other in _blocks(images[number * _BLOCK :]):
            those = _centred(other, mean_image).reshape(len(other), -1)
            squares = (these**2).sum(axis=1)[:, None] + (those**2).sum(axis=1) - 2.0 * these @ those.T
            largest = max(largest, float(squares.max()))
    return math.sqrt(largest)
