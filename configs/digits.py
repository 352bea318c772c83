"""The quick start: a guided teacher of 8x8 handwritten digits, one w-conditioned student, rounds of halving to 1 step.

    python main.py
    python main.py --mode=run --config=configs/digits.py --workdir=runs/digits

The data set is embedded in the package. Append ":smoke" for the same stages with a few tiny updates (a minute), or
one of the variants, each also with "-smoke":

    :edm         the same networks and updates with EDM's preconditioning, training noise, loss weight and samplers
    :full        besides, students of the stochastic sampler, distilled encoders, and style transfer in the report
    :single-<w>  baseline of Meng et al. 2023: one student for one guidance weight
    :separate    baseline: the conditional and the unconditional model distilled without w (in one network, as the
                 teacher has them) and combined by two evaluations a step
"""

from typing import Any

from diffdistill import presets
from diffdistill.config import default_config, smoke

VARIANTS = ("", "edm", "full", "separate", "single-0", "single-1", "single-2")


def get_config(variant: str = "") -> Any:
    """The settings of one of VARIANTS, each also with "-smoke" ("smoke" for the first)."""
    whole = variant.removesuffix("smoke").removesuffix("-")
    if whole not in VARIANTS or variant.endswith("-"):
        raise ValueError(
            f"configs/digits.py has no variant {variant!r}; there are {', '.join(VARIANTS[1:])}, each also with "
            "'-smoke', and 'smoke'."
        )
    config = default_config()
    config.name = f"digits-{variant}" if variant else "digits"

    model, teacher, guided, halving = config.model, config.teacher, config.guided, config.progressive
    model.channels, model.multipliers, model.embedding, model.num_groups = 32, (1, 2), 128, 8
    model.blocks_per_level, model.attention_resolutions = 1, ()

    teacher.num_updates, teacher.learning_rate, teacher.warmup_updates = 1500, 2e-3, 50
    teacher.ema_decay, teacher.ema_ramp = 0.99, True
    guided.num_updates, guided.learning_rate = 800, 2e-3
    guided.ema_decay, guided.ema_ramp = 0.95, True
    guided.w_min, guided.w_max = 0.0, 2.0  # [0, 4] learns w = 0 more slowly
    halving.num_updates, halving.learning_rate = 320, 1e-3
    halving.start_steps, halving.end_steps = 32, 1
    for stage in (teacher, guided, halving):
        stage.batch_size, stage.anneal, stage.weight = 64, "linear", "snr_trunc"
        stage.stratified_times = True

    config.training.save_every = 200
    config.evaluation.num_samples, config.evaluation.guidance = 1000, (0.0, 1.0, 2.0)
    if whole == "edm":
        _edm(config)
    elif whole == "full":
        config.stochastic.update(halving)
        config.encoder.update({**halving, "weight": config.encoder.weight})
        config.evaluation.transfers = ("3 to 8", "9 to 4")
    elif whole == "separate":
        guided.num_updates, halving.label_dropout = 0, 0.5
    elif whole:
        guided.w_min = guided.w_max = float(whole.removeprefix("single-"))
        config.evaluation.guidance = (guided.w_min,)
    return smoke(config) if variant.endswith("smoke") else config


def _edm(config: Any) -> None:
    """EDM's recipe, with the noise levels that --mode=noise-levels proposes for these images."""
    presets.apply(config, "edm")
    config.model.sigma_data = 0.752
    config.teacher.p_mean, config.teacher.p_std = -0.81, 0.93
    config.process.log_snr_min, config.process.log_snr_max = -4.53, 6.763  # sigma from 0.034 to 9.63
    config.sampling.sampler = "heun"
    config.evaluation.samplers, config.evaluation.num_steps = ("ddim", "euler", "heun"), (1, 2, 4, 8, 18)
    config.evaluation.guidance = (0.0, 1.0)
