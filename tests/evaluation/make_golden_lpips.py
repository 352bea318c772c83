"""Writes golden_lpips.npz: LPIPS of two pairs of images, in torch, with drawn weights, AlexNet's and VGG's.

Run by hand with torch; the package lpips is not needed, its formula is written out below:

    python make_golden_lpips.py

The file holds shapes, images and distances, not the weights: tests/weights/drawn_tensors.py draws them again.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from torch.nn import functional

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "weights"))
from drawn_tensors import drawn  # noqa: E402

# As in torchvision: C channels, stride, padding of a convolution with its kernel; "pool" is max-pooling.
ALEX = [
    (0, 64, 11, 4, 2),
    "pool3",
    (3, 192, 5, 1, 2),
    "pool3",
    (6, 384, 3, 1, 1),
    (8, 256, 3, 1, 1),
    (10, 256, 3, 1, 1),
]
ALEX_MAPS = (0, 3, 6, 8, 10)
VGG_WIDTHS = {
    0: 64,
    2: 64,
    5: 128,
    7: 128,
    10: 256,
    12: 256,
    14: 256,
    17: 512,
    19: 512,
    21: 512,
    24: 512,
    26: 512,
    28: 512,
}
VGG_MAPS = (2, 7, 14, 21, 28)


def vgg():
    layers = []
    for number, width in VGG_WIDTHS.items():
        layers += (["pool2"] if number in (5, 10, 17, 24) else []) + [(number, width, 3, 1, 1)]
    return layers


def distances(layers, maps, pairs):
    """(shapes by name, distances (N,))."""
    shapes, outputs = {}, [[], []]
    for side, image in enumerate(pairs):
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
        h, channels = (image - shift) / scale, 3
        for layer in layers:
            if isinstance(layer, str):
                h = functional.max_pool2d(h, int(layer[-1]), 2)
                continue
            number, width, kernel, stride, padding = layer
            name = f"net.slice{1 + sum(number > last for last in maps)}.{number}"
            shapes |= {f"{name}.weight": (width, channels, kernel, kernel), f"{name}.bias": (width,)}
            weight, bias = (
                torch.from_numpy(drawn(f"{name}.{part}", shapes[f"{name}.{part}"])) for part in ("weight", "bias")
            )
            h, channels = torch.relu(functional.conv2d(h, weight, bias, stride, padding)), width
            if number in maps:
                outputs[side].append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
    total = 0
    for index, (one, other) in enumerate(zip(*outputs, strict=True)):
        name = f"lin{index}.model.1.weight"
        shapes[name] = (1, one.shape[1], 1, 1)
        channels = torch.from_numpy(np.abs(drawn(name, shapes[name])))
        total = total + functional.conv2d((one - other).square(), channels).mean((2, 3))[:, 0]
    return shapes, total.numpy()


def main() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 40, 36)).astype(np.float32)
    golden = {"images": images.transpose(0, 1, 3, 4, 2)}
    for name, layers, maps in (("alex", ALEX, ALEX_MAPS), ("vgg", vgg(), VGG_MAPS)):
        shapes, golden[name] = distances(layers, maps, torch.from_numpy(images))
        golden[f"{name}_shapes"] = json.dumps(shapes)
    np.savez_compressed(HERE / "golden_lpips.npz", **golden)


if __name__ == "__main__":
    main()
