"""Teacher: a diffusion model trained on data, any network output with any loss weight (Salimans & Ho 2022, section 4).

Labels are dropped to the null class with a given probability, so that the model can be guided without a classifier
(Ho & Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffdistill.diffusion.schedules import Schedule
from diffdistill.methods import base
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
) -> base.Method:
    """Method that fits ``denoiser`` to data: weight(log_snr) ||D(z, log_snr, label) - x||^2 at random noise levels.

    Args:
      denoiser: network and parameterisation; conditional where its number of classes is positive.
      schedule: log-SNR as a function of t in [0, 1].
      weight: factor on the mean squared error of x_hat, a function of log-SNR (see diffusion.weighting).
      updater: optimiser.
      label_dropout: probability of the null class, 0 to 1.
      stratified: spread the noise levels of one batch evenly (see base.uniform).
      parts: see base.from_loss.
      augment: (key, images) -> (augmented images, (B, K) what was done to them), for a denoiser that is told so; None
        leaves the images as they are.
      noise: log-SNR as a function of a uniform draw (see diffusion.noise); None: that of the schedule at uniform t.
    """

    def loss(
        params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, base.Metrics]:
        del frozen, arguments
        random = base.streams(key)
        x = base.images(batch)
        augmentation = None
        if augment is not None:
            x, augmentation = augment(random["augmentation"], x)
        if noise is None:
            log_snr = schedule.log_snr(base.training_times(random["time"], x.shape[0], schedule, stratified=stratified))
        else:
            log_snr = noise(base.uniform(random["time"], x.shape[0], stratified=stratified))
        z, _ = base.noised(random["noise"], x, log_snr)
        label = base.labels(random["label"], batch, denoiser.num_classes, label_dropout)
        condition = Condition(label=label, augmentation=augmentation, image=base.shown(denoiser, random["image"], x))
        x_hat = denoiser(params, z, log_snr, condition, dropout_key=random["dropout"])
        return base.weighted_loss(x_hat, x, log_snr, weight)

    return base.from_loss("teacher", lambda key, sources: denoiser.init(key), loss, updater, parts=parts)
