"""What a run is made of: one frozen dataclass per part, checked as a whole before anything starts.

The fields and defaults stand here alone. Files in ``configs/`` start from :func:`default_config` (the same fields as
an ml-collections ConfigDict, so that ``--config.teacher.batch_size=256`` works) and :func:`resolve` turns the result
back into these dataclasses, which is all that the library sees.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from diffdistill import config_checks, fields
from diffdistill.fields import ConfigError as ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from (see data.sources.open_source)."""

    source: str = "digits"  # digits | idx | images | tfds | array_record | latents
    dataset: str = ""  # what tables of papers call it, such as cifar10; empty: the source
    path: str = ""  # folder, zip, tar or TFDS name; empty for the embedded digits
    split: str = "train"
    image_size: int = 0  # 0: as stored, all alike
    channels: int = 0  # 0: as stored, all alike; 1 or 3 converts
    flip: bool = False  # random horizontal flip
    # What the images of this config are known to be: other images are refused. Empty and 0: whatever the source holds.
    image_shape: tuple[int, ...] = ()
    num_classes: int = 0
    # Of latents: the network sees (latent - latent_shift) * latent_scale; one shift for all channels, or one for each.
    latent_shift: tuple[float, ...] = ()
    latent_scale: float = 1.0


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

    prediction: str = "v"  # x | eps | v | both, or a preconditioning: edm | vp | ve | iddpm | ddpm
    sigma_data: float = 0.5  # standard deviation of the data: of prediction edm and of the loss weight edm
    conditional: bool = True
    # From image to image: what the network is shown beside z. inpainting | super_resolution | colourisation
    image_condition: str = ""
    architecture: str = "unet"  # unet | ddpmpp | ncsnpp | edm_adm
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2)
    embedding: int = 512
    blocks_per_level: int = 2
    attention_resolutions: tuple[int, ...] = (8,)
    num_heads: int = 1  # used where head_dim is 0
    head_dim: int = 0
    num_groups: int = 32  # of ddpmpp, ncsnpp and edm_adm: at most, with four channels each at least
    augmentation_features: int = 0  # length of the augmentation label, of all but unet
    # Empty or 0: the architecture's own.
    encoder: str = ""  # standard | residual | skip, of ddpmpp and ncsnpp
    decoder: str = ""  # standard | skip, of ddpmpp and ncsnpp
    noise_features: int = 0  # width of the embedding of the noise level, of all but unet
    noise_frequencies: tuple[float, ...] = ()  # constants of ncsnpp, noise_features / 2 of them
    dtype: str = "float32"  # compute type; parameters stay float32
    remat: bool = False  # recompute blocks in the backward pass: less memory, about a third more time
    attention: str = "auto"
    learned_variance: bool = False  # C more outputs for the variance of a step, trained by the hybrid loss


@dataclass(frozen=True)
class OptimizationConfig:
    """Optimiser and length of a stage."""

    num_updates: int = 0
    batch_size: int = 128
    learning_rate: float = 2e-4
    parts: int = 1  # equal parts of a batch whose gradients are averaged: less memory, the same update in expectation
    warmup_updates: int = 0
    warmup_images: int = 0  # instead of warmup_updates: linear from 0 at the first update
    anneal: Literal["constant", "linear"] = "constant"  # constant | linear (to zero at the end of the stage)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    adam_b1: float = 0.9
    adam_eps: float = 1e-8
    ema_decay: float = 0.0  # 0: no average
    ema_ramp: bool = False  # decay min(ema_decay, (1 + n) / (10 + n)) at update n, for short runs
    ema_half_life: int = 0  # images, instead of ema_decay
    ema_ramp_ratio: float = 0.0  # the half-lives are at most this share of the images seen; 0: no bound
    ema_half_lives: tuple[int, ...] = ()  # images; of further averages; see sampling.average
    non_finite: Literal["stop", "replace"] = "stop"  # replace: gradients that are NaN count as 0, as in EDM
    dropout: float = 0.0
    weight: str = "snr_trunc"
    weight_k: float = 1.0  # of p2: SNR / (k + SNR)^gamma
    weight_gamma: float = 1.0  # of p2
    weight_g: float = 0.0  # bound of min_snr, max_snr and soft_min_snr; 0: their own
    weight_shift: float = 2.0  # of sigmoid
    weight_normalised: bool = False  # divided by its mean, as a factor on the error of the noise
    stratified_times: bool = False


@dataclass(frozen=True)
class TeacherConfig(OptimizationConfig):
    """Training on data."""

    label_dropout: float = 0.1
    augmentation: float = 0.0  # probability of EDM's augmentations (data.augmentation); 0: none, not even flips
    # How noisy the examples are: as the schedule at uniform t, or, whatever the schedule: lognormal | vp | ve | iddpm.
    noise: str = "schedule"
    p_mean: float = -1.2  # of lognormal: ln s is normal with this mean and p_std, s = sigma / alpha
    p_std: float = 1.2
    noise_sigma_min: float = 0.02  # of ve and karras: from and to
    noise_sigma_max: float = 100.0
    importance_sampling: bool = False  # of the steps of a discrete schedule, by their losses so far


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
    # Share of the examples on which the unconditional model is distilled: students that two branches can guide, the
    # baseline of Meng et al. 2023. Not with a w-conditioned student.
    label_dropout: float = 0.0


@dataclass(frozen=True)
class EncoderConfig(ProgressiveConfig):
    """Rounds of halving of the encoder, from data to noise; num_updates = 0 leaves them out."""

    weight: str = "snr_plus_one"


@dataclass(frozen=True)
class LevelsConfig:
    """The distribution of noise levels s = sigma / alpha (see diffusion.noise)."""

    noise: str = "lognormal"  # schedule (at uniform t) | lognormal | karras | vp | ve | iddpm
    p_mean: float = -1.2  # of lognormal
    p_std: float = 1.2
    sigma_min: float = 0.002  # of karras and ve
    sigma_max: float = 80.0
    first: float = 0.0  # of karras: the part of the way from sigma_min to sigma_max
    last: float = 1.0


@dataclass(frozen=True)
class DisbackConfig(OptimizationConfig):
    """A one-step generator by score distillation: DisBack, or, without a path, Diff-Instruct; 0 updates leave it out.

    The fields of every stage are the generator's; batch size and parts are also those of the other two networks.
    """

    learning_rate: float = 1e-5
    gradient_clip: float = 0.0
    adam_b1: float = 0.0
    weight: str = "edm"  # of the losses by which denoisers learn the generator's samples
    signal: str = "diff_instruct"  # diff_instruct | dmd2 | sid (methods.score_distillation)
    start: Literal["teacher", "student"] = "teacher"  # student: the progressive chain's of one step, with sigma_init=0
    sigma_init: float = 1.0  # noise level of the generator's input; 0: the end of the process, t = 1
    guidance: tuple[float, ...] = ()  # w or (w_min, w_max) of a w-conditioned teacher; empty: all that it knows
    path: int = 10  # checkpoints of the degradation; 0: Diff-Instruct
    interval: int = 100  # updates of the degradation between two of them
    path_learning_rate: float = 1e-5
    path_share: float = 0.0  # targets are apart by this share of their loss on the first generator's samples; 0: all
    leg: int = 100  # updates of the generator for each target but the last, the teacher
    walk: Literal["fixed", "adaptive"] = "fixed"  # adaptive: a target is left, at most after leg updates, as soon as
    walk_window: int = 20  # the mismatch of so many updates
    walk_fall: float = 0.02  # is not by this share below that of so many before
    fake_learning_rate: float = 1e-5
    fake_updates: int = 1  # of the fake denoiser, for one of the generator
    fake_first: bool = True
    levels: LevelsConfig = field(default_factory=LevelsConfig)  # at which the generator is judged
    fake_levels: LevelsConfig = field(default_factory=LevelsConfig)  # on which the other two learn
    keep_every: int = 0  # checkpoints of the generator at multiples of it all stay; 0: as training.keep says


@dataclass(frozen=True)
class TrainingConfig:
    """How stages are run."""

    updates_per_call: int = 0  # 0: 10 on accelerators, 1 on CPUs, whose loops are slow
    log_every: int = 50
    save_every: int = 1000
    keep: int = 2  # checkpoints kept per stage
    shard_state: bool = False  # spread optimiser state and averages over the devices, for networks that need the memory


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of --mode=sample and of the evaluation."""

    sampler: str = "ddim"
    batch_size: int = 250
    clip: bool = True
    average: int = 0  # of stages with ema_half_lives, the one to use; 0: ema_decay's or ema_half_life's
    variance_fraction: float = 0.0  # of the ancestral sampler: 0 small, 1 large variance
    # edm: to the nearest byte; adm: truncated, as papers that evaluate with ADM do; none: float32, of latents
    quantisation: str = "edm"
    # Of euler, heun, churn and ablation: noise levels s = sigma / alpha from sigma_max to sigma_min (0: the published
    # ends), spread by rho, never beyond what the process has; alpha of steps of second order (1 Heun, 1/2 midpoint).
    sigma_min: float = 0.0
    sigma_max: float = 0.0
    rho: float = 7.0
    alpha: float = 1.0
    # Of churn: heun.TUNED_CHURN holds the published choices.
    s_churn: float = 40.0
    s_tmin: float = 0.05
    s_tmax: float = 50.0
    s_noise: float = 1.003
    # Of ablation.
    solver: str = "heun"  # euler | heun
    discretisation: str = "edm"  # edm | vp | ve | iddpm
    noise_schedule: str = "linear"  # linear | vp | ve
    scaling: str = "none"  # none | vp


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
    # Style transfers of runs with encoder stages, such as "3 to 8": images of one class, by number or name, to another.
    transfers: tuple[str, ...] = ()
    bits_images: int = 0  # of the data, whose bits per dimension by a discrete teacher are computed, all steps of it
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
    stochastic: ProgressiveConfig = field(default_factory=ProgressiveConfig)  # students of the stochastic sampler
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    disback: DisbackConfig = field(default_factory=DisbackConfig)
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
    model.num_heads, model.head_dim, model.noise_features, model.noise_frequencies = 1, 0, 0, ()
    for stage in (config.teacher, config.guided, config.progressive, config.stochastic, config.encoder, config.disback):
        stage.num_updates, stage.batch_size = min(stage.num_updates, 6), 16
        stage.warmup_updates = min(stage.warmup_updates, 2)
    for halving in (config.progressive, config.stochastic, config.encoder):
        halving.start_steps, halving.end_steps, halving.final_num_updates = 4, 1, 0
    disback = config.disback
    disback.path, disback.interval, disback.leg, disback.walk_window = min(disback.path, 2), 2, 2, 1
    disback.keep_every = min(disback.keep_every, 3)
    config.training = ConfigDict({"updates_per_call": 2, "log_every": 2, "save_every": 3, "keep": 1})
    config.sampling.batch_size = 50
    # Domain features: nothing has to be fetched.
    kept = {"guidance": config.evaluation.guidance[:2], "transfers": config.evaluation.transfers}
    config.evaluation = ConfigDict(dataclasses.asdict(EvaluationConfig(num_samples=50, num_steps=(1, 2), **kept)))
    return config


def resolve(settings: Any) -> Config:
    """Turns nested settings (a ConfigDict or plain dicts) into a checked Config.

    Raises:
      ConfigError: an unknown field, a value of the wrong type or out of range, or choices that exclude each other.
    """
    if hasattr(settings, "to_dict"):
        settings = settings.to_dict()
    config = fields.build(Config, settings, "config")
    config_checks.check(config)
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
