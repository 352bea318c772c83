"""A small classifier whose penultimate layer serves as the feature space of small images ("domain features").

Inception features say little about an 8x8 grey digit. Here a convolutional classifier is trained on the evaluated
data itself, by a recipe in which nothing is free: architecture, seed, number of updates, learning rate, augmentation
and hold-out split are constants of this file, and `RECIPE` changes whenever one of them does. Distances in these
features are comparable between runs on the same data, and are never called FID.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from diffdistill.evaluation.arrays import read_npz
from diffdistill.evaluation.files import write_atomically
from diffdistill.training.json_files import parse_object

RECIPE = 1  # raise it with any change below: a cached network of another recipe is never used
FEATURES = 64
WIDTHS = (16, 32, 64)
SMALLEST_MAP = 4
UPDATES = 1500
BATCH_SIZE = 96
LEARNING_RATE = 2e-3
SEED = 0
HOLD_OUT_FRACTION = 0.2
HOLD_OUT_LIMIT = 10_000
_LARGEST = 2**28  # bytes of a network
APPLY_BATCH = 256

log = logging.getLogger(__name__)


class Classifier(nn.Module):
    """3x3 convolutions until the map is at most 4x4, a penultimate layer of `FEATURES` numbers, and class logits."""

    num_classes: int

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """images (B, H, W, C) uint8 -> features (B, FEATURES), logits (B, num_classes), float32."""
        # "highest": float32 convolutions otherwise run in TF32 or bfloat16 passes on accelerators, and the distance
        # of one set of images would depend on the device that measured it.
        convolution = partial(nn.Conv, kernel_size=(3, 3), precision=jax.lax.Precision.HIGHEST)
        dense = partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
        halvings = max(0, math.ceil(math.log2(max(images.shape[1:3]) / SMALLEST_MAP)))
        h = images.astype(jnp.float32) / 127.5 - 1.0
        h = nn.silu(convolution(WIDTHS[0])(h))
        for level in range(max(halvings, len(WIDTHS) - 1)):
            width = WIDTHS[min(level + 1, len(WIDTHS) - 1)]
            h = nn.silu(convolution(width, strides=2 if level < halvings else 1)(h))
        h = h.reshape(h.shape[0], -1)
        # silu, not relu: units that are off for every image would make the covariance singular.
        features = nn.silu(dense(FEATURES, name="penultimate")(h))
        return features, dense(self.num_classes, name="logits")(features)


@dataclass(frozen=True)
class FeatureNetwork:
    """A trained classifier. `record` says how it came about, with its accuracy on images it has never seen.

    Features are scaled by one number, such that on the data it was trained for their variance is 1 in the mean over
    dimensions; a squared Frechet distance of `FEATURES` (64) is then as large as the whole spread of the data.
    """

    variables: Mapping[str, Any]
    scale: float
    image_shape: tuple[int, int, int]
    num_classes: int
    record: Mapping[str, Any]

    def measure(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """images (N, H, W, C) uint8 -> features (N, FEATURES) float32, predicted labels (N,) int32, in one pass.

        Works in batches of `APPLY_BATCH`, the last one padded, so that one compilation serves every N.
        """
        images = _checked(images, self.image_shape)
        features = np.empty((len(images), FEATURES), np.float32)
        labels = np.empty(len(images), np.int32)
        for start in range(0, len(images), APPLY_BATCH):
            batch = images[start : start + APPLY_BATCH]
            padded = np.zeros((APPLY_BATCH, *self.image_shape), np.uint8)
            padded[: len(batch)] = batch
            outputs, predicted = _forward(self.num_classes, self.variables, padded)
            features[start : start + len(batch)] = np.asarray(outputs)[: len(batch)] * self.scale
            labels[start : start + len(batch)] = np.asarray(predicted)[: len(batch)]
        return features, labels

    def features(self, images: np.ndarray) -> np.ndarray:
        """images (N, H, W, C) uint8 -> (N, FEATURES) float32."""
        return self.measure(images)[0]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """images (N, H, W, C) uint8 -> predicted class (N,) int32."""
        return self.measure(images)[1]


def train_or_load(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    fingerprint: str,
    cache_dir: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> FeatureNetwork:
    """The feature network of a data set, from `cache_dir` when it was trained before.

    images (N, H, W, C) uint8; labels (N,) integers in [0, num_classes); `fingerprint` identifies their content (a
    Source's fingerprint()). The cache is one file, named by a hash of fingerprint, shape, classes and recipe.
    `progress(updates done, updates in all)` is called during training. Raises ValueError on data that cannot be used.
    """
    path = Path(cache_dir) / f"features-{_cache_key(fingerprint, images.shape[1:], num_classes)}.npz"
    if path.exists():
        try:
            return _load(path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("cannot read the cached feature network %s (%s); training it again", path, error)
    network = train(images, labels, num_classes, fingerprint=fingerprint, progress=progress)
    _save(network, path)
    return network


def train(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    fingerprint: str = "",
    progress: Callable[[int, int], object] | None = None,
) -> FeatureNetwork:
    """Trains the classifier by the fixed recipe: Adam with a cosine rate, random shifts by a pixel or two.

    One image in five (at most `HOLD_OUT_LIMIT`) is kept aside; `record["hold_out_accuracy"]` is measured on those.
    """
    images, labels = _checked(images, images.shape[1:]), np.asarray(labels)
    if len(images) < 10 or labels.shape != (len(images),):
        raise ValueError(
            f"domain features need at least 10 images with one label each; given images {images.shape}, "
            f"labels {labels.shape}"
        )
    if num_classes < 2 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"domain features come from a classifier and need labels in [0, num_classes) with num_classes >= 2; given "
            f"num_classes={num_classes}, labels from {labels.min()} to {labels.max()}"
        )
    started = time.monotonic()
    random = np.random.default_rng(SEED)
    order = random.permutation(len(images))
    num_held_out = min(HOLD_OUT_LIMIT, round(HOLD_OUT_FRACTION * len(images)))
    held_out, training = order[:num_held_out], order[num_held_out:]
    shift = max(1, min(images.shape[1:3]) // 16)

    model = Classifier(num_classes)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, UPDATES))
    variables = model.init(jax.random.key(SEED), jnp.zeros((1, *images.shape[1:]), jnp.uint8))

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(variables: Any, state: Any, batch: Array, target: Array, offsets: Array) -> tuple[Any, Any]:
        batch = _shifted(batch, offsets, shift)

        def loss(variables: Any) -> Array:
            outputs: Any = model.apply(variables, batch)
            return optax.softmax_cross_entropy_with_integer_labels(outputs[1], target).mean()

        gradient = jax.grad(loss)(variables)
        changes, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, changes), state

    # One call per update, not a loop on the device: XLA's CPU backend runs the gradient of a convolution inside a
    # loop some 20 times slower (measured with jax 0.10.2).
    state = optimizer.init(variables)
    for done in range(UPDATES):
        chosen = random.choice(training, BATCH_SIZE)
        offsets = random.integers(0, 2 * shift + 1, (BATCH_SIZE, 2))
        variables, state = update(variables, state, images[chosen], labels[chosen].astype(np.int32), offsets)
        if progress is not None and (done + 1) % 50 == 0:
            progress(done + 1, UPDATES)

    variables = jax.tree.map(np.asarray, variables)
    unscaled = FeatureNetwork(variables, 1.0, _shape3(images), num_classes, {})
    features, _ = unscaled.measure(images[order[:HOLD_OUT_LIMIT]])
    accuracy = float(np.mean(unscaled.predict(images[held_out]) == labels[held_out]))
    record = {
        "recipe": RECIPE,
        "fingerprint": fingerprint,
        "training_images": len(training),
        "hold_out_images": len(held_out),
        "hold_out_accuracy": accuracy,
        "updates": UPDATES,
        "wall_seconds": time.monotonic() - started,
    }
    log.info("feature network: %.2f %% of %d held-out images right", 100 * accuracy, len(held_out))
    scale = float(1.0 / np.sqrt(max(features.astype(np.float64).var(0).mean(), 1e-12)))
    return FeatureNetwork(variables, scale, _shape3(images), num_classes, record)


@partial(jax.jit, static_argnums=0)
def _forward(num_classes: int, variables: Any, images: Array) -> tuple[Array, Array]:
    outputs: Any = Classifier(num_classes).apply(variables, images)
    features, logits = outputs
    return features, jnp.argmax(logits, -1)


def _shifted(batch: Array, offsets: Array, shift: int) -> Array:
    """Every image moved by offsets - shift pixels, its edge repeated: batch (B, H, W, C), offsets (B, 2)."""
    padded = jnp.pad(batch, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    crop = partial(jax.lax.dynamic_slice, slice_sizes=batch.shape[1:])
    return jax.vmap(lambda image, offset: crop(image, (offset[0], offset[1], 0)))(padded, offsets)


def _checked(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != tuple(shape):
        expected = tuple(shape) if len(shape) == 3 else "(H, W, C)"
        raise ValueError(f"expected uint8 images (N, *{expected}); given {images.dtype} {images.shape}")
    return images


def _shape3(images: np.ndarray) -> tuple[int, int, int]:
    return images.shape[1], images.shape[2], images.shape[3]


def _cache_key(fingerprint: str, image_shape: tuple[int, ...], num_classes: int) -> str:
    text = json.dumps([RECIPE, fingerprint, list(image_shape), num_classes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _save(network: FeatureNetwork, path: Path) -> None:
    header = {
        "image_shape": network.image_shape,
        "num_classes": network.num_classes,
        "scale": network.scale,
        "record": dict(network.record),
    }
    arrays: dict[str, Any] = {"header": np.array(json.dumps(header))}
    for name, value in flatten_dict(network.variables, sep="/").items():
        arrays[f"variables/{name}"] = np.asarray(value)
    write_atomically(path, lambda file: np.savez(file, **arrays))


def _load(path: Path) -> FeatureNetwork:
    found = read_npz(path, _LARGEST)
    header, prefix = parse_object(str(found["header"])), "variables/"
    arrays = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    height, width, channels = header["image_shape"]
    variables = unflatten_dict(arrays, sep="/")
    return FeatureNetwork(
        variables, header["scale"], (height, width, channels), header["num_classes"], header["record"]
    )
