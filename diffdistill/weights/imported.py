"""What an import yields, and the conversion of torch's tensors into the parameters of one of our networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from diffdistill.models import arguments
from diffdistill.models.denoiser import Network, Params
from diffdistill.weights import WeightsError

Tensors = dict[str, NDArray[Any]]
# Of every published UNet of guided-diffusion and of progressive distillation.
LOWEST_RESOLUTION = 8
_LEVELS, _BLOCKS = 12, 8  # of a level; twice those of the largest published network
# Splits the first axis, 3 C, of a tensor for queries, keys and values: (tensor, heads, 0 | 1 | 2) -> (C, ...).
Split = Callable[[NDArray[Any], int, int], NDArray[Any]]


@dataclass(frozen=True)
class ImportedModel:
    """A published model as one of ours: what rebuilds its denoiser, its parameters, and where they come from.

    Attributes:
      source: whose format: edm, guided-diffusion or progressive.
      sha256: of the file.
      model: fields of config.ModelConfig that differ from what every network has; `prediction` is not among them.
      network: the network that they describe.
      params: float32 parameters of `network`, nested dicts of numpy arrays.
      prediction, prediction_settings: arguments of diffusion.parameterisation.get.
      image_shape: (H, W, C).
      num_classes: 0 for an unconditional model.
      sigma_min, sigma_max: noise levels sigma/alpha that the network was made for.
      dropout, label_dropout: that it was trained with; 0 where the file does not say.
      num_steps: sampler steps that it was distilled to; 0 where it is tied to none.
    """

    source: str
    sha256: str
    model: dict[str, Any]
    network: Network
    params: Params
    prediction: str
    prediction_settings: dict[str, float]
    image_shape: tuple[int, int, int]
    num_classes: int
    sigma_min: float
    sigma_max: float
    dropout: float = 0.0
    label_dropout: float = 0.0
    num_steps: int = 0


def sha256(path: Path) -> str:
    """The hash of a file's content, hexadecimal; WeightsError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error


def parameter_shapes(network: Network, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `network`, by its path "module/layer/kernel"; nothing is allocated."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if network.num_classes else None
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        shapes: Any = jax.eval_shape(network.init, jax.random.key(0), images, one, label, None)["params"]
    except ValueError as error:
        raise WeightsError(f"its network is not one that can be built here: {error}") from error
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(shapes, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def check_stack(tensors: Tensors, levels: int, blocks: int) -> None:
    """Raises WeightsError for tensors without numbers, and for a stack that is larger than any published one.

    Names alone may say anything: that of one tensor, that it is in the 10^11th block.
    """
    empty = next((name for name, value in tensors.items() if not value.size), None)
    if empty is not None:
        raise WeightsError(f"its tensor {empty} has shape {tensors[empty].shape}, which holds no number")
    if not (1 <= levels <= _LEVELS and 1 <= blocks <= _BLOCKS):
        raise WeightsError(
            f"by the names of its tensors its network has {levels} levels of {blocks} blocks; expected 1 to {_LEVELS} "
            f"levels of 1 to {_BLOCKS}"
        )


def convert(
    tensors: Mapping[str, NDArray[Any]],
    network: Network,
    image_shape: tuple[int, int, int],
    modules: Mapping[str, str],
    layers: Mapping[str, str],
    split: Split,
) -> Params:
    """The parameters of `network` from the tensors of a torch module, as float32.

    Args:
      tensors: all that must find a place, by name.
      network, image_shape: what they are for.
      modules: the name in torch of each of our top modules ("down_0_block_1").
      layers: the same for what lies inside blocks ("norm1"); queries, keys and values are one layer "qkv".
      split: how that layer holds them.

    Raises:
      WeightsError: a tensor is missing, has another shape or has no place; the message names it.
    """
    unused, params = set(tensors), {}
    for path, shape in parameter_shapes(network, image_shape).items():
        module, _, leaf = path.rpartition("/")
        top, _, layer = module.partition("/")
        name = modules[top] + (f".{layers['qkv' if layer in _QKV else layer]}" if layer else "")
        name += ".bias" if leaf == "bias" else ".weight"
        if name not in tensors:
            raise WeightsError(f"it lacks the tensor {name}, which the network has as {path} {shape}")
        value = tensors[name]
        unused.discard(name)
        if layer in _QKV:
            if value.shape[0] != 3 * shape[-1]:
                raise WeightsError(f"its tensor {name} has shape {value.shape}, but 3 x {shape[-1]} rows are needed")
            heads = arguments.heads_of(network, shape[-1])  # type: ignore[arg-type]
            value = split(value, heads, _QKV.index(layer))
        if not np.isfinite(value).all():
            raise WeightsError(f"its tensor {name} holds a NaN or an infinity")
        value = _transposed(value, len(shape)) if leaf == "kernel" else value
        if value.shape != shape:
            raise WeightsError(
                f"its tensor {name} has shape {tensors[name].shape}, which does not fit {path} {shape} of the network"
            )
        params[path] = np.ascontiguousarray(value, np.float32)
    if unused:
        name = min(unused)
        raise WeightsError(f"it has the tensor {name} {tensors[name].shape}, for which the network has no place")
    return flax.traverse_util.unflatten_dict(params, sep="/")


_QKV = ("q", "k", "v")


def _transposed(value: NDArray[Any], rank: int) -> NDArray[Any]:
    """torch's (outputs, inputs, ...) as flax's (..., inputs, outputs); convolutions of one pixel as matrices."""
    if rank == 2 and all(side == 1 for side in value.shape[2:]):
        value = value.reshape(value.shape[:2])
    return np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim >= 2 else value
