"""Gaussians in two dimensions as images (1, 1, 2): their denoisers and scores are known in closed form."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffdistill.diffusion import parameterisation, process
from diffdistill.models.denoiser import Denoiser

SHAPE = (1, 1, 2)


def posterior_mean(z, log_snr, mean, covariance):
    """E[x | z] (B, 1, 1, 2) for x ~ N(mean (2,), covariance (2, 2)) and z = alpha x + sigma eps."""

    def one(z, log_snr):
        alpha, sigma = process.alpha(log_snr), process.sigma(log_snr)
        (a, b), (c, d) = alpha**2 * covariance + sigma**2 * jnp.eye(2)
        # Written out: two batched solves of jaxlib 0.10.2 in one program on a CPU of two cores can wait for each other
        # for ever (each blocks a thread of the pool that its parts are to run on).
        inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
        return mean + alpha * covariance @ (inverse @ (z - alpha * mean))

    return jax.vmap(one)(z.reshape(-1, 2), jnp.broadcast_to(log_snr, z.shape[:1])).reshape(z.shape)


class GaussianNetwork(nn.Module):
    """A network that is the exact denoiser of N(mean, diag(exp(log_std))^2), with these as its parameters."""

    num_classes: int = 0
    output_channels: int = 2
    guidance_embedding: str = "none"

    @nn.compact
    def __call__(self, inputs, time, label=None, guidance=None, *, deterministic=True):
        mean = self.param("mean", nn.initializers.zeros, (2,))
        log_std = self.param("log_std", nn.initializers.zeros, (2,))
        angle = (time * (jnp.pi / 2000))[:, None, None, None]
        alpha, variance = jnp.cos(angle), jnp.exp(2 * log_std)
        return mean + alpha * variance * (inputs - alpha * mean) / (alpha**2 * variance + jnp.sin(angle) ** 2)


def denoiser() -> Denoiser:
    """The network above as a denoiser."""
    return Denoiser(GaussianNetwork(), parameterisation.get("x"), 0, SHAPE)


def params(mean, std):
    """Its parameters."""
    return {"mean": jnp.asarray(mean, jnp.float32), "log_std": jnp.log(jnp.asarray(std, jnp.float32))}
