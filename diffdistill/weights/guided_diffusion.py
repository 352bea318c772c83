"""State dicts in the layout of openai/guided-diffusion (Dhariwal & Nichol 2021), that of P2 (Choi et al. 2022) too."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffdistill.diffusion import parameterisation, schedules
from diffdistill.models import architectures
from diffdistill.weights import WeightsError, torch_file
from diffdistill.weights.imported import LOWEST_RESOLUTION, ImportedModel, Tensors, check_stack, convert, sha256

_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "temb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "nin_shortcut": "skip_connection",
    "norm": "norm",
    "qkv": "qkv",
    "proj_out": "proj_out",
}


def read(path: Path, *, image_size: int = 0, prediction: str = "") -> ImportedModel:
    """The network of a state dict, with heads of 64 channels; its learned variance comes with it.

    Args:
      path: such as 64x64_diffusion.pt or ffhq_p2.pt.
      image_size: side of its images; 0: such that the lowest of its resolutions is 8, as in all that are published.
      prediction: "iddpm", the cosine schedule and queries, keys and values one after the other, as the network of
        ImageNet-64; or "ddpm", the linear schedule and them by heads, as those of 128 pixels and more and all of P2. No
        tensor tells; empty: by the number of levels.

    Raises:
      WeightsError: no such file, damaged, naming code, or another network; the message names the tensor.
    """
    if prediction and prediction not in _SPLITS:
        raise WeightsError(f"prediction {prediction!r} is none of guided-diffusion's: {', '.join(_SPLITS)}.")
    content = torch_file.read_state_dict(path)
    try:
        other = sorted(str(name) for name, value in content.items() if not isinstance(value, np.ndarray))
        if other:
            raise WeightsError(f"its entries {', '.join(other[:5])} are no tensors; save the state dict alone")
        tensors = {str(name): value for name, value in content.items()}
        return _import(path, tensors, image_size, prediction)
    except WeightsError as error:
        raise WeightsError(f"{path} is refused: {error}.") from error


def _import(path: Path, tensors: Tensors, image_size: int, prediction: str) -> ImportedModel:
    levels, count = _stack(tensors)
    check_stack(tensors, levels, count)
    native = LOWEST_RESOLUTION << levels - 1
    size = image_size or native
    prediction = prediction or ("iddpm" if native <= 64 else "ddpm")
    model, modules = _settings(tensors, levels, count, size), _modules(tensors, levels, count)
    channels = _shape(tensors, "input_blocks.0.0.weight")[1]
    outputs = _shape(tensors, "out.2.weight")[0]
    if outputs not in (channels, 2 * channels):
        raise WeightsError(
            f"it puts out {outputs} channels for images of {channels}: neither noise nor noise and variance"
        )
    num_classes = 0
    if "label_emb.weight" in tensors:
        num_classes = len(tensors["label_emb.weight"])
        tensors["label_emb.weight"] = tensors["label_emb.weight"].T
    network = architectures.build(**model, output_channels=outputs, num_classes=num_classes)
    image_shape = (size, size, channels)
    levels_of_noise = schedules.get(parameterisation.TABLES[prediction], log_snr_min=-60.0, log_snr_max=60.0)
    sigma_min, sigma_max = levels_of_noise.sigma_range()
    return ImportedModel(
        source="guided-diffusion",
        sha256=sha256(path),
        model=model | {"learned_variance": outputs > channels},
        network=network,
        params=convert(tensors, network, image_shape, modules, _LAYERS, _SPLITS[prediction]),
        prediction=prediction,
        prediction_settings={},
        image_shape=image_shape,
        num_classes=num_classes,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise WeightsError(f"it lacks the tensor {name}, by which its network would be recognised")
    return tensors[name].shape


def _stack(tensors: Tensors) -> tuple[int, int]:
    """Number of levels, and of residual blocks in each: on the way up all but one end in a block that doubles."""
    ups = sorted(
        int(found[1])
        for name in tensors
        if (found := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.bias", name))
    )
    if not ups:
        raise WeightsError("its network changes resolution by other means than residual blocks, or is another one")
    return len(ups) + 1, ups[0]


def _settings(tensors: Tensors, levels: int, count: int, size: int) -> dict[str, Any]:
    """The fields of config.ModelConfig, from the shapes of the tensors."""
    embedding, noise_features = _shape(tensors, "time_embed.0.weight")
    starts = [1 + level * (count + 1) for level in range(levels)]
    widths = [_shape(tensors, f"input_blocks.{start}.0.out_layers.3.weight")[0] for start in starts]
    channels = math.gcd(noise_features, *widths)
    if widths[0] < 128:
        raise WeightsError(f"its levels are {widths} channels wide; its 32 groups need 128 at least to be ours")
    return {
        "architecture": "edm_adm",
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "embedding": embedding,
        "blocks_per_level": count,
        "attention_resolutions": tuple(
            size >> level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in tensors
        ),
        "num_heads": 1,
        "head_dim": 64,
        "num_groups": 32,
        "noise_features": 0 if noise_features == channels else noise_features,
    }


def _modules(tensors: Tensors, levels: int, count: int) -> dict[str, str]:
    """Their name of each of our modules."""
    names = {
        "dense0": "time_embed.0",
        "dense1": "time_embed.2",
        "class_emb": "label_emb",
        "conv_in": "input_blocks.0.0",
        "mid_block_1": "middle_block.0",
        "mid_attn_1": "middle_block.1",
        "mid_block_2": "middle_block.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    for level in range(levels):
        down, up = 1 + level * (count + 1), (levels - 1 - level) * (count + 1)
        for index in range(count + 1):
            for position, kind in enumerate(("block", "attn")):
                names[f"down_{level}_{kind}_{index}"] = f"input_blocks.{down + index}.{position}"
                names[f"up_{level}_{kind}_{index}"] = f"output_blocks.{up + index}.{position}"
        names[f"down_{level}_downsample"] = f"input_blocks.{down + count}.0"
        # It follows the last block of the level, and attention where there is some.
        position = 2 if f"output_blocks.{up + count}.1.qkv.weight" in tensors else 1
        names[f"up_{level}_upsample"] = f"output_blocks.{up + count}.{position}"
    return names


def _by_kind(value: NDArray[Any], heads: int, index: int) -> NDArray[Any]:
    """All queries, then all keys, then all values."""
    return value.reshape(3, -1, *value.shape[1:])[index]


def _by_heads(value: NDArray[Any], heads: int, index: int) -> NDArray[Any]:
    """Head by head its queries, keys and values."""
    return value.reshape(heads, 3, -1, *value.shape[1:])[:, index].reshape(-1, *value.shape[1:])


_SPLITS = {"iddpm": _by_kind, "ddpm": _by_heads}
