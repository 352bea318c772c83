"""Distillation of guided models, stage one: one student for every guidance weight (Meng et al. 2023, section 3.1).

The student D(z, log_snr, label, w) matches the guided teacher (1 + w) D(z, label) - w D(z, null) in one evaluation
instead of two. w = 0 is the plain conditional model; the other common scale is 1 + w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffdistill.diffusion.schedules import Schedule
from diffdistill.methods import base
from diffdistill.models.denoiser import Condition, Denoiser, guided, transfer


def distillation(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    weight: Callable[[jax.Array], jax.Array],
    updater: base.Updater,
    *,
    w_min: float,
    w_max: float,
    stratified: bool = False,
    parts: int = 1,
) -> base.Method:
    """Method that fits a w-conditioned student to a guided teacher, whose parameters are ``sources["teacher"]``.

    Loss: weight(log_snr) ||D_student(z_t, label, w) - x_w(z_t, label)||^2 with w uniform on [w_min, w_max] and t
    uniform; no sampler step is involved. The student starts from the teacher's parameters; its branch for w starts
    at zero, so that at first it is the conditional teacher for every w.

    Args:
      student: the denoiser to train, with an embedding of w.
      teacher: a class-conditional denoiser that was trained with label dropout.
      w_min, w_max: range of the guidance weight; equal ends give the paper's single-w baseline.
    """
    guided_teacher = guided(teacher)

    def init(key: jax.Array, sources: Mapping[str, Any]) -> Any:
        return transfer(sources["teacher"], student.init(key))

    def loss(
        params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, base.Metrics]:
        del arguments
        random = base.streams(key)
        x = base.images(batch)
        size = x.shape[0]
        log_snr = schedule.log_snr(base.training_times(random["time"], size, schedule, stratified=stratified))
        z, _ = base.noised(random["noise"], x, log_snr)
        condition = Condition(
            label=batch["label"],
            guidance=base.guidance_weights(random["guidance"], size, w_min, w_max),
            image=base.shown(student, random["image"], x),
        )
        target = jax.lax.stop_gradient(guided_teacher(frozen["teacher"], z, log_snr, condition))
        x_hat = student(params, z, log_snr, condition, dropout_key=random["dropout"])
        return base.weighted_loss(x_hat, target, log_snr, weight)

    return base.from_loss("guided", init, loss, updater, parts=parts)
