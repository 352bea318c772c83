"""What is refused in the part of a config that makes a one-step generator; a part of config_checks.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffdistill import fields
from diffdistill.diffusion import noise
from diffdistill.fields import ConfigError
from diffdistill.methods import score_distillation

if TYPE_CHECKING:
    from diffdistill.config import Config


def check(config: Config) -> None:
    """Raises ConfigError for a name that is not known, a number out of its range, choices that exclude each other."""
    settings = config.disback
    fields.one_of("config.disback.signal", settings.signal, list(score_distillation.SIGNALS))
    for name in ("path", "sigma_init", "keep_every"):
        _least(name, getattr(settings, name), 0)
    for name in ("path_share", "walk_fall"):
        _least(name, getattr(settings, name), 0.0, 0.999)
    for name in ("interval", "leg", "fake_updates", "walk_window"):
        _least(name, getattr(settings, name), 1)
    for name in ("path_learning_rate", "fake_learning_rate"):
        _least(name, getattr(settings, name), 1e-12)
    for where, levels in (("levels", settings.levels), ("fake_levels", settings.fake_levels)):
        fields.one_of(f"config.disback.{where}.noise", levels.noise, ["schedule", *noise.NOISES])
        _least(f"{where}.p_std", levels.p_std, 1e-6)
        _least(f"{where}.sigma_min", levels.sigma_min, 1e-12, levels.sigma_max)
        _least(f"{where}.first", levels.first, 0.0, levels.last)
        _least(f"{where}.last", levels.last, levels.first, 1.0)
    if settings.num_updates:
        _check_start(config)
        _check_guidance(config)


def _least(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"config.disback.{name} is {value!r}, but must be {bound}.")


def _check_start(config: Config) -> None:
    settings, halving = config.disback, config.progressive
    if settings.num_updates <= (settings.path - 1) * settings.leg:
        raise ConfigError(
            f"config.disback.num_updates ({settings.num_updates}) ends before the path does: with {settings.path} "
            f"checkpoints and legs of {settings.leg} updates the teacher comes after "
            f"{(settings.path - 1) * settings.leg}. Give more updates, a shorter path or shorter legs."
        )
    if settings.walk == "adaptive" and settings.leg % settings.walk_window:
        raise ConfigError(
            f"config.disback.leg ({settings.leg}), after which an adaptive walk leaves a target in any case, is not a "
            f"multiple of config.disback.walk_window ({settings.walk_window}), after which it looks."
        )
    one_step = halving.num_updates and halving.end_steps == 1
    if settings.start == "student" and (not one_step or settings.sigma_init):
        raise ConfigError(
            "config.disback.start='student' begins with the progressive chain's student of one step, which knows the "
            "noise at t = 1: set config.progressive.num_updates, config.progressive.end_steps=1 and "
            "config.disback.sigma_init=0; or start='teacher'."
        )
    low, high = (math.exp(-0.5 * bound) for bound in (config.process.log_snr_max, config.process.log_snr_min))
    if settings.sigma_init and not 0.999 * low <= settings.sigma_init <= 1.001 * high:
        raise ConfigError(
            f"config.disback.sigma_init is {settings.sigma_init}, but the noise levels of config.process run from "
            f"{low:.3g} to {high:.3g}; 0 takes the last."
        )
    if not settings.sigma_init and config.model.prediction in ("eps", "vp", "ve", "iddpm"):
        raise ConfigError(
            f"config.disback.sigma_init=0 asks config.model.prediction={config.model.prediction!r} for an image at the "
            "end of the process, where the noise that it predicts no longer determines one. Give a noise level, such "
            "as 2.5."
        )


def _check_guidance(config: Config) -> None:
    weights, guided = config.disback.guidance, config.guided
    if not weights:
        return
    known = guided.num_updates and guided.w_min <= weights[0] <= weights[-1] <= guided.w_max
    if len(weights) > 2 or not known:
        raise ConfigError(
            f"config.disback.guidance is {weights}, but must be (w,) or (w_min, w_max) within what config.guided "
            "distils, whose num_updates has to be positive. Leave it empty for all of that, or for a teacher without "
            "guidance."
        )
