"""The quick start: a guided teacher of 8x8 handwritten digits, one w-conditioned student, rounds of halving to 1 step.

    python main.py
    python main.py --mode=run --config=configs/digits.py --workdir=runs/digits

The data set is embedded in the package. Append ":smoke" for the same stages with a few tiny updates (a minute).
"""

from typing import Any

from diffdistill.config import default_config, smoke


def get_config(variant: str = "") -> Any:
    """The settings; variant "smoke" for a few tiny updates."""
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/digits.py has no variant {variant!r}; there is 'smoke'.")
    config = default_config()
    config.name = "digits-smoke" if variant else "digits"

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
    return smoke(config) if variant else config
