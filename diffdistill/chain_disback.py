"""Binds the stages of score distillation to their networks, noise levels and optimisers; a part of chain.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from diffdistill.config import DisbackConfig, LevelsConfig
from diffdistill.diffusion import noise
from diffdistill.diffusion.schedules import Schedule
from diffdistill.methods import Method, base, disback, score_distillation, walk
from diffdistill.models.denoiser import Denoiser
from diffdistill.training.state import Updater


def path_settings(settings: DisbackConfig) -> DisbackConfig:
    """The settings of the stage that records the path, out of those of its generator."""
    return dataclasses.replace(
        settings,
        num_updates=settings.path * settings.interval,
        learning_rate=settings.path_learning_rate,
        keep_every=settings.interval,
        **_NO_AVERAGE,
    )


_NO_AVERAGE: dict[str, Any] = {"ema_decay": 0.0, "ema_half_life": 0, "ema_ramp_ratio": 0.0, "ema_half_lives": ()}


def levels_of(levels: LevelsConfig) -> Callable[[jax.Array], jax.Array] | None:
    """A distribution of noise levels as log-SNR of a uniform draw; None where the schedule is to say it."""
    if levels.noise == "schedule":
        return None
    ends = {"sigma_min": levels.sigma_min, "sigma_max": levels.sigma_max}
    own = {
        "lognormal": {"p_mean": levels.p_mean, "p_std": levels.p_std},
        "ve": ends,
        "karras": {**ends, "first": levels.first, "last": levels.last},
    }
    return noise.get(levels.noise, **own.get(levels.noise, {}))


def bind(
    name: str,
    settings: DisbackConfig,
    origin: disback.Origin,
    fake: Denoiser,
    schedule: Schedule,
    weight: Callable[[jax.Array], jax.Array],
    updater: Updater,
) -> Method:
    """The method called `name`: degradation, disback or diff_instruct; `updater` is that of what it exports."""
    levels, fake_levels = (_draws(settings, each, schedule) for each in (settings.levels, settings.fake_levels))
    if name == "degradation":
        return disback.degradation(origin, fake, fake_levels, weight, updater, parts=settings.parts)
    without = {**_NO_AVERAGE, "averages": ()}
    del without["ema_half_lives"]
    fakes = dataclasses.replace(updater.optimization, learning_rate=settings.fake_learning_rate, **without)
    pace = walk.Pace(settings.walk_window, settings.walk_fall, settings.leg) if settings.walk == "adaptive" else None
    return disback.distillation(
        name,
        origin,
        fake,
        score_distillation.get(settings.signal),
        levels,
        fake_levels,
        weight,
        updater,
        Updater(fakes),
        fake_updates=settings.fake_updates,
        fake_first=settings.fake_first,
        pace=pace,
        parts=settings.parts,
    )


def path_loss(
    settings: DisbackConfig,
    origin: disback.Origin,
    schedule: Schedule,
    weight: Callable[[jax.Array], jax.Array],
) -> base.Loss:
    """The loss of a checkpoint of the path, as `degradation` has it but without dropout."""
    return disback.denoising(origin, origin.denoiser, _draws(settings, settings.fake_levels, schedule), weight)


def _draws(settings: DisbackConfig, levels: LevelsConfig, schedule: Schedule) -> disback.Noise:
    """(key, B) -> (B,) log-SNR."""
    quantile, stratified = levels_of(levels), settings.stratified_times

    def draw(key: jax.Array, batch_size: int) -> jax.Array:
        if quantile is None:
            return schedule.log_snr(base.training_times(key, batch_size, schedule, stratified=stratified))
        return quantile(base.uniform(key, batch_size, stratified=stratified))

    return draw
