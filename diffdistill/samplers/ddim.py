"""DDIM (Song et al. 2021) as a rotation, for sampling and for distillation targets alike.

A denoiser here is any function denoise(z (B, H, W, C), log_snr (B,)) -> x_hat (B, H, W, C): a closure over parameters
and condition.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from diffdistill.diffusion.process import alpha, angle, expand, sigma
from diffdistill.diffusion.schedules import Schedule

Denoise = Callable[[Array, Array], Array]


def check_num_steps(num_steps: int | Array) -> None:
    """Refuses a number of steps below one: ValueError. A traced number cannot be looked at and passes."""
    if not isinstance(num_steps, Tracer) and num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: a sampler takes at least 1 step")


def step(x_hat: Array, z: Array, log_snr_t: ArrayLike, log_snr_s: ArrayLike) -> Array:
    """Returns z_s, shape of z, from z = z_t and the prediction x_hat; log_snr scalar or (B,), either time the noisier.

    z_s = alpha_s x_hat + (sigma_s / sigma_t)(z_t - alpha_t x_hat), Salimans & Ho 2022, eq. 8, written with angles so
    that near times subtract nothing large: z_s = (sin b / sin a) z_t + (sin(a - b) / sin a) x_hat.
    """
    a, b = expand(angle(log_snr_t), z), expand(angle(log_snr_s), z)
    return (jnp.sin(b) * z + jnp.sin(a - b) * x_hat) / jnp.sin(a)


def sample(
    denoise: Denoise,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None = None,
    clip: bool = True,
) -> Array:
    """Returns images (B, H, W, C) from noise z at t = 1 by `num_steps` equal steps in t; the last returns x_hat.

    `num_steps` (int >= 1) may be traced: one compilation serves every count. Gradients through the sampler need it as a
    plain int. `clip` limits x_hat to [-1, 1] at each
    step. `keys` is ignored, and there so that every sampler is called alike.
    """
    del keys
    check_num_steps(num_steps)

    def body(i: Array, z: Array) -> Array:
        t, s = step_times(i, num_steps)
        log_snr_t, log_snr_s = schedule.log_snr(t), schedule.log_snr(s)
        x_hat = denoise(z, jnp.broadcast_to(log_snr_t, z.shape[:1]))
        if clip:
            x_hat = jnp.clip(x_hat, -1.0, 1.0)
        return jnp.where(s > 0, step(x_hat, z, log_snr_t, log_snr_s), x_hat)

    return jax.lax.fori_loop(0, num_steps, body, z)


def encode(
    denoise: Denoise, x: Array, schedule: Schedule, num_steps: int | Array, *, keys: Array | None = None
) -> Array:
    """Returns noise z (B, H, W, C) at t = 1 that `sample` turns into about x, by `num_steps` equal steps from t = 0.

    Reverse DDIM: from s = i/N to t = (i + 1)/N along the prediction at s (Meng et al. 2023, section 3.4). x_hat is not
    clipped. `num_steps` (int >= 1) may be traced; `keys` is ignored.
    """
    del keys
    check_num_steps(num_steps)
    total = jnp.asarray(num_steps).astype(jnp.float32)

    def body(i: Array, z: Array) -> Array:
        s, t = i.astype(jnp.float32) / total, (i + 1).astype(jnp.float32) / total
        log_snr_s, log_snr_t = schedule.log_snr(s), schedule.log_snr(t)
        return step(denoise(z, jnp.broadcast_to(log_snr_s, z.shape[:1])), z, log_snr_s, log_snr_t)

    return jax.lax.fori_loop(0, num_steps, body, x)


def step_times(i: int | Array, num_steps: int | Array) -> tuple[Array, Array]:
    """Returns the times (t, s), float32, of step i = 0..N-1 of a sampler: t = (N - i)/N down to s = (N - i - 1)/N."""
    left = jnp.asarray(num_steps) - jnp.asarray(i)
    total = jnp.asarray(num_steps).astype(jnp.float32)
    return left.astype(jnp.float32) / total, (left - 1).astype(jnp.float32) / total


def two_step_target(
    denoise: Denoise, z_t: Array, schedule: Schedule, t: Array, m: Array, s: Array
) -> tuple[Array, Array, Array]:
    """Returns (x~, x1, x2), each (B, H, W, C): the x_hat with which ONE step t -> s lands where TWO, t -> m -> s, do.

    t > m > s are times (B,); z_t (B, H, W, C) is at t; `denoise` is the teacher. x1 = D(z_t), and x2 = D(z_m) after a
    DDIM step. x~ = x1 + w2 (x2 - x1), the inversion of Salimans & Ho 2022 (algorithm 2) solved by hand, with
    w2 = sin(m - s) sin(t) / (sin(t - s) sin(m)) in angles, so that x~ lies between x1 and x2. Where s is exactly 0 the
    step ends at the data, theta_s counts as 0 and w2 = 1: compute s as i/N, not as t - 1/N. Where the schedule gives
    all three times one log-SNR (a discrete one asked for more steps than it has), x~ = x1 = x2 whatever w2.
    """
    log_snr_t, log_snr_m, log_snr_s = (schedule.log_snr(time) for time in (t, m, s))
    x1 = denoise(z_t, log_snr_t)
    x2 = denoise(step(x1, z_t, log_snr_t, log_snr_m), log_snr_m)
    # The same w2 with tan(theta) = exp(-log_snr / 2) put in: a ratio of sums of positive numbers, which float32 keeps
    # to its last digits and inside [0, 1] where differences of angles near pi/2 would lose four of them.
    second = jnp.expm1(0.5 * (log_snr_s - log_snr_m))
    whole = second - jnp.expm1(0.5 * (log_snr_t - log_snr_m))
    at_data = (s <= 0) | (whole <= 0)
    w2 = jnp.where(at_data, 1.0, second / jnp.where(at_data, 1.0, whole))
    return x1 + expand(w2, x1) * (x2 - x1), x1, x2


def two_step_encoding_target(
    denoise: Denoise, z_s: Array, schedule: Schedule, s: Array, m: Array, t: Array
) -> tuple[Array, Array, Array]:
    """Returns (x~, x1, x2), each (B, H, W, C): the x_hat with which ONE step s -> t lands where TWO, s -> m -> t, do.

    s < m < t are times (B,), as `encode` takes them; z_s (B, H, W, C) is at s. In eps the target is
    e1 + w2 (e2 - e1) with w2 = (tan t - tan m) / (tan t - tan s) in angles, which lies between the two predictions;
    x~ is what it means at s, where the student is evaluated.
    """
    log_snr_s, log_snr_m, log_snr_t = (schedule.log_snr(time) for time in (s, m, t))
    x1 = denoise(z_s, log_snr_s)
    z_m = step(x1, z_s, log_snr_s, log_snr_m)
    x2 = denoise(z_m, log_snr_m)
    e1, e2 = (_noise_in(z, x, log_snr) for z, x, log_snr in ((z_s, x1, log_snr_s), (z_m, x2, log_snr_m)))
    # tan(theta) = exp(-log_snr / 2), all divided by that of t: the largest, so that nothing overflows.
    whole = -jnp.expm1(0.5 * (log_snr_t - log_snr_s))
    w2 = jnp.where(whole > 0, -jnp.expm1(0.5 * (log_snr_t - log_snr_m)) / jnp.where(whole > 0, whole, 1.0), 1.0)
    eps = e1 + expand(w2, e1) * (e2 - e1)
    return (z_s - expand(sigma(log_snr_s), z_s) * eps) / expand(alpha(log_snr_s), z_s), x1, x2


def _noise_in(z: Array, x_hat: Array, log_snr: Array) -> Array:
    """eps_hat (B, H, W, C): what is left of z beside alpha x_hat, in units of sigma."""
    return (z - expand(alpha(log_snr), z) * x_hat) / expand(sigma(log_snr), z)
