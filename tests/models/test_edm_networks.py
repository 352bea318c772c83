"""DDPM++, NCSN++ and EDM's ADM: published sizes, start, conditioning, precision, remat, resampling, errors.

That they compute what the reference computes is tested where its weights are imported (tests/weights).
"""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_parameters import random_parameters

from diffdistill.diffusion import parameterisation
from diffdistill.models import architectures, initialisers, resampling, song_unet
from diffdistill.models.denoiser import Condition, Denoiser, guided
from diffdistill.models.edm_adm import EdmADM
from diffdistill.models.song_unet import SongUNet

CLASSES = 3
COMMON = {"output_channels": 3, "num_heads": 1, "head_dim": 0}
TINY = {**COMMON, "channels": 8, "multipliers": (2,), "embedding": 16, "blocks_per_level": 1, "num_classes": CLASSES}
tiny = functools.partial(architectures.build, **TINY, attention_resolutions=(4,), augmentation_features=9)
NAMES = ["ddpmpp", "ncsnpp", "edm_adm"]


def arguments(network, size: int = 2, side: int = 4) -> tuple:
    """Images, times, labels, guidance weights and augmentation that `network` takes."""
    return (
        jax.random.normal(jax.random.key(1), (size, side, side, 3)),
        jnp.linspace(-1.0, 1.0, size),
        jnp.arange(size) % network.num_classes if network.num_classes else None,
        jnp.linspace(0.0, 4.0, size) if network.guidance_embedding != "none" else None,
        jax.random.normal(jax.random.key(2), (size, 9)) if network.augmentation_features else None,
    )


@functools.cache
def trained(network):
    return random_parameters(jax.eval_shape(network.init, jax.random.key(0), *arguments(network)))


@functools.cache
def fresh(network):
    return jax.jit(network.init)(jax.random.key(0), *arguments(network))


@functools.cache
def applied(network):
    return jax.jit(network.apply)


@pytest.mark.parametrize(
    ("name", "settings", "side", "expected"),
    [
        ("ddpmpp", {"multipliers": (2, 2, 2), "num_classes": 10}, 32, 55_735_299),
        ("ddpmpp", {"multipliers": (2, 2, 2)}, 32, 55_733_891),
        ("ncsnpp", {"multipliers": (2, 2, 2), "num_classes": 10}, 32, 56_400_643),
        ("ncsnpp", {"multipliers": (2, 2, 2)}, 32, 56_397_827),
        ("ddpmpp", {"multipliers": (1, 2, 2, 2)}, 64, 61_805_571),
        ("ncsnpp", {"multipliers": (1, 2, 2, 2)}, 64, 62_761_091),
        ("edm_adm", {"multipliers": (1, 2, 3, 4), "num_classes": 1000}, 64, 295_899_267),
    ],
)
def test_published_sizes(name, settings, side, expected):
    if name == "edm_adm":
        sizes = {"channels": 192, "embedding": 768, "blocks_per_level": 3, "attention_resolutions": (32, 16, 8)}
        network = architectures.build(name, **COMMON | {"head_dim": 64}, **sizes, **settings)
    else:
        sizes = {"channels": 128, "embedding": 512, "blocks_per_level": 4, "attention_resolutions": (16,)}
        network = architectures.build(name, **COMMON, **sizes, **settings, augmentation_features=9)
    image_shape = (side, side, 3)
    denoiser = Denoiser(network, parameterisation.get("edm"), network.num_classes, image_shape)
    assert denoiser.num_parameters() == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_network_is_near_zero(name):
    network = tiny(name, guidance_embedding="mapped")
    params = fresh(network)
    output = applied(network)(params, *arguments(network))
    assert output.dtype == jnp.float32
    assert np.max(np.abs(output)) < 1e-3
    assert np.std(applied(network)(trained(network), *arguments(network))) > 0.1
    kernels = flax.traverse_util.flatten_dict(params["params"], sep="/")
    # Uniform: variance bound^2 / 3. The bound is 1/sqrt(fan_in) in ADM, whose first convolution is as wide as its first
    # level, and sqrt(6 / (fan_in + fan_out)) in the others.
    block = kernels["down_0_block_0/conv1/kernel"]
    bound = 1 / math.sqrt(9 * 16) if name == "edm_adm" else math.sqrt(6 / (9 * 8 + 9 * 16))
    assert np.max(np.abs(block)) <= bound
    assert np.std(block) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert np.any(kernels["down_0_block_0/conv1/bias"]) == (name == "edm_adm")
    if name != "edm_adm":
        query_bound = math.sqrt(0.2) * math.sqrt(6 / (16 + 48))
        assert 0.9 * query_bound < np.max(np.abs(kernels["mid_attn_1/q/kernel"])) <= query_bound


@pytest.mark.parametrize("name", NAMES)
def test_null_class_and_missing_augmentation_are_zeros(name):
    network = tiny(name)
    x, time, label, _, augmentation = arguments(network)
    params, apply = trained(network), applied(network)
    flat = flax.traverse_util.flatten_dict(params)
    silent = {**flat, ("params", "class_emb", "kernel"): jnp.zeros_like(flat[("params", "class_emb", "kernel")])}
    silent = flax.traverse_util.unflatten_dict(silent)
    null = apply(params, x, time, jnp.full_like(label, CLASSES), None, augmentation)
    np.testing.assert_array_equal(null, apply(silent, x, time, label, None, augmentation))
    assert np.max(np.abs(null - apply(params, x, time, label, None, augmentation))) > 1e-3
    as_it_is = apply(params, x, time, label, None, jnp.zeros_like(augmentation))
    np.testing.assert_allclose(apply(params, x, time, label), as_it_is, atol=1e-6)
    assert np.max(np.abs(as_it_is - apply(params, x, time, label, None, augmentation))) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_guidance_branch_is_silent_at_first(name):
    without, with_branch = tiny(name), tiny(name, guidance_embedding="mapped")
    x, time, label, w, augmentation = arguments(with_branch)
    params = trained(without)["params"]
    branch = {module: values for module, values in fresh(with_branch)["params"].items() if module not in params}
    assert set(branch) == {"guidance_dense0", "guidance_dense1"}
    guided_output = applied(with_branch)({"params": {**params, **branch}}, x, time, label, w, augmentation)
    plain = applied(without)({"params": params}, x, time, label, None, augmentation)
    np.testing.assert_allclose(guided_output, plain, atol=1e-6)
    awake = {"params": {**params, **{module: trained(with_branch)["params"][module] for module in branch}}}
    assert np.max(np.abs(applied(with_branch)(awake, x, time, label, w, augmentation) - plain)) > 1e-3


@pytest.mark.parametrize("name", ["ncsnpp", "edm_adm"])
def test_bfloat16_and_remat_keep_parameters_and_agree(name):
    network = tiny(name, multipliers=(1, 2))
    params = trained(network)
    expected = applied(network)(params, *arguments(network))
    for change, low, high in (({"dtype": jnp.bfloat16}, 0, 0.03), ({"remat": True}, -1, 1e-5)):
        other = network.clone(**change)
        shapes = jax.eval_shape(other.init, jax.random.key(0), *arguments(network))
        assert shapes == jax.eval_shape(network.init, jax.random.key(0), *arguments(network))
        output = applied(other)(params, *arguments(network))
        assert output.dtype == jnp.float32
        assert low < np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2)) < high


def test_attention_stands_where_each_family_has_it():
    settings = {"channels": 8, "multipliers": (1, 1), "embedding": 16, "blocks_per_level": 2, "num_classes": 0}
    for name, expected in (
        ("ddpmpp", {"down_1_attn_0", "down_1_attn_1", "mid_attn_1", "up_1_attn_2"}),
        ("edm_adm", {"down_1_attn_0", "down_1_attn_1", "mid_attn_1", "up_1_attn_0", "up_1_attn_1", "up_1_attn_2"}),
    ):
        network = architectures.build(name, **COMMON, **settings, attention_resolutions=(2,))
        shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments(network))["params"]
        assert {module for module in shapes if "attn" in module} == expected


def test_frequencies_of_ncsnpp_are_constants():
    assert song_unet.fourier_frequencies(3) == pytest.approx((2.01168, -2.11368, 10.2468), rel=1e-4)
    network = tiny("ncsnpp")
    assert not any("freq" in module for module in trained(network)["params"])
    own = network.clone(noise_frequencies=song_unet.fourier_frequencies(8))
    np.testing.assert_array_equal(
        applied(own)(trained(network), *arguments(network)), applied(network)(trained(network), *arguments(network))
    )
    other = network.clone(noise_frequencies=(1.0,) * 8)
    assert np.any(
        applied(other)(trained(network), *arguments(network)) != applied(own)(trained(network), *arguments(network))
    )


def test_augmentation_goes_through_the_denoiser_to_both_branches_of_guidance():
    network = tiny("ddpmpp")
    denoiser = Denoiser(network, parameterisation.get("edm"), CLASSES, (4, 4, 3))
    params, (z, _, label, _, augmentation) = trained(network)["params"], arguments(network)
    with_it = Condition(label=label, augmentation=augmentation)
    x_hat = jax.jit(denoiser)(params, z, 0.0, with_it)
    assert np.max(np.abs(x_hat - jax.jit(denoiser)(params, z, 0.0, Condition(label=label)))) > 1e-3
    unguided = Condition(label=label, augmentation=augmentation, guidance=0.0)
    np.testing.assert_allclose(jax.jit(guided(denoiser))(params, z, 0.0, unguided), x_hat, atol=1e-5)
    plain = Denoiser(network.clone(augmentation_features=0), parameterisation.get("edm"), CLASSES, (4, 4, 3))
    with pytest.raises(ValueError, match="takes no augmentation"):
        plain(params, z, 0.0, with_it)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 5, 2, 1)])
def test_filters_agree_with_their_definition(taps):
    x = np.random.default_rng(0).standard_normal((1, 6, 8, 2)).astype(np.float32)
    weights, pad = np.asarray(taps) / sum(taps), len(taps) // 2 - 1
    kernel = jnp.asarray(np.outer(weights, weights), jnp.float32)[:, :, None, None] * jnp.ones((1, 1, 1, 2))
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    down = convolve(x, kernel, (2, 2), [(pad, pad)] * 2)
    up = convolve(x, 4 * kernel, (1, 1), [(len(taps) - 1 - pad,) * 2] * 2, lhs_dilation=(2, 2))
    for how, expected in (("down", down), ("up", up), ("none", x)):
        np.testing.assert_allclose(resampling.resample(jnp.asarray(x), how, taps), expected, atol=1e-6)
    np.testing.assert_allclose(resampling.fir_downsample(jnp.asarray(x), taps), down, atol=1e-6)
    assert resampling.resample(jnp.asarray(x, jnp.bfloat16), "up", taps).dtype == jnp.bfloat16


def test_the_filter_brings_its_own_margin_after_a_convolution():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 6, 1)), jnp.float32)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    np.testing.assert_allclose(
        resampling.fir_downsample(padded, (1, 3, 3, 1), pad=False),
        resampling.fir_downsample(x, (1, 3, 3, 1)),
        atol=1e-6,
    )


def test_xavier_bounds_count_the_kernels_of_a_layer():
    draw = initialisers.xavier_uniform(2.0, side_by_side=3)(jax.random.key(0), (3, 3, 5, 100), jnp.float32)
    bound = 2 * math.sqrt(6 / (9 * 5 + 9 * 300))
    assert 0.99 * bound < float(jnp.max(jnp.abs(draw))) <= bound


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (tiny("ddpmpp"), {"label": None}, "needs a label"),
        (tiny("edm_adm"), {"label": None}, "needs a label"),
        (tiny("ncsnpp"), {"augmentation": (2, 6)}, r"augmentation must be \(2, 9\)"),
        (tiny("edm_adm").clone(augmentation_features=0), {"augmentation": (2, 9)}, "takes no augmentation parameters"),
        (tiny("ncsnpp").clone(noise_frequencies=(1.0,)), {}, "has 1 entries"),
        (tiny("ddpmpp").clone(encoder="both"), {}, "choose one of standard, residual, skip"),
        (tiny("ddpmpp").clone(decoder="residual"), {}, "choose one of standard, skip"),
        (tiny("ddpmpp").clone(noise_embedding="none"), {}, "choose one of positional, fourier"),
        (tiny("ncsnpp", multipliers=(1, 1)).clone(resample_filter=(1, 2, 1)), {}, "an even number of symmetric taps"),
    ],
)
def test_misfits_are_refused(network, change, message):
    x, time, label, w, augmentation = arguments(network)
    label = change.get("label", label)
    augmentation = jnp.zeros(change["augmentation"]) if "augmentation" in change else augmentation
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), x, time, label, w, augmentation)


def test_names_build_networks():
    assert isinstance(tiny("ddpmpp"), SongUNet)
    assert isinstance(tiny("edm_adm"), EdmADM)
    assert tiny("ddpmpp").encoder == "standard"
    assert (tiny("ncsnpp").encoder, tiny("ncsnpp").noise_features) == ("residual", 16)
    assert tiny("ncsnpp", encoder="skip", decoder="skip").decoder == "skip"
    with pytest.raises(ValueError, match="choose one of unet, ddpmpp, ncsnpp, edm_adm"):
        tiny("ddpm++")
    with pytest.raises(ValueError, match="augmentation_features=9 is no setting of architecture 'unet'"):
        tiny("unet")
    with pytest.raises(ValueError, match="encoder='skip' is no setting of architecture 'edm_adm'"):
        tiny("edm_adm", encoder="skip")
