"""The analysis of Choi et al. 2022 (P2) of any config, images and model: what is learnt at which signal-to-noise ratio.

* Perceptual distance: how far two noisings of one image are apart, and of two images, as functions of the SNR. Where
  the curves part, images begin to be told by their content.
* Stochastic reconstruction: an image is noised to some SNR and sampled back from there. What the two have in common is
  what that much noise had left.
* Weights: where a training puts its weight, and the SNR of schedules.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill import chain
from diffdistill.config import Config
from diffdistill.data.contract import Source
from diffdistill.data.pipeline import gather
from diffdistill.diffusion import process, schedules, weighting
from diffdistill.diffusion.schedules import Schedule
from diffdistill.evaluation import analysis_plots, protocols
from diffdistill.evaluation import images as grids
from diffdistill.evaluation.files import write_atomically
from diffdistill.generator import Generator
from diffdistill.methods import base
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.samplers import ancestral

# Distance of images (N, H, W, C), float32 in units of [-1, 1] (noisy ones beyond it), pair by pair: (N,).
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

SNR_LEVELS = tuple(10.0**power for power in (-4, -3, -2, -1, 0, 1, 2))  # of reconstructions
_CURVE_LOG_SNR = np.linspace(np.log(1e-4), np.log(1e4), 33)
_TIMES = 1000  # of continuous schedules


def root_mean_square(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The distance of pixels, for images without any better one."""
    return np.sqrt(np.mean(np.square(one - other), axis=(1, 2, 3)))


def feature_distance(features: Callable[[np.ndarray], np.ndarray]) -> Distance:
    """The root mean square difference of features, which `features` gives of uint8 images (N, H, W, C) as (N, D)."""

    def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        as_bytes = (np.asarray(protocols.quantise(jnp.asarray(images), "edm")) for images in (one, other))
        first, second = map(features, as_bytes)
        return np.sqrt(np.mean(np.square(first - second), axis=1))

    return distance


@dataclass(frozen=True)
class Curves:
    """Distances by noise level: log-SNR (L,), and of every pair (L, N) those of one image and of two."""

    log_snr: np.ndarray
    same: np.ndarray
    different: np.ndarray


def distances(source: Source, distance: Distance, *, count: int = 200, seed: int = 0) -> Curves:
    """Perceptual distance against SNR, from `count` random triplets of noisy images.

    Of two images, the first is noised twice and the other once, each with noise of its own; the same triplets serve all
    noise levels from SNR 1e-4 to 1e4. Two different images are drawn where the source has two.
    """
    random = np.random.default_rng(seed)
    first = random.integers(0, len(source), count)
    second = (first + random.integers(1, max(len(source), 2), count)) % len(source)
    x, other = (gather(source, index)["image"].astype(np.float32) / 127.5 - 1.0 for index in (first, second))
    noises = random.standard_normal((3, *x.shape), np.float32)
    rows = []
    for log_snr in _CURVE_LOG_SNR:
        a, b, c = (
            np.asarray(process.add_noise(jnp.asarray(image), jnp.asarray(noise), float(log_snr)))
            for image, noise in zip((x, x, other), noises, strict=True)
        )
        rows.append((distance(a, b), distance(a, c)))
    same, different = (np.stack(column) for column in zip(*rows, strict=True))
    return Curves(_CURVE_LOG_SNR, same, different)


def time_of(schedule: Schedule, log_snr: float) -> float:
    """The time at which a schedule is nearest to a noise level, among its own or, of a continuous one, 2^14."""
    count = schedule.num_train_steps or 2**14
    times = np.arange(1, count + 1, dtype=np.float32) / np.float32(count)
    return float(times[np.argmin(np.abs(np.asarray(schedule.log_snr(times)) - log_snr))])


def reconstruct(
    generator: Generator, images: np.ndarray, labels: np.ndarray, snr: float, *, num_steps: int = 100, seed: int = 0
) -> np.ndarray:
    """Images (N, H, W, C) uint8, noised to an SNR and sampled back from there by `num_steps` ancestral steps.

    Args:
      generator: a stage that is conditional on no guidance weight; its variance is the learned one where it has one.
      labels: (N,) classes, which a conditional model is told.
    """
    start = np.float32(time_of(generator.schedule, float(np.log(snr))))
    fraction = float(generator.settings.get("variance_fraction", 0.0))
    variance = None if generator.learned_variance else fraction
    run = _reconstruction(generator.denoiser, generator.schedule, generator.clip, variance, num_steps)
    found = run(generator.params, images, labels.astype(np.int32), start, np.int32(seed))
    return np.asarray(protocols.quantise(found, "edm"))


@functools.lru_cache(maxsize=4)
def _reconstruction(
    denoiser: Denoiser, schedule: Schedule, clip: bool, variance_fraction: float | None, num_steps: int
) -> Any:
    """(params, images, labels, start, seed) -> images; a variance_fraction of None stands for the learned one."""

    @jax.jit
    def run(params: Any, images: jax.Array, labels: jax.Array, start: jax.Array, seed: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(jnp.arange(len(images)))
        eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), x.shape[1:]))(keys)
        z = process.add_noise(x, eps, schedule.log_snr(start))
        condition = Condition(label=labels if denoiser.num_classes else None)

        def denoise(z: jax.Array, log_snr: jax.Array) -> Any:
            found = denoiser.predict(params, z, log_snr, condition)
            return (found.x, found.variance_fraction) if variance_fraction is None else found.x

        # The same schedule from its clean end to `start`, which the sampler takes for the whole.
        rest = dataclasses.replace(schedule, log_snr=lambda t: schedule.log_snr(t * start))
        image_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        return ancestral.sample(
            denoise, z, rest, num_steps, keys=image_keys, clip=clip, variance_fraction=variance_fraction or 0.0
        )

    return run


@dataclass(frozen=True)
class Weights:
    """What a training looks at, by time: each (T,); weights add up to one.

    Attributes:
      time: in (0, 1].
      log_snr: of the noise that is trained on.
      on_noise: the config's weight, as a factor on the error of the noise; baseline: of the plain error, gamma = 0.
      on_bound: both as factors on the terms of the variational bound, as the paper plots them.
    """

    time: np.ndarray
    log_snr: np.ndarray
    on_noise: Mapping[str, np.ndarray]
    on_bound: Mapping[str, np.ndarray]


def weights(config: Config) -> Weights:
    """The weights of a config's teacher beside those of the baseline, at all its times or 1000 of a continuous one."""
    schedule = chain.schedule_of(config.process)
    count = schedule.num_train_steps or _TIMES
    draws = (jnp.arange(count) + 0.5) / count
    noise = chain.noise_of(config.teacher)
    log_snr = schedule.log_snr(base.times(draws, schedule)) if noise is None else noise(draws)
    rate = schedules.rate(schedule)(log_snr)
    chosen = {"baseline": weighting.get("snr"), config.teacher.weight: chain.stage_weight(config, config.teacher)}
    on_noise = {name: weighting.on_noise(weight, log_snr) for name, weight in chosen.items()}
    return Weights(
        np.asarray(base.times(draws, schedule)),
        np.asarray(log_snr),
        {name: _shares(values) for name, values in on_noise.items()},
        {name: _shares(values / rate) for name, values in on_noise.items()},
    )


def _shares(values: jax.Array) -> np.ndarray:
    exact = np.asarray(values, np.float64)
    return exact / exact.sum()


def write_csv(path: Path, columns: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    """One row per entry, with a header; numbers to six digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([f"{float(value):.6g}" for value in row] for row in zip(*columns.values(), strict=True))


def to_files(
    config: Config,
    place: Path,
    source: Source | None,
    generator: Generator | None,
    distance: Distance,
    *,
    title: str,
    num: int = 8,
    num_steps: int = 100,
    seed: int = 0,
) -> list[Path]:
    """Writes weights.png and .csv, and distance and reconstruction where there are images and a model to make them.

    Args:
      config: whose weights.
      place: the folder to write to; it exists.
      source: images; None leaves out distances and reconstructions.
      generator: the model that reconstructs; None leaves it out.
      distance: of images; title: what it is called.
      num: images that are reconstructed and shown.
      num_steps: from any level back to data.
      seed: of the draws.
    """
    written = _write_weights(config, place)
    if source is None:
        return written
    curves = distances(source, distance, seed=seed)
    columns = {"log_snr": curves.log_snr, "snr": np.exp(curves.log_snr)}
    for name, values in (("same", curves.same), ("different", curves.different)):
        columns |= {f"{name}_mean": values.mean(axis=1), f"{name}_deviation": values.std(axis=1)}
    write_csv(place / "distance.csv", columns)
    shown = {"two noisings of one image": curves.same, "noisings of two images": curves.different}
    write_atomically(
        place / "distance.png", lambda file: file.write(analysis_plots.distance_plot(columns["snr"], shown, title))
    )
    written += [place / "distance.png", place / "distance.csv"]
    if generator is not None:
        written += _write_reconstructions(generator, source, distance, place, num, num_steps, seed)
    return written


def _write_weights(config: Config, place: Path) -> list[Path]:
    found = weights(config)
    snr = np.exp(found.log_snr.astype(np.float64))
    columns = {"time": found.time, "log_snr": found.log_snr}
    for kind, values in (("noise", found.on_noise), ("bound", found.on_bound)):
        columns |= {f"{name}_on_{kind}": shares for name, shares in values.items()}
    write_csv(place / "weights.csv", columns)
    times = np.arange(1, _TIMES + 1, dtype=np.float32) / np.float32(_TIMES)
    curves = {
        name: (times, np.exp(np.asarray(schedules.get(f"discrete_{name}").log_snr(times), np.float64)))
        for name in ("linear", "cosine")
    }
    order = np.argsort(found.log_snr)
    on_noise, on_bound = ({name: v[order] for name, v in each.items()} for each in (found.on_noise, found.on_bound))
    curves[config.name] = found.time, snr
    picture = analysis_plots.weights_plot(curves, snr[order], on_noise, on_bound)
    write_atomically(place / "weights.png", lambda file: file.write(picture))
    return [place / "weights.png", place / "weights.csv"]


def _write_reconstructions(
    generator: Generator, source: Source, distance: Distance, place: Path, num: int, num_steps: int, seed: int
) -> list[Path]:
    """A grid whose rows are the images themselves and what is sampled back from each SNR, least noise first."""
    chosen = np.random.default_rng(seed).choice(len(source), min(num, len(source)), replace=False)
    batch = gather(source, chosen)
    rows, names, means = [batch["image"]], ["images"], []
    for snr in SNR_LEVELS[::-1]:
        rows.append(reconstruct(generator, batch["image"], batch["label"], snr, num_steps=num_steps, seed=seed))
        names.append(f"SNR {snr:g}")
        means.append(distance(*(images.astype(np.float32) / 127.5 - 1.0 for images in (batch["image"], rows[-1]))))
    picture = grids.grid(np.concatenate(rows), len(rows), len(chosen), row_labels=names)
    grids.save_png(place / "reconstruction.png", picture)
    found = np.stack(means)
    columns = {"snr": np.array(SNR_LEVELS[::-1]), "distance_mean": found.mean(axis=1)}
    write_csv(place / "reconstruction.csv", columns | {"distance_deviation": found.std(axis=1)})
    return [place / "reconstruction.png", place / "reconstruction.csv"]
