"""The released networks of Salimans & Ho 2022: Flax training states in msgpack, with the averaged parameters inside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import msgpack
import numpy as np

from diffdistill.data import unpickling
from diffdistill.models import architectures
from diffdistill.models.denoiser import Network, Params
from diffdistill.weights import WeightsError
from diffdistill.weights.imported import (
    LOWEST_RESOLUTION,
    ImportedModel,
    Tensors,
    check_stack,
    parameter_shapes,
    sha256,
)

_CONTAINERS = 1 << 17  # dicts and lists of a file


def read(path: Path, *, image_size: int = 0, prediction: str = "") -> ImportedModel:
    """The averaged network of a file.

    Args:
      path: a checkpoint of diffusion_distillation, teacher or student.
      image_size: side of its images; 0: such that the lowest of its resolutions is 8, as in all that are published.
      prediction: what it puts out, x or v; empty: x (CIFAR-10), or both where it has twice the channels.

    Raises:
      WeightsError: no such file, damaged, or not such a network; the message names the tensor.
    """
    content = _restore(path)
    try:
        averaged = content.get("ema_params") or content.get("params")
        if not isinstance(averaged, Mapping):
            raise WeightsError(
                f"it has no entry 'ema_params', only {', '.join(sorted(map(str, content))) or 'nothing'}"
            )
        flat = flax.traverse_util.flatten_dict(dict(averaged), sep="/")
        # Their modules are called down_0.block_0, ours down_0_block_0.
        tensors = {str(name).replace(".", "_"): np.asarray(value) for name, value in flat.items()}
        return _import(path, tensors, image_size, prediction, int(content.get("num_sample_steps") or 0))
    except WeightsError as error:
        raise WeightsError(f"{path} is refused: {error}.") from error


def _restore(path: Path) -> dict[str, Any]:
    try:
        packed = path.read_bytes()
        _check_containers(packed)
        content = flax.serialization.msgpack_restore(packed)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except WeightsError as error:
        raise WeightsError(f"{path} is refused: {error}.") from error
    except Exception as error:  # damaged msgpack raises nearly anything
        raise WeightsError(f"{path} is damaged, truncated or no msgpack ({unpickling.about(error)}).") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}; a dict with the entry 'ema_params' was expected.")
    return content


def _check_containers(packed: bytes) -> None:
    """Raises WeightsError where a file holds more dicts and lists than any training state: one takes a single byte."""
    count = 0

    def container(_: list[Any]) -> None:
        nonlocal count
        count += 1
        if count > _CONTAINERS:
            raise WeightsError(f"it holds more than {_CONTAINERS} dicts and lists, which no training state needs")

    def restore(content: bytes) -> None:
        msgpack.unpackb(
            content,
            object_pairs_hook=container,
            list_hook=container,
            ext_hook=lambda _, inner: restore(inner),
            max_array_len=_CONTAINERS,
            raw=True,
            strict_map_key=False,
        )

    restore(packed)


def _import(path: Path, tensors: Tensors, image_size: int, prediction: str, num_steps: int) -> ImportedModel:
    levels = len({name for name in tensors if re.match(r"down_\d+_block_0/conv1/kernel", name)})
    blocks = len({name for name in tensors if re.match(r"down_0_block_\d+/conv1/kernel", name)})
    check_stack(tensors, levels, blocks)
    size = image_size or LOWEST_RESOLUTION << levels - 1
    channels, model = _shape(tensors, "conv_in/kernel")[2], _settings(tensors, levels, blocks, size)
    outputs = _shape(tensors, "conv_out/kernel")[3]
    if outputs not in (channels, 2 * channels):
        raise WeightsError(f"its network puts out {outputs} channels for images of {channels}")
    prediction = prediction or ("x" if outputs == channels else "both")
    if (prediction == "both") != (outputs == 2 * channels):
        raise WeightsError(
            f"its network puts out {outputs} channels for images of {channels}, which is not {prediction!r}"
        )
    num_classes = _shape(tensors, "class_emb/kernel")[0] if "class_emb/kernel" in tensors else 0
    network = architectures.build(**model, output_channels=outputs, num_classes=num_classes)
    image_shape = (size, size, channels)
    return ImportedModel(
        source="progressive",
        sha256=sha256(path),
        model=model,
        network=network,
        params=_parameters(tensors, network, image_shape),
        prediction=prediction,
        prediction_settings={},
        image_shape=image_shape,
        num_classes=num_classes,
        # log-SNR from -20 to 20
        sigma_min=math.exp(-10.0),
        sigma_max=math.exp(10.0),
        num_steps=num_steps,
    )


def _settings(tensors: Tensors, levels: int, blocks: int, size: int) -> dict[str, Any]:
    """The fields of config.ModelConfig, from the shapes of the tensors."""
    channels = _shape(tensors, "conv_in/kernel")[3]
    widths = [_shape(tensors, f"down_{level}_block_0/conv1/kernel")[3] for level in range(levels)]
    if any(width % channels for width in widths):
        raise WeightsError(f"its levels are {widths} channels wide, which are not multiples of the first {channels}")
    heads = {_shape(tensors, name)[1:3] for name in tensors if name.endswith("/q/kernel")}
    numbers, sizes = (sorted({head[axis] for head in heads}) for axis in (0, 1))
    if not heads or (len(numbers) > 1 and len(sizes) > 1):
        raise WeightsError(f"its attention has the heads {sorted(heads)}, neither equally many nor equally large")
    return {
        "architecture": "unet",
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "embedding": _shape(tensors, "dense0/kernel")[1],
        "blocks_per_level": blocks,
        "attention_resolutions": tuple(
            size >> level for level in range(levels) if f"down_{level}_attn_0/q/kernel" in tensors
        ),
        "num_heads": numbers[0] if len(numbers) == 1 else 1,
        "head_dim": 0 if len(numbers) == 1 else sizes[0],
        "num_groups": 32,
    }


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise WeightsError(f"it lacks the tensor {name}, by which its network would be recognised")
    return tensors[name].shape


def _parameters(tensors: Tensors, network: Network, image_shape: tuple[int, int, int]) -> Params:
    shapes, params = parameter_shapes(network, image_shape), {}
    for name, shape in shapes.items():
        value = tensors.get(name)
        if value is None:
            raise WeightsError(f"it lacks the tensor {name}, which the network has as {shape}")
        # Heads and their channels stand apart there, and old releases of flax kept scales as (1, 1, 1, C).
        if value.size != math.prod(shape):
            raise WeightsError(f"its tensor {name} has shape {value.shape}, which does not fit {shape} of the network")
        if not np.isfinite(value).all():
            raise WeightsError(f"its tensor {name} holds a NaN or an infinity")
        params[name] = np.asarray(value, np.float32).reshape(shape)
    for name in sorted(set(tensors) - set(shapes)):
        raise WeightsError(f"it has the tensor {name} {tensors[name].shape}, for which the network has no place")
    return flax.traverse_util.unflatten_dict(params, sep="/")
