"""Random weights of the Inception network that any machine draws alike, and images to look at with them.

Away from initial values: those make the pooled features about 2e-8, and any tolerance passes.
"""

import math
import pathlib
import sys

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parent.parent / "weights"))
import torch_zip

SIZES = (32, 64, 256, 299, 512)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor that the torch state dict calls `name`, float32."""
    random = np.random.default_rng(list(name.encode()))
    if name.endswith("running_var") or name.endswith("bn.weight"):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(("running_mean", "bias")):
        return random.normal(0.0, 0.2, shape).astype(np.float32)
    return random.normal(0.0, math.sqrt(2.0 / math.prod(shape[1:])), shape).astype(np.float32)


def images(size: int, count: int = 2) -> np.ndarray:
    """(count, size, size, 3) uint8: noise on smooth waves, so that an error of the resizing shows."""
    random = np.random.default_rng(size)
    waves = np.sin(np.arange(size) * 7.0 / size)[:, None, None] * np.cos(np.arange(size) * 5.0 / size)[:, None]
    pictures = 128 + 80 * waves * random.uniform(-1, 1, (count, 1, 1, 3)) + random.normal(0, 25, (count, size, size, 3))
    return np.clip(pictures, 0, 255).astype(np.uint8)


def state_dict() -> dict[str, np.ndarray]:
    """All tensors, with the names of torch."""
    import jax
    from flax.traverse_util import flatten_dict

    from diffdistill.evaluation.inception import InceptionV3

    one = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    params = flatten_dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), one)["params"], sep=".")
    ends = {
        "kernel": "conv.weight",
        "scale": "bn.weight",
        "bias": "bn.bias",
        "mean": "bn.running_mean",
        "var": "bn.running_var",
    }
    found = {}
    for name, leaf in params.items():
        module, _, kind = name.rpartition(".")
        match leaf.shape:
            case (height, width, inputs, outputs):
                shape = (outputs, inputs, height, width)
            case (inputs, outputs):
                shape = (outputs, inputs)
            case shape:
                pass
        torch_name = f"{module}.{ends[kind]}" if module else {"fc_kernel": "fc.weight", "fc_bias": "fc.bias"}[kind]
        found[torch_name] = drawn(torch_name, shape)
    return found


def write(path: pathlib.Path) -> pathlib.Path:
    """A file as torch.save writes it, 95 MB."""
    return torch_zip.write(path, state_dict())
