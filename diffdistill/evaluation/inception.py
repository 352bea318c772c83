"""Inception v3 of 2015-12-05, the feature network of FID, with all taps (Szegedy et al. 2016; Heusel et al. 2017).

It differs from the network of the paper in three ways that every port has to copy: 1008 classes, 3x3 average pools that
leave the padding out of the mean, and a maximum pool in the last block. Its weights come from a file (see `load`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from diffdistill import places
from diffdistill.data import pickles, unpickling
from diffdistill.data.contract import DataError
from diffdistill.evaluation import protocols
from diffdistill.weights import WeightsError, fetch, torch_file

TAPS = ("64", "192", "768", "2048", "sfid", "logits_unbiased", "logits")
ENVIRONMENT = "DIFFDISTILL_INCEPTION_WEIGHTS"
BATCH_NORM_EPS = 1e-3
SPATIAL_CHANNELS = 7
# TF32 changes the pooled features by 5e-4 and bfloat16 by 4.6e-3: never leave the choice to the device.
HIGHEST = jax.lax.Precision.HIGHEST


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation with fixed statistics, ReLU; `padding`: pixels (height, width)."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        height, width = self.padding
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            ((height, height), (width, width)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=HIGHEST,
        )
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", ones, (self.channels,), jnp.float32)
        bias = self.param("bias", zeros, (self.channels,), jnp.float32)
        mean = self.param("mean", zeros, (self.channels,), jnp.float32)
        var = self.param("var", ones, (self.channels,), jnp.float32)
        return nn.relu((x - mean) * (scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)) + bias)


def _average(x: Array) -> Array:
    """3x3 mean at stride 1 over the pixels that exist."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x: Array) -> Array:
    """3x3 maximum at stride 1."""
    return nn.max_pool(x, (3, 3), padding="SAME")


def _halve(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, pool."""

    pool_channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = ConvBN(64, name="branch1x1")(x)
        five = ConvBN(48, name="branch5x5_1")(x)
        five = ConvBN(64, (5, 5), padding=(2, 2), name="branch5x5_2")(five)
        three = ConvBN(64, name="branch3x3dbl_1")(x)
        three = ConvBN(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(three)
        three = ConvBN(96, (3, 3), padding=(1, 1), name="branch3x3dbl_3")(three)
        pool = ConvBN(self.pool_channels, name="branch_pool")(_average(x))
        return jnp.concatenate([one, five, three, pool], -1)


class BlockB(nn.Module):
    """35x35 -> 17x17."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = ConvBN(384, (3, 3), 2, name="branch3x3")(x)
        double = ConvBN(64, name="branch3x3dbl_1")(x)
        double = ConvBN(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        double = ConvBN(96, (3, 3), 2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _halve(x)], -1)


class BlockC(nn.Module):
    """17x17: 1x1, 7x7 as 1x7 and 7x1 once and twice, pool. Returns the block's output and its 1x1 branch."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        wide, tall = (
            functools.partial(ConvBN, kernel=(1, 7), padding=(0, 3)),
            functools.partial(ConvBN, kernel=(7, 1), padding=(3, 0)),
        )
        one = ConvBN(192, name="branch1x1")(x)
        seven = ConvBN(self.channels, name="branch7x7_1")(x)
        seven = wide(self.channels, name="branch7x7_2")(seven)
        seven = tall(192, name="branch7x7_3")(seven)
        double = ConvBN(self.channels, name="branch7x7dbl_1")(x)
        double = tall(self.channels, name="branch7x7dbl_2")(double)
        double = wide(self.channels, name="branch7x7dbl_3")(double)
        double = tall(self.channels, name="branch7x7dbl_4")(double)
        double = wide(192, name="branch7x7dbl_5")(double)
        pool = ConvBN(192, name="branch_pool")(_average(x))
        return jnp.concatenate([one, seven, double, pool], -1), one


class BlockD(nn.Module):
    """17x17 -> 8x8."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = ConvBN(192, name="branch3x3_1")(x)
        three = ConvBN(320, (3, 3), 2, name="branch3x3_2")(three)
        seven = ConvBN(192, name="branch7x7x3_1")(x)
        seven = ConvBN(192, (1, 7), padding=(0, 3), name="branch7x7x3_2")(seven)
        seven = ConvBN(192, (7, 1), padding=(3, 0), name="branch7x7x3_3")(seven)
        seven = ConvBN(192, (3, 3), 2, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _halve(x)], -1)


class BlockE(nn.Module):
    """8x8: 1x1, 3x3 and two 3x3, each ending in 1x3 beside 3x1, pool."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide, tall = (
            functools.partial(ConvBN, kernel=(1, 3), padding=(0, 1)),
            functools.partial(ConvBN, kernel=(3, 1), padding=(1, 0)),
        )
        one = ConvBN(320, name="branch1x1")(x)
        three = ConvBN(384, name="branch3x3_1")(x)
        double = ConvBN(448, name="branch3x3dbl_1")(x)
        double = ConvBN(384, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        parts = [
            one,
            wide(384, name="branch3x3_2a")(three),
            tall(384, name="branch3x3_2b")(three),
            wide(384, name="branch3x3dbl_3a")(double),
            tall(384, name="branch3x3dbl_3b")(double),
            ConvBN(192, name="branch_pool")(_maximum(x) if self.max_pool else _average(x)),
        ]
        return jnp.concatenate(parts, -1)


class InceptionV3(nn.Module):
    """The network; its tensors have the names of the torch state dict."""

    num_classes: int = 1008

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        """images (B, 299, 299, 3) float32, normalised by a protocol -> the arrays of TAPS, (B, d) float32."""
        taps = {}
        x = ConvBN(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = ConvBN(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = ConvBN(64, (3, 3), padding=(1, 1), name="Conv2d_2b_3x3")(x)
        x = _halve(x)
        taps["64"] = x.mean((1, 2))
        x = ConvBN(80, name="Conv2d_3b_1x1")(x)
        x = ConvBN(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = _halve(x)
        taps["192"] = x.mean((1, 2))
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)
        x, _ = BlockC(128, name="Mixed_6b")(x)
        x, _ = BlockC(160, name="Mixed_6c")(x)
        x, spatial = BlockC(160, name="Mixed_6d")(x)
        taps["sfid"] = spatial[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)  # "mixed_6/conv" of the TensorFlow graph
        x, _ = BlockC(192, name="Mixed_6e")(x)
        taps["768"] = x.mean((1, 2))
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(False, name="Mixed_7b")(x)
        x = BlockE(True, name="Mixed_7c")(x)
        taps["2048"] = pooled = x.mean((1, 2))
        kernel = self.param("fc_kernel", nn.initializers.lecun_normal(), (2048, self.num_classes), jnp.float32)
        bias = self.param("fc_bias", nn.initializers.zeros, (self.num_classes,), jnp.float32)
        taps["logits_unbiased"] = jnp.dot(pooled, kernel, precision=HIGHEST)
        taps["logits"] = taps["logits_unbiased"] + bias
        return taps


@dataclass(frozen=True)
class FeatureExtractor:
    """The network with its weights, bound to a protocol.

    Attributes:
      variables: of InceptionV3.
      protocol: a name of protocols.PROTOCOLS.
      weights_sha256: of the file that the weights came from; it belongs beside every figure.
    """

    variables: Mapping[str, Any]
    protocol: str
    weights_sha256: str

    def __call__(self, images: np.ndarray | Array, taps: Sequence[str] = ("2048",)) -> dict[str, Array]:
        """images (B, H, W, 1 or 3) uint8 -> {tap: (B, d) float32}, on the default device."""
        return _apply(self.variables, jnp.asarray(images), self.protocol, tuple(taps))


def apply(variables: Mapping[str, Any], images: Array, protocol: str, taps: Sequence[str]) -> dict[str, Array]:
    """The same as a pure function, for use inside other programs. Raises ValueError for an unknown tap or protocol."""
    unknown = [tap for tap in taps if tap not in TAPS]
    if unknown:
        raise ValueError(f"unknown taps {', '.join(unknown)}; known are {', '.join(TAPS)}")
    outputs: Any = InceptionV3().apply(variables, protocols.preprocess(images, protocol))
    return {tap: outputs[tap] for tap in taps}


_apply = jax.jit(apply, static_argnums=(2, 3))


def load(path: str | os.PathLike[str] = "", protocol: str = "tf", accept_sha256: str = "") -> FeatureExtractor:
    """The network from a file of weights, whose sha256 is verified before anything in it is read.

    Args:
      path: the torch state dict or the nested-dict pickle of the JAX ports; empty: the path in the environment variable
        DIFFDISTILL_INCEPTION_WEIGHTS, or what `--mode=fetch-weights` fetched.
      protocol: how images are resized and normalised, a name of protocols.PROTOCOLS.
      accept_sha256: accepts one other file by its hash. Its figures are comparable with each other alone.

    Raises:
      WeightsError: no such file, another file, or one that does not hold this network.
    """
    file = _find(path)
    found = fetch.sha256(file)
    known = (fetch.INCEPTION.sha256, fetch.INCEPTION_NESTED.sha256)
    if found not in (*known, accept_sha256.lower()):
        size = file.stat().st_size
        short = f" It has {size} of {fetch.INCEPTION.size} bytes." if size < fetch.INCEPTION.size else ""
        raise WeightsError(
            f"{file} is not the published Inception network: its sha256 is {found}, expected {known[0]} (torch) or "
            f"{known[1]} (nested dict).{short} Fetch it with --mode=fetch-weights. A network of your own is accepted "
            f"with config.evaluation.inception_sha256={found}; its figures are then not FID."
        )
    try:
        if torch_file.is_torch(file):
            variables = variables_from_state_dict(torch_file.read_state_dict(file))
        else:
            with open(file, "rb") as stream:
                variables = variables_from_nested(pickles.load(stream, str(file)))
    except WeightsError:
        raise
    except DataError as error:
        raise WeightsError(f"{error}.") from error
    except Exception as error:  # names and values that belong to no network raise nearly anything
        raise WeightsError(f"{file} does not hold the Inception network of FID ({unpickling.about(error)}).") from error
    return FeatureExtractor(variables, protocol, found)


def _find(path: str | os.PathLike[str]) -> Path:
    fetched = places.cache() / fetch.INCEPTION.name
    given = os.fspath(path) or os.environ.get(ENVIRONMENT, "") or (str(fetched) if fetched.exists() else "")
    if not given:
        raise WeightsError(
            "The Inception network is needed for FID and its relatives, and there is none here. Fetch it once with "
            f"python main.py --mode=fetch-weights, or give a file with --inception_weights=PATH or ${ENVIRONMENT}."
        )
    if not Path(given).is_file():
        raise WeightsError(
            f"{given} is not a file. --inception_weights or ${ENVIRONMENT} must name the Inception weights; "
            "--mode=fetch-weights fetches them."
        )
    return Path(given)


def variables_from_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of InceptionV3 from a torch state dict with the names of torchvision (Conv2d_1a_3x3.conv.weight, ...).

    Raises WeightsError that names the first tensor that is missing, surplus or of another shape.
    """
    names = {"bn.weight": "scale", "bn.bias": "bias", "bn.running_mean": "mean", "bn.running_var": "var"}
    found = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked" or name.startswith("AuxLogits."):
            continue
        value = np.asarray(value)
        parent, _, layer = module.rpartition(".")
        if layer == "conv" and kind == "weight" and value.ndim == 4:
            found[f"{parent}.kernel"] = value.transpose(2, 3, 1, 0)
        elif f"{layer}.{kind}" in names:
            found[f"{parent}.{names[f'{layer}.{kind}']}"] = value
        elif module == "fc" and kind == "weight":
            found["fc_kernel"] = value.T
        else:
            found[{"fc.bias": "fc_bias"}.get(name, name)] = value
    return _checked({name.replace(".", "/"): value for name, value in found.items()})


def variables_from_nested(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same from the nested dicts of the JAX ports: block / branch / conv / kernel, bn / scale, bias, mean, var."""
    found = {}
    for name, value in flatten_dict(tree, sep="/").items():
        name = name.replace("/conv/", "/").replace("/bn/", "/").replace("fc/", "fc_")
        if value is not None and not name.startswith("AuxLogits"):
            found[name] = np.asarray(value)
    return _checked(found)


@functools.cache
def _shapes() -> dict[str, tuple[int, ...]]:
    one = jax.ShapeDtypeStruct((1, protocols.SIDE, protocols.SIDE, 3), jnp.float32)
    params: Any = jax.eval_shape(InceptionV3().init, jax.random.key(0), one)["params"]
    leaves: Any = flatten_dict(params, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def _checked(found: dict[str, np.ndarray]) -> dict[str, Any]:
    for name, shape in _shapes().items():
        if name not in found:
            raise WeightsError(f"the file does not hold the Inception network of FID: the tensor {name} is missing.")
        if found[name].shape != shape:
            raise WeightsError(
                f"the file does not hold the Inception network of FID: {name} has shape {found[name].shape}, not "
                f"{shape}."
            )
    surplus = sorted(set(found) - set(_shapes()))
    if surplus:
        raise WeightsError(f"the file does not hold the Inception network of FID: {surplus[0]} has no place in it.")
    # float32 arrays of ours: the file's numbers may lie at any address and in any order.
    return {"params": unflatten_dict({name: np.array(found[name], np.float32) for name in _shapes()}, sep="/")}
