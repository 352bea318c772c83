"""What is refused in a config before anything starts; each message says which field, what it is and what it may be."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from diffdistill import config_checks_bounds, config_checks_disback, fields
from diffdistill.data.augmentation import LABELS as AUGMENTATION_FEATURES
from diffdistill.diffusion import conditioning, noise, parameterisation, schedules, weighting
from diffdistill.evaluation.protocols import PROTOCOLS, QUANTISATIONS
from diffdistill.fields import ConfigError
from diffdistill.models import architectures, song_unet
from diffdistill.samplers import SAMPLERS, heun, respaced, sigmas

STAGES = ("teacher", "guided", "progressive", "stochastic", "encoder", "disback")
HALVINGS = ("progressive", "stochastic", "encoder")

if TYPE_CHECKING:
    from diffdistill.config import Config, ModelConfig, OptimizationConfig, ProgressiveConfig


def check(config: Config) -> None:
    """Raises ConfigError for a name that is not known, a number out of its range, choices that exclude each other."""
    config_checks_bounds.check(config)  # before anything is computed with the numbers
    _check_names(config)
    _check_ranges(config)
    _check_combinations(config)
    config_checks_disback.check(config)


def _check_names(config: Config) -> None:
    fields.one_of(
        "config.data.source", config.data.source, ["digits", "idx", "images", "tfds", "array_record", "latents"]
    )
    fields.one_of("config.process.schedule", config.process.schedule, list(schedules.SCHEDULES))
    fields.one_of("config.model.prediction", config.model.prediction, list(parameterisation.PARAMETERISATIONS))
    _check_architecture(config.model)
    fields.one_of("config.model.image_condition", config.model.image_condition, ["", *conditioning.TASKS])
    fields.one_of("config.model.dtype", config.model.dtype, ["float32", "bfloat16"])
    fields.one_of("config.model.attention", config.model.attention, ["auto", "xla", "cudnn"])
    fields.one_of("config.guided.w_embedding", config.guided.w_embedding, ["mapped", "raw"])
    fields.one_of("config.sampling.sampler", config.sampling.sampler, list(SAMPLERS))
    fields.one_of("config.sampling.quantisation", config.sampling.quantisation, [*QUANTISATIONS, "none"])
    for index, sampler in enumerate(config.evaluation.samplers):
        fields.one_of(f"config.evaluation.samplers[{index}]", sampler, list(SAMPLERS))
    fields.one_of("config.evaluation.protocol", config.evaluation.protocol, list(PROTOCOLS))
    if config.evaluation.reference_protocol:
        fields.one_of("config.evaluation.reference_protocol", config.evaluation.reference_protocol, list(PROTOCOLS))
    fields.one_of("config.sampling.solver", config.sampling.solver, list(heun.EVALUATIONS))
    fields.one_of("config.sampling.discretisation", config.sampling.discretisation, list(sigmas.DISCRETISATIONS))
    fields.one_of("config.sampling.noise_schedule", config.sampling.noise_schedule, list(sigmas.PATHS))
    fields.one_of("config.sampling.scaling", config.sampling.scaling, list(sigmas.SCALINGS))
    fields.one_of("config.teacher.noise", config.teacher.noise, ["schedule", *noise.NOISES])
    for name in STAGES:
        stage: OptimizationConfig = getattr(config, name)
        fields.one_of(f"config.{name}.weight", stage.weight, list(weighting.WEIGHTS))


def _check_architecture(model: ModelConfig) -> None:
    fields.one_of("config.model.architecture", model.architecture, list(architectures.ARCHITECTURES))
    fields.one_of("config.model.encoder", model.encoder, ["", *song_unet.ENCODERS])
    fields.one_of("config.model.decoder", model.decoder, ["", *song_unet.DECODERS])
    try:
        architectures.check(model.architecture, dataclasses.asdict(model))
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error
    needed = model.noise_features or 2 * model.channels
    if model.noise_frequencies and 2 * len(model.noise_frequencies) != needed:
        raise ConfigError(
            f"config.model.noise_frequencies has {len(model.noise_frequencies)} entries, but must have half as many as "
            f"the embedding of the noise level has features, {needed / 2:g}; leave it empty for the built-in draw."
        )


def _check_ranges(config: Config) -> None:
    def least(where: str, value: float, low: float, high: float = float("inf")) -> None:
        if not low <= value <= high:
            bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise ConfigError(f"{where} is {value!r}, but must be {bound}.")

    for name in STAGES:
        stage: OptimizationConfig = getattr(config, name)
        where = f"config.{name}"
        least(f"{where}.num_updates", stage.num_updates, 1 if name == "teacher" else 0)
        least(f"{where}.batch_size", stage.batch_size, 1)
        least(f"{where}.learning_rate", stage.learning_rate, 1e-12)
        least(f"{where}.parts", stage.parts, 1)
        for field_name in ("warmup_updates", "warmup_images", "ema_half_life", "ema_ramp_ratio"):
            least(f"{where}.{field_name}", getattr(stage, field_name), 0)
        least(f"{where}.weight_decay", stage.weight_decay, 0.0)
        least(f"{where}.gradient_clip", stage.gradient_clip, 0.0)
        least(f"{where}.adam_b1", stage.adam_b1, 0.0, 0.999999)
        least(f"{where}.adam_eps", stage.adam_eps, 1e-30)
        least(f"{where}.dropout", stage.dropout, 0.0, 0.999)
        least(f"{where}.ema_decay", stage.ema_decay, 0.0, 0.999999)
        for field_name in ("weight_k", "weight_gamma", "weight_g"):
            least(f"{where}.{field_name}", getattr(stage, field_name), 0.0)
    least("config.teacher.augmentation", config.teacher.augmentation, 0.0, 1.0)
    least("config.teacher.label_dropout", config.teacher.label_dropout, 0.0, 0.999)
    for name in HALVINGS:
        least(f"config.{name}.final_num_updates", getattr(config, name).final_num_updates, 0)
        least(f"config.{name}.label_dropout", getattr(config, name).label_dropout, 0.0, 0.999)
    least("config.process.num_train_steps", config.process.num_train_steps, 2)
    for name in ("log_every", "save_every", "keep"):
        least(f"config.training.{name}", getattr(config.training, name), 1)
    least("config.training.updates_per_call", config.training.updates_per_call, 0)
    least("config.sampling.batch_size", config.sampling.batch_size, 1)
    kept = sorted({life for name in STAGES for life in getattr(config, name).ema_half_lives})
    if config.sampling.average and config.sampling.average not in kept:
        raise ConfigError(
            f"config.sampling.average is {config.sampling.average}, but the averages that stages keep beside the usual "
            f"one, ema_half_lives, are {kept or 'none'}."
        )
    least("config.sampling.variance_fraction", config.sampling.variance_fraction, 0.0, 1.0)
    for name in ("sigma_min", "sigma_max", "s_churn", "s_tmin", "s_tmax", "s_noise"):
        least(f"config.sampling.{name}", getattr(config.sampling, name), 0.0)
    least("config.sampling.rho", config.sampling.rho, 1.0)
    least("config.sampling.alpha", config.sampling.alpha, 0.01, 1.0)
    least("config.teacher.p_std", config.teacher.p_std, 1e-6)
    least("config.teacher.noise_sigma_min", config.teacher.noise_sigma_min, 1e-12, config.teacher.noise_sigma_max)
    least("config.model.sigma_data", config.model.sigma_data, 1e-12)
    least("config.evaluation.num_samples", config.evaluation.num_samples, 0)
    least("config.evaluation.reference_images", config.evaluation.reference_images, 0)
    least("config.evaluation.bits_images", config.evaluation.bits_images, 0)
    least("config.evaluation.reservoir", config.evaluation.reservoir, 2)
    for index, seed in enumerate(config.evaluation.seeds):
        least(f"config.evaluation.seeds[{index}]", seed, 0, 2**31 - 1 - config.evaluation.num_samples)
    seeds = sorted(config.evaluation.seeds)
    for one, other in itertools.pairwise(seeds):
        if other - one < config.evaluation.num_samples:
            raise ConfigError(
                f"config.evaluation.seeds {config.evaluation.seeds} are numbers of first images, but {one} and {other} "
                f"are less than config.evaluation.num_samples = {config.evaluation.num_samples} apart: "
                "they would share images."
            )
    for index, steps in enumerate(config.evaluation.num_steps):
        least(f"config.evaluation.num_steps[{index}]", steps, 1)
    for name in ("augmentation_features", "noise_features"):
        least(f"config.model.{name}", getattr(config.model, name), 0)
    least("config.data.image_size", config.data.image_size, 0)
    least("config.data.channels", config.data.channels, 0)
    least("config.seed", config.seed, 0)
    if config.evaluation.num_samples == 1:
        raise ConfigError("config.evaluation.num_samples is 1, but a distance needs 2 or more; 0 leaves it out.")
    if config.evaluation.reference_images == 1:
        raise ConfigError("config.evaluation.reference_images is 1, but statistics need 2 or more; 0 takes all.")
    try:
        process = config.process
        schedule = schedules.get(
            process.schedule,
            log_snr_min=process.log_snr_min,
            log_snr_max=process.log_snr_max,
            num_train_steps=process.num_train_steps,
        )
        if table := parameterisation.TABLES.get(config.model.prediction):
            schedules.get(table, num_train_steps=process.num_train_steps)
    except ValueError as error:
        raise ConfigError(f"config.process: {error}") from error
    _check_respaced(config, schedule)
    sampling = config.sampling
    try:
        for name in ("edm", sampling.discretisation):  # whichever sampler the command line then asks for
            low, high = sigmas.sigma_range(schedule, name, sampling.sigma_min, sampling.sigma_max)
            sigmas.DISCRETISATIONS[name].make(low, high, sampling.rho)
    except ValueError as error:
        raise ConfigError(f"config.sampling: {error}.") from error


def _check_respaced(config: Config, schedule: schedules.Schedule) -> None:
    """Refuses respaced samplers that a schedule cannot have before anything is trained."""
    evaluation, sampling = config.evaluation, config.sampling
    # Domain features measure the teacher at the length of its chain, too.
    chains = [getattr(config, name) for name in HALVINGS] if evaluation.features == "domain" else []
    asked = (*evaluation.num_steps, *(halving.start_steps for halving in chains if halving.num_updates))
    for name in evaluation.samplers or (sampling.sampler,):
        for steps in asked if name in respaced.INDICES else ():
            try:
                respaced.check(name, schedule, steps)
            except ValueError as error:
                raise ConfigError(f"config.evaluation.num_steps: {error}.") from error


def _check_combinations(config: Config) -> None:
    model, guided = config.model, config.guided
    for name in STAGES:
        _check_stage(f"config.{name}", getattr(config, name))
    if not model.multipliers:
        raise ConfigError("config.model.multipliers is empty: it needs one entry per resolution, such as (1, 2).")
    for multiplier in model.multipliers if model.architecture == "unet" else ():
        if model.channels * multiplier % model.num_groups:
            raise ConfigError(
                f"config.model.channels x multiplier = {model.channels * multiplier} cannot be split into "
                f"config.model.num_groups = {model.num_groups} groups of equal size."
            )
    if config.teacher.augmentation and model.augmentation_features != AUGMENTATION_FEATURES:
        raise ConfigError(
            f"config.teacher.augmentation is {config.teacher.augmentation}, but config.model.augmentation_features is "
            f"{model.augmentation_features}: the network has to be told what was done to its images. Set "
            f"augmentation_features={AUGMENTATION_FEATURES} with an architecture that takes it, or augmentation=0."
        )
    for name, wanted in (
        ("model.learned_variance", model.learned_variance),
        ("teacher.importance_sampling", config.teacher.importance_sampling),
    ):
        if wanted and (not config.process.schedule.startswith("discrete") or config.teacher.noise != "schedule"):
            raise ConfigError(
                f"config.{name} needs the steps of a discrete schedule, drawn at random, but config.process.schedule "
                f"is {config.process.schedule!r} and config.teacher.noise {config.teacher.noise!r}. Set them to "
                "discrete_linear or discrete_cosine and to schedule."
            )
    if guided.num_updates:
        if not model.conditional:
            raise ConfigError(
                "config.guided.num_updates is positive, but config.model.conditional is False: guidance needs classes. "
                "Set config.model.conditional=True, or config.guided.num_updates=0 to distil without guidance."
            )
        if config.teacher.label_dropout == 0.0:
            raise ConfigError(
                "config.guided needs a teacher with a null class, but config.teacher.label_dropout is 0. "
                "Train the teacher with 0.1 (published ones were trained without), or set config.guided.num_updates=0."
            )
        if guided.w_min > guided.w_max:
            raise ConfigError(f"config.guided.w_min ({guided.w_min}) is above config.guided.w_max ({guided.w_max}).")
    if config.encoder.label_dropout:
        raise ConfigError("config.encoder.label_dropout must be 0: encoders are told the class of every image.")
    for name in HALVINGS:
        stage: ProgressiveConfig = getattr(config, name)
        if stage.num_updates and stage.label_dropout and (guided.num_updates or not config.teacher.label_dropout):
            why = "the students are w-conditioned" if guided.num_updates else "config.teacher.label_dropout is 0"
            raise ConfigError(
                f"config.{name}.label_dropout is {stage.label_dropout}, but {why}: it distils the null class of a "
                "teacher for guidance by two branches. Set it to 0."
            )
        if getattr(config, name).num_updates:
            _check_halving(config, name)
    if model.image_condition and config.encoder.num_updates:
        raise ConfigError(
            "config.model.image_condition and config.encoder exclude each other: what is shown of an image would be "
            "encoded too. Set config.encoder.num_updates=0."
        )
    if config.sampling.quantisation == "none" and config.evaluation.num_samples:
        raise ConfigError(
            "config.sampling.quantisation is 'none', but figures are of images made of bytes. Set 'edm' or 'adm', or "
            "--config.evaluation.num_samples=0."
        )
    for text in config.evaluation.transfers:
        if " to " not in text:
            raise ConfigError(f"config.evaluation.transfers has {text!r}, but a transfer reads as in '3 to 8'.")
        if not (model.conditional and config.encoder.num_updates and config.progressive.num_updates):
            raise ConfigError(
                f"config.evaluation.transfers has {text!r}, which needs classes, encoder stages and decoder stages: "
                "config.model.conditional, config.encoder.num_updates and config.progressive.num_updates."
            )
        if guided.num_updates and not guided.w_min <= 0.0 <= guided.w_max:
            raise ConfigError(
                f"config.evaluation.transfers has {text!r}: images are encoded without guidance, but the students know "
                f"w from {guided.w_min} to {guided.w_max} alone. Let config.guided.w_min be 0."
            )
        if config.sampling.quantisation == "none":
            raise ConfigError(
                f"config.evaluation.transfers has {text!r}, which makes images of bytes. Set "
                "config.sampling.quantisation to 'edm' or 'adm'."
            )
    if config.data.source == "digits" and config.data.path:
        raise ConfigError(
            f"config.data.path is {config.data.path!r}, but the digits are embedded in the package. "
            "Set config.data.source to idx, images, tfds, array_record or latents to read a path."
        )
    if not config.data.latent_scale > 0:
        raise ConfigError(f"config.data.latent_scale is {config.data.latent_scale}, but must be positive.")
    if len(config.data.image_shape) not in (0, 3):
        raise ConfigError(
            f"config.data.image_shape is {config.data.image_shape}, but must be (height, width, channels) or ()."
        )


def _check_stage(where: str, stage: OptimizationConfig) -> None:
    if stage.batch_size % stage.parts:
        raise ConfigError(
            f"{where}.batch_size ({stage.batch_size}) cannot be split into {where}.parts = {stage.parts} equal parts."
        )
    for one, other in (("warmup_updates", "warmup_images"), ("ema_decay", "ema_half_life")):
        if getattr(stage, one) and getattr(stage, other):
            raise ConfigError(f"{where}.{one} and {where}.{other} exclude each other: set one of them to 0.")
    if stage.ema_ramp_ratio and not (stage.ema_half_life or stage.ema_half_lives):
        raise ConfigError(f"{where}.ema_ramp_ratio bounds {where}.ema_half_life, which is 0: set both or none.")
    lives = stage.ema_half_lives
    if any(life < 1 for life in lives) or len(set(lives)) < len(lives):
        raise ConfigError(f"{where}.ema_half_lives is {lives}, but must be different numbers of images, at least 1.")


def _check_halving(config: Config, name: str) -> None:
    stage: ProgressiveConfig = getattr(config, name)
    start, end = stage.start_steps, stage.end_steps
    ratio = start // end if end > 0 and start % end == 0 else 0
    if end < 1 or ratio < 2 or ratio & (ratio - 1):
        raise ConfigError(
            f"config.{name}.start_steps ({start}) must be end_steps ({end}) doubled once or more, such as "
            "1024 and 1: every round halves the number of steps."
        )
    discrete = config.process.schedule.startswith("discrete")
    if discrete and config.process.num_train_steps < start:
        raise ConfigError(
            f"config.process.num_train_steps ({config.process.num_train_steps}) is less than "
            f"config.{name}.start_steps ({start}): a discrete teacher has no more steps than it was trained on."
        )
    own = weighting.settings_of(stage.weight, {"k": stage.weight_k, "gamma": stage.weight_gamma})
    at_noise = float(weighting.get(stage.weight, **own)(config.process.log_snr_min))
    if at_noise < 1e-3 and name != "encoder":  # which is never evaluated at t = 1
        raise ConfigError(
            f"config.{name}.weight={stage.weight!r} is {at_noise:.2g} at t = 1, where every student "
            "takes its first step and the student of one step its only one: it would not learn. Use a weight that does "
            "not vanish with the signal: snr_trunc, snr_plus_one, constant or edm."
        )
    if config.model.prediction in ("eps", "vp", "ve", *parameterisation.TABLES):
        raise ConfigError(
            f"config.model.prediction={config.model.prediction!r} cannot be distilled progressively: the network "
            "predicts the noise, and towards zero signal-to-noise this no longer determines x (Salimans & Ho 2022, "
            f"section 4). Use 'v', 'x', 'both' or 'edm', or set config.{name}.num_updates=0 to train the teacher alone."
        )
