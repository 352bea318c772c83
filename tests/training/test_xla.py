"""What XLA is asked for: nothing where it would not be understood, or the user has asked for something else."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.training import mesh as meshes
from diffdistill.training import xla


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def test_a_program_on_cpus_has_xlas_own_convolutions_and_the_same_gradient():
    options = xla.compiler_options(meshes.make_mesh())
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 32))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 32, 32))
    gradient = jax.grad(lambda x, kernel: jnp.square(convolution(x, kernel)).mean(), argnums=(0, 1))
    program = jax.jit(gradient, compiler_options=options).lower(x, kernel).compile()
    assert "ynn" not in program.as_text()
    for ours, usual in zip(program(x, kernel), jax.jit(gradient)(x, kernel), strict=True):
        np.testing.assert_allclose(ours, usual, rtol=1e-4, atol=1e-4)


def test_what_the_user_asks_for_counts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE")
    assert xla.compiler_options(meshes.make_mesh()) == {}


def test_accelerators_are_told_nothing():
    gpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")]))
    assert xla.compiler_options(gpu) == {}


@pytest.mark.parametrize("option", ["xla_cpu_of_another_version", "xla_cpu_experimental_ynn_fusion_type"])
def test_a_version_that_does_not_know_an_option_is_not_told_it(option):
    assert xla._known(((option, "NEITHER"),)) == ()
