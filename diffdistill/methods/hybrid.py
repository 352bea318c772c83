"""The hybrid loss of networks that learn the variance of their steps (Nichol & Dhariwal 2021, section 3.1).

To the weighted error comes 0.001 T times the term of the variational bound, in bits per dimension, of the step that was
drawn. Only the variance learns from it: the prediction of the data gets no gradient.
"""

import jax

from diffdistill.diffusion import variational
from diffdistill.diffusion.schedules import Schedule
from diffdistill.models.denoiser import Prediction

VARIATIONAL_WEIGHT = 1e-3


def bits(prediction: Prediction, x: jax.Array, step: jax.Array, schedule: Schedule) -> jax.Array:
    """(B,) terms of the bound in bits per dimension, differentiable by the variance alone.

    Args:
      prediction: for x at the noise levels of `step`; from a network that learns the variance.
      x: data (B, H, W, C) in [-1, 1].
      step: (B,) int32 from 1, the step to data, to T.
      schedule: a discrete one.

    ValueError for a schedule without steps and for a prediction without a variance.
    """
    steps = schedule.num_train_steps
    if steps is None or prediction.variance_fraction is None:
        raise ValueError(
            f"the hybrid loss needs a discrete schedule and a network that learns the variance; the schedule is "
            f"{schedule.name!r}, the variance {'missing' if prediction.variance_fraction is None else 'there'}"
        )
    term = variational.term(
        x,
        jax.lax.stop_gradient(prediction.x),
        prediction.variance_fraction,
        schedule.log_snr(step / steps),
        schedule.log_snr((step - 1) / steps),
        step == 1,
        schedule.log_snr(2 / steps),
    )
    return variational.BITS_PER_NAT * term


def weight(schedule: Schedule) -> float:
    """The factor of `bits` in the loss, 0.001 T: one for the usual 1000 steps."""
    return VARIATIONAL_WEIGHT * (schedule.num_train_steps or 0)
