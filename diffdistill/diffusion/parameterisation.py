"""What a network is given and what its output means: x, eps, v, both, or F of a preconditioning.

The preconditionings are the columns of table 1 of Karras et al. 2022 ("Elucidating the design space"), each in its
authors' own scaling of input and time: vp, ve, iddpm, edm. With s = ve_sigma and z_ve = z / alpha,
x_hat = c_skip z_ve + c_out F(c_in z_ve; c_noise). ddpm is iddpm with the table of Ho et al. 2020.

Images and outputs are (B, H, W, C or 2C); log_snr is (B,) or scalar.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion import names, schedules
from diffdistill.diffusion.process import alpha, angle, expand, sigma, ve_sigma, vp_to_ve

NUM_NOISE_LEVELS = 1000  # M of vp, and of iddpm and ddpm unless said otherwise


def x_from_eps(eps_hat: Array, z: Array, log_snr: ArrayLike) -> Array:
    """Returns x_hat = (z - sigma eps_hat) / alpha; an error in eps_hat grows by sigma / alpha."""
    return (z - expand(sigma(log_snr), z) * eps_hat) / expand(alpha(log_snr), z)


def eps_from_x(x_hat: Array, z: Array, log_snr: ArrayLike) -> Array:
    """Returns eps_hat = (z - alpha x_hat) / sigma, the inverse of `x_from_eps`."""
    return (z - expand(alpha(log_snr), z) * x_hat) / expand(sigma(log_snr), z)


def x_from_v(v_hat: Array, z: Array, log_snr: ArrayLike) -> Array:
    """Returns x_hat = alpha z - sigma v_hat."""
    return expand(alpha(log_snr), z) * z - expand(sigma(log_snr), z) * v_hat


def v_from_x(x_hat: Array, z: Array, log_snr: ArrayLike) -> Array:
    """Returns v_hat = (alpha z - x_hat) / sigma, the inverse of `x_from_v`."""
    return (expand(alpha(log_snr), z) * z - x_hat) / expand(sigma(log_snr), z)


@dataclass(frozen=True)
class Parameterisation:
    """The four conversions between a network and a denoiser.

    output_channels(C): how many channels the network must put out for images of C channels.
    network_input(z, log_snr): what the network sees, shape of z.
    network_time(log_snr): its time input, shape of log_snr.
    to_x(output, z, log_snr): x_hat, shape of z, from the output (B, H, W, output_channels(C)).
    target(x, eps, log_snr): the output that makes to_x return x, for z = alpha x + sigma eps.
    learned_variance: whether C more channels at the end hold the variance of a step (see `with_variance`); to_x and
      target leave them out.
    """

    name: str
    output_channels: Callable[[int], int]
    network_input: Callable[[Array, ArrayLike], Array]
    network_time: Callable[[ArrayLike], Array]
    to_x: Callable[[Array, Array, ArrayLike], Array]
    target: Callable[[Array, Array, ArrayLike], Array]
    learned_variance: bool = False


def with_variance(parameters: Parameterisation) -> Parameterisation:
    """Returns `parameters` for a network that learns the variance of its steps too (Nichol & Dhariwal 2021)."""

    def to_x(output: Array, z: Array, log_snr: ArrayLike) -> Array:
        return parameters.to_x(output[..., : -z.shape[-1]], z, log_snr)

    return dataclasses.replace(
        parameters,
        output_channels=lambda channels: parameters.output_channels(channels) + channels,
        to_x=to_x,
        learned_variance=True,
    )


def _same_channels(channels: int) -> int:
    return channels


def _unchanged(z: Array, log_snr: ArrayLike) -> Array:
    return z


def angle_time(log_snr: ArrayLike) -> Array:
    """Returns 1000 theta / (pi/2), about 1000 t on the cosine schedule (Salimans & Ho 2022, released configuration)."""
    return (1000.0 / (jnp.pi / 2)) * angle(jnp.clip(jnp.asarray(log_snr, dtype=float), -20.0, 20.0))


def _x() -> Parameterisation:
    return Parameterisation(
        "x",
        _same_channels,
        _unchanged,
        angle_time,
        to_x=lambda output, z, log_snr: output,
        target=lambda x, eps, log_snr: x,
    )


def _eps() -> Parameterisation:
    return Parameterisation(
        "eps",
        _same_channels,
        _unchanged,
        angle_time,
        to_x=x_from_eps,
        target=lambda x, eps, log_snr: eps,
    )


def _v() -> Parameterisation:
    def target(x: Array, eps: Array, log_snr: ArrayLike) -> Array:
        return expand(alpha(log_snr), x) * eps - expand(sigma(log_snr), x) * x

    return Parameterisation("v", _same_channels, _unchanged, angle_time, to_x=x_from_v, target=target)


def _both() -> Parameterisation:
    def to_x(output: Array, z: Array, log_snr: ArrayLike) -> Array:
        # sigma^2 x~ + alpha^2 (z - sigma eps~)/alpha: each half is trusted where it is well conditioned.
        if output.shape[-1] != 2 * z.shape[-1]:
            raise ValueError(
                f"output 'both' holds x and eps side by side: expected {2 * z.shape[-1]} channels for images of shape "
                f"{z.shape}, got {output.shape}; build the network with output_channels(C) = 2C"
            )
        x_part, eps_part = jnp.split(output, 2, axis=-1)
        a, s = expand(alpha(log_snr), z), expand(sigma(log_snr), z)
        return s**2 * x_part + a * (z - s * eps_part)

    return Parameterisation(
        "both",
        lambda channels: 2 * channels,
        _unchanged,
        angle_time,
        to_x=to_x,
        target=lambda x, eps, log_snr: jnp.concatenate([x, eps], axis=-1),
    )


def _edm(*, sigma_data: float = 0.5) -> Parameterisation:
    # Karras et al. 2022, table 1, column "EDM", with s = sigma/alpha and z_ve = z/alpha put in and multiplied out, so
    # that nothing divides by alpha: with d = sqrt(sigma^2 + sigma_data^2 alpha^2),
    #   c_in z_ve = z / d,   c_skip z_ve = sigma_data^2 alpha z / d^2,   c_out = sigma sigma_data / d.
    if not sigma_data > 0:
        raise ValueError(f"sigma_data={sigma_data}: expected the standard deviation of the data, above 0 (usually 0.5)")

    def scales(log_snr: ArrayLike, like: Array) -> tuple[Array, Array, Array]:
        a, s = expand(alpha(log_snr), like), expand(sigma(log_snr), like)
        return a, s, jnp.sqrt(s**2 + (sigma_data * a) ** 2)

    def network_input(z: Array, log_snr: ArrayLike) -> Array:
        return z / scales(log_snr, z)[2]

    def network_time(log_snr: ArrayLike) -> Array:
        return -0.125 * jnp.asarray(log_snr, dtype=float)  # c_noise = ln(s) / 4

    def to_x(output: Array, z: Array, log_snr: ArrayLike) -> Array:
        a, s, d = scales(log_snr, z)
        return sigma_data * (sigma_data * a / d**2 * z + s / d * output)

    def target(x: Array, eps: Array, log_snr: ArrayLike) -> Array:
        a, s, d = scales(log_snr, x)
        return (s / sigma_data * x - sigma_data * a * eps) / d

    return Parameterisation("edm", _same_channels, network_input, network_time, to_x, target)


def _vp() -> Parameterisation:
    # c_in z_ve = z, and F is eps.
    def network_time(log_snr: ArrayLike) -> Array:
        # log(1 + s^2) = softplus(-log_snr): exact for small s, where 1 + s^2 rounds to 1.
        exponent = jax.nn.softplus(-jnp.asarray(log_snr, dtype=float))
        return (NUM_NOISE_LEVELS - 1) * schedules.vp_time(exponent)

    return dataclasses.replace(_eps(), name="vp", network_time=network_time)


def _ve() -> Parameterisation:
    def network_time(log_snr: ArrayLike) -> Array:
        return -0.5 * jnp.asarray(log_snr, dtype=float) - math.log(2.0)  # ln(s / 2)

    return Parameterisation(
        "ve",
        _same_channels,
        vp_to_ve,
        network_time,
        to_x=lambda output, z, log_snr: x_from_eps(-output, z, log_snr),  # c_out = +s
        target=lambda x, eps, log_snr: -eps,
    )


def _table(name: str, betas: np.ndarray) -> Parameterisation:
    # As vp, but the network knows only the times 0..M-1 of its own table.
    sigmas = schedules.discrete_sigmas(betas)

    def network_time(log_snr: ArrayLike) -> Array:
        return schedules.nearest_index(sigmas, ve_sigma(log_snr)).astype(float)

    return dataclasses.replace(_eps(), name=name, network_time=network_time)


def _iddpm(*, num_train_steps: int = NUM_NOISE_LEVELS) -> Parameterisation:
    return _table("iddpm", schedules.cosine_betas(num_train_steps))  # Nichol & Dhariwal 2021


def _ddpm(*, num_train_steps: int = NUM_NOISE_LEVELS) -> Parameterisation:
    return _table("ddpm", schedules.linear_betas(num_train_steps))  # Ho et al. 2020


PARAMETERISATIONS: dict[str, Callable[..., Parameterisation]] = {
    "x": _x,
    "eps": _eps,
    "v": _v,
    "both": _both,
    "edm": _edm,
    "vp": _vp,
    "ve": _ve,
    "iddpm": _iddpm,
    "ddpm": _ddpm,
}
# Those whose networks know the noise levels of a table alone, and the schedule that it is.
TABLES = {"iddpm": "discrete_cosine", "ddpm": "discrete_linear"}


def get(name: str, **settings: float) -> Parameterisation:
    """Returns the parameterisation called `name`, one of PARAMETERISATIONS.

    Settings: `sigma_data` (default 0.5) of "edm"; `num_train_steps` (default 1000), the length of the table, of "iddpm"
    and "ddpm". ValueError for an unknown name or setting.
    """
    make = names.choose(PARAMETERISATIONS, name, "network output")
    names.check_settings(make, settings, f"network output {name!r}")
    return make(**settings)
