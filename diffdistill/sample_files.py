"""Samples as files: a grid as PNG, the images themselves as .npz, and the files that say what to sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill.data.latents import open_latents, scaled
from diffdistill.data.pipeline import gather
from diffdistill.data.pixels import SUFFIXES, decode
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluation import images, protocols
from diffdistill.generator import Generator, SampleError, Samples
from diffdistill.sample import load_from
from diffdistill.sampling_program import shown_of
from diffdistill.training import processes
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
    pictures: str = "",
    mask: str = "",
    w: float,
    extrapolate: bool,
    num_steps: int | None,
    sampler: str | None,
    quantisation: str,
    say: Callable[[str], Any],
) -> None:
    """Samples a stage and writes <out>/samples.npz and, of images, <out>/samples.png.

    The arguments are those of the command line.

    num = 0 means as many as there are latents, or 100. extrapolate: whether w may lie outside the range that the stage
    was distilled for. quantisation: "" is that of the run. labels: classes, or one .npy file of them. pictures, mask:
    what a model from image to image is shown, as many images as are to be made; the mask is one picture for all, or an
    .npy file (num, H, W), bright or 1 where the image is to be made.

    Raises:
      SampleError: latents that cannot be read, or anything that `Generator.sample` refuses.
      WorkdirError: a folder that cannot be written.
    """
    from tqdm import tqdm

    generator = dataclasses.replace(load_from(folder, stage), extrapolates=extrapolate)
    if quantisation and generator.latent_scaling is not None and quantisation != "none":
        raise SampleError(f"--quantisation={quantisation} is for images, but stage {generator.name} makes latents.")
    if quantisation:
        generator = dataclasses.replace(generator, quantisation=quantisation)
    place = Path(out) if out else folder.path / "samples"
    try:
        processes.on_main(lambda: place.mkdir(parents=True, exist_ok=True))
    except OSError as error:
        raise WorkdirError(
            f"the folder {place} for the images cannot be written: {error.strerror}. Choose another with --out=FOLDER."
        ) from error
    noise = _read_array("latents", latents) if latents else None
    classes = _read_labels(labels[0]) if len(labels) == 1 and labels[0].endswith(".npy") else list(labels)
    if mask and not pictures:
        raise SampleError(f"--mask={mask} says where images are to be made anew: give them with --images=PATH.")
    given = _read_pictures(pictures, num, generator) if pictures else None
    masks = _read_masks(mask, len(given), generator) if given is not None and mask else None
    num = num or next((len(array) for array in (noise, given) if array is not None), 100)
    with tqdm(total=num, desc="sampling", unit="image", delay=2, disable=None) as bar:
        samples = generator.sample(
            num,
            seed=seed,
            labels=classes or None,
            w=w,
            num_steps=num_steps,
            sampler=sampler,
            latents=noise,
            pictures=given,
            masks=masks,
            progress=lambda done: bar.update(done - bar.n),
        )
    if not processes.is_main():
        return
    files, what = [place / "samples.npz"], "latents"
    if generator.latent_scaling is None:
        shown, what = samples, "images"
        if samples.images.dtype != np.uint8:
            pixels = protocols.quantise(jnp.asarray(samples.images), "edm")
            shown = dataclasses.replace(samples, images=np.asarray(pixels))
        files.insert(0, place / "samples.png")
        save_grid(files[0], shown, generator, max(10, int(np.ceil(np.sqrt(num)))))
        if given is not None and given.dtype == np.uint8:
            files.insert(1, place / "pairs.png")
            _save_pairs(files[1], given, masks, shown, generator)
    images.save_npz(files[-1], samples.images, samples.labels, samples.seeds)
    say(
        f"{num} {what} from {generator.name}, {num_steps or generator.num_steps} steps, w = {w:g}, "
        f"{samples.network_evaluations} network evaluations each: {', '.join(map(str, files))}"
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


def _save_pairs(
    path: Path, pictures: np.ndarray, masks: np.ndarray | None, samples: Samples, generator: Generator
) -> None:
    """Two rows: what the model was shown, and what it made of it."""
    columns = slice(0, 12)
    keys = jax.vmap(jax.random.key)(samples.seeds[columns])
    holes = None if masks is None else jnp.asarray(masks[columns])
    seen = shown_of(generator.denoiser, keys, jnp.asarray(pictures[columns]), holes)
    assert seen is not None
    channels = pictures.shape[-1]
    seen = np.asarray(protocols.quantise(seen[..., :channels], "edm"))
    seen = np.broadcast_to(seen, (*seen.shape[:3], channels))  # one grey channel of colourisation
    made = samples.images[columns]
    tiles = np.concatenate([seen, made])
    images.save_png(path, images.grid(tiles, 2, len(made), row_labels=["shown", "made"]))


def _read_pictures(path: str, num: int, generator: Generator) -> np.ndarray:
    """Images of the size of the model, or latents (N, H, W, C) of an .npz file as the network sees them."""
    height, width, channels = generator.denoiser.image_shape
    if generator.latent_scaling is not None:
        shift, scale = generator.latent_scaling
        source = scaled(open_latents(path, "train", None, None), shift.tolist(), float(scale))
    elif Path(path).suffix.lower() in SUFFIXES:
        return _read_picture("images", path, height if height == width else None, channels)[None]
    else:
        source = open_unlabelled(path, height if height == width else None, channels)
    return gather(source, np.arange(min(num or len(source), len(source))))["image"]


def _read_masks(path: str, num: int, generator: Generator) -> np.ndarray:
    """(num, H, W) of 0 and 1 out of a picture, the same for all images, or out of an .npy file."""
    if path.endswith(".npy"):
        return _read_array("mask", path)
    height, width, _ = generator.denoiser.image_shape
    picture = _read_picture("mask", path, None, 1)
    if picture.shape[:2] != (height, width):
        raise SampleError(f"the mask {path} is {picture.shape[:2]}, but the images are {(height, width)}.")
    return np.broadcast_to(picture[..., 0] > 127, (num, height, width))


def _read_picture(what: str, path: str, image_size: int | None, channels: int) -> np.ndarray:
    try:
        with Path(path).open("rb") as file:
            return decode(file, path, image_size, channels)
    except OSError as error:
        raise SampleError(f"--{what}={path} cannot be read: {error.strerror}.") from error


def _read_labels(path: str) -> list[int]:
    """Classes out of a file: (num,) whole numbers, or (num, classes) one-hot rows, as the EDM networks take them."""
    labels = _read_array("labels", path)
    if labels.ndim == 2 and labels.size and ((labels == labels.max(1, keepdims=True)).sum(1) == 1).all():
        labels = labels.argmax(1)
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int64)
    if labels.ndim != 1 or not np.array_equal(labels, whole):
        raise SampleError(
            f"--labels={path} holds {labels.dtype} {labels.shape}; expected (num,) class numbers or (num, classes) "
            "one-hot rows."
        )
    return whole.tolist()


def _read_array(what: str, path: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise SampleError(f"--{what}={path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged header raises nearly anything
        raise SampleError(
            f"--{what}={path} is not an .npy file of numbers ({error}); write it with numpy.save."
        ) from error
    if array.dtype.kind not in "biuf":
        raise SampleError(f"--{what}={path} holds {array.dtype}; expected plain numbers, written with numpy.save.")
    return array
