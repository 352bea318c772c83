"""LPIPS, the perceptual distance of Zhang et al. 2018 (arXiv 1801.03924): AlexNet or VGG-16, channels weighted.

Five feature maps of two images are normalised to unit length in every pixel; their squared differences are weighted by
channel, averaged over the pixels and added up. The weights come from a file that the user makes where the package lpips
is installed: torch.save(lpips.LPIPS(net="alex").state_dict(), "alex.pth"), or net="vgg".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill.weights import WeightsError, torch_file

Tensors = dict[str, np.ndarray]
_BATCH = 32
# What the networks were trained on, in units of [-1, 1].
_SHIFT, _SCALE = np.array([-0.030, -0.088, -0.188], np.float32), np.array([0.458, 0.448, 0.450], np.float32)


@dataclass(frozen=True)
class _Network:
    """A stack of convolutions, each followed by relu.

    Attributes:
      slices: convolutions up to each of the five maps: (number in torch, stride, padding).
      pooled: the slices that begin with max-pooling of stride 2.
      window: of the pooling.
      least: side of an image that leaves a pixel at the end.
    """

    slices: tuple[tuple[tuple[int, int, int], ...], ...]
    pooled: tuple[int, ...]
    window: int
    least: int


_ALEX = _Network((((0, 4, 2),), ((3, 1, 2),), ((6, 1, 1),), ((8, 1, 1),), ((10, 1, 1),)), (1, 2), 3, 32)
_VGG = _Network(
    (
        ((0, 1, 1), (2, 1, 1)),
        ((5, 1, 1), (7, 1, 1)),
        ((10, 1, 1), (12, 1, 1), (14, 1, 1)),
        ((17, 1, 1), (19, 1, 1), (21, 1, 1)),
        ((24, 1, 1), (26, 1, 1), (28, 1, 1)),
    ),
    (1, 2, 3, 4),
    2,
    16,
)


def load(path: str | Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The distance whose weights a file holds: images (N, H, W, 1 or 3) float32 in [-1, 1], pair by pair, -> (N,).

    One channel is repeated to three. The function raises ValueError for images that are too small.

    Raises:
      WeightsError: no such file, damaged, naming code, or other tensors than those of LPIPS.
    """
    tensors = {str(name): value for name, value in torch_file.read_state_dict(Path(path)).items()}
    network = _VGG if "net.slice1.2.weight" in tensors else _ALEX
    try:
        params = _parameters(tensors, network)
    except WeightsError as error:
        raise WeightsError(f"{path} is refused: {error}; expected the state dict of lpips.LPIPS.") from error

    def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if min(one.shape[1:3]) < network.least:
            raise ValueError(
                f"LPIPS needs images of {network.least} pixels at least, got {one.shape[1]}x{one.shape[2]}; leave "
                "--lpips out for features of a small classifier"
            )
        parts = [
            np.asarray(_compare(params, network, one[first : first + _BATCH], other[first : first + _BATCH]))
            for first in range(0, len(one), _BATCH)
        ]
        return np.concatenate(parts)

    return distance


def _parameters(tensors: Tensors, network: _Network) -> list[dict[str, Any]]:
    """By slice: kernels (3, 3, in, out) and biases of its convolutions, and the weights (C,) of its channels."""

    def tensor(name: str, *shape: int | None) -> jax.Array:
        """Of a shape in which None stands for any number."""
        if name not in tensors:
            raise WeightsError(f"it lacks the tensor {name}")
        value = tensors[name]
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise WeightsError(f"its {name} is no tensor of floating point")
        expected = tuple(max(side, 1) if own is None else own for side, own in zip(value.shape, shape, strict=False))
        if value.shape != expected or value.ndim != len(shape):
            text = ", ".join("any" if side is None else str(side) for side in shape)
            raise WeightsError(f"its tensor {name} has shape {value.shape}, not ({text})")
        return jnp.asarray(value, jnp.float32)

    found, width = [], 3
    for index, convolutions in enumerate(network.slices):
        kernels, biases = [], []
        for number, stride, padding in convolutions:
            name = f"net.slice{index + 1}.{number}"
            side = 11 if stride == 4 else 2 * padding + 1
            kernels.append(tensor(f"{name}.weight", None, width, side, side).transpose(2, 3, 1, 0))
            width = kernels[-1].shape[-1]
            biases.append(tensor(f"{name}.bias", width))
        channels = tensor(f"lin{index}.model.1.weight", 1, width, 1, 1).reshape(-1)
        found.append({"kernels": kernels, "biases": biases, "channels": channels})
    return found


@functools.partial(jax.jit, static_argnums=1)
def _compare(params: list[dict[str, Any]], network: _Network, one: jax.Array, other: jax.Array) -> jax.Array:
    """(N,) distances of two batches."""
    pairs = zip(_features(params, network, one), _features(params, network, other), params, strict=True)
    return sum(jnp.mean(jnp.square(a - b) @ own["channels"], axis=(1, 2)) for a, b, own in pairs)  # type: ignore[return-value]


def _features(params: list[dict[str, Any]], network: _Network, x: jax.Array) -> list[jax.Array]:
    """The five maps, each of unit length in every pixel."""
    h = (jnp.broadcast_to(x, (*x.shape[:-1], 3)) - _SHIFT) / _SCALE
    maps = []
    for index, convolutions in enumerate(network.slices):
        if index in network.pooled:
            window = (1, network.window, network.window, 1)
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        for layer, (_, stride, padding) in enumerate(convolutions):
            h = jax.lax.conv_general_dilated(
                h,
                params[index]["kernels"][layer],
                (stride, stride),
                ((padding, padding), (padding, padding)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )
            h = jax.nn.relu(h + params[index]["biases"][layer])
        maps.append(h / (jnp.sqrt(jnp.sum(jnp.square(h), axis=-1, keepdims=True)) + 1e-10))
    return maps
