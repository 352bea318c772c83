"""Samplers of discrete schedules on some of their steps (Nichol & Dhariwal 2021; the defaults of guided-diffusion).

The process is that of N of the T steps: a step leads from one kept index to the next below it, with what noise lies
between them, and the network is always told the original step. `denoise` is as in `ancestral`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from diffdistill.diffusion.schedules import Schedule
from diffdistill.samplers import ancestral as full
from diffdistill.samplers import ddim as full_ddim
from diffdistill.samplers.ancestral import PredictStep
from diffdistill.samplers.ddim import Denoise


def even_indices(num_train_steps: int, num_steps: int) -> list[int]:
    """Returns N of the indices 0..T-1, both ends among them: 250 of 1000 are 0, 4, 8, 12, ..., 991, 995, 999.

    The stride (T-1)/(N-1) is added up in float64 and rounded half to even, rounding errors included: what the released
    models were sampled at. ValueError for N beyond 1..T.
    """
    _check_count(num_train_steps, num_steps)
    if num_steps == 1:
        return [num_train_steps - 1]
    strides = np.full(num_steps, (num_train_steps - 1) / (num_steps - 1))
    strides[0] = 0.0
    return [round(float(position)) for position in np.cumsum(strides)]


def strided_indices(num_train_steps: int, num_steps: int) -> list[int]:
    """Returns 0, i, 2i, ... for the least whole stride i that gives exactly N indices below T, as DDIM takes them.

    ValueError for an N that no stride gives; the message names the nearest that one does.
    """
    _check_count(num_train_steps, num_steps)
    counts = {stride: -(-num_train_steps // stride) for stride in range(1, num_train_steps)}
    for stride, count in counts.items():
        if count == num_steps:
            return list(range(0, num_train_steps, stride))
    near = min(counts.values(), key=lambda count: (abs(count - num_steps), count))
    raise ValueError(
        f"num_steps={num_steps}: no whole stride over {num_train_steps} steps gives as many; the nearest is {near}"
    )


INDICES = {"respaced": even_indices, "respaced_ddim": strided_indices}


def check(name: str, schedule: Schedule, num_steps: int | Array) -> list[int]:
    """Returns the indices that the sampler called `name` visits, increasing; ValueError where it has none."""
    if schedule.num_train_steps is None:
        raise ValueError(
            f"the {name} sampler takes some of the steps of a discrete schedule, and {schedule.name!r} has none; use "
            f"{'ancestral' if name == 'respaced' else 'ddim'}"
        )
    if isinstance(num_steps, Tracer):
        raise ValueError(f"the {name} sampler needs its number of steps as a plain number, not traced")
    return INDICES[name](schedule.num_train_steps, int(num_steps))


def ancestral(
    denoise: PredictStep,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None,
    clip: bool = True,
    variance_fraction: ArrayLike = 0.0,
) -> Array:
    """Returns images (B, H, W, C) from noise z by ancestral steps between `num_steps` indices; the last returns x_hat.

    Arguments, noise and errors are those of `samplers.ancestral.sample`; the variance is what the network has learnt
    where it has, otherwise that of `variance_fraction`. ValueError too for a continuous schedule and a traced
    num_steps.
    """
    image_keys = full.check_keys(keys, z, "respaced")
    levels = _levels(check("respaced", schedule, num_steps), schedule)

    def body(i: Array, z: Array) -> Array:
        log_snr_t, log_snr_s, last = levels[i], levels[i + 1], i == len(levels) - 2
        x_hat, fraction = full.prediction(denoise(z, jnp.broadcast_to(log_snr_t, z.shape[:1])), variance_fraction)
        if clip:
            x_hat = jnp.clip(x_hat, -1.0, 1.0)
        return jnp.where(
            last, x_hat, full.step(x_hat, z, full.step_noise(image_keys, i, z), log_snr_t, log_snr_s, fraction)
        )

    return jax.lax.fori_loop(0, len(levels) - 1, body, z)


def ddim(
    denoise: Denoise,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None = None,
    clip: bool = True,
) -> Array:
    """Returns images (B, H, W, C) from noise z by DDIM steps (eta = 0) between the strided indices.

    The first, (N - 1) times the stride, is not the noisiest. Arguments are those of `samplers.ddim.sample`. ValueError
    for a continuous schedule, a traced num_steps, and a number of steps that no whole stride gives.
    """
    del keys
    levels = _levels(check("respaced_ddim", schedule, num_steps), schedule)

    def body(i: Array, z: Array) -> Array:
        x_hat = denoise(z, jnp.broadcast_to(levels[i], z.shape[:1]))
        if clip:
            x_hat = jnp.clip(x_hat, -1.0, 1.0)
        return jnp.where(i == len(levels) - 2, x_hat, full_ddim.step(x_hat, z, levels[i], levels[i + 1]))

    return jax.lax.fori_loop(0, len(levels) - 1, body, z)


def _levels(indices: list[int], schedule: Schedule) -> Array:
    """(N + 1,) log-SNR from the noisiest index to the cleanest, and that of the data."""
    steps = np.append(np.array(indices[::-1], np.float32) + 1, 0.0)
    return schedule.log_snr(steps / np.float32(schedule.num_train_steps or 1))


def _check_count(num_train_steps: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"num_steps={num_steps}: expected 1 to {num_train_steps}, the steps of the schedule")
