"""The published networks of Karras et al. 2022 (NVlabs/edm): pickles of a dict with the entry `ema`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffdistill.models import architectures
from diffdistill.weights import WeightsError, persistent
from diffdistill.weights.imported import ImportedModel, Tensors, check_stack, convert, sha256
from diffdistill.weights.persistent import Record

# Preconditioning by class: our name, what it lets one choose and the only values that are built here.
_PRECONDITIONERS: dict[str, tuple[str, dict[str, float]]] = {
    "EDMPrecond": ("edm", {}),
    "VPPrecond": ("vp", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": ("ve", {}),
    "iDDPMPrecond": ("iddpm", {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}
_LAYERS = {
    "norm1": "norm0",
    "conv1": "conv0",
    "temb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "nin_shortcut": "skip",
    "norm": "norm2",
    "qkv": "qkv",
    "proj_out": "proj",
}
_CONSTANTS = ("resample_filter", "map_noise.freqs")


def read(path: Path) -> ImportedModel:
    """The averaged network of a file, whatever its size, classes and preconditioning; nothing in it is executed.

    Raises:
      WeightsError: no such file, damaged, naming code, or not a network that can be built here; the message names the
        tensor or attribute.
    """
    content = persistent.read(path)
    try:
        return _import(path, content.get("ema"))
    except WeightsError as error:
        raise WeightsError(f"{path} is refused: {error}.") from error


def _import(path: Path, ema: Any) -> ImportedModel:
    if not isinstance(ema, Record) or ema.class_name not in _PRECONDITIONERS:
        kind = ema.class_name if isinstance(ema, Record) else type(ema).__name__
        raise WeightsError(f"its entry 'ema' is a {kind!r}, expected one of {', '.join(_PRECONDITIONERS)}")
    prediction, constants = _PRECONDITIONERS[ema.class_name]
    for name, expected in constants.items():
        found = ema.attribute(name, (int, float))
        if not math.isclose(found, expected, rel_tol=1e-6):
            raise WeightsError(f"its {ema.class_name} has {name}={found}, but only {expected} is supported")
    levels = float(ema.attribute("sigma_min", (int, float))), float(ema.attribute("sigma_max", (int, float)))
    if prediction == "ve" and not 0.0 < levels[0] < levels[1] < math.inf:
        raise WeightsError(
            f"its {ema.class_name} was trained on noise levels from {levels[0]} to {levels[1]}, expected two positive "
            "numbers, such as 0.02 and 100"
        )
    size, channels = ema.attribute("img_resolution", int), ema.attribute("img_channels", int)
    module = ema.child("model")
    tensors = module.tensors()
    filters = {name: value for name, value in tensors.items() if name.endswith(_CONSTANTS[0])}
    fourier = tensors.get(_CONSTANTS[1])
    tensors = {name: value for name, value in tensors.items() if not name.endswith(_CONSTANTS)}
    model = _settings(module, tensors, filters, fourier)
    check_stack(tensors, len(model["multipliers"]), model["blocks_per_level"])
    last = "out_conv" if "out_conv.weight" in tensors else f"dec.{size}x{size}_aux_conv"
    if prediction == "iddpm":
        # The second half of the outputs is the variance of Nichol & Dhariwal 2021, which no sampler here reads.
        tensors |= {name: tensors[name][:channels] for name in (f"{last}.weight", f"{last}.bias") if name in tensors}
    own = {"sigma_data": float(ema.attribute("sigma_data", (int, float)))} if prediction == "edm" else {}
    num_classes = ema.attribute("label_dim", int)
    network = architectures.build(**model, output_channels=channels, num_classes=num_classes)
    image_shape = (size, size, channels)
    params = convert(tensors, network, image_shape, _modules(model, size), _LAYERS, _split)
    return ImportedModel(
        source="edm",
        sha256=sha256(path),
        model=model,
        network=network,
        params=params,
        prediction=prediction,
        prediction_settings=own,
        image_shape=image_shape,
        num_classes=num_classes,
        sigma_min=levels[0],
        sigma_max=levels[1],
        dropout=_dropout(module),
        label_dropout=float(module.state.get("label_dropout") or 0.0),
    )


def _settings(module: Record, tensors: Tensors, filters: Tensors, fourier: NDArray[Any] | None) -> dict[str, Any]:
    """The fields of config.ModelConfig, from the shapes of the tensors; from attributes only what no tensor tells."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise WeightsError(f"it lacks the tensor {name}, by which its network would be recognised")
        return tensors[name].shape

    sizes = sorted({int(found[1]) for name in tensors if (found := re.match(r"enc\.(\d+)x", name))}, reverse=True)
    if not sizes:
        raise WeightsError(
            f"its network is a {module.class_name!r} without an encoder, expected SongUNet or DhariwalUNet"
        )
    embedding, noise_features = shape("map_layer0.weight")
    widths = [shape(f"enc.{size}x{size}_block0.conv1.weight")[0] for size in sizes]
    adm = "out_conv.weight" in tensors
    channels = math.gcd(noise_features, *widths) if adm else shape(f"enc.{sizes[0]}x{sizes[0]}_conv.weight")[0]
    if any(width % channels for width in widths):
        raise WeightsError(f"its levels are {widths} channels wide, which are not multiples of the first {channels}")
    model: dict[str, Any] = {
        "architecture": "edm_adm" if adm else "ddpmpp" if fourier is None else "ncsnpp",
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "embedding": embedding,
        "blocks_per_level": len(
            {name for name in tensors if re.match(rf"enc\.{sizes[0]}x\d+_block\d+\.conv1\.w", name)}
        ),
        "attention_resolutions": tuple(size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in tensors),
        "num_groups": 32,
        "augmentation_features": shape("map_augment.weight")[1] if "map_augment.weight" in tensors else 0,
        **_heads(module, adm),
    }
    if adm:
        return model | {"noise_features": 0 if noise_features == channels else noise_features}
    _check_filters(filters, (1, 1) if fourier is None else (1, 3, 3, 1))
    model["encoder"] = next(
        (kind for kind in ("residual", "skip") if any(f"_aux_{kind}." in name for name in tensors)), "standard"
    )
    lowest = f"dec.{sizes[-1]}x{sizes[-1]}_aux_conv.weight"
    model["decoder"] = "skip" if len(sizes) > 1 and lowest in tensors else "standard"
    model["noise_features"] = noise_features
    if fourier is not None:
        model["noise_frequencies"] = tuple(fourier.astype(np.float32).tolist())
    return model


def _heads(module: Record, adm: bool) -> dict[str, int]:
    """The number of heads, an attribute of every block with attention."""
    found = set()
    for block in _blocks(module):
        heads = block.state.get("num_heads")
        if isinstance(heads, int) and heads > 0:
            found.add(block.attribute("out_channels", int) // heads if adm else heads)
    if len(found) != 1:
        raise WeightsError(
            f"its attention blocks have {sorted(found)} {'channels per head' if adm else 'heads'}, not one"
        )
    return {"num_heads": 1, "head_dim": found.pop()} if adm else {"num_heads": found.pop(), "head_dim": 0}


def _dropout(module: Record) -> float:
    rates = {float(rate) for block in _blocks(module) if isinstance(rate := block.state.get("dropout"), int | float)}
    return max(rates, default=0.0)


def _blocks(module: Record) -> list[Record]:
    modules = [module.child(part).entries("_modules").values() for part in ("enc", "dec")]
    return [block for part in modules for block in part if isinstance(block, Record)]


def _check_filters(filters: Tensors, taps: tuple[int, ...]) -> None:
    """Refuses resampling with other weights than those of the architecture."""
    expected = np.outer(taps, taps) / sum(taps) ** 2
    for name, value in filters.items():
        if value.shape[-2:] != expected.shape or not np.allclose(value, expected):
            raise WeightsError(f"its constant {name} is not the filter {taps} of this architecture")


def _modules(model: dict[str, Any], size: int) -> dict[str, str]:
    """Their name of each of our modules."""
    levels, count = len(model["multipliers"]), model["blocks_per_level"]
    first, last = f"dec.{size}x{size}", f"dec.{size >> levels - 1}x{size >> levels - 1}"
    adm = model["architecture"] == "edm_adm"
    names = {
        "dense0": "map_layer0",
        "dense1": "map_layer1",
        "class_emb": "map_label",
        "augmentation_emb": "map_augment",
        "conv_in": f"enc.{size}x{size}_conv",
        "mid_block_1": f"{last}_in0",
        "mid_attn_1": f"{last}_in0",
        "mid_block_2": f"{last}_in1",
        "norm_out": "out_norm" if adm else f"{first}_aux_norm",
        "conv_out": "out_conv" if adm else f"{first}_aux_conv",
    }
    for level in range(levels):
        above, here, below = (f"{size * 2 >> lower}x{size * 2 >> lower}" for lower in range(level, level + 3))
        for index in range(count + 1):
            for kind in ("block", "attn"):
                names[f"down_{level}_{kind}_{index}"] = f"enc.{here}_block{index}"
                names[f"up_{level}_{kind}_{index}"] = f"dec.{here}_block{index}"
        names[f"down_{level}_downsample"] = f"enc.{below}_down"
        names[f"down_{level}_input"] = f"enc.{below}_aux_{model.get('encoder')}"
        names[f"up_{level}_upsample"] = f"dec.{above}_up"
        names[f"up_{level}_norm_out"] = f"dec.{here}_aux_norm"
        names[f"up_{level}_conv_out"] = f"dec.{here}_aux_conv"
    return names


def _split(value: NDArray[Any], heads: int, index: int) -> NDArray[Any]:
    """Rows are ordered by head, channel of the head, and queries, keys, values last."""
    return value.reshape(heads, -1, 3, *value.shape[1:])[:, :, index].reshape(-1, *value.shape[1:])
