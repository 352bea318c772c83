"""LPIPS against its formula in torch, with drawn weights."""

import json
import pathlib
import pickle
import sys
import zipfile

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
    path = torch_zip.write(tmp_path / "lpips.pth", {"net.slice1.0.weight": np.zeros((2, 3, 11, 11), np.float32)})
    with pytest.raises(WeightsError, match=r"lacks the tensor net.slice1.0.bias; expected the state dict of lpips"):
        lpips.load(path)


@pytest.mark.parametrize(
    ("changed", "shape", "message"),
    [
        ("net.slice1.0.weight", (0,), r"net.slice1.0.weight has shape \(0,\), not \(any, 3, 11, 11\)"),
        ("net.slice1.0.weight", (0, 3, 11, 11), r"net.slice1.0.weight has shape \(0, 3, 11, 11\)"),
        ("net.slice2.3.weight", (192, 3, 5, 5), r"net.slice2.3.weight has shape .*, not \(any, 64, 5, 5\)"),
        ("net.slice5.10.bias", (1,), r"net.slice5.10.bias has shape \(1,\), not \(256\)"),
        ("lin2.model.1.weight", (384,), r"lin2.model.1.weight has shape \(384,\), not \(1, 384, 1, 1\)"),
    ],
)
def test_tensors_of_other_shapes_are_named(tmp_path, changed, shape, message):
    path = torch_zip.write(tmp_path / "lpips.pth", {**tensors("alex"), changed: np.zeros(shape, np.float32)})
    with pytest.raises(WeightsError, match=message):
        lpips.load(path)


def test_text_in_place_of_a_tensor_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "lpips.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"net.slice1.0.weight": "x"}, 2))
    with pytest.raises(WeightsError, match=r"net.slice1.0.weight is no tensor of floating point"):
        lpips.load(tmp_path / "lpips.pth")
