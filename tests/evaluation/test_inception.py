"""The Inception network against golden values (make_golden_inception.py), and the files of its weights."""

from __future__ import annotations

import hashlib
import os
import pathlib
import pickle
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import random_inception

from diffdistill.evaluation import inception
from diffdistill.weights import WeightsError, fetch, torch_file

GOLDEN = pathlib.Path(__file__).parent / "golden_inception.npz"
TAPS = ("64", "192", "768", "2048", "logits_unbiased", "logits")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
    return random_inception.write(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="module")
def extractor(weights) -> inception.FeatureExtractor:
    return inception.load(weights, "tf", accept_sha256=fetch.sha256(weights))


@pytest.mark.parametrize("size", random_inception.SIZES)
def test_all_taps_agree_with_the_public_implementation(extractor, size):
    found = extractor(random_inception.images(size), TAPS)
    with np.load(GOLDEN) as golden:
        for tap in TAPS:
            expected = golden[f"{size}_{tap}"]
            assert found[tap].dtype == np.float32
            difference = np.abs(np.asarray(found[tap]) - expected).max() / np.abs(expected).max()
            assert difference < 2e-6, (tap, difference)


def test_the_spatial_tap_is_the_beginning_of_a_branch(extractor):
    """Seven channels of the 1x1 branch of block 6d, row after row: flattened height, width, channel."""
    import jax
    from flax.traverse_util import flatten_dict

    images = random_inception.images(64)[:1]
    seen = {}

    def intermediates(variables, x):
        return inception.InceptionV3().apply(variables, x, capture_intermediates=True)[1]["intermediates"]

    x = inception.protocols.preprocess(jax.numpy.asarray(images), "tf")
    for name, value in flatten_dict(jax.jit(intermediates)(extractor.variables, x), sep="/").items():
        seen[name] = value[0]
    branch = seen["Mixed_6d/branch1x1/__call__"]
    assert branch.shape == (1, 17, 17, 192)
    np.testing.assert_allclose(
        extractor(images, ("sfid",))["sfid"], branch[..., :7].reshape(1, -1), rtol=1e-4, atol=1e-4
    )


def test_size_of_the_network(extractor):
    from flax.traverse_util import flatten_dict

    shapes = {name: value.shape for name, value in flatten_dict(extractor.variables["params"], sep="/").items()}
    convolutions = [shape for name, shape in shapes.items() if name.endswith("/kernel")]
    assert len(convolutions) == 94
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 23_885_392


def test_grey_images_are_repeated(extractor):
    grey = random_inception.images(32)[..., :1]
    np.testing.assert_array_equal(extractor(grey)["2048"], extractor(np.repeat(grey, 3, -1))["2048"])


def test_protocols_differ(extractor):
    images = random_inception.images(64)
    found = [
        np.asarray(inception.FeatureExtractor(extractor.variables, name, "")(images)["2048"])
        for name in ("tf", "pytorch-fid", "clean")
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(found[first] - found[second]).max() > 1e-2


def test_the_nested_pickle_gives_the_same_variables(extractor, tmp_path):
    import jax

    tree = {"AuxLogits": None}
    for name, value in random_inception.state_dict().items():
        *modules, kind = name.replace("running_", "").split(".")
        leaf = np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
        if modules[-1] == "conv" or name == "fc.weight":
            kind = "kernel"
        elif kind == "weight":
            kind = "scale"
        place = tree
        for module in modules:
            place = place.setdefault(module, {})
        place[kind] = leaf
    path = tmp_path / "nested.pickle"
    path.write_bytes(pickle.dumps(tree))
    found = inception.load(path, "tf", accept_sha256=fetch.sha256(path))
    jax.tree.map(np.testing.assert_array_equal, found.variables, extractor.variables)


def test_weights_are_found_by_the_environment_variable(weights, monkeypatch):
    digest = fetch.sha256(weights)
    monkeypatch.setenv(inception.ENVIRONMENT, str(weights))
    assert inception.load("", "tf", accept_sha256=digest).weights_sha256 == digest
    monkeypatch.setenv(inception.ENVIRONMENT, "/nowhere.pth")
    with pytest.raises(WeightsError, match=r"/nowhere\.pth is not a file.*fetch-weights"):
        inception.load()


def test_without_weights_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"--mode=fetch-weights.*--inception_weights=PATH"):
        inception.load()


def test_another_file_is_refused_before_it_is_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsError, match=f"sha256 is {fetch.sha256(path)}, expected {fetch.INCEPTION.sha256}"):
        inception.load(path)
    # And where its hash is accepted, nothing in it runs.
    for name in ("weights.pth", "weights.pickle"):
        evil = path.rename(tmp_path / name)
        with pytest.raises(WeightsError, match=r"refused.*system"):
            inception.load(evil, accept_sha256=fetch.sha256(evil))
        path = evil
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("Mixed_7c.branch3x3_2a.bn.running_var"), "Mixed_7c/branch3x3_2a/var is missing"),
        (
            lambda state: state.update({"fc.bias": np.zeros(1000, np.float32)}),
            r"fc_bias has shape \(1000,\), not \(1008,\)",
        ),
        (lambda state: state.update({"Conv2d_9.conv.weight": np.zeros((1, 1, 1, 1))}), "Conv2d_9/kernel has no place"),
    ],
)
def test_another_network_is_refused_and_the_tensor_named(change, message):
    state = random_inception.state_dict()
    change(state)
    with pytest.raises(WeightsError, match=message):
        inception.variables_from_state_dict(state)


def test_a_truncated_file_is_refused(weights, tmp_path):
    path = tmp_path / "short.pth"
    path.write_bytes(weights.read_bytes()[:50_000_000])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match="expected"):
        inception.load(path)
    with pytest.raises(WeightsError, match=r"damaged|refused"):
        inception.load(path, accept_sha256=digest)


def test_unknown_taps_and_protocols_are_refused(extractor):
    images = random_inception.images(32)
    with pytest.raises(ValueError, match="unknown taps 1024; known are 64, 192"):
        extractor(images, ("1024",))
    with pytest.raises(ValueError, match="protocol"):
        inception.FeatureExtractor(extractor.variables, "cubic", "")(images)
    with pytest.raises(ValueError, match=r"expected uint8 images.*float32"):
        extractor(images.astype(np.float32))


def test_what_the_reader_returns_is_what_was_written(weights):
    found = torch_file.read_state_dict(weights)
    for name, value in random_inception.state_dict().items():
        np.testing.assert_array_equal(found[name], value)
