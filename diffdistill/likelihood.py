"""How many bits per dimension a discrete model needs for images: its variational bound, all steps of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill import chain
from diffdistill.config import Config
from diffdistill.data.contract import Source
from diffdistill.data.pipeline import gather
from diffdistill.diffusion import process, variational
from diffdistill.diffusion.schedules import Schedule
from diffdistill.generator import Generator
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.training import mesh as meshes


@dataclass(frozen=True)
class Bound:
    """The bound of some images in bits per dimension, each (N,).

    Attributes:
      prior: of the noisiest level, which no network changes.
      steps: of all steps to cleaner levels, the last, which ends at bytes, included.
      seconds: that it took.
    """

    prior: np.ndarray
    steps: np.ndarray
    seconds: float

    @property
    def total(self) -> np.ndarray:
        return self.prior + self.steps


def bound(generator: Generator, images: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> Bound:
    """The variational bound of images by a model of a discrete schedule: an upper bound of -log2 p / dimensions.

    Each step is evaluated once, at noise that is a function of the seed and the number of image and step. x_hat is
    limited to [-1, 1] where sampling does so. The variance is the learned one, or that of sampling.

    Args:
      generator: a stage, ready to sample.
      images: (N, H, W, C) uint8.
      labels: (N,) classes; not looked at by an unconditional model.

    Raises:
      ValueError: the model's schedule is continuous.
    """
    if generator.schedule.num_train_steps is None:
        raise ValueError(
            f"bits per dimension are those of the steps of a discrete schedule; {generator.schedule.name!r} has none"
        )
    start = time.monotonic()
    fraction = float(generator.settings.get("variance_fraction", 0.0))
    run = _compiled(generator.denoiser, generator.schedule, generator.clip, fraction)
    mesh, size = meshes.make_mesh(), generator.chunk_size(len(images))
    priors, steps = [], []
    for first in range(0, len(images), size):
        rows = np.minimum(np.arange(first, first + size), len(images) - 1)
        inputs = images[rows], labels[rows].astype(np.int32), rows.astype(np.int32)
        found = run(generator.params, *(meshes.shard_rows(mesh, each) for each in inputs), np.int32(seed))
        kept = min(size, len(images) - first)
        priors.append(meshes.all_rows(found[0])[:kept])
        steps.append(meshes.all_rows(found[1])[:kept])
    return Bound(np.concatenate(priors), np.concatenate(steps), time.monotonic() - start)


@functools.lru_cache(maxsize=4)
def _compiled(denoiser: Denoiser, schedule: Schedule, clip: bool, variance_fraction: float) -> Callable[..., Any]:
    """(params, images, labels, numbers, seed) -> (prior, steps), each (B,) bits per dimension."""
    mesh = meshes.make_mesh()
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    count = schedule.num_train_steps or 0

    @functools.partial(jax.jit, in_shardings=(everywhere, rows, rows, rows, everywhere), out_shardings=(rows, rows))
    def run(params: Any, images: jax.Array, labels: jax.Array, numbers: jax.Array, seed: jax.Array) -> Any:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)
        condition = Condition(label=labels if denoiser.num_classes else None)

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, step), x.shape[1:])  # noqa: E731
            log_snr = jnp.broadcast_to(schedule.log_snr(step / count), total.shape)
            z = process.add_noise(x, jax.vmap(draw)(keys), log_snr)
            found = denoiser.predict(params, z, log_snr, condition)
            x_hat = jnp.clip(found.x, -1.0, 1.0) if clip else found.x
            fraction = variance_fraction if found.variance_fraction is None else found.variance_fraction
            cleaner = jnp.broadcast_to(schedule.log_snr((step - 1) / count), total.shape)
            first = jnp.broadcast_to(step == 1, total.shape)
            return total + variational.term(x, x_hat, fraction, log_snr, cleaner, first, schedule.log_snr(2 / count))

        total = jax.lax.fori_loop(1, count + 1, add, jnp.zeros(len(x), jnp.float32))
        prior = variational.prior(x, schedule.log_snr(1.0))
        return variational.BITS_PER_NAT * prior, variational.BITS_PER_NAT * total

    return run


def chosen(source: Source, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of `count` of the source's images, spread evenly, or of all where it has fewer."""
    index = np.linspace(0, len(source) - 1, min(len(source), count)).astype(np.int64)
    batch = gather(source, index)
    return batch["image"], batch["label"]


def wanted(config: Config, stage: chain.Stage) -> bool:
    """Whether the evaluation of a config is to measure the bound of a stage: teachers of a discrete schedule alone."""
    discrete = config.process.schedule.startswith("discrete")
    return bool(config.evaluation.bits_images and discrete and stage.method == "teacher")
