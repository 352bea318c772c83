"""CIFAR-10 at 32x32 within minutes on one GPU: a guided teacher, one w-conditioned student, halved from 32 steps to 1.

    python main.py --config=configs/cifar10_small.py --workdir=runs/cifar10_small --config.data.path=PATH
    python main.py --config=configs/cifar10_small.py:6-minutes --workdir=runs/cifar10_small --config.data.path=PATH

    python main.py --config=configs/cifar10_small.py:edm-10-minutes --workdir=runs/cifar10_edm --config.data.path=PATH

PATH holds what `--mode=prepare` wrote. "edm-" is an EDM teacher of the same network and the one-step generator that
DisBack makes of it; results/run_cifar10_small.py runs both. The variant is a budget: how long the whole run may take,
compilation and evaluation included, on a GPU that trains the teacher with REFERENCE_RATE images a second
(`--mode=benchmark` says what yours does; the time follows in proportion). Stages keep their share of it. Append
"-smoke" for a few tiny updates on
the embedded digits.
"""

import re
from typing import Any

from diffdistill import presets
from diffdistill.config import default_config, smoke

REFERENCE_RATE = 8000  # training images a second of the teacher, for which the minutes hold
# Seconds of compilation and evaluation, whatever the budget. Of one H200 (results/h200): 111 for the teacher's program,
# some 35 for the guided student's, 8 for that of the rounds; evaluation was given 55.
OVERHEAD = 210
# Of an example, in updates of the teacher. By FLOPs both are 5 / 3, two evaluations of the teacher beside the student's
# forward and backward; on H200s two guided students took 2.5 and 2.3, four rounds 2.1 to 2.7.
GUIDED_COST, HALVING_COST = 2.5, 2.2
# Shares of the training time. The rounds to 16, 8 and 4 steps have one part each, those to 2 and 1 two.
TEACHER_SHARE, GUIDED_SHARE, ROUNDS_SHARE, ROUNDS_PARTS = 0.5, 0.18, 0.32, 7
# The same with "edm-": of an example, four evaluations of the fake denoiser beside the generator's sample and gradient
# and two denoisers that judge it; of the path, a sample and the fake denoiser's forward and backward.
DISBACK_COST, PATH_COST = 3.0, 4 / 3
EDM_TEACHER_SHARE, PATH_SHARE, GENERATOR_SHARE = 0.6, 0.06, 0.34


def get_config(variant: str = "25-minutes") -> Any:
    """The settings for a budget: "<minutes>-minutes", such as 4.5, perhaps with "edm-" before and "-smoke" after it."""
    match = re.fullmatch(r"(edm-)?(\d+(?:\.\d+)?)-minutes(-smoke)?", variant)
    seconds = 60 * float(match[2]) - OVERHEAD if match else 0.0
    if not match or seconds <= 0:
        raise ValueError(
            f"configs/cifar10_small.py has no variant {variant!r}; give a budget of more than {OVERHEAD / 60:g} "
            "minutes, such as '25-minutes', '6-minutes' or 'edm-6-minutes', also with '-smoke'."
        )
    config = _edm(seconds) if match[1] else _chain(seconds)
    config.name = f"cifar10_small-{variant}"
    return smoke(config) if match[3] else config


def _base() -> Any:
    """Data, network and teacher that both have in common."""
    config = default_config()
    data, model, teacher = config.data, config.model, config.teacher
    data.source, data.dataset, data.flip = "array_record", "cifar10", True
    data.image_shape, data.num_classes = (32, 32, 3), 10

    model.dtype = "bfloat16"
    model.channels, model.multipliers, model.embedding, model.num_groups = 64, (1, 2, 4), 256, 16
    model.blocks_per_level, model.attention_resolutions, model.head_dim = 2, (8,), 64

    teacher.batch_size, teacher.learning_rate, teacher.warmup_updates = 256, 1e-3, 200
    teacher.ema_decay, teacher.ema_ramp = 0.999, True
    teacher.anneal, teacher.stratified_times = "linear", True

    config.training.save_every = 5000  # a save costs the loop of a GPU some three seconds
    config.sampling.batch_size = 1000
    config.evaluation.num_samples = 2000
    return config


def _chain(seconds: float) -> Any:
    """Teacher, guided student, rounds of halving."""
    config = _base()
    teacher, guided, halving = config.teacher, config.guided, config.progressive
    guided.batch_size, guided.learning_rate = 128, 5e-4
    guided.ema_decay, guided.ema_ramp = 0.99, True
    guided.w_min, guided.w_max = 0.0, 2.0
    halving.batch_size, halving.learning_rate = 128, 3e-4
    halving.start_steps, halving.end_steps = 32, 1
    for stage in (teacher, guided, halving):
        stage.anneal, stage.weight, stage.stratified_times = "linear", "snr_trunc", True

    teacher.num_updates = _updates(seconds * TEACHER_SHARE, teacher.batch_size)
    guided.num_updates = _updates(seconds * GUIDED_SHARE / GUIDED_COST, guided.batch_size)
    halving.num_updates = _updates(seconds * ROUNDS_SHARE / ROUNDS_PARTS / HALVING_COST, halving.batch_size)
    halving.final_num_updates = 2 * halving.num_updates

    config.evaluation.num_steps, config.evaluation.guidance = (1, 4), (0.0, 1.0, 2.0)
    return config


def _edm(seconds: float) -> Any:
    """EDM's teacher, and DisBack from it."""
    config = _base()
    presets.apply(config, "edm")
    teacher, disback = config.teacher, config.disback
    teacher.num_updates = _updates(seconds * EDM_TEACHER_SHARE, teacher.batch_size)
    disback.batch_size, disback.stratified_times = 256, True
    disback.learning_rate = disback.fake_learning_rate = disback.path_learning_rate = 1e-4
    disback.ema_decay, disback.ema_ramp = 0.999, True
    disback.num_updates = _updates(seconds * GENERATOR_SHARE / DISBACK_COST, disback.batch_size)
    disback.path = 5
    disback.interval = _updates(seconds * PATH_SHARE / PATH_COST / disback.path, disback.batch_size)
    # The last target is the teacher itself: it gets half of the updates.
    disback.leg = max(10, disback.num_updates // (2 * disback.path) // 10 * 10)
    disback.keep_every = max(10, disback.num_updates // 8 // 10 * 10)
    config.sampling.sampler = "heun"
    config.evaluation.samplers, config.evaluation.num_steps = ("heun",), (1, 18)
    return config


def _updates(seconds: float, batch_size: int) -> int:
    """Updates of a batch in so many seconds, in whole calls of ten, which is how accelerators run them."""
    return max(1, round(seconds * REFERENCE_RATE / batch_size / 10)) * 10
