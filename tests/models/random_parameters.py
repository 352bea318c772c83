"""Parameters away from their initial values, so that no branch of a network is silent; nothing is compiled."""

import math

import jax
import numpy as np


def random_parameters(shapes):
    """Normal kernels of unit gain, biases of 0.1 and scales about 1, for a tree of jax.ShapeDtypeStruct."""

    def leaf(path, like):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(list(name.encode())).standard_normal(like.shape, np.float32)
        if "kernel" in name:
            return noise / math.sqrt(math.prod(like.shape[:-1]))
        return 0.1 * noise + ("scale" in name)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
