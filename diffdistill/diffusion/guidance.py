"""Classifier-free guidance (Ho & Salimans 2022) in the convention x_w = (1 + w) x_cond - w x_uncond.

w = 0 is the plain conditional model; the other common scale is g = 1 + w.
"""

from jax import Array
from jax.typing import ArrayLike

from diffdistill.diffusion.process import expand


def combine(x_cond: Array, x_uncond: Array, w: ArrayLike) -> Array:
    """Returns (1 + w) x_cond - w x_uncond for predictions (B, H, W, C) and w scalar or (B,).

    Give it x_hat or v, not eps: at t = 1 the way back from eps to x divides by alpha = 4.5e-5, and float32 rounding
    then shows as errors of several 1e-2 in x at w = 4.
    """
    w = expand(w, x_cond)
    return (1.0 + w) * x_cond - w * x_uncond
