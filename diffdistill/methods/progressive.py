"""Progressive distillation: a student of N steps learns from a teacher of 2N (Salimans & Ho 2022, algorithm 2).

With a w-conditioned teacher this is also stage two of the distillation of guided models (Meng et al. 2023, section
3.2): teacher and student get the same guidance weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffdistill.diffusion.schedules import Schedule
from diffdistill.methods import base
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.samplers import ddim


def halving(
    denoiser: Denoiser,
    schedule: Schedule,
    weight: Callable[[jax.Array], jax.Array],
    updater: base.Updater,
    *,
    guidance_range: tuple[float, float] | None = None,
    stratified: bool = False,
    parts: int = 1,
) -> base.Method:
    """Method for one round of halving; ``sources["teacher"]`` are the parameters of the 2N-step model.

    The number of steps N of the student is the traced ``arguments["num_steps"]`` and the teacher's parameters are
    the traced ``frozen["teacher"]``, so that every round of a chain runs the same compiled step.

    Args:
      denoiser: teacher and student alike; the student starts as a copy.
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
        t, m, s = (index + 1.0) / num_steps, (index + 0.5) / num_steps, index / num_steps
        log_snr = schedule.log_snr(t)
        z, _ = base.noised(random["noise"], x, log_snr)
        condition = Condition(
            label=batch["label"] if denoiser.num_classes else None,
            guidance=None
            if guidance_range is None
            else base.guidance_weights(random["guidance"], size, *guidance_range),
        )
        target, _, _ = ddim.two_step_target(
            lambda z, log_snr: denoiser(frozen["teacher"], z, log_snr, condition), z, schedule, t, m, s
        )
        x_hat = denoiser(params, z, log_snr, condition, dropout_key=random["dropout"])
        return base.weighted_loss(x_hat, jax.lax.stop_gradient(target), log_snr, weight)

    return base.from_loss("progressive", init, loss, updater, parts=parts)
