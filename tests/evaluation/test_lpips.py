"""LPIPS against its formula in torch, with drawn weights."""

import json
import pathlib
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "weights"))

import torch_zip  # noqa: E402
from drawn_tensors import drawn  # noqa: E402

from diffdistill.evaluation import lpips  # noqa: E402
from diffdistill.weights import WeightsError  # noqa: E402

GOLDEN = np.load(HERE / "golden_lpips.npz")


def tensors(name: str) -> dict[str, np.ndarray]:
    shapes = json.loads(str(GOLDEN[f"{name}_shapes"]))
    found = {tensor: drawn(tensor, tuple(shape)) for tensor, shape in shapes.items()}
    # Channel weights are not negative.
    return {tensor: np.abs(value) if tensor.startswith("lin") else value for tensor, value in found.items()}


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_is_the_reference(name, tmp_path):
    distance = lpips.load(torch_zip.write(tmp_path / "lpips.pth", tensors(name)))
    one, other = GOLDEN["images"]
    np.testing.assert_allclose(distance(one, other), GOLDEN[name], rtol=2e-4)
    np.testing.assert_allclose(distance(one, one), 0.0, atol=1e-9)
    if name == "alex":
        grey = one[..., :1]
        np.testing.assert_allclose(distance(grey, grey * 0.5), distance(grey.repeat(3, -1), grey.repeat(3, -1) * 0.5))
        with pytest.raises(ValueError, match="32 pixels at least, got 8x8"):
            distance(one[:, :8, :8], other[:, :8, :8])


def test_a_file_without_the_learnt_weights_is_refused(tmp_path):
    path = torch_zip.write(tmp_path / "lpips.pth", {"net.slice1.0.weight": np.zeros((2, 3, 3, 3), np.float32)})
    with pytest.raises(WeightsError, match=r"lacks the tensor net.slice1.0.bias; expected the state dict of lpips"):
        lpips.load(path)
