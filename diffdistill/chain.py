"""The plan of a run: the stages of a config, in order, as data; and what each stage binds together.

A plan is a tuple of :class:`Stage`. Adding a distillation method means one file in ``methods`` and one entry here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from diffdistill import chain_disback
from diffdistill.config import (
    Config,
    DisbackConfig,
    GuidedConfig,
    LevelsConfig,
    ModelConfig,
    OptimizationConfig,
    ProcessConfig,
    ProgressiveConfig,
    TeacherConfig,
)
from diffdistill.data import augmentation
from diffdistill.diffusion import conditioning, parameterisation, schedules, weighting
from diffdistill.diffusion.schedules import Schedule
from diffdistill.methods import Method, base, disback
from diffdistill.methods.encoder import encoder_halving
from diffdistill.methods.guided import distillation
from diffdistill.methods.progressive import halving
from diffdistill.methods.teacher import teacher
from diffdistill.models import architectures
from diffdistill.models.denoiser import Denoiser
from diffdistill.samplers import one_step
from diffdistill.training.state import Optimization, Updater

_MEAN_POINTS = 100_000  # noise levels over which a weight is averaged: whole multiples of the usual tables


@dataclass(frozen=True)
class Stage:
    """One training run of a chain.

    Attributes:
      name: also its folder in the workdir.
      method: teacher, guided, progressive, stochastic, encoder, degradation, disback or diff_instruct.
      teacher: the name of the earlier stage that it learns from; empty for a stage that learns from data alone.
      num_steps: sampler steps of the student; 0 where the model is not tied to a number of steps.
      num_updates, settings: its length and its part of the config.
      conditioned_on_guidance: whether the network has an embedding of w.
      generator: of score distillation, the name of the earlier stage that is the generator at first.
      path: of a generator, the name of the stage whose checkpoints are its targets before the teacher.
    """

    name: str
    method: str
    teacher: str
    num_steps: int
    num_updates: int
    settings: OptimizationConfig
    conditioned_on_guidance: bool
    generator: str = ""
    path: str = ""

    @property
    def group(self) -> str:
        """The name of its part of the config."""
        return "disback" if isinstance(self.settings, DisbackConfig) else self.method


@dataclass(frozen=True)
class DataFacts:
    """What networks need to know of the data."""

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] = ()
    latents: bool = False  # floating-point arrays, not bytes of pixels


def plan(config: Config) -> tuple[Stage, ...]:
    """The stages of a config: teacher, guided student, rounds of each kind of halving, then a one-step generator."""
    stages = [Stage("teacher", "teacher", "", 0, config.teacher.num_updates, config.teacher, False)]
    guided = config.guided.num_updates > 0
    if guided:
        stages.append(Stage("guided", "guided", "teacher", 0, config.guided.num_updates, config.guided, True))
    first = stages[-1].name
    stages += _rounds("round", "progressive", config.progressive, first, guided)
    stages += _rounds("stochastic", "stochastic", config.stochastic, first, guided)
    stages += _rounds("encoder", "encoder", config.encoder, first, guided)
    student = next((stage.name for stage in stages if stage.method == "progressive" and stage.num_steps == 1), "")
    stages += _one_step(config.disback, first, student, guided)
    return tuple(stages)


def _one_step(settings: DisbackConfig, teacher: str, student: str, guided: bool) -> Iterator[Stage]:
    if not settings.num_updates:
        return
    generator = student if settings.start == "student" else teacher
    method = "disback" if settings.path else "diff_instruct"
    if settings.path:
        path = chain_disback.path_settings(settings)
        yield Stage("degradation", "degradation", teacher, 0, path.num_updates, path, guided, generator)
    path_name = "degradation" if settings.path else ""
    yield Stage("one_step", method, teacher, 1, settings.num_updates, settings, guided, generator, path_name)


def _rounds(prefix: str, method: str, settings: ProgressiveConfig, teacher: str, guided: bool) -> Iterator[Stage]:
    if not settings.num_updates:
        return
    num_steps = settings.start_steps // 2
    # The last evaluation of the stochastic sampler is a plain step to data: in one step there is nothing to learn that
    # the student of two steps does not know.
    end_steps = max(settings.end_steps, 2) if method == "stochastic" else settings.end_steps
    for index in range((settings.start_steps // end_steps).bit_length() - 1):
        updates = settings.num_updates
        if num_steps <= 2 and settings.final_num_updates:
            updates = settings.final_num_updates
        name = f"{prefix}_{index:02d}_steps_{num_steps:04d}"
        yield Stage(name, method, teacher, num_steps, updates, settings, guided)
        teacher = name
        num_steps //= 2


def full_steps(config: Config) -> int:
    """The number of steps at which models that are tied to none (teacher, guided student) count as sampled in full."""
    for settings in (config.progressive, config.stochastic, config.encoder):
        if settings.num_updates > 0:
            return settings.start_steps
    return max(config.evaluation.num_steps, default=256)


def guidance_range(config: Config, stage: Stage) -> tuple[float, float] | None:
    """(w_min, w_max) of a stage with an embedding of w; None for any other."""
    if stage.conditioned_on_guidance and isinstance(stage.settings, DisbackConfig) and stage.settings.guidance:
        return stage.settings.guidance[0], stage.settings.guidance[-1]
    return (config.guided.w_min, config.guided.w_max) if stage.conditioned_on_guidance else None


def has_null_class(config: Config, stage: Stage) -> bool:
    """Whether a stage has learnt the unconditional model beside the conditional one, so that two branches guide it."""
    dropout = getattr(stage.settings, "label_dropout", 0.0)
    return config.model.conditional and not stage.conditioned_on_guidance and dropout > 0


@functools.cache
def schedule_of(process: ProcessConfig) -> Schedule:
    """The noise schedule of a config; the same object for equal settings, so that it can key compiled programs."""
    return schedules.get(
        process.schedule,
        log_snr_min=process.log_snr_min,
        log_snr_max=process.log_snr_max,
        num_train_steps=process.num_train_steps,
    )


@functools.cache
def sampling_schedule_of(process: ProcessConfig, prediction: str) -> Schedule:
    """The schedule as samplers see it: noise levels are those of the network's own table where it has one."""
    schedule = schedule_of(process)
    if prediction not in parameterisation.TABLES or schedule.num_train_steps is not None:
        return schedule
    table = schedules.get(parameterisation.TABLES[prediction], num_train_steps=process.num_train_steps)
    return dataclasses.replace(schedule, nearest_sigma=table.nearest_sigma)


def denoiser_of(config: Config, stage: Stage, facts: DataFacts, *, dropout: float = 0.0) -> Denoiser:
    """The denoiser that a stage trains; network and output are the same in every stage but for the w branch."""
    embedding = config.guided.w_embedding if stage.conditioned_on_guidance else "none"
    return _denoiser(config.model, embedding, facts, dropout, config.process.num_train_steps)


@functools.cache
def _denoiser(
    model: ModelConfig, guidance_embedding: str, facts: DataFacts, dropout: float, num_train_steps: int
) -> Denoiser:
    table = {"num_train_steps": num_train_steps} if model.prediction in parameterisation.TABLES else {}
    output = parameterisation.get(model.prediction, **_sigma_data(model.prediction, model), **table)
    if model.learned_variance:
        output = parameterisation.with_variance(output)
    num_classes = facts.num_classes if model.conditional else 0
    network = architectures.build(
        model.architecture,
        channels=model.channels,
        multipliers=model.multipliers,
        embedding=model.embedding,
        output_channels=output.output_channels(facts.image_shape[-1]),
        blocks_per_level=model.blocks_per_level,
        attention_resolutions=model.attention_resolutions,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        dropout=dropout,
        num_classes=num_classes,
        guidance_embedding=guidance_embedding,
        augmentation_features=model.augmentation_features,
        encoder=model.encoder,
        decoder=model.decoder,
        noise_features=model.noise_features,
        noise_frequencies=model.noise_frequencies,
        num_groups=model.num_groups,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        attention=model.attention,
    )
    return Denoiser(network, output, num_classes, facts.image_shape, conditioning.get(model.image_condition))


def weight_of(model: ModelConfig, name: str, **settings: Any) -> Callable[[jax.Array], jax.Array]:
    """The loss weight called `name`, told the standard deviation of the data where it asks for it."""
    return weighting.get(name, **_sigma_data(name, model), **settings)


def weight_settings(settings: OptimizationConfig) -> dict[str, float]:
    """What the weight of a stage takes beside the noise level, such as k and gamma of p2."""
    values = {"k": settings.weight_k, "gamma": settings.weight_gamma, "shift": settings.weight_shift}
    values |= {"g": settings.weight_g} if settings.weight_g else {}
    return weighting.settings_of(settings.weight, values)


def stage_weight(config: Config, settings: OptimizationConfig) -> Callable[[jax.Array], jax.Array]:
    """The loss weight of a stage with all that its part of the config says of it."""
    schedule = schedule_of(config.process)
    own: dict[str, Any] = weight_settings(settings)
    if weighting.per_unit_log_snr(settings.weight):
        own["rate"] = schedules.rate(schedule)
    weight = weight_of(config.model, settings.weight, **own)
    if not settings.weight_normalised:
        return weight
    draws = (jnp.arange(_MEAN_POINTS) + 0.5) / _MEAN_POINTS
    drawn = None
    if isinstance(settings, TeacherConfig):
        drawn = noise_of(settings)
    elif isinstance(settings, DisbackConfig):
        drawn = chain_disback.levels_of(settings.fake_levels)
    levels = drawn(draws) if drawn else schedule.log_snr(base.times(draws, schedule))
    return weighting.normalised(weight, levels)


def _sigma_data(name: str, model: ModelConfig) -> dict[str, float]:
    return {"sigma_data": model.sigma_data} if name == "edm" else {}


def noise_of(settings: TeacherConfig) -> Callable[[jax.Array], jax.Array] | None:
    """The distribution of the noise that a teacher trains on; None where its schedule is to say it."""
    return chain_disback.levels_of(
        LevelsConfig(
            settings.noise, settings.p_mean, settings.p_std, settings.noise_sigma_min, settings.noise_sigma_max
        )
    )


def updater_of(stage: Stage) -> Updater:
    """Optimiser and average of the parameters of a stage."""
    settings = stage.settings
    return Updater(
        Optimization(
            learning_rate=settings.learning_rate,
            warmup_updates=settings.warmup_updates or settings.warmup_images / settings.batch_size,
            warmup_from_zero=settings.warmup_images > 0,
            anneal=settings.anneal,
            weight_decay=settings.weight_decay,
            gradient_clip=settings.gradient_clip,
            b1=settings.adam_b1,
            eps=settings.adam_eps,
            ema_decay=settings.ema_decay,
            ema_ramp=settings.ema_ramp,
            ema_half_life=settings.ema_half_life / settings.batch_size,
            ema_ramp_ratio=settings.ema_ramp_ratio,
            averages=tuple((str(life), life / settings.batch_size) for life in settings.ema_half_lives),
            replace_non_finite=settings.non_finite == "replace",
        )
    )


def method_of(config: Config, stage: Stage, facts: DataFacts) -> Method:
    """Binds a stage's method to its networks, schedule, weight and optimiser.

    Rounds of one chain get the SAME method object (number of steps, number of updates and teacher are arguments of
    its step), so that whoever compiles per method compiles once per chain.
    """
    return _method(config, _anonymous(stage), facts)


def _anonymous(stage: Stage) -> Stage:
    return Stage("", stage.method, "", 0, 0, stage.settings, stage.conditioned_on_guidance)


def origin_of(config: Config, stage: Stage, facts: DataFacts) -> disback.Origin:
    """How the generator of a stage of score distillation makes its samples."""
    with jax.ensure_compile_time_eval():
        log_snr = float(one_step.log_snr_of(config.disback.sigma_init, schedule_of(config.process)))
    return disback.Origin(denoiser_of(config, stage, facts), log_snr, guidance_range(config, stage))


def path_loss(config: Config, stage: Stage, facts: DataFacts) -> base.Loss:
    """The loss of a checkpoint of the path of a generator's stage: (params, {"generator": params}, batch, key, {})."""
    settings = stage.settings
    assert isinstance(settings, DisbackConfig)
    weight = stage_weight(config, settings)
    return chain_disback.path_loss(settings, origin_of(config, stage, facts), schedule_of(config.process), weight)


@functools.lru_cache(maxsize=8)
def _method(config: Config, stage: Stage, facts: DataFacts) -> Method:
    settings = stage.settings
    if isinstance(settings, DisbackConfig):
        return chain_disback.bind(
            stage.method,
            settings,
            origin_of(config, stage, facts),
            denoiser_of(config, stage, facts, dropout=settings.dropout),
            schedule_of(config.process),
            stage_weight(config, settings),
            updater_of(stage),
        )
    denoiser = denoiser_of(config, stage, facts, dropout=settings.dropout)
    schedule = schedule_of(config.process)
    weight, updater = stage_weight(config, settings), updater_of(stage)
    common: dict[str, Any] = {"stratified": settings.stratified_times, "parts": settings.parts}
    if isinstance(settings, TeacherConfig):
        common |= {"label_dropout": settings.label_dropout, "noise": noise_of(settings)}
        common["importance_sampling"] = settings.importance_sampling
        if settings.augmentation:
            common["augment"] = functools.partial(augmentation.augment, probability=settings.augmentation)
        return teacher(denoiser, schedule, weight, updater, **common)
    if isinstance(settings, GuidedConfig):
        teacher_network = _denoiser(config.model, "none", facts, 0.0, config.process.num_train_steps)
        return distillation(
            denoiser, teacher_network, schedule, weight, updater, w_min=settings.w_min, w_max=settings.w_max, **common
        )
    if stage.method == "encoder":
        return encoder_halving(
            denoiser, schedule, weight, updater, guidance_range=guidance_range(config, stage), **common
        )
    assert isinstance(settings, ProgressiveConfig)
    common |= {"stochastic": stage.method == "stochastic", "label_dropout": settings.label_dropout}
    return halving(denoiser, schedule, weight, updater, guidance_range=guidance_range(config, stage), **common)
