"""Samplers: flat functions of a denoiser, all called alike and found by name.

sample(denoise, z, schedule, num_steps, *, keys, clip, **settings) -> images, with settings of its own per sampler.
"""

from collections.abc import Callable

from jax import Array

from diffdistill.diffusion import names
from diffdistill.samplers import ancestral, ddim

SAMPLERS: dict[str, Callable[..., Array]] = {"ddim": ddim.sample, "ancestral": ancestral.sample}


def get(name: str) -> Callable[..., Array]:
    """Returns the sampler called `name`, one of SAMPLERS; an unknown name is a ValueError that lists the known ones."""
    return names.choose(SAMPLERS, name, "sampler")
