"""The UNet: published sizes, zero output at the start, conditioning, precision, remat, attention, errors."""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_parameters import random_parameters

from diffdistill.models import initialisers, layers, resampling
from diffdistill.models.unet import UNet

CLASSES = 4
TINY = functools.partial(
    UNet, channels=8, multipliers=(1, 2), embedding=16, output_channels=1, blocks_per_level=1, num_groups=4
)
SMALLEST = functools.partial(TINY, multipliers=(1,))


def arguments(network: UNet, shape: tuple[int, ...] = (3, 4, 4, 1)) -> tuple:
    """Images, times, labels and guidance weights that `network` takes."""
    size = shape[0]
    return (
        jax.random.normal(jax.random.key(1), shape),
        jnp.linspace(10.0, 990.0, size),
        jnp.arange(size) % network.num_classes if network.num_classes else None,
        jnp.linspace(0.0, 4.0, size) if network.guidance_embedding != "none" else None,
    )


@functools.cache
def shapes(network: UNet, shape: tuple[int, ...] = (3, 4, 4, 1)) -> dict:
    return jax.eval_shape(network.init, jax.random.key(0), *arguments(network, shape))


@functools.cache
def trained(network: UNet, shape: tuple[int, ...] = (3, 4, 4, 1)) -> dict:
    return random_parameters(shapes(network, shape))


def parameters_of(network: UNet, resolution: int) -> int:
    a = jax.ShapeDtypeStruct
    inputs = a((1, resolution, resolution, 3), jnp.float32), a((1,), jnp.float32)
    label = a((1,), jnp.int32) if network.num_classes else None
    return sum(
        math.prod(p.shape) for p in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0), *inputs, label))
    )


def test_published_sizes():
    cifar10 = UNet(256, (1, 1, 1), 1024, 3, attention_resolutions=(8, 16), num_heads=1)
    imagenet = UNet(192, (1, 2, 3, 4), 768, 6, attention_resolutions=(8, 16, 32), head_dim=64, num_classes=1000)
    lsun = UNet(64, (1, 2, 4, 6, 8), 768, 6, attention_resolutions=(8, 16, 32), head_dim=64)
    assert parameters_of(cifar10, 32) == 60_004_099  # published: 60.0 M
    assert parameters_of(imagenet, 64) == 295_905_222  # 295.9 M
    assert parameters_of(lsun, 128) == 139_578_502  # 139.6 M


def test_output_is_zero_at_initialisation():
    network = SMALLEST(num_classes=CLASSES, guidance_embedding="mapped")
    params = jax.jit(network.init)(jax.random.key(0), *arguments(network))
    output = jax.jit(network.apply)(params, *arguments(network))
    assert not np.any(output)
    assert np.any(jax.jit(network.apply)(trained(network), *arguments(network)))


def test_any_number_of_channels_and_any_shape_that_can_be_halved():
    network = TINY(channels=6, output_channels=10, attention_resolutions=(4, 2), num_groups=32)
    shape = (2, 4, 8, 5)
    output = jax.jit(network.apply)(trained(network, shape), *arguments(network, shape))
    assert output.shape == (2, 4, 8, 10)
    assert output.dtype == jnp.float32
    assert np.all(np.isfinite(output))


def test_attention_stands_at_the_listed_resolutions_and_in_the_middle():
    blocks = {name for name in shapes(TINY(attention_resolutions=(2,)))["params"] if "attn" in name}
    assert blocks == {"down_1_attn_0", "mid_attn_1", "up_1_attn_0", "up_1_attn_1"}
    assert {name for name in shapes(SMALLEST())["params"] if "attn" in name} == {"mid_attn_1"}


def test_null_class_is_a_one_hot_of_zeros():
    network = SMALLEST(num_classes=CLASSES)
    x, time, label, _ = arguments(network)
    params = trained(network)
    apply = jax.jit(network.apply)
    flat = flax.traverse_util.flatten_dict(params)
    flat[("params", "class_emb", "kernel")] = jnp.zeros_like(flat[("params", "class_emb", "kernel")])
    null = apply(params, x, time, jnp.full_like(label, CLASSES))
    np.testing.assert_array_equal(null, apply(flax.traverse_util.unflatten_dict(flat), x, time, label))
    assert np.all(np.abs(null - apply(params, x, time, label)).max(axis=(1, 2, 3)) > 1e-3)


@pytest.mark.parametrize("embedding", ["mapped", "raw"])
def test_guidance_branch_is_silent_at_first(embedding):
    without, with_branch = SMALLEST(num_classes=CLASSES), SMALLEST(num_classes=CLASSES, guidance_embedding=embedding)
    params = trained(without)["params"]
    x, time, label, w = arguments(with_branch)
    branch = jax.jit(
        lambda key: {k: v for k, v in with_branch.init(key, x, time, label, w)["params"].items() if k not in params}
    )(jax.random.key(0))
    assert set(branch) == {"guidance_dense0", "guidance_dense1"}
    plain = jax.jit(without.apply)({"params": params}, x, time, label)
    apply = jax.jit(with_branch.apply)
    for weight in (w, 100.0 * w):
        np.testing.assert_array_equal(apply({"params": {**params, **branch}}, x, time, label, weight), plain)
    awake = {"params": trained(with_branch)["params"]}
    assert np.all(np.abs(apply(awake, x, time, label, w) - apply(awake, x, time, label, w + 1)).max((1, 2, 3)) > 1e-4)


def test_remat_changes_neither_parameters_nor_values_nor_gradients():
    plain, remat = (SMALLEST(num_classes=CLASSES, dropout=0.5, remat=remat) for remat in (False, True))
    params = trained(plain)
    assert shapes(remat) == shapes(plain)

    def run(network):
        def loss(params):
            output = network.apply(
                params, *arguments(network), deterministic=False, rngs={"dropout": jax.random.key(2)}
            )
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, output), grads = run(plain)
    (_, output_remat), grads_remat = run(remat)
    # To rounding: XLA fuses the two programs differently (bit-equal with jax 0.10, not with 0.12).
    np.testing.assert_allclose(output, output_remat, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), grads, grads_remat)


def test_bfloat16_keeps_parameters_and_output_in_float32_and_agrees():
    plain, half = SMALLEST(num_groups=8), SMALLEST(num_groups=8, dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(shapes(half)))
    x = arguments(plain)
    expected, output = (jax.jit(network.apply)(trained(plain), *x) for network in (plain, half))
    assert output.dtype == jnp.float32
    error = np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 0.03


@pytest.mark.parametrize("rate", [0.0, 0.13, 0.5, 0.9, 1.0])
def test_dropout_keeps_the_mean_and_drops_as_often_as_asked(rate):
    network, x = layers.Dropout(rate), jnp.ones((64, 16, 16, 32), jnp.bfloat16)
    output = network.apply({}, x, False, rngs={"dropout": jax.random.key(1)})
    assert output.dtype == x.dtype
    dropped = np.asarray(output == 0, np.float64)
    deviation = max(np.sqrt(rate * (1 - rate) / x.size), 1e-9)
    assert abs(dropped.mean() - rate) < 4 * deviation
    if rate < 1:
        np.testing.assert_allclose(np.asarray(output, np.float32)[dropped == 0], 1 / (1 - rate), rtol=4e-3)
    for axes in ((0,), (1, 2), (3,)):  # images, pixels, channels: none is dropped more often than the others
        others = tuple(axis for axis in range(4) if axis not in axes)
        shares, count = dropped.mean(others), x.size // np.prod([x.shape[axis] for axis in axes])
        assert np.abs(shares - rate).max() < 5 * max(np.sqrt(rate * (1 - rate) / count), 1e-9)


def test_hashed_bits_look_random():
    shape = (32, 16, 16, 16)
    bits = np.asarray(layers.hashed_bits(jax.random.key(0), shape))
    size = bits.size
    for position in range(32):
        bit = ((bits >> position) & 1) * 2.0 - 1.0
        assert abs(bit.mean()) < 5 / np.sqrt(size), position
        for axis in range(4):  # neighbours, and the same place of the next image
            for lag in (1, 2, 4, 8):
                along = np.roll(bit, lag, axis)
                assert abs((bit * along).mean()) < 5 / np.sqrt(size), (position, axis, lag)
    counts = np.bincount(bits.ravel() >> 24, minlength=256)
    expected = size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)
    other = np.asarray(layers.hashed_bits(jax.random.key(1), shape))
    agreement = (1 - 2.0 * (bits >> 31)) * (1 - 2.0 * (other >> 31))
    assert abs(agreement.mean()) < 5 / np.sqrt(size)
    np.testing.assert_array_equal(bits, layers.hashed_bits(jax.random.key(0), shape))


def test_dropout_acts_only_when_it_is_asked_for():
    network = SMALLEST(dropout=0.5)
    params, x = trained(network), arguments(network)
    noisy = jax.jit(lambda key: network.apply(params, *x, deterministic=False, rngs={"dropout": key}))
    first, again, other = noisy(jax.random.key(0)), noisy(jax.random.key(0)), noisy(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    without = SMALLEST(dropout=0.0).apply
    np.testing.assert_array_equal(jax.jit(network.apply)(params, *x), jax.jit(without)(params, *x))


def test_kernels_have_unit_gain():
    kernel = initialisers.fan_in_normal(jax.random.key(0), (3, 3, 64, 64))
    assert abs(float(jnp.std(kernel)) * math.sqrt(9 * 64) - 1) < 0.01
    assert abs(float(jnp.mean(kernel))) < 1e-3


def test_resampling():
    x = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    up = resampling.upsample(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_array_equal(resampling.downsample(up), x)
    np.testing.assert_allclose(resampling.downsample(x)[0, 0, 0], x[0, :2, :2].mean((0, 1)))


def test_sinusoids():
    value = jnp.asarray([0.0, 1.0, 500.0])
    embedding = layers.sinusoids(value, 7)
    frequencies = np.asarray([1.0, 1e-2, 1e-4])
    expected = np.asarray(value)[:, None] * frequencies
    np.testing.assert_allclose(embedding[:, :3], np.sin(expected), atol=1e-5)
    np.testing.assert_allclose(embedding[:, 3:6], np.cos(expected), atol=1e-5)
    np.testing.assert_array_equal(embedding[:, 6], 0.0)


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (6, 2), (8, 8), (5, 1)])
def test_group_norm_is_accurate_at_a_large_mean(channels, groups):
    rng = np.random.default_rng(0)
    x = (1000.0 + rng.standard_normal((2, 4, 4, channels))).astype(np.float32)
    network = layers.GroupNorm(num_groups=32 if groups == channels and groups > 4 else 4, dtype=jnp.float32)
    scale, bias = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    grouped = x.astype(np.float64).reshape(2, 16, groups, -1)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    output = network.apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(output, expected, atol=2e-3)


def _plain_group_norm(params, x, added, scale, shift):
    """What GroupNorm means, in two passes over each group."""
    x = x + added[:, None, None, :]
    grouped = x.reshape(len(x), -1, 2, x.shape[-1] // 2)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean((1, 3), keepdims=True) + 1e-6)
    normed = normed.reshape(x.shape) * params["scale"] + params["bias"]
    return normed * (1 + scale[:, None, None, :]) + shift[:, None, None, :]


@pytest.mark.parametrize("seed", range(3))
def test_group_norm_with_conditions_and_its_gradients_agree_with_their_definition(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    x = 3.0 + jax.random.normal(next(keys), (2, 4, 6, 8)) * jnp.arange(1.0, 9.0)
    added, scale, shift = jax.random.normal(next(keys), (3, 2, 8))
    params = {name: jax.random.normal(next(keys), (8,)) for name in ("scale", "bias")}
    weights = jax.random.normal(next(keys), x.shape)
    network = layers.GroupNorm(num_groups=2)

    def ours(*arguments):
        params, *rest = arguments
        return (weights * network.apply({"params": params}, *rest)).sum()

    def plain(*arguments):
        return (weights * _plain_group_norm(*arguments)).sum()

    arguments = (params, x, added, scale, shift)
    found = jax.value_and_grad(ours, argnums=(0, 1, 2, 3, 4))(*arguments)
    expected = jax.value_and_grad(plain, argnums=(0, 1, 2, 3, 4))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)


def test_group_norm_of_equal_pixels_is_its_bias():
    network, params = layers.GroupNorm(num_groups=4), {"scale": jnp.full(4, 2.0), "bias": jnp.arange(4.0)}
    x = jnp.full((1, 3, 3, 4), 1e4)
    output, pull = jax.vjp(lambda x: network.apply({"params": params}, x), x)
    np.testing.assert_allclose(output, jnp.broadcast_to(jnp.arange(4.0), x.shape), atol=2e-3)
    assert np.isfinite(pull(jnp.ones_like(output))[0]).all()


def test_attention_agrees_with_its_definition():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
    logits = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, value)
    for implementation in ("auto", "xla"):
        np.testing.assert_allclose(layers.attend(query, key, value, implementation), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "platform", "capability", "permitted"),
    [
        ("bfloat16", 64, "gpu", "8.0", True),
        ("bfloat16", 256, "gpu", "9.0", True),
        ("bfloat16", 256, "gpu", "8.0", False),
        ("bfloat16", 60, "gpu", "9.0", False),
        ("bfloat16", 64, "gpu", "7.5", False),
        ("bfloat16", 64, "tpu", "", False),
        ("bfloat16", 64, "gpu", "gfx90a", False),
        ("float32", 64, "gpu", "9.0", False),
    ],
)
def test_where_the_fused_kernel_is_taken(dtype, head_dim, platform, capability, permitted):
    assert layers.cudnn_permits(jnp.dtype(dtype), head_dim, platform, capability) is permitted


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (TINY(), {"inputs": (3, 5, 4, 1)}, "divisible by 2; got 5x4"),
        (TINY(), {"inputs": (4, 4, 1)}, r"images \(B, H, W, C\)"),
        (TINY(), {"label": 0}, "unconditional"),
        (TINY(num_classes=4), {"label": None}, "needs a label"),
        (TINY(), {"guidance": 0}, "no guidance branch"),
        (TINY(guidance_embedding="mapped"), {"guidance": None}, "needs guidance"),
        (TINY(guidance_embedding="map"), {}, "choose one of none, mapped, raw"),
        (TINY(num_heads=1, head_dim=8), {}, "exclude each other"),
        (TINY(num_heads=3), {}, "cannot be split"),
        (TINY(head_dim=16, attention_resolutions=(4,)), {}, "choose one that divides"),
        (TINY(dtype=jnp.float16), {}, "choose float32 or bfloat16"),
        (TINY(attention="flash"), {}, "choose one of auto, xla, cudnn"),
        (TINY(attention="cudnn"), {}, "Use attention='auto'"),
    ],
)
def test_misfits_are_refused(network, change, message):
    inputs, time, label, guidance = arguments(network)
    inputs = jnp.zeros(change.get("inputs", inputs.shape))
    for name, kind in (("label", jnp.int32), ("guidance", jnp.float32)):
        if name in change:
            given = None if change[name] is None else jnp.zeros(3, kind)
            label, guidance = (given, guidance) if name == "label" else (label, given)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), inputs, time, label, guidance)
