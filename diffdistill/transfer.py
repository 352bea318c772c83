"""Style transfer (Meng et al. 2023, section 4.4): encode images with one class or model, decode with another.

The noise that an image is encoded to holds what the class does not say: decoded as another class, a digit keeps its
slant and its thickness.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill import chain, runner, sample
from diffdistill.data.contract import Source
from diffdistill.data.pipeline import gather
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.diffusion.schedules import Schedule
from diffdistill.evaluation import features, images, metrics, strokes
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.sample import Generator, SampleError
from diffdistill.samplers import ddim
from diffdistill.training import mesh as meshes
from diffdistill.workdir import Workdir, WorkdirError

SHOWN = 12  # columns of the picture


@dataclass(frozen=True)
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


def to_files(
    folder: Workdir,
    *,
    encoder: str,
    decoder: str,
    pictures: str,
    source_class: str,
    target_class: str,
    w: float,
    num: int,
    num_steps: int | None,
    out: str,
    say: Callable[[str], Any],
) -> None:
    """Transfers images and writes transfer.png and transfer.npz; the arguments are those of the command line.

    The undistilled models from which encoder and decoder were distilled do the same in as many steps, for comparison.

    Args:
      folder: the run that the stages are of.
      encoder, decoder: stages of it, or paths of stages of other runs.
      pictures: images of `source_class`; empty: those of the run's data.
      source_class, target_class: number or name of a class.
      w: guidance weight of the decoder.
      num: how many images; 0: 100, or as many as there are.
      num_steps: of both; None: what each was distilled to.
      out: folder to write to; empty: <workdir>/transfer.

    Raises:
      SampleError: stages, classes or images that do not fit.
      DataError, WorkdirError: images or folders that cannot be read or written.
    """
    place = Path(out) if out else folder.path / "transfer"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"{place} cannot be written: {error.strerror}. Choose another with --out=FOLDER.") from error
    pairs = list(_pairs(folder, encoder, decoder, num_steps))
    distilled = pairs[0]
    source, _ = runner.open_data(folder.config)
    first = distilled.encoder.class_number(source_class)
    second = distilled.decoder.class_number(target_class)
    given = _pictures(source, pictures, first, num or 100)
    from_labels, to_labels = (np.full(len(given), label, np.int32) for label in (first, second))
    rows, lines = [("images", given)], []
    network = _classifier(folder, source)
    for pair in pairs:
        noise = pair.encode(given, from_labels)
        back, changed = pair.decode(noise, from_labels, 0.0), pair.decode(noise, to_labels, w)
        rows += [(f"{pair.name}: back", back), (f"{pair.name}: class {target_class}", changed)]
        lines.append(_figures(pair, given, back, changed, to_labels, network))
    _against_many_steps(pairs, given, from_labels, chain.full_steps(folder.config), say)
    if not meshes.is_main():
        return
    columns = min(SHOWN, len(given))
    tiles = np.concatenate([row[:columns] for _, row in rows])
    picture = images.grid(tiles, len(rows), columns, row_labels=[name for name, _ in rows])
    images.save_png(place / "transfer.png", picture)
    kept = {f"row_{number}_{name}": row for number, (name, row) in enumerate(rows)}
    images.save_npz(place / "transfer.npz", rows[2][1], to_labels, None, **kept)
    say("\n".join([*lines, f"{len(given)} images: {place / 'transfer.png'}, {place / 'transfer.npz'}"]))


def _pairs(folder: Workdir, encoder: str, decoder: str, num_steps: int | None) -> Iterator[Pair]:
    """The pair that was asked for, and the undistilled one in as many steps."""
    own = {stage.name for stage in chain.plan(folder.config)}
    found = []
    for name in (encoder, decoder):
        elsewhere = name not in own and Path(name).is_dir()
        found.append(sample.locate(name) if elsewhere else (folder, name))
    first, second = (sample.load_from(*each) for each in found)
    steps = num_steps or first.num_steps, num_steps or second.num_steps
    yield Pair("distilled", first, second, *steps)
    first, second = (_before_halving(opened, name) for opened, name in found)
    yield Pair("DDIM", first, second, *steps)


def _before_halving(folder: Workdir, name: str) -> Generator:
    """The model that the chain of a stage began with."""
    stages = {stage.name: stage for stage in chain.plan(folder.config)}
    stage = stages[name]
    while stage.num_steps:
        stage = stages[stage.teacher]
    return sample.load_stage(folder, stage)


def _pictures(source: Source, path: str, label: int, num: int) -> np.ndarray:
    if path:
        height, _, channels = source.image_shape
        given = open_unlabelled(path, height, channels)
        return gather(given, np.arange(min(num, len(given))))["image"]
    data = gather(source, np.arange(min(len(source), 20_000)))
    return data["image"][data["label"] == label][:num]


def _classifier(folder: Workdir, source: Source) -> features.FeatureNetwork | None:
    """The run's feature network, where the data has classes and the run is measured by it."""
    if folder.config.evaluation.features != "domain" or source.num_classes < 2:
        return None
    data = gather(source, np.linspace(0, len(source) - 1, min(len(source), 10_000)).astype(np.int64))
    cache = folder.path / "evaluation" / "cache"
    return features.train_or_load(data["image"], data["label"], source.num_classes, source.fingerprint(), cache)


def _figures(
    pair: Pair,
    given: np.ndarray,
    back: np.ndarray,
    changed: np.ndarray,
    labels: np.ndarray,
    network: features.FeatureNetwork | None,
) -> str:
    """One line: reconstruction, class and strokes of a transfer."""
    parts = [f"reconstruction RMSE {metrics.paired_rmse(back, given):.3g}"]
    if network is not None:
        parts.append(f"class accuracy {100 * metrics.class_accuracy(network.predict(changed), labels):.1f} %")
    if given.shape[-1] == 1:
        for name, measure in strokes.MEASURES.items():
            parts.append(f"correlation of {name} {strokes.correlation(measure(given), measure(changed)):.2f}")
    return f"{pair.name}, {pair.encoder_steps} + {pair.decoder_steps} steps: {', '.join(parts)}"


def _against_many_steps(
    pairs: list[Pair], given: np.ndarray, labels: np.ndarray, full: int, say: Callable[[str], Any]
) -> None:
    """Says how far each encoder is from the undistilled one in `full` steps."""
    reference = dataclasses.replace(pairs[-1], encoder_steps=full).encode(given, labels)
    for pair in pairs:
        distance = np.sqrt(np.mean(np.square(pair.encode(given, labels) - reference)))
        say(f"{pair.name} encoder, {pair.encoder_steps} steps: RMSE {distance:.3g} to DDIM's noise in {full} steps")
