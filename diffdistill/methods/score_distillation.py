"""Score distillation: what a generator learns from the difference of two denoisers on its own noised samples.

x_g are samples of the generator. D_T, the teacher, and D_F, the fake one, denoise z = alpha x_g + sigma eps; D_F knows
the distribution of the generator, so that (D_F - D_T) / s^2, s = sigma / alpha, is the difference of the two scores.
Every signal is one function (x_g, D_T, D_F, log_snr, key) -> (loss, delta), whose gradient with respect to x_g is
what the generator follows: a new one is a function here and its name in SIGNALS.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffdistill.diffusion import names
from diffdistill.methods import base

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Signal = Callable[[jax.Array, Denoise, Denoise, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

SID_ALPHA = 1.2


def diff_instruct(
    x_g: jax.Array, teacher: Denoise, fake: Denoise, log_snr: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(loss, delta): the gradient on x_g is D_F - D_T, summed over pixels, averaged over the batch (Luo et al. 2023).

    It is that of s^2 KL(noised generator || noised teacher), the mean over the noise levels of the batch. DisBack
    (Zhang et al. 2025) is this signal with the teacher replaced by the checkpoints of a path.

    Args:
      x_g: (B, H, W, C) samples.
      teacher, fake: (z, log_snr) -> x_hat; no gradient passes through them.
      log_snr: (B,) noise levels.
      key: of the noise.

    Returns:
      The loss, whose value means nothing, and delta = D_F - D_T, (B, H, W, C), without gradient.
    """
    _, delta = _scores(x_g, teacher, fake, log_snr, key)
    return _along(x_g, delta), delta


def dmd2(
    x_g: jax.Array, teacher: Denoise, fake: Denoise, log_snr: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As diff_instruct, with delta in units of the mean over pixels of |x_g - D_T| (Yin et al. 2024, no GAN)."""
    x_t, delta = _scores(x_g, teacher, fake, log_snr, key)
    return _along(x_g, delta / _distance(x_g, x_t)), delta


def sid(
    x_g: jax.Array, teacher: Denoise, fake: Denoise, log_snr: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As diff_instruct, with the loss of score identity distillation (Zhou et al. 2024), alpha = 1.2.

    (D_T - D_F) ((D_T - x_g) - alpha (D_T - D_F)), divided by the mean over pixels of |x_g - D_T|. The gradient also
    passes through what the denoisers are given, though never into their parameters.
    """
    z, _ = base.noised(key, x_g, log_snr)
    x_t, x_f = teacher(z, log_snr), fake(z, log_snr)
    losses = (x_t - x_f) * ((x_t - x_g) - SID_ALPHA * (x_t - x_f)) / _distance(x_g, x_t)
    return jnp.sum(losses) / x_g.shape[0], jax.lax.stop_gradient(x_f - x_t)


def _scores(
    x_g: jax.Array, teacher: Denoise, fake: Denoise, log_snr: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(D_T, D_F - D_T), without gradient."""
    z, _ = base.noised(key, jax.lax.stop_gradient(x_g), log_snr)
    x_t, x_f = teacher(z, log_snr), fake(z, log_snr)
    return jax.lax.stop_gradient(x_t), jax.lax.stop_gradient(x_f - x_t)


def _along(x_g: jax.Array, direction: jax.Array) -> jax.Array:
    """A scalar whose gradient with respect to x_g is direction / B."""
    return jnp.sum(direction * x_g) / x_g.shape[0]


def _distance(x_g: jax.Array, x_t: jax.Array) -> jax.Array:
    """(B, 1, 1, 1) mean over pixels of |x_g - x_t|, without gradient; bounded away from 0, where it divides."""
    distance = jnp.mean(jnp.abs(x_g - x_t), axis=tuple(range(1, x_g.ndim)), keepdims=True)
    return jax.lax.stop_gradient(jnp.maximum(distance, 1e-5))


SIGNALS: dict[str, Signal] = {"diff_instruct": diff_instruct, "dmd2": dmd2, "sid": sid}


def get(name: str) -> Signal:
    """Returns the signal called `name`, one of SIGNALS; an unknown name is a ValueError that lists the known ones."""
    return names.choose(SIGNALS, name, "signal of score distillation")
