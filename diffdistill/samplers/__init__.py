"""Samplers: flat functions of a denoiser, all called alike and found by name.

sample(denoise, z, schedule, num_steps, *, keys, clip, **settings) -> images, with settings of its own per sampler.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from diffdistill.diffusion import names
from diffdistill.samplers import ancestral, ddim, heun, one_step, respaced, stochastic

SAMPLERS: dict[str, Callable[..., Array]] = {
    "ddim": ddim.sample,
    "ancestral": ancestral.sample,
    "stochastic": stochastic.sample,
    "respaced": respaced.ancestral,
    "respaced_ddim": respaced.ddim,
    "euler": heun.euler,
    "heun": heun.sample,
    "churn": heun.churn,
    "ablation": heun.ablation,
    "one_step": one_step.sample,
}
SCHEDULED = ("ddim", "ancestral")  # which step along the schedule's own times, as distillation by halving does
STOCHASTIC = ("ancestral", "stochastic", "respaced", "churn")  # whose images depend on more than their initial noise
LEARNED_VARIANCE = ("ancestral", "respaced")  # whose steps have the variance that a network has learnt
FIXED_STEPS = tuple(respaced.INDICES)  # which need their number of steps as a plain number
_SOLVERS = {"heun": "heun", "churn": "heun"}  # of a fixed second order


def get(name: str) -> Callable[..., Array]:
    """Returns the sampler called `name`, one of SAMPLERS; an unknown name is a ValueError that lists the known ones."""
    return names.choose(SAMPLERS, name, "sampler")


def settings_of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of `values` that the sampler called `name` takes as settings of its own; the rest is another's."""
    parameters = inspect.signature(get(name)).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("keys", "clip")]
    return {setting: values[setting] for setting in own if setting in values}


def num_evaluations(name: str, num_steps: int, settings: Mapping[str, Any] | None = None) -> int:
    """Returns how often the sampler called `name` evaluates the denoiser in `num_steps` steps with these settings."""
    get(name)
    solver = (settings or {}).get("solver", "heun") if name == "ablation" else _SOLVERS.get(name, "euler")
    return int(names.choose(heun.EVALUATIONS, solver, "solver")(num_steps))
