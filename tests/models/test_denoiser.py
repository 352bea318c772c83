"""The Denoiser contract: parameterisation applied, conditions checked, guidance in one call, parameter transfer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_parameters import random_parameters

from diffdistill.diffusion import parameterisation, process
from diffdistill.models.denoiser import Condition, Denoiser, guided, transfer
from diffdistill.models.unet import UNet

CLASSES = 4
SHAPE = (2, 2, 1)
V = parameterisation.get("v")


@functools.cache
def denoiser(output=V, num_classes=CLASSES, image_shape=SHAPE, **settings) -> Denoiser:
    network = UNet(
        channels=8,
        multipliers=(1,),
        embedding=16,
        output_channels=output.output_channels(image_shape[-1]),
        blocks_per_level=1,
        num_classes=num_classes,
        num_groups=4,
        **settings,
    )
    return Denoiser(network, output, num_classes, image_shape)


@functools.cache
def trained(model: Denoiser) -> dict:
    return random_parameters(jax.eval_shape(model.init, jax.random.key(0)))


Z = jax.random.normal(jax.random.key(1), (3, *SHAPE))
LOG_SNR = jnp.asarray([-5.0, 0.0, 3.0])
LABEL = jnp.asarray([0, 1, 3])


def test_a_fresh_denoiser_predicts_what_a_zero_output_means():
    model = denoiser()
    params = model.init(jax.random.key(0))
    x_hat = jax.jit(model)(params, Z, LOG_SNR, Condition(label=LABEL))
    np.testing.assert_allclose(x_hat, process.expand(process.alpha(LOG_SNR), Z) * Z, rtol=1e-6)
    assert model.num_parameters() == sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize("name", list(parameterisation.PARAMETERISATIONS))
def test_every_parameterisation_fits(name):
    output = parameterisation.get(name)
    model = denoiser(output, 0, (2, 2, 3))
    shape = jax.eval_shape(
        model, jax.eval_shape(model.init, jax.random.key(0)), jnp.zeros((5, 2, 2, 3)), 0.0, Condition()
    )
    assert shape.shape == (5, 2, 2, 3)
    assert shape.dtype == jnp.float32


def test_scalars_stand_for_every_image():
    model = denoiser()
    call = jax.jit(model)
    one = call(trained(model), Z, 0.5, Condition(label=2))
    np.testing.assert_array_equal(one, call(trained(model), Z, jnp.full(3, 0.5), Condition(label=jnp.full(3, 2))))


def test_dropout_acts_only_where_a_key_is_given():
    model = denoiser(dropout=0.5)
    condition = Condition(label=LABEL)
    plain = jax.jit(model)(trained(model), Z, LOG_SNR, condition)
    np.testing.assert_array_equal(plain, jax.jit(denoiser())(trained(model), Z, LOG_SNR, condition))
    assert np.any(jax.jit(model)(trained(model), Z, LOG_SNR, condition, dropout_key=jax.random.key(0)) != plain)


def test_guided_is_two_evaluations_in_one():
    model = denoiser()
    params, w = trained(model), jnp.asarray([0.0, 1.0, 4.0])
    call = jax.jit(model)
    conditional = call(params, Z, LOG_SNR, Condition(label=LABEL))
    unconditional = call(params, Z, LOG_SNR, Condition(label=CLASSES))
    expected = (1 + w[:, None, None, None]) * conditional - w[:, None, None, None] * unconditional
    x_hat = jax.jit(guided(model))(params, Z, LOG_SNR, Condition(label=LABEL, guidance=w))
    np.testing.assert_allclose(x_hat, expected, atol=1e-5)
    np.testing.assert_allclose(x_hat[0], conditional[0], atol=1e-6)  # w = 0 is the plain conditional model


def test_a_student_starts_as_the_conditional_teacher_for_every_w():
    teacher, student = denoiser(), denoiser(guidance_embedding="mapped")
    # Under jit, what the transfer replaces is never drawn.
    params = jax.jit(lambda key: transfer(trained(teacher), student.init(key)))(jax.random.key(5))
    expected = jax.jit(teacher)(trained(teacher), Z, LOG_SNR, Condition(label=LABEL))
    x_hat = jax.jit(student)(params, Z, LOG_SNR, Condition(label=LABEL, guidance=jnp.asarray([0.0, 1.0, 4.0])))
    np.testing.assert_array_equal(x_hat, expected)


def test_transfer_names_the_tensor_that_does_not_fit():
    params = trained(denoiser())
    student = trained(denoiser(guidance_embedding="mapped"))
    kernel = {**params, "conv_in": {**params["conv_in"], "kernel": jnp.zeros((3, 3, 2, 8))}}
    with pytest.raises(ValueError, match=r"conv_in/kernel has shape \(3, 3, 2, 8\).*\(3, 3, 1, 8\)"):
        transfer(kernel, student)
    with pytest.raises(ValueError, match=r"guidance_dense0/.*which the new network lacks"):
        transfer(student, params)
    with pytest.raises(ValueError, match=r"conv_out/.*which the source lacks"):
        transfer({name: value for name, value in params.items() if name != "conv_out"}, student)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({}, {"z": jnp.zeros((3, 4, 4, 1))}, r"images of shape \(2, 2, 1\); got z of shape \(3, 4, 4, 1\)"),
        ({}, {"condition": Condition()}, "needs a label"),
        (
            {},
            {"condition": Condition(label=jnp.zeros(2, jnp.int32))},
            r"label must be a scalar or .*\(3,\); got \(2,\)",
        ),
        ({}, {"log_snr": jnp.zeros((3, 1))}, "log_snr must be a scalar"),
        ({}, {"condition": Condition(label=0, guidance=1.0)}, "no guidance branch"),
        ({"guidance_embedding": "raw"}, {"condition": Condition(label=0)}, "needs guidance"),
        ({"num_classes": 0}, {"condition": Condition(label=0)}, "takes no label"),
        ({}, {"condition": Condition(label=0, augmentation=jnp.zeros((3, 9)))}, "no augmentation"),
    ],
)
def test_misfits_are_refused(settings, call, message):
    model = denoiser(**settings)
    call = {"z": Z, "log_snr": LOG_SNR, "condition": Condition(label=LABEL), **call}
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model, params, call["z"], call["log_snr"], call["condition"])


def test_guided_refuses_what_it_cannot_guide():
    with pytest.raises(ValueError, match="class-conditional"):
        guided(denoiser(num_classes=0))
    with pytest.raises(ValueError, match="conditional on w itself"):
        guided(denoiser(guidance_embedding="mapped"))
    with pytest.raises(ValueError, match="needs Condition"):
        guided(denoiser())({}, Z, LOG_SNR, Condition(label=LABEL))


def test_network_and_parameterisation_must_fit():
    network = denoiser().network
    with pytest.raises(ValueError, match="needs a network with output_channels=2; got 1"):
        Denoiser(network, parameterisation.get("both"), CLASSES, SHAPE)
    with pytest.raises(ValueError, match="give both the same number"):
        Denoiser(network, V, 0, SHAPE)
