"""Progressive distillation: a student of N steps learns from a teacher of 2N (Salimans & Ho 2022, algorithm 2).

With a w-conditioned teacher this is also stage two of the distillation of guided models (Meng et al. 2023, section
3.2): teacher and student get the same guidance weight. Students of the stochastic sampler are a chain of their own:
they step twice as far as they advance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffdistill.diffusion import process
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
    label_dropout: float = 0.0,
    stochastic: bool = False,
    stratified: bool = False,
    parts: int = 1,
) -> base.Method:
    """Method for one round of halving; ``sources["teacher"]`` are the parameters of the 2N-step model.

    The number of steps N of the student is the traced ``arguments["num_steps"]`` and the teacher's parameters are
    the traced ``frozen["teacher"]``, so that every round of a chain runs the same compiled step.

    Args:
      denoiser: teacher and student alike; the student starts as a copy.
      guidance_range: (w_min, w_max) of a w-conditioned denoiser; None for one without guidance.
      label_dropout: share of the examples, 0 to 1, whose label is the null class for teacher and student: a conditional
        and an unconditional student in one.
      stochastic: for samplers.stochastic: one step of the student covers two whole steps, t -> t - 1/N -> t - 2/N, of
        the teacher, whose own steps are 1/N long where it is the student of the round before.
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
        t = (index + 1.0) / num_steps
        if stochastic:
            m, s = index / num_steps, jnp.maximum(index - 1.0, 0.0) / num_steps
        else:
            m, s = (index + 0.5) / num_steps, index / num_steps
        log_snr = schedule.log_snr(t)
        z, _ = base.noised(random["noise"], x, log_snr)
        condition = Condition(
            label=base.labels(random["label"], batch, denoiser.num_classes, label_dropout),
            guidance=None
            if guidance_range is None
            else base.guidance_weights(random["guidance"], size, *guidance_range),
            image=base.shown(denoiser, random["image"], x),
        )
        target, x1, _ = ddim.two_step_target(
            lambda z, log_snr: denoiser(frozen["teacher"], z, log_snr, condition), z, schedule, t, m, s
        )
        if stochastic:
            target = jnp.where(process.expand(index == 0, x1), x1, target)  # the last evaluation is a single step
        x_hat = denoiser(params, z, log_snr, condition, dropout_key=random["dropout"])
        return base.weighted_loss(x_hat, jax.lax.stop_gradient(target), log_snr, weight)

    return base.from_loss("stochastic" if stochastic else "progressive", init, loss, updater, parts=parts)
