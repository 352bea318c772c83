"""The columns of table 1 of Karras et al. 2022 as changes of a config: VP, VE, iDDPM, EDM.

A preset sets four groups of fields that are independent of one another: the process, the network's preconditioning,
noise and weight of the training, and the sampler. Any of them may be set to something else afterwards.
"""

import math
from typing import Any

from diffdistill.diffusion import names
from diffdistill.diffusion.schedules import VE_SIGMA_MAX
from diffdistill.samplers.heun import TUNED_CHURN
from diffdistill.samplers.sigmas import vp_sigma


def _log_snr(sigma: float) -> float:
    return -2.0 * math.log(sigma)


# Bounds of log-SNR are the levels on which each network is trained; samplers do not leave them. EDM's own time is
# sigma, but halving takes equal steps in time: of those linear in sigma nearly all would lie where all is noise.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "vp": {
        "process": {"schedule": "vp", "log_snr_min": -20.0, "log_snr_max": _log_snr(vp_sigma(1e-5))},
        "model": {"prediction": "vp"},
        "teacher": {"noise": "vp", "weight": "snr"},
        "sampling": {"solver": "euler", "discretisation": "vp", "noise_schedule": "vp", "scaling": "vp"},
    },
    "ve": {
        "process": {"schedule": "ve", "log_snr_min": _log_snr(VE_SIGMA_MAX), "log_snr_max": _log_snr(0.02)},
        "model": {"prediction": "ve"},
        "teacher": {"noise": "ve", "weight": "snr"},
        "sampling": {"solver": "euler", "discretisation": "ve", "noise_schedule": "ve", "scaling": "none"},
    },
    "iddpm": {
        "process": {"schedule": "discrete_cosine", "log_snr_min": -20.0, "log_snr_max": 20.0, "num_train_steps": 1000},
        "model": {"prediction": "iddpm"},
        "teacher": {"noise": "iddpm", "weight": "snr"},
        "sampling": {"solver": "euler", "discretisation": "iddpm", "noise_schedule": "linear", "scaling": "none"},
    },
    "edm": {
        "process": {"schedule": "karras", "log_snr_min": _log_snr(80.0), "log_snr_max": _log_snr(0.002)},
        "model": {"prediction": "edm"},
        "teacher": {"noise": "lognormal", "weight": "edm"},
        "sampling": {"solver": "heun", "discretisation": "edm", "noise_schedule": "linear", "scaling": "none"},
    },
}


def discrete(config: Any, schedule: str, num_train_steps: int = 1000) -> Any:
    """Sets a discrete teacher of the noise with learned variance, as guided-diffusion and P2 have it; returns `config`.

    Args:
      config: a ConfigDict; process, prediction, training noise and sampler are set.
      schedule: linear (Ho et al. 2020) or cosine (Nichol & Dhariwal 2021).
      num_train_steps: T.
    """
    names.choose({"linear": 0, "cosine": 0}, schedule, "discrete schedule")
    config.process.schedule, config.process.num_train_steps = f"discrete_{schedule}", num_train_steps
    config.model.prediction, config.model.learned_variance = {"linear": "ddpm", "cosine": "iddpm"}[schedule], True
    config.teacher.noise, config.teacher.weight = "schedule", "snr"
    config.sampling.sampler, config.sampling.clip, config.sampling.quantisation = "respaced", True, "adm"
    config.evaluation.num_steps = (250,)
    return config


def as_published(config: Any, side: int, num_classes: int, name: str) -> None:
    """Sets sampler and evaluation to those by which the paper's figures of a network were made.

    Args:
      config: a ConfigDict.
      side, num_classes: of its images, pixels and classes; 64 and 1000 is ImageNet-64.
      name: the preset, one of PRESETS.
    """
    sampling, evaluation = config.sampling, config.evaluation
    sampling.sampler, sampling.quantisation = "heun", "edm"
    evaluation.features, evaluation.guidance = "inception", (0.0,)
    evaluation.num_steps = (18,) if side <= 32 else (40,)
    if (side, num_classes) == (64, 1000):
        sampling.sampler, evaluation.num_steps = "churn", (256,)
        sampling.update(TUNED_CHURN["imagenet64-edm" if name == "edm" else "imagenet64-adm"])


def apply(config: Any, name: str) -> Any:
    """Sets the fields of the preset called `name`, one of PRESETS, in a ConfigDict, and returns it.

    The sampler becomes "ablation" with the preset's choices, without clipping, as in the paper. ValueError for an
    unknown name.
    """
    for group, values in names.choose(PRESETS, name, "preset").items():
        config[group].update(values)
    config.sampling.sampler, config.sampling.clip = "ablation", False
    return config
