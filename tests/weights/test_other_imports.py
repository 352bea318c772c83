"""State dicts of guided-diffusion (outputs of the reference) and msgpack of progressive distillation."""

import json
import math
import pathlib

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_zip
from drawn_tensors import drawn

from diffdistill.models.unet import UNet
from diffdistill.weights import WeightsError
from diffdistill.weights.imported import parameter_shapes
from diffdistill.weights.sources import import_weights

GUIDED, P2 = (np.load(pathlib.Path(__file__).with_name(f"golden_{name}.npz")) for name in ("guided_diffusion", "p2"))


def guided_tensors(golden=GUIDED) -> dict[str, np.ndarray]:
    return {name: drawn(name, tuple(shape)) for name, shape in json.loads(str(golden["shapes"])).items()}


def test_guided_diffusion_is_the_reference(tmp_path):
    imported = import_weights("guided-diffusion", torch_zip.write(tmp_path / "64x64.pt", guided_tensors()))
    assert imported.prediction == "iddpm"
    assert imported.image_shape == (16, 16, 3)
    assert imported.num_classes == 3
    assert imported.model["multipliers"] == (1, 2)
    assert imported.model["attention_resolutions"] == (8,)
    times = jnp.asarray([3.0, 700.0])
    with jax.default_matmul_precision("highest"):
        output = jax.jit(imported.network.apply)({"params": imported.params}, GUIDED["x"], times, jnp.asarray([2, 0]))
    np.testing.assert_allclose(output, GUIDED["raw"], atol=2e-5)
    assert imported.model["learned_variance"]
    assert (imported.sigma_min, imported.sigma_max) == pytest.approx((0.00642541, 20291.17), rel=1e-5)


def test_the_layout_of_p2_is_the_reference(tmp_path):
    """The linear schedule, the variance in the outputs, and queries, keys and values ordered by heads."""
    path = torch_zip.write(tmp_path / "ffhq_p2.pt", guided_tensors(P2))
    imported = import_weights("guided-diffusion", path, prediction="ddpm")
    assert (imported.image_shape, imported.num_classes) == ((16, 16, 3), 0)
    assert imported.model["learned_variance"]
    assert imported.model["blocks_per_level"] == 1
    with jax.default_matmul_precision("highest"):
        output = jax.jit(imported.network.apply)({"params": imported.params}, P2["x"], jnp.asarray([3.0, 700.0]))
    np.testing.assert_allclose(output, P2["raw"], atol=2e-5)
    # The noise and log-SNR of spec 05: index 999 of the linear table.
    assert -2 * np.log(imported.sigma_max) == pytest.approx(-10.1177, abs=1e-4)
    with pytest.raises(WeightsError, match="'v' is none of guided-diffusion's: iddpm, ddpm"):
        import_weights("guided-diffusion", path, prediction="v")


def _only_block(*numbers):
    """Leaves of the tensors only some that double the resolution, by their names."""

    def change(tensors):
        tensors.clear()
        tensors.update({f"output_blocks.{number}.1.in_layers.0.bias": np.zeros(1) for number in numbers})

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda t: t.pop("output_blocks.1.0.in_layers.2.bias"),
            {},
            "lacks the tensor output_blocks.1.0.in_layers.2.bias",
        ),
        (
            lambda t: t.update({"middle_block.1.norm.bias": np.zeros(3)}),
            {},
            r"middle_block.1.norm.bias has shape \(3,\)",
        ),
        (lambda t: t.update({"alien.weight": np.zeros(3)}), {}, r"has the tensor alien.weight \(3,\)"),
        (lambda t: t.update({"input_blocks.4.1.qkv.weight": np.zeros((9, 256, 1))}), {}, "3 x 256 rows are needed"),
        (lambda t: t.update({"out.2.weight": np.zeros((5, 128, 3, 3))}), {}, "puts out 5 channels for images of 3"),
        (lambda t: t.clear(), {}, "other means than residual blocks"),
        (lambda t: t.update({"label_emb.weight": np.zeros((0, 4))}), {}, r"label_emb.weight has shape \(0, 4\), which"),
        (_only_block(10**11), {}, "has 2 levels of 100000000000 blocks; expected 1 to 12 levels of 1 to 8"),
        (_only_block(*range(1, 63)), {}, "has 63 levels of 1 blocks; expected 1 to 12"),
    ],
)
def test_a_mismatch_in_a_state_dict_is_named(tmp_path, change, options, message):
    tensors = guided_tensors()
    change(tensors)
    path = torch_zip.write(tmp_path / "64x64.pt", tensors)
    with pytest.raises(WeightsError, match=message):
        import_weights("guided-diffusion", path, **options)


HEADS = {
    "one head": {"num_heads": 1, "multipliers": (1, 1), "attention_resolutions": (8,)},
    "heads of 8": {"head_dim": 8, "multipliers": (1, 2), "attention_resolutions": (16, 8)},
}


def released(network: UNet, size: int) -> tuple[dict[str, np.ndarray], dict]:
    """Drawn parameters of `network` by our names, and the same as the release spells and shapes them."""
    ours, theirs = {}, {}
    for name, shape in parameter_shapes(network, (size, size, 3)).items():
        ours[name] = value = drawn(name, shape)
        module, layer = name.split("/")[:2]
        if "attn" in module and layer != "norm":
            heads = value.shape[-1] // network.head_dim if network.head_dim else 1
            if layer != "proj_out":
                value = value.reshape(*value.shape[:-1], heads, -1)
            elif value.ndim == 2:
                value = value.reshape(heads, -1, value.shape[-1])
        if "norm" in name:
            value = value.reshape(1, 1, 1, -1)  # as flax had it in 2022
        theirs["/".join([module.replace("_block", ".block").replace("_attn", ".attn"), *name.split("/")[1:]])] = value
    tree = flax.traverse_util.unflatten_dict(
        {name.replace("_downsample", ".downsample").replace("_upsample", ".upsample"): v for name, v in theirs.items()},
        sep="/",
    )
    return ours, tree


def write_state(path: pathlib.Path, tree: dict) -> pathlib.Path:
    state = {"step": 3, "optimizer": {"target": {"a": np.zeros(2)}}, "ema_params": tree, "num_sample_steps": 8}
    path.write_bytes(flax.serialization.to_bytes(state))
    return path


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("classes", [0, 4])
def test_progressive_networks_come_over_unchanged(tmp_path, kind, classes):
    network = UNet(
        channels=16,
        embedding=24,
        output_channels=6 if classes else 3,
        blocks_per_level=2,
        num_classes=classes,
        **HEADS[kind],
    )
    ours, tree = released(network, 16)
    assert "down_0.block_1" in tree
    imported = import_weights("progressive", write_state(tmp_path / "checkpoint_3", tree))
    assert imported.network == network
    assert (imported.image_shape, imported.num_classes, imported.num_steps) == ((16, 16, 3), classes, 8)
    assert imported.prediction == ("both" if classes else "x")
    flat = flax.traverse_util.flatten_dict(imported.params, sep="/")
    assert set(flat) == set(ours)
    for name, value in ours.items():
        np.testing.assert_array_equal(flat[name], value)


def test_what_a_progressive_network_predicts_can_be_said(tmp_path):
    _, tree = released(UNet(16, (1, 1), 24, 3, 1, num_heads=1), 16)
    path = write_state(tmp_path / "checkpoint_3", tree)
    assert import_weights("progressive", path, prediction="v").prediction == "v"
    with pytest.raises(WeightsError, match="3 channels for images of 3, which is not 'both'"):
        import_weights("progressive", path, prediction="both")


def test_a_mismatch_in_a_training_state_is_named(tmp_path):
    network = UNet(16, (1, 1), 24, 3, 1, num_heads=1)
    path = tmp_path / "checkpoint_3"
    for change, message in (
        (lambda tree: tree["mid.block_1"].pop("conv2"), r"lacks the tensor mid_block_1/conv2/bias"),
        (lambda tree: tree["dense1"].update(bias=np.zeros(3)), r"dense1/bias has shape \(3,\)"),
        (
            lambda tree: tree.update({"down_0.downsample": {"kernel": np.zeros(3)}}),
            "lacks the tensor down_0_downsample",
        ),
        (
            lambda tree: tree["conv_in"].update(kernel=np.zeros((0, 3, 3, 0))),
            r"kernel has shape \(0, 3, 3, 0\)",
        ),
        (
            lambda tree: tree.update({f"down_{n}.block_0": tree["down_0.block_0"] for n in range(63)}),
            "has 63 levels of 1 blocks",
        ),
        (lambda tree: tree.update({"alien": {"kernel": np.zeros(3)}}), r"has the tensor alien/kernel \(3,\)"),
    ):
        _, tree = released(network, 16)
        change(tree)
        with pytest.raises(WeightsError, match=message):
            import_weights("progressive", write_state(path, tree))
    path.write_bytes(flax.serialization.to_bytes({"ema_params": tree, "num_sample_steps": math.inf}))
    with pytest.raises(WeightsError, match=r"is not a network of progressive \(OverflowError"):
        import_weights("progressive", path)
    path.write_bytes(b"\xc1nothing")
    with pytest.raises(WeightsError, match="damaged"):
        import_weights("progressive", path)
    path.write_bytes(flax.serialization.to_bytes({"weights": 1}))
    with pytest.raises(WeightsError, match="no entry 'ema_params', only weights"):
        import_weights("progressive", path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_training_state_of_a_million_empty_dicts_is_refused(tmp_path, inside):
    """Each is a single byte; inside: those of one array are."""
    lists = b"\x93" + (b"\xdc\xff\xff" + b"\x80" * 0xFFFF) * 3
    content = b"\xc9" + len(lists).to_bytes(4, "big") + b"\x01" + lists if inside else lists
    path = tmp_path / "checkpoint_3"
    path.write_bytes(b"\x81\xaaema_params" + content)
    with pytest.raises(WeightsError, match="holds more than 131072 dicts and lists"):
        import_weights("progressive", path)
