"""Distillation of encoders: a student of N steps from data to noise learns from 2N (Meng et al. 2023, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffdistill.diffusion.schedules import Schedule
from diffdistill.methods import base
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.samplers import ddim


def encoder_halving(
    denoiser: Denoiser,
    schedule: Schedule,
    weight: Callable[[jax.Array], jax.Array],
    updater: base.Updater,
    *,
    guidance_range: tuple[float, float] | None = None,
    stratified: bool = False,
    parts: int = 1,
) -> base.Method:
    """Method for one round of halving of the encoder; ``sources["teacher"]`` are the parameters of the 2N-step one.

    Data is noised to s = i/N, i = 0..N-1; the student's one step s -> (i + 1)/N of reverse DDIM is to end where two of
    the teacher's do. Both are evaluated, and the loss is weighted, at s.

    Args:
      denoiser: teacher and student alike; the student starts as a copy.
      weight: factor on the mean squared error of x_hat. Near data x_hat says little about the noise, on which the step
        depends: take one that grows with the signal, such as snr_plus_one.
      guidance_range: (w_min, w_max) of a w-conditioned denoiser; None for one without guidance.
    """

    def init(key: jax.Array, sources: Mapping[str, Any]) -> Any:
        del key
        return sources["teacher"]

    def loss(
        params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, base.Metrics]:
        random = base.streams(key)
        x = base.images(batch)
        size = x.shape[0]
        num_steps = arguments["num_steps"].astype(jnp.float32)
        index = jnp.floor(base.uniform(random["time"], size, stratified=stratified) * num_steps)
        s, m, t = index / num_steps, (index + 0.5) / num_steps, (index + 1.0) / num_steps
        log_snr = schedule.log_snr(s)
        z, _ = base.noised(random["noise"], x, log_snr)
        condition = Condition(
            label=batch["label"] if denoiser.num_classes else None,
            guidance=None
            if guidance_range is None
            else base.guidance_weights(random["guidance"], size, *guidance_range),
        )
        target, _, _ = ddim.two_step_encoding_target(
            lambda z, log_snr: denoiser(frozen["teacher"], z, log_snr, condition), z, schedule, s, m, t
        )
        x_hat = denoiser(params, z, log_snr, condition, dropout_key=random["dropout"])
        return base.weighted_loss(x_hat, jax.lax.stop_gradient(target), log_snr, weight)

    return base.from_loss("encoder", init, loss, updater, parts=parts)
