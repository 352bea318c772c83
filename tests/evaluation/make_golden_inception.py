"""Writes golden_inception.npz: what torch-fidelity's Inception network gives with the weights of random_inception.

    pip install torch==2.13.0 numpy pillow scipy tqdm && pip install --no-deps torch-fidelity
    python tests/evaluation/make_golden_inception.py

Computed in float64 (`.double()`; the extractor's own option of that name runs in float32) and kept as float32.
"""

import importlib.util
import pathlib
import sys
import tempfile
import types

import numpy as np
import random_inception
import torch

GOLDEN = pathlib.Path(__file__).parent / "golden_inception.npz"
TAPS = ("64", "192", "768", "2048", "logits_unbiased", "logits")


def stand_in() -> None:
    """Puts an empty package in the place of torch_fidelity, whose own imports want torchvision."""
    if "torch_fidelity" not in sys.modules:
        package = types.ModuleType("torch_fidelity")
        package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
        sys.modules["torch_fidelity"] = package


def extractor():
    """torch-fidelity's extractor with random weights."""
    stand_in()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/empty.pth"
        torch.save({}, path)
        load = FeatureExtractorInceptionV3.load_state_dict
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        network = FeatureExtractorInceptionV3("inception", list(TAPS), feature_extractor_weights_path=path)
        FeatureExtractorInceptionV3.load_state_dict = load
    state = network.state_dict()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            state[name] = torch.from_numpy(random_inception.drawn(name, tuple(value.shape)))
    network.load_state_dict(state)
    return network


def main() -> None:
    network = extractor()
    arrays = {}
    for size in random_inception.SIZES:
        pictures = torch.from_numpy(random_inception.images(size).transpose(0, 3, 1, 2).copy())
        in_float32 = [tap.numpy() for tap in network.float()(pictures)]
        network.double().feature_extractor_internal_dtype = torch.float64
        truth = [tap.numpy() for tap in network(pictures)]
        network.feature_extractor_internal_dtype = torch.float32
        for name, exact, single in zip(TAPS, truth, in_float32, strict=True):
            difference = np.abs(single - exact).max() / np.abs(exact).max()
            print(f"{size} {name}: float32 differs by {difference:.1e} relative; magnitude {np.abs(exact).max():.3g}")
            arrays[f"{size}_{name}"] = exact.astype(np.float32)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
