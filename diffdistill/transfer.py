"""Style transfer (Meng et al. 2023, section 4.4): encode images with one class or model, decode with another.

The noise that an image is encoded to holds what the class does not say: decoded as another class, a digit keeps its
slant and its thickness.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill import chain, sample
from diffdistill.chain import Stage
from diffdistill.diffusion.schedules import Schedule
from diffdistill.evaluation import features, metrics, strokes
from diffdistill.generator import Generator, SampleError
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.samplers import ddim
from diffdistill.training import mesh as meshes
from diffdistill.workdir import Workdir

DISTILLED, UNDISTILLED = "distilled", "DDIM"


@dataclass(frozen=True, eq=False)
class Pair:
    """An encoder and a decoder, each with its number of steps."""

    name: str
    encoder: Generator
    decoder: Generator
    encoder_steps: int
    decoder_steps: int

    def encode(self, pictures: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Images (N, H, W, C) uint8 of classes (N,) -> noise (N, H, W, C) float32, at w = 0."""
        return encode(self.encoder, pictures, labels, num_steps=self.encoder_steps)

    def decode(self, noise: np.ndarray, labels: np.ndarray, w: float) -> np.ndarray:
        """Noise (N, H, W, C) -> images (N, H, W, C) uint8 of classes (N,)."""
        given = labels if self.decoder.denoiser.num_classes else None
        settings = {"labels": given, "latents": noise, "num_steps": self.decoder_steps, "sampler": "ddim"}
        return self.decoder.sample(len(noise), w=w, **settings).images


def encode(
    generator: Generator, pictures: np.ndarray, labels: np.ndarray, *, num_steps: int, w: float = 0.0
) -> np.ndarray:
    """The noise (N, H, W, C) float32 at t = 1 that images lead to by `num_steps` steps of reverse DDIM.

    Args:
      generator: any model; one that was distilled for it needs few steps.
      pictures: (N, H, W, C) uint8.
      labels: (N,) their classes; ignored by a model without.
      num_steps: evaluations.
      w: guidance weight, for a model that is conditioned on it.

    Raises SampleError for images that are not of the model's shape.
    """
    denoiser = generator.denoiser
    if denoiser.task is not None:
        raise SampleError(f"stage {generator.name} makes images from images; there is no encoding with it.")
    if pictures.dtype != np.uint8 or pictures.shape[1:] != denoiser.image_shape:
        raise SampleError(
            f"the images are {pictures.dtype} {pictures.shape[1:]}, but stage {generator.name} is made for uint8 "
            f"{denoiser.image_shape}."
        )
    run = _compiled(denoiser, generator.schedule, generator.guidance_range is not None)
    mesh, num = meshes.make_mesh(), len(pictures)
    chunk = generator.chunk_size(num)
    noise = np.empty(pictures.shape, np.float32)
    for start in range(0, num, chunk):
        rows = np.minimum(np.arange(start, start + chunk), num - 1)
        inputs = jax.tree.map(functools.partial(meshes.shard_rows, mesh), (pictures[rows], labels[rows]))
        found = meshes.all_rows(run(generator.params, *inputs, np.float32(w), np.int32(num_steps)))
        noise[start : start + chunk] = found[: num - start]
    return noise


@functools.lru_cache(maxsize=8)
def _compiled(denoiser: Denoiser, schedule: Schedule, takes_guidance: bool) -> Callable[..., jax.Array]:
    mesh = meshes.make_mesh()
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)

    @functools.partial(jax.jit, in_shardings=(everywhere, rows, rows, everywhere, everywhere), out_shardings=rows)
    def run(params: Any, pictures: jax.Array, labels: jax.Array, w: jax.Array, num_steps: jax.Array) -> jax.Array:
        condition = Condition(
            label=labels if denoiser.num_classes else None,
            guidance=jnp.full(labels.shape, w) if takes_guidance else None,
        )
        x = pictures.astype(jnp.float32) / 127.5 - 1.0
        return ddim.encode(lambda z, log_snr: denoiser(params, z, log_snr, condition), x, schedule, num_steps)

    return run


@dataclass(frozen=True)
class Transfer:
    """What one pair made of images of one class.

    Attributes:
      noise: (N, H, W, C) float32, what the images were encoded to.
      back: (N, H, W, C) uint8, decoded as the class that they came from, at w = 0.
      changed: w -> (N, H, W, C) uint8, decoded as the other class.
    """

    noise: np.ndarray
    back: np.ndarray
    changed: dict[float, np.ndarray]


def transfer(pair: Pair, pictures: np.ndarray, first: int, second: int, weights: tuple[float, ...]) -> Transfer:
    """Images (N, H, W, C) uint8 of class `first` as class `second`, at each guidance weight of `weights`."""
    from_labels, to_labels = (np.full(len(pictures), label, np.int32) for label in (first, second))
    noise = pair.encode(pictures, from_labels)
    changed = {w: pair.decode(noise, to_labels, w) for w in weights}
    return Transfer(noise, pair.decode(noise, from_labels, 0.0), changed)


def figures(
    made: Transfer, pictures: np.ndarray, reference: np.ndarray, second: int, network: features.FeatureNetwork | None
) -> dict[str, Any]:
    """How good a transfer is.

    Args:
      made: of `pictures` to class `second`.
      reference: (N, H, W, C) the noise that the undistilled model encodes them to in many steps.
      network: a classifier of the data; None: no class accuracy.

    Returns:
      noise_rmse (to the reference), reconstruction_rmse (of back, in units of [-1, 1]) and by_w: a dict for each w
      with class_accuracy and, for grey images, the correlation of each measure of strokes with that of the originals.
    """
    by_w = []
    for w, changed in made.changed.items():
        entry: dict[str, Any] = {"w": w}
        if network is not None:
            labels = np.full(len(changed), second)
            entry["class_accuracy"] = metrics.class_accuracy(network.predict(changed), labels)
        if pictures.shape[-1] == 1:
            for name, measure in strokes.MEASURES.items():
                entry[name] = strokes.correlation(measure(pictures), measure(changed))
        by_w.append(entry)
    return {
        "noise_rmse": float(np.sqrt(np.mean(np.square(made.noise - reference)))),
        "reconstruction_rmse": metrics.paired_rmse(made.back, pictures),
        "by_w": by_w,
    }


def pairs(
    encoder: tuple[Workdir, str],
    decoder: tuple[Workdir, str],
    encoder_steps: int | None,
    decoder_steps: int | None,
    *,
    extrapolate: bool = False,
) -> tuple[Pair, Pair]:
    """The pair of two stages, (run, name of the stage) each, and the undistilled models they began with.

    Both take the same numbers of steps; None: those that the stages were distilled to. extrapolate: whether w may lie
    outside the decoder's range. SampleError for a decoder that is an encoder.
    """
    first, second = sample.load_from(*encoder), sample.load_from(*decoder)
    if not first.is_encoder and encoder[1] == "":
        raise SampleError(f"the encoder {encoder[0].path} is a run; give one of its stages.")
    if second.is_encoder:
        raise SampleError(f"the decoder {second.name} leads from images to noise; take a round_ stage.")
    second = dataclasses.replace(second, extrapolates=extrapolate)
    steps = encoder_steps or first.num_steps, decoder_steps or second.num_steps
    return (
        Pair(DISTILLED, first, second, *steps),
        Pair(
            UNDISTILLED,
            _before_halving(encoder[0], first.name),
            dataclasses.replace(_before_halving(decoder[0], second.name), extrapolates=extrapolate),
            *steps,
        ),
    )


def many_step_noise(pair: Pair, pictures: np.ndarray, first: int, num_steps: int) -> np.ndarray:
    """The noise that the encoder of an undistilled pair finds in `num_steps` steps."""
    labels = np.full(len(pictures), first, np.int32)
    return dataclasses.replace(pair, encoder_steps=num_steps).encode(pictures, labels)


def _before_halving(folder: Workdir, name: str) -> Generator:
    """The model that the chain of a stage began with."""
    stages: dict[str, Stage] = {stage.name: stage for stage in chain.plan(folder.config)}
    stage = stages[name]
    while stage.num_steps:
        stage = stages[stage.teacher]
    return sample.load_stage(folder, stage)
