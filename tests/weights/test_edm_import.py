"""Pickles in the form of NVlabs/edm: the reference implementation's outputs, recognition, and refusal of code."""

import builtins
import functools
import json
import os
import pathlib
import pickle

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import persistent_pickle
import pytest
from drawn_tensors import drawn

from diffdistill import chain
from diffdistill.config import resolve
from diffdistill.diffusion import parameterisation, schedules
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.samplers import heun
from diffdistill.weights import WeightsError
from diffdistill.weights.sources import import_weights

GOLDEN = np.load(pathlib.Path(__file__).with_name("golden_edm_networks.npz"))
VARIANTS = sorted({name.partition("/")[0] for name in GOLDEN})
TAPS = {2: np.asarray([1, 1]), 4: np.asarray([1, 3, 3, 1])}


def tensors_of(facts: dict) -> dict[str, np.ndarray]:
    """Every tensor of the reference network: weights drawn, filters as they are."""
    found = {}
    for name, shape in facts["shapes"].items():
        taps = TAPS.get(shape[-1] if shape else 0)
        constant = name.endswith("resample_filter")
        found[name] = np.float32(np.outer(taps, taps) / taps.sum() ** 2)[None, None] if constant else drawn(name, shape)
    return found


def content_of(facts: dict, tensors: dict[str, np.ndarray]):
    """What the reference pickles, for `persistent_pickle.stand_ins`."""
    attributes = {
        path: {"num_heads": heads, "out_channels": width, "dropout": dropout}
        for path, (heads, width, dropout) in facts["blocks"].items()
    }
    model = persistent_pickle.module(facts["model"], tensors, attributes)
    state = {"_parameters": {}, "_buffers": {}, "_modules": {"model": model}, **facts["attributes"]}
    ema = persistent_pickle.persistent(facts["class"], **state)
    return {
        "ema": ema,
        "loss_fn": persistent_pickle.persistent("EDMLoss", P_mean=-1.2),
        "dataset_kwargs": {"path": "x"},
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a pickle of a variant, after `change(facts, tensors)`, and returns its path."""

    def written(variant: str, change=lambda facts, tensors: None) -> pathlib.Path:
        persistent_pickle.stand_ins(monkeypatch)
        facts = json.loads(str(GOLDEN[f"{variant}/facts"]))
        tensors = tensors_of(facts)
        change(facts, tensors)
        path = tmp_path / "network-snapshot.pkl"
        path.write_bytes(pickle.dumps(content_of(facts, tensors)))
        monkeypatch.undo()
        return path

    return written


def argument(variant: str, name: str) -> jax.Array | None:
    return jnp.asarray(GOLDEN[f"{variant}/{name}"]) if f"{variant}/{name}" in GOLDEN else None


@pytest.mark.parametrize("variant", VARIANTS)
def test_raw_output_is_that_of_the_reference(write, variant):
    imported = import_weights("edm", write(variant))
    label = jnp.asarray([2, 0]) if imported.num_classes else None
    time = jnp.asarray([-0.6, 0.9])
    with jax.default_matmul_precision("highest"):
        output = jax.jit(imported.network.apply)(
            {"params": imported.params}, argument(variant, "x"), time, label, None, argument(variant, "augmentation")
        )
    assert output.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(output, GOLDEN[f"{variant}/raw"][..., :3], atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "prediction", "sigma_min", "sigma_max"),
    [
        ("ddpmpp-64px", "edm", 0.0, np.inf),
        ("ddpmpp-uncond", "vp", 0.001, 152.167),
        ("ncsnpp-cond", "ve", 0.02, 100.0),
        ("adm-iddpm", "iddpm", 0.00642, 20291.17),
    ],
)
def test_denoiser_is_that_of_the_reference(write, variant, prediction, sigma_min, sigma_max):
    imported = import_weights("edm", write(variant))
    assert imported.prediction == prediction
    np.testing.assert_allclose([imported.sigma_min, imported.sigma_max], [sigma_min, sigma_max], rtol=0.03)
    output = parameterisation.get(imported.prediction, **imported.prediction_settings)
    denoiser = Denoiser(imported.network, output, imported.num_classes, imported.image_shape)
    sigma = jnp.asarray([0.1, 2.0])
    z = GOLDEN[f"{variant}/x"] / jnp.sqrt(1 + sigma**2)[:, None, None, None]
    condition = Condition(label=jnp.asarray([2, 0]) if imported.num_classes else None)
    with jax.default_matmul_precision("highest"):
        x_hat = jax.jit(denoiser)(imported.params, z, -2 * jnp.log(sigma), condition)
    np.testing.assert_allclose(x_hat, GOLDEN[f"{variant}/denoised"], atol=1e-4)


def test_heun_gives_the_images_of_the_reference(write):
    imported = import_weights("edm", write("ddpmpp-cond"))
    denoiser = Denoiser(imported.network, parameterisation.get("edm"), imported.num_classes, imported.image_shape)
    condition = Condition(label=jnp.asarray([2, 0]))

    def run(params, z):
        denoise = functools.partial(denoiser, params, condition=condition)
        return heun.sample(denoise, z, schedules.get("edm"), 18, clip=False)

    with jax.default_matmul_precision("highest"):
        images = jax.jit(run)(imported.params, jnp.asarray(GOLDEN["ddpmpp-cond/x"]))
    np.testing.assert_allclose(images, GOLDEN["ddpmpp-cond/sampled"], atol=1e-3)


def test_network_is_recognised_from_the_tensors(write):
    imported = import_weights("edm", write("ncsnpp-cond"))
    frequencies = imported.model.pop("noise_frequencies")
    np.testing.assert_array_equal(np.float32(frequencies), drawn("map_noise.freqs", (8,)))
    assert imported.model == {
        "architecture": "ncsnpp",
        "channels": 8,
        "multipliers": (2, 2),
        "embedding": 32,
        "blocks_per_level": 1,
        "attention_resolutions": (4,),
        "num_groups": 32,
        "augmentation_features": 9,
        "num_heads": 1,
        "head_dim": 0,
        "encoder": "residual",
        "decoder": "standard",
        "noise_features": 16,
    }
    assert imported.num_classes == 3
    assert imported.dropout == pytest.approx(0.1)
    assert len(imported.sha256) == 64
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(imported.params))


def test_every_weight_finds_its_place_once(write):
    imported = import_weights("edm", write("adm"))
    shapes = json.loads(str(GOLDEN["adm/facts"]))["shapes"]
    expected = sum(int(np.prod(shape)) for name, shape in shapes.items() if "resample_filter" not in name)
    assert sum(leaf.size for leaf in jax.tree.leaves(imported.params)) == expected
    kernels = flax.traverse_util.flatten_dict(imported.params, sep="/")
    np.testing.assert_array_equal(
        kernels["conv_in/kernel"], drawn("enc.8x8_conv.weight", (64, 3, 3, 3)).transpose(2, 3, 1, 0)
    )


def _drop(name):
    return lambda facts, tensors: tensors.pop(name)


def _add(name, shape=(2, 2)):
    return lambda facts, tensors: tensors.update({name: np.zeros(shape, np.float32)})


def _set(name, value):
    return lambda facts, tensors: facts["attributes"].update({name: value})


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("ddpmpp-cond", _drop("dec.8x8_block1.conv0.weight"), r"lacks the tensor dec.8x8_block1.conv0.weight"),
        ("ddpmpp-cond", _add("dec.8x8_block1.extra.weight"), r"has the tensor dec.8x8_block1.extra.weight \(2, 2\)"),
        ("ddpmpp-cond", _add("enc.8x8_block0.conv0.bias", (7,)), r"enc.8x8_block0.conv0.bias has shape \(7,\)"),
        ("ddpmpp-cond", _add("enc.4x4_block0.qkv.weight", (6, 4, 1, 1)), r"enc.4x4_block0.qkv.weight has shape"),
        ("ddpmpp-cond", _add("enc.4x4_down.conv0.resample_filter", (1, 1, 2, 2)), "is not the filter"),
        ("ddpmpp-cond", _set("sigma_data", None), "sigma_data=None"),
        ("ddpmpp-cond", _set("sigma_min", 10**400), r"is not a network of edm \(OverflowError"),
        ("ddpmpp-cond", _set("sigma_min", ((), ())), "sigma_min=a tuple, which was not expected"),
        (
            "ddpmpp-cond",
            _add("dec.8x8_block1.conv0.weight", (0, 3)),
            r"has shape \(0, 3\), which holds no",
        ),
        ("ddpmpp-cond", _set("label_dim", 4), r"map_label.weight has shape \(8, 3\)"),
        ("ddpmpp-uncond", _set("beta_d", 12.0), "beta_d=12.0, but only 19.9"),
        ("ncsnpp-cond", _set("sigma_min", 0), "noise levels from 0.0 to 100.0, expected two positive"),
        (
            "ddpmpp-cond",
            lambda facts, tensors: facts.update({"class": "Net"}),
            "is a 'Net', expected one of EDMPrecond",
        ),
        ("ddpmpp-cond", lambda facts, tensors: tensors.clear(), "has no submodule|without an encoder"),
    ],
)
def test_a_mismatch_is_refused_and_named(write, variant, change, message):
    with pytest.raises(WeightsError, match=message):
        import_weights("edm", write(variant, change))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    """A class of our own, which a file must not be able to make."""


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (lambda mark: Evil(os.system, f"touch {mark}"), r"(posix|nt)\.system"),
        (lambda mark: Evil(builtins.eval, f"open({str(mark)!r}, 'w')"), r"builtins\.eval"),
        (lambda mark: Evil(builtins.exec, f"open({str(mark)!r}, 'w')"), r"builtins\.exec"),
        (lambda mark: Evil(os.mkdir, str(mark)), r"(posix|nt)\.mkdir"),
        (lambda mark: Plain(), r"test_edm_import\.Plain"),
    ],
)
@pytest.mark.parametrize("place", ["alone", "beside", "in a storage"])
def test_code_is_refused_before_anything_runs(tmp_path, monkeypatch, evil, name, place):
    mark = tmp_path / "mark"
    content = evil(mark)
    if place == "beside":
        content = {"ema": None, "loss_fn": content}
    if place == "in a storage":
        persistent_pickle.stand_ins(monkeypatch)
        load = persistent_pickle._name("torch.storage", "_load_from_bytes")
        content = {"ema": persistent_pickle.Call(load, pickle.dumps(content))}
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(content))
    monkeypatch.undo()
    with pytest.raises(WeightsError, match=name):
        import_weights("edm", path)
    assert not mark.exists()


def test_a_block_of_numbers_is_not_read_a_million_times(tmp_path, monkeypatch):
    persistent_pickle.stand_ins(monkeypatch)
    content = persistent_pickle.storage_bytes(np.zeros(1 << 18, np.float32))
    load = persistent_pickle._name("torch.storage", "_load_from_bytes")
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps({"ema": [persistent_pickle.Call(load, content) for _ in range(1000)]}))
    monkeypatch.undo()
    assert path.stat().st_size < 1 << 21
    with pytest.raises(WeightsError, match="repeats a part of itself so often"):
        import_weights("edm", path)


@pytest.mark.parametrize("field", ["class_name", "_parameters"])
def test_a_record_of_deep_tuples_is_refused(tmp_path, monkeypatch, field):
    """(t, t) of (t, t) of ...: 2^60 tuples to its hash and to its text."""
    persistent_pickle.stand_ins(monkeypatch)
    deep = ()
    for _ in range(60):
        deep = (deep, deep)
    module = persistent_pickle.persistent("Net", _parameters=[(deep, 1)])
    state = {"sigma_min": 0, "sigma_max": 1, "img_resolution": 8, "img_channels": 3, "_modules": {"model": module}}
    ema = persistent_pickle.persistent(deep if field == "class_name" else "EDMPrecond", **state)
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps({"ema": ema}))
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="'ema' is a ''" if field == "class_name" else "without an encoder"):
        import_weights("edm", path)


def test_source_inside_the_file_stays_text(write):
    # persistent_pickle.SOURCE raises when it is executed.
    assert import_weights("edm", write("skip-skip")).model["decoder"] == "skip"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x04not a pickle", "damaged"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"net": 1}), "'ema' is a 'NoneType'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        import_weights("edm", path)


def test_a_truncated_file_is_refused(write):
    path = write("skip-skip")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="damaged or truncated"):
        import_weights("edm", path)


def test_the_source_that_a_file_is_of_is_named(tmp_path, write):
    path = write("skip-skip")
    with pytest.raises(WeightsError, match=r"By its first bytes it is one for --source=edm\.$"):
        import_weights("progressive", path)
    with pytest.raises(WeightsError, match="is an address; download the file first"):
        import_weights("edm", "https://example.org/edm.pkl")
    with pytest.raises(WeightsError, match="files of edm say their image_size themselves"):
        import_weights("edm", path, image_size=32)


def test_weights_that_are_not_finite_are_refused(write):
    def spoil(facts, tensors):
        tensors["dec.8x8_aux_norm.bias"][0] = np.nan

    with pytest.raises(WeightsError, match=r"dec.8x8_aux_norm.bias holds a NaN"):
        import_weights("edm", write("ddpmpp-cond", spoil))


def test_a_missing_file_and_an_unknown_source_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"none.pkl cannot be read"):
        import_weights("edm", tmp_path / "none.pkl")
    with pytest.raises(WeightsError, match="choose one of edm, guided-diffusion, progressive"):
        import_weights("edn", tmp_path / "none.pkl")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_rebuilds_the_imported_network(write, variant):
    imported = import_weights("edm", write(variant))
    settings = {"prediction": imported.prediction, "conditional": imported.num_classes > 0, **imported.model}
    config = resolve(json.loads(json.dumps({"model": settings, "teacher": {"num_updates": 1}})))
    facts = chain.DataFacts(imported.image_shape, imported.num_classes)
    assert chain.denoiser_of(config, chain.plan(config)[0], facts).network == imported.network
