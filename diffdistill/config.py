"""What a run is made of: one frozen dataclass per part, checked as a whole before anything starts.

The fields and defaults stand here alone. Files in ``configs/`` start from :func:`default_config` (the same fields as
an ml-collections ConfigDict, so that ``--config.teacher.batch_size=256`` works) and :func:`resolve` turns the result
back into these dataclasses, which is all that the library sees.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from diffdistill import fields
from diffdistill.diffusion import parameterisation, schedules, weighting
from diffdistill.evaluation.protocols import PROTOCOLS, QUANTISATIONS
from diffdistill.fields import ConfigError
from diffdistill.samplers import SAMPLERS


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from (see data.sources.open_source)."""

    source: str = "digits"  # digits | idx | images | tfds | array_record
    dataset: str = ""  # what tables of papers call it, such as cifar10; empty: the source
    path: str = ""  # folder, zip, tar or TFDS name; empty for the embedded digits
    split: str = "train"
    image_size: int = 0  # 0: as stored, all alike
    channels: int = 0  # 0: as stored, all alike; 1 or 3 converts
    flip: bool = False  # random horizontal flip
    # What the images of this config are known to be: other images are refused. Empty and 0: whatever the source holds.
    image_shape: tuple[int, ...] = ()
    num_classes: int = 0


@dataclass(frozen=True)
class ProcessConfig:
    """Log-SNR as a function of t."""

    schedule: str = "cosine"
    log_snr_min: float = -20.0
    log_snr_max: float = 20.0
    num_train_steps: int = 1000  # of discrete schedules


@dataclass(frozen=True)
class ModelConfig:
    """The network and what it predicts."""

    prediction: str = "v"  # x | eps | v | both | edm
    conditional: bool = True
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2)
    embedding: int = 512
    blocks_per_level: int = 2
    attention_resolutions: tuple[int, ...] = (8,)
    num_heads: int = 1  # used where head_dim is 0
    head_dim: int = 0
    num_groups: int = 32
    dtype: str = "float32"  # compute type; parameters stay float32
    remat: bool = False  # recompute blocks in the backward pass: less memory, about a third more time
    attention: str = "auto"


@dataclass(frozen=True)
class OptimizationConfig:
    """Optimiser and length of a stage."""

    num_updates: int = 0
    batch_size: int = 128
    learning_rate: float = 2e-4
    warmup_updates: int = 0
    anneal: Literal["constant", "linear"] = "constant"  # constant | linear (to zero at the end of the stage)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.0  # 0: no average
    ema_ramp: bool = False  # decay min(ema_decay, (1 + n) / (10 + n)) at update n, for short runs
    dropout: float = 0.0
    weight: str = "snr_trunc"
    stratified_times: bool = False


@dataclass(frozen=True)
class TeacherConfig(OptimizationConfig):
    """Training on data."""

    label_dropout: float = 0.1


@dataclass(frozen=True)
class GuidedConfig(OptimizationConfig):
    """One w-conditioned student of the guided teacher; num_updates = 0 leaves the stage out."""

    w_min: float = 0.0
    w_max: float = 4.0
    w_embedding: str = "mapped"  # mapped: arctan(exp(-w/2)) / (pi/2) before the sinusoid; raw: w itself


@dataclass(frozen=True)
class ProgressiveConfig(OptimizationConfig):
    """Rounds of halving from start_steps (the first teacher's) down to end_steps (the last student's)."""

    start_steps: int = 1024
    end_steps: int = 1
    final_num_updates: int = 0  # updates of the rounds to 2 and to 1 step; 0: as the others


@dataclass(frozen=True)
class TrainingConfig:
    """How stages are run."""

    updates_per_call: int = 0  # 0: 10 on accelerators, 1 on CPUs, whose loops are slow
    log_every: int = 50
    save_every: int = 1000
    keep: int = 2  # checkpoints kept per stage


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of --mode=sample and of the evaluation."""

    sampler: str = "ddim"
    batch_size: int = 250
    clip: bool = True
    variance_fraction: float = 0.0  # of the ancestral sampler: 0 small, 1 large variance
    # edm: to the nearest byte; adm: truncated, as in the papers that evaluate with ADM's code
    quantisation: str = "edm"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured after the chain: every stage x steps x sampler x w x seed of the lists."""

    # domain: features of a small classifier of the same data, for small images. inception: FID and its relatives.
    features: Literal["domain", "inception"] = "domain"
    num_samples: int = 50_000  # 0 leaves the evaluation out
    stages: tuple[str, ...] = ()  # empty: every finished one
    num_steps: tuple[int, ...] = (1, 2, 4, 8)  # of models tied to no number of steps; students have their own
    samplers: tuple[str, ...] = ()  # empty: sampling.sampler
    guidance: tuple[float, ...] = (0.0, 1.0, 4.0)
    seeds: tuple[int, ...] = ()  # numbers of the first image, one measurement each; empty: a million times the seed
    grid_columns: int = 10
    # The rest concerns inception features.
    protocol: str = "tf"  # tf | pytorch-fid | clean: how images are resized
    reference: str = ""  # file of reference statistics; empty: computed from the run's data
    reference_protocol: str = ""  # protocol of a reference file that does not say it itself
    reference_images: int = 0  # of the run's data, thinned out evenly; 0: all
    inception_sha256: str = ""  # accepts weights other than the published ones, by their hash
    reservoir: int = 10_000  # samples whose features are kept, for KID, precision and recall


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "unnamed"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    guided: GuidedConfig = field(default_factory=GuidedConfig)
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def default_config() -> Any:
    """The defaults as an ml-collections ConfigDict, for files in configs/ to change."""
    return ConfigDict(dataclasses.asdict(Config()))


def smoke(config: Any) -> Any:
    """A few tiny updates of the same stages on the embedded digits: seconds, not days. Changes and returns `config`."""
    config.data = ConfigDict(dataclasses.asdict(DataConfig(flip=config.data.flip)))
    model = config.model
    model.channels, model.embedding, model.num_groups, model.blocks_per_level = 8, 16, 4, 1
    model.multipliers, model.attention_resolutions, model.dtype = (1, 2), (4,), "float32"
    model.num_heads, model.head_dim = 1, 0
    for stage in (config.teacher, config.guided, config.progressive):
        stage.num_updates, stage.batch_size = min(stage.num_updates, 6), 16
        stage.warmup_updates = min(stage.warmup_updates, 2)
    config.progressive.start_steps, config.progressive.end_steps, config.progressive.final_num_updates = 4, 1, 0
    config.training = ConfigDict({"updates_per_call": 2, "log_every": 2, "save_every": 3, "keep": 1})
    config.sampling.batch_size = 50
    # Domain features: nothing has to be fetched.
    config.evaluation = ConfigDict(dataclasses.asdict(EvaluationConfig(num_samples=50, num_steps=(1, 2))))
    config.evaluation.guidance = (0.0, 1.0)
    return config


def resolve(settings: Any) -> Config:
    """Turns nested settings (a ConfigDict or plain dicts) into a checked Config.

    Raises:
      ConfigError: an unknown field, a value of the wrong type or out of range, or choices that exclude each other.
    """
    if hasattr(settings, "to_dict"):
        settings = settings.to_dict()
    config = fields.build(Config, settings, "config")
    _check(config)
    return config


def expected(path: str) -> str:
    """What a field holds, in words: expected("teacher.batch_size") is "a whole number".

    Raises:
      ConfigError: there is no such field.
    """
    kind, where = Config, "config"
    for name in path.split("."):
        if not dataclasses.is_dataclass(kind):
            raise ConfigError(f"config.{path} is not a field: {where} is {fields.expected(kind)}.")
        kind, where = fields.kind_of(kind, name.partition("[")[0], where), f"{where}.{name}"
    return fields.expected(kind)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values that json can write."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _check(config: Config) -> None:
    _check_names(config)
    _check_ranges(config)
    _check_combinations(config)


def _check_names(config: Config) -> None:
    fields.one_of("config.data.source", config.data.source, ["digits", "idx", "images", "tfds", "array_record"])
    fields.one_of("config.process.schedule", config.process.schedule, list(schedules.SCHEDULES))
    fields.one_of("config.model.prediction", config.model.prediction, list(parameterisation.PARAMETERISATIONS))
    fields.one_of("config.model.dtype", config.model.dtype, ["float32", "bfloat16"])
    fields.one_of("config.model.attention", config.model.attention, ["auto", "xla", "cudnn"])
    fields.one_of("config.guided.w_embedding", config.guided.w_embedding, ["mapped", "raw"])
    fields.one_of("config.sampling.sampler", config.sampling.sampler, list(SAMPLERS))
    fields.one_of("config.sampling.quantisation", config.sampling.quantisation, list(QUANTISATIONS))
    for index, sampler in enumerate(config.evaluation.samplers):
        fields.one_of(f"config.evaluation.samplers[{index}]", sampler, list(SAMPLERS))
    fields.one_of("config.evaluation.protocol", config.evaluation.protocol, list(PROTOCOLS))
    if config.evaluation.reference_protocol:
        fields.one_of("config.evaluation.reference_protocol", config.evaluation.reference_protocol, list(PROTOCOLS))
    for name in ("teacher", "guided", "progressive"):
        stage: OptimizationConfig = getattr(config, name)
        fields.one_of(f"config.{name}.weight", stage.weight, list(weighting.WEIGHTS))


def _check_ranges(config: Config) -> None:
    def least(where: str, value: float, low: float, high: float = float("inf")) -> None:
        if not low <= value <= high:
            bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise ConfigError(f"{where} is {value!r}, but must be {bound}.")

    for name in ("teacher", "guided", "progressive"):
        stage: OptimizationConfig = getattr(config, name)
        where = f"config.{name}"
        least(f"{where}.num_updates", stage.num_updates, 1 if name == "teacher" else 0)
        least(f"{where}.batch_size", stage.batch_size, 1)
        least(f"{where}.learning_rate", stage.learning_rate, 1e-12)
        least(f"{where}.warmup_updates", stage.warmup_updates, 0)
        least(f"{where}.weight_decay", stage.weight_decay, 0.0)
        least(f"{where}.gradient_clip", stage.gradient_clip, 0.0)
        least(f"{where}.dropout", stage.dropout, 0.0, 0.999)
        least(f"{where}.ema_decay", stage.ema_decay, 0.0, 0.999999)
    least("config.teacher.label_dropout", config.teacher.label_dropout, 0.0, 1.0)
    least("config.progressive.final_num_updates", config.progressive.final_num_updates, 0)
    least("config.process.num_train_steps", config.process.num_train_steps, 2)
    for name in ("log_every", "save_every", "keep"):
        least(f"config.training.{name}", getattr(config.training, name), 1)
    least("config.training.updates_per_call", config.training.updates_per_call, 0)
    least("config.sampling.batch_size", config.sampling.batch_size, 1)
    least("config.sampling.variance_fraction", config.sampling.variance_fraction, 0.0, 1.0)
    least("config.evaluation.num_samples", config.evaluation.num_samples, 0)
    least("config.evaluation.reference_images", config.evaluation.reference_images, 0)
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
    for name in ("channels", "embedding", "blocks_per_level", "num_groups"):
        least(f"config.model.{name}", getattr(config.model, name), 1)
    least("config.data.image_size", config.data.image_size, 0)
    least("config.data.channels", config.data.channels, 0)
    least("config.seed", config.seed, 0)
    if config.evaluation.num_samples == 1:
        raise ConfigError("config.evaluation.num_samples is 1, but a distance needs 2 or more; 0 leaves it out.")
    if config.evaluation.reference_images == 1:
        raise ConfigError("config.evaluation.reference_images is 1, but statistics need 2 or more; 0 takes all.")
    try:
        process = config.process
        schedules.get(
            process.schedule,
            log_snr_min=process.log_snr_min,
            log_snr_max=process.log_snr_max,
            num_train_steps=process.num_train_steps,
        )
    except ValueError as error:
        raise ConfigError(f"config.process: {error}") from error


def _check_combinations(config: Config) -> None:
    model, guided, progressive = config.model, config.guided, config.progressive
    if not model.multipliers:
        raise ConfigError("config.model.multipliers is empty: it needs one entry per resolution, such as (1, 2).")
    for multiplier in model.multipliers:
        if model.channels * multiplier % model.num_groups:
            raise ConfigError(
                f"config.model.channels x multiplier = {model.channels * multiplier} cannot be split into "
                f"config.model.num_groups = {model.num_groups} groups of equal size."
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
                "Set it to 0.1, or config.guided.num_updates=0."
            )
        if guided.w_min > guided.w_max:
            raise ConfigError(f"config.guided.w_min ({guided.w_min}) is above config.guided.w_max ({guided.w_max}).")
    if progressive.num_updates:
        _check_halving(config)
    if config.data.source == "digits" and config.data.path:
        raise ConfigError(
            f"config.data.path is {config.data.path!r}, but the digits are embedded in the package. "
            "Set config.data.source to idx, images, tfds or array_record to read a path."
        )
    if len(config.data.image_shape) not in (0, 3):
        raise ConfigError(
            f"config.data.image_shape is {config.data.image_shape}, but must be (height, width, channels) or ()."
        )


def _check_halving(config: Config) -> None:
    start, end = config.progressive.start_steps, config.progressive.end_steps
    ratio = start // end if end > 0 and start % end == 0 else 0
    if end < 1 or ratio < 2 or ratio & (ratio - 1):
        raise ConfigError(
            f"config.progressive.start_steps ({start}) must be end_steps ({end}) doubled once or more, such as "
            "1024 and 1: every round halves the number of steps."
        )
    discrete = config.process.schedule.startswith("discrete")
    if discrete and config.process.num_train_steps % start:
        raise ConfigError(
            f"config.process.num_train_steps ({config.process.num_train_steps}) is not a multiple of "
            f"config.progressive.start_steps ({start}): the times of the sampler would not be times of the teacher."
        )
    at_noise = float(weighting.get(config.progressive.weight)(config.process.log_snr_min))
    if at_noise < 1e-3:
        raise ConfigError(
            f"config.progressive.weight={config.progressive.weight!r} is {at_noise:.2g} at t = 1, where every student "
            "takes its first step and the student of one step its only one: it would not learn. Use a weight that does "
            "not vanish with the signal: snr_trunc, snr_plus_one, constant or edm."
        )
    if config.model.prediction == "eps":
        raise ConfigError(
            "config.model.prediction='eps' cannot be distilled progressively: towards zero signal-to-noise the output "
            "no longer determines x (Salimans & Ho 2022, section 4). Use 'v', 'x' or 'both', or set "
            "config.progressive.num_updates=0 to train the teacher alone."
        )
