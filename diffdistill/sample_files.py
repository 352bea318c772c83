"""Samples as files: a grid as PNG, the images themselves as .npz, and the files that say what to sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffdistill.evaluation import images, protocols
from diffdistill.sample import Generator, SampleError, Samples, load_from
from diffdistill.training import mesh as meshes
from diffdistill.workdir import Workdir, WorkdirError


def to_files(
    folder: Workdir,
    stage: str,
    *,
    out: str,
    num: int,
    seed: int,
    labels: Sequence[str],
    latents: str,
    w: float,
    num_steps: int | None,
    sampler: str | None,
    quantisation: str,
    say: Callable[[str], Any],
) -> None:
    """Samples a stage and writes <out>/samples.png and <out>/samples.npz; the arguments are those of the command line.

    num = 0 means as many as there are latents, or 100. quantisation: "" is that of the run. labels: classes, or one
    .npy file of them.

    Raises:
      SampleError: latents that cannot be read, or anything that `Generator.sample` refuses.
      WorkdirError: a folder that cannot be written.
    """
    from tqdm import tqdm

    generator = load_from(folder, stage)
    if quantisation:
        generator = dataclasses.replace(generator, quantisation=quantisation)
    place = Path(out) if out else folder.path / "samples"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"the folder {place} for the images cannot be written: {error.strerror}. Choose another with --out=FOLDER."
        ) from error
    noise = _read_array("latents", latents) if latents else None
    classes = _read_labels(labels[0]) if len(labels) == 1 and labels[0].endswith(".npy") else list(labels)
    num = num or (100 if noise is None else len(noise))
    with tqdm(total=num, desc="sampling", unit="image", delay=2, disable=None) as bar:
        samples = generator.sample(
            num,
            seed=seed,
            labels=classes or None,
            w=w,
            num_steps=num_steps,
            sampler=sampler,
            latents=noise,
            progress=lambda done: bar.update(done - bar.n),
        )
    if not meshes.is_main():
        return
    shown = samples
    if samples.images.dtype != np.uint8:
        shown = dataclasses.replace(samples, images=np.asarray(protocols.quantise(jnp.asarray(samples.images), "edm")))
    save_grid(place / "samples.png", shown, generator, max(10, int(np.ceil(np.sqrt(num)))))
    images.save_npz(place / "samples.npz", samples.images, samples.labels, samples.seeds)
    say(
        f"{num} images from {generator.name}, {num_steps or generator.num_steps} steps, w = {w:g}, "
        f"{samples.network_evaluations} network evaluations each: {place / 'samples.png'}, {place / 'samples.npz'}"
    )


def save_grid(path: Path, samples: Samples, generator: Generator, columns: int) -> None:
    """Writes a PNG of samples, at most `columns` wide: rows are classes, named at the left, each as far as it goes.

    Images of a model without classes fill the rows in order.
    """
    if not generator.denoiser.num_classes:
        rows = -(-len(samples.images) // columns)
        images.save_png(path, images.grid(samples.images, rows, min(columns, len(samples.images))))
        return
    groups = [np.flatnonzero(samples.labels == label)[:columns] for label in range(generator.denoiser.num_classes)]
    present = [(label, group) for label, group in enumerate(groups) if len(group)]
    width = max(len(group) for _, group in present)
    if len(present) > max(20, 4 * width):  # many classes with hardly an image each: a plain grid in order of class
        order = np.argsort(samples.labels, kind="stable")
        images.save_png(path, images.grid(samples.images[order], -(-len(order) // columns), columns))
        return
    tiles = np.full((len(present), width, *samples.images.shape[1:]), images.BACKGROUND, np.uint8)
    for row, (_, group) in enumerate(present):
        tiles[row, : len(group)] = samples.images[group]
    names = [generator.class_names[label] if generator.class_names else str(label) for label, _ in present]
    flat = tiles.reshape(-1, *samples.images.shape[1:])
    images.save_png(path, images.grid(flat, len(present), width, row_labels=names))


def _read_labels(path: str) -> list[int]:
    """Classes out of a file: (num,) whole numbers, or (num, classes) one-hot rows, as the EDM networks take them."""
    labels = _read_array("labels", path)
    if labels.ndim == 2 and ((labels == labels.max(1, keepdims=True)).sum(1) == 1).all():
        labels = labels.argmax(1)
    if labels.ndim != 1 or not np.array_equal(labels, labels.astype(np.int64)):
        raise SampleError(
            f"--labels={path} holds {labels.dtype} {labels.shape}; expected (num,) class numbers or (num, classes) "
            "one-hot rows."
        )
    return [int(label) for label in labels]


def _read_array(what: str, path: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise SampleError(f"--{what}={path} cannot be read: {error.strerror}.") from error
    except (ValueError, EOFError) as error:
        raise SampleError(
            f"--{what}={path} is not an .npy file of numbers ({error}); write it with numpy.save."
        ) from error
