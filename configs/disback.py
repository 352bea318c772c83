"""DisBack: one-step generators by score distillation along the teacher's path (Zhang et al. 2025), and Diff-Instruct.

    python main.py --config=configs/disback.py:digits --workdir=runs/disback
    python main.py --config=configs/disback.py:cifar10 --workdir=runs/disback_cifar10 --config.data.path=PATH

Rows: digits, fashion (both for a CPU or any GPU), cifar10, ffhq64, imagenet64. Append "-baseline" for Diff-Instruct
(Luo et al. 2023), the same without a path (--config.disback.path=0), and "-smoke" for a few tiny updates on the
embedded digits. The teachers are those of configs/digits.py:edm, configs/fashion_mnist.py and configs/edm.py,
configuration F; an imported one goes on with --config=configs/workdir.py:FOLDER and the fields of config.disback.

Optimiser, training noise, order and averages are Diff-Instruct's. There is no public code of DisBack for these data
sets: the length of the path, its rate and legs, sigma_init of the digits and all numbers of updates are our choice.
"""

from typing import Any

from configs import digits, edm, fashion_mnist
from diffdistill.config import smoke

TEACHERS = {
    "cifar10": "cifar10-uncond-ddpmpp-F",
    "ffhq64": "ffhq64-uncond-ddpmpp-F",
    "imagenet64": "imagenet64-cond-adm-F",
}
ROWS = ("digits", "fashion", *TEACHERS)
VARIANTS = ("", "-baseline", "-smoke", "-baseline-smoke")


def get_config(row: str = "digits") -> Any:
    """The settings of one row of ROWS with one of VARIANTS."""
    name, _, variant = row.partition("-")
    if name not in ROWS or row.removeprefix(name) not in VARIANTS:
        raise ValueError(
            f"configs/disback.py has no row {row!r}; rows: {', '.join(ROWS)}, each also with '-baseline', '-smoke' or "
            "'-baseline-smoke'."
        )
    if name == "digits":
        config = _digits()
    elif name == "fashion":
        config = _fashion()
    else:
        config = _published(name)
    config.name = f"disback-{row}"
    if "baseline" in variant:
        config.disback.path = 0
    return smoke(config) if "smoke" in variant else config


def _digits() -> Any:
    config = digits.get_config("edm")
    config.guided.num_updates = config.progressive.num_updates = 0
    config.evaluation.guidance, config.evaluation.num_steps = (0.0,), (1, 8, 18)
    config.evaluation.samplers = ("heun",)
    disback, teacher = config.disback, config.teacher
    disback.num_updates, disback.batch_size, disback.stratified_times = 2000, 64, True
    disback.learning_rate = disback.fake_learning_rate = disback.path_learning_rate = 3e-4
    disback.fake_updates, disback.ema_decay, disback.ema_ramp = 2, 0.99, True
    disback.sigma_init, disback.path, disback.interval, disback.leg = 2.5, 5, 8, 8
    disback.keep_every = 100
    for levels in (disback.levels, disback.fake_levels):
        levels.p_mean, levels.p_std = teacher.p_mean, teacher.p_std
    return config


def _fashion() -> Any:
    config = fashion_mnist.get_config()
    config.guided.num_updates = config.progressive.num_updates = 0
    config.evaluation.guidance = (0.0,)
    disback = config.disback
    disback.num_updates, disback.batch_size, disback.stratified_times = 20_000, 128, True
    disback.learning_rate = disback.fake_learning_rate = disback.path_learning_rate = 1e-4
    disback.ema_decay, disback.ema_ramp = 0.999, True
    disback.sigma_init, disback.path, disback.interval, disback.leg = 2.5, 10, 100, 100
    disback.keep_every = 2_000
    return config


def _published(name: str) -> Any:
    config = edm.get_config(TEACHERS[name])
    disback = config.disback
    disback.num_updates, disback.batch_size = 50_000, 512 if name == "cifar10" else 256
    disback.ema_half_life, disback.ema_ramp_ratio = 500_000, 0.05
    disback.keep_every = 5_000
    return config
