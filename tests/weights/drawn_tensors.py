"""Weights away from their initial values that any machine draws alike from a tensor's name in torch and its shape."""

import math

import numpy as np


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels of unit gain, scales about 1, biases of 0.1; no layer is silent. float32."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("freqs"):
        return 16 * noise
    if len(shape) >= 2:
        return noise / np.float32(math.sqrt(math.prod(shape[1:])))
    scale = "norm" in name and name.endswith("weight")
    return np.float32(0.1) * noise + np.float32(scale)
