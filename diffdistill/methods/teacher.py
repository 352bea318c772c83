"""Teacher: a diffusion model trained on data, any network output with any loss weight (Salimans & Ho 2022, section 4).

Labels are dropped to the null class with a given probability, so that the model can be guided without a classifier
(Ho & Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffdistill.diffusion.schedules import Schedule
from diffdistill.methods import base, hybrid, importance
from diffdistill.models.denoiser import Condition, Denoiser


def teacher(
    denoiser: Denoiser,
    schedule: Schedule,
    weight: Callable[[jax.Array], jax.Array],
    updater: base.Updater,
    *,
    label_dropout: float = 0.0,
    stratified: bool = False,
    parts: int = 1,
    noise: Callable[[jax.Array], jax.Array] | None = None,
    augment: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    importance_sampling: bool = False,
) -> base.Method:
    """Method that fits ``denoiser`` to data: weight(log_snr) ||D(z, log_snr, label) - x||^2 at random noise levels.

    Args:
      denoiser: network and parameterisation; conditional where its number of classes is positive. One that learns the
        variance gets the hybrid loss, which needs the times of a discrete schedule.
      schedule: log-SNR as a function of t in [0, 1].
      weight: factor on the mean squared error of x_hat, a function of log-SNR (see diffusion.weighting).
      updater: optimiser.
      label_dropout: probability of the null class, 0 to 1.
      stratified: spread the noise levels of one batch evenly (see base.uniform).
      parts: see base.from_loss.
      augment: (key, images) -> (augmented images, (B, K) what was done to them), for a denoiser that is told so; None
        leaves the images as they are.
      noise: log-SNR as a function of a uniform draw (see diffusion.noise); None: that of the schedule at uniform t.
      importance_sampling: draw the steps of a discrete schedule by their losses so far (see methods.importance).
    """
    learned_variance = denoiser.parameterisation.learned_variance
    if (learned_variance or importance_sampling) and (schedule.num_train_steps is None or noise is not None):
        raise ValueError(
            "a learned variance and importance sampling need the steps of a discrete schedule, drawn at random; got "
            f"the schedule {schedule.name!r}{' and a training noise of its own' if noise is not None else ''}."
        )

    def levels(key: jax.Array, size: int, frozen: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(log-SNR, step from 1 of a discrete schedule, factor of the loss), each (B,)."""
        draws = base.uniform(key, size, stratified=stratified)
        if noise is not None:
            return noise(draws), jnp.zeros_like(draws), jnp.ones_like(draws)
        steps = schedule.num_train_steps or 1
        if importance_sampling:
            index, factor = importance.draw(draws, frozen["memory"])
            return schedule.log_snr((index + 1) / steps), index + 1, factor
        times = base.times(draws, schedule)
        return schedule.log_snr(times), jnp.round(times * steps).astype(jnp.int32), jnp.ones_like(draws)

    def loss(
        params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Any]]:
        del arguments
        random = base.streams(key)
        x = base.images(batch)
        augmentation = None
        if augment is not None:
            x, augmentation = augment(random["augmentation"], x)
        log_snr, step, factor = levels(random["time"], x.shape[0], frozen)
        z, _ = base.noised(random["noise"], x, log_snr)
        label = base.labels(random["label"], batch, denoiser.num_classes, label_dropout)
        condition = Condition(label=label, augmentation=augmentation, image=base.shown(denoiser, random["image"], x))
        prediction = denoiser.predict(params, z, log_snr, condition, dropout_key=random["dropout"])
        losses = base.weighted_losses(prediction.x, x, log_snr, weight)
        metrics = base.summary(losses, log_snr)
        if learned_variance:
            bits = hybrid.bits(prediction, x, step, schedule)
            losses = losses + hybrid.weight(schedule) * bits
            metrics["bits_per_dim"] = jnp.mean(factor * bits) * (schedule.num_train_steps or 0)
        metrics["loss"] = jnp.mean(factor * losses)
        if importance_sampling:
            remembered = {"index": step - 1, "losses": jax.lax.stop_gradient(losses)}
            return metrics["loss"], {**metrics, base.RECORD: remembered}
        return metrics["loss"], metrics

    memory = None
    if importance_sampling:
        memory = base.Memory(
            init=lambda: importance.empty(schedule.num_train_steps or 0),
            update=lambda history, record: importance.record(history, **record),
        )
    return base.from_loss("teacher", lambda key, sources: denoiser.init(key), loss, updater, parts=parts, memory=memory)
