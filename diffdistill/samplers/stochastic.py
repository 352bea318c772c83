"""The N-step stochastic sampler of distilled models (Meng et al. 2023, section 3.3 and appendix).

`denoise` is as in `ddim`: denoise(z (B, H, W, C), log_snr (B,)) -> x_hat (B, H, W, C).
"""

import jax
import jax.numpy as jnp
from jax import Array

from diffdistill.diffusion.process import expand, log1mexp
from diffdistill.diffusion.schedules import Schedule
from diffdistill.samplers import ddim
from diffdistill.samplers.ancestral import check_keys, step_noise
from diffdistill.samplers.ddim import Denoise, check_num_steps, step_times


def noise_back(z: Array, noise: Array, log_snr_k: Array, log_snr_s: Array) -> Array:
    """Returns z_s out of z = z_k and standard normal noise, s the noisier time; log_snr scalar or (B,).

    z_s = (alpha_s / alpha_k) z_k + sigma_{s|k} e with sigma_{s|k}^2 = (1 - exp(log_snr_s - log_snr_k)) sigma_s^2.
    """
    log_snr_k, log_snr_s = jnp.asarray(log_snr_k, dtype=float), jnp.asarray(log_snr_s, dtype=float)
    log_keep = 0.5 * (jax.nn.log_sigmoid(log_snr_s) - jax.nn.log_sigmoid(log_snr_k))
    log_deviation = 0.5 * (log1mexp(log_snr_k - log_snr_s) + jax.nn.log_sigmoid(-log_snr_s))
    return expand(jnp.exp(log_keep), z) * z + expand(jnp.exp(log_deviation), z) * noise


def sample(
    denoise: Denoise,
    z: Array,
    schedule: Schedule,
    num_steps: int | Array,
    *,
    keys: Array | None,
    clip: bool = True,
) -> Array:
    """Returns images (B, H, W, C) from noise z at t = 1 in exactly `num_steps` evaluations, at t = 1, 1 - 1/N, .., 1/N.

    From t one deterministic step of double length, to t - 2/N, then noise back to t - 1/N; the last evaluation, at
    1/N, returns x_hat. `keys` (B,) are typed PRNG keys, one per image, as of the ancestral sampler. `num_steps`
    (int >= 1) may be traced. `clip` limits x_hat to [-1, 1] at each step. ValueError for missing or misshapen keys.
    """
    check_num_steps(num_steps)
    image_keys = check_keys(keys, z, "stochastic")

    def body(i: Array, z: Array) -> Array:
        t, s = step_times(i, num_steps)
        _, k = step_times(jnp.minimum(i + 1, num_steps - 1), num_steps)
        log_snr_t, log_snr_s, log_snr_k = schedule.log_snr(t), schedule.log_snr(s), schedule.log_snr(k)
        x_hat = denoise(z, jnp.broadcast_to(log_snr_t, z.shape[:1]))
        if clip:
            x_hat = jnp.clip(x_hat, -1.0, 1.0)
        z_k = ddim.step(x_hat, z, log_snr_t, log_snr_k)
        return jnp.where(s > 0, noise_back(z_k, step_noise(image_keys, i, z), log_snr_k, log_snr_s), x_hat)

    return jax.lax.fori_loop(0, num_steps, body, z)
