"""EDM as published (Karras et al. 2022): the teachers of configurations A to F, sampled with Heun's method.

    python main.py --config=configs/edm.py:cifar10-cond-ddpmpp-F --workdir=runs/edm --config.data.path=PATH

The row is <data set>-<cond|uncond>-<network>-<configuration>, such as ffhq64-uncond-ncsnpp-E or
imagenet64-cond-adm-F. A is the baseline of Song et al. 2021, B adds the training hyper-parameters, C the capacity, D
the preconditioning, E noise distribution and loss weight, F the augmentation (not on ImageNet). PATH holds what
`--mode=prepare` wrote; add --mode=plan to see sizes, memory and FLOPs; append "-smoke" for a few tiny updates on the
embedded digits. A device that cannot hold its share of the published batch takes it in parts:
--config.teacher.parts=8. For a teacher that can be guided and distilled add --config.teacher.label_dropout=0.1.

The paper combines DDPM++ and NCSN++ with A to F, and ADM with the last; ADM in A to C has the preconditioning of iDDPM.
The half-lives of A and its missing ramp-up are recalled, not published.
"""

from typing import Any

from diffdistill import presets
from diffdistill.config import default_config, smoke
from diffdistill.data.augmentation import LABELS

# Image side and number of classes; 0: none.
IMAGES = {"cifar10": (32, 10), "ffhq64": (64, 0), "afhqv2_64": (64, 3), "imagenet64": (64, 1000)}
NETWORKS = {"ddpmpp": ("ddpmpp", "vp"), "ncsnpp": ("ncsnpp", "ve"), "adm": ("edm_adm", "iddpm")}
LETTERS = "ABCDEF"
ROWS = tuple(
    f"{dataset}-{condition}-{network}-{letter}"
    for dataset, (_, classes) in IMAGES.items()
    for condition in (("cond", "uncond") if classes else ("uncond",))
    for network in NETWORKS
    for letter in LETTERS
)


def get_config(row: str = "cifar10-cond-ddpmpp-F") -> Any:
    """The settings of one row of ROWS, each also with "-smoke"."""
    name = row.removesuffix("-smoke")
    if name not in ROWS:
        raise ValueError(
            f"configs/edm.py has no row {row!r}; a row is <{'|'.join(IMAGES)}>-<cond|uncond>-<{'|'.join(NETWORKS)}>-"
            "<A to F>, such as cifar10-cond-ddpmpp-F (FFHQ has no classes), each also with '-smoke'."
        )
    dataset, condition, network, letter = name.split("-")
    config = default_config()
    config.name = f"edm-{row}"
    side, classes = IMAGES[dataset]
    config.data.source, config.data.dataset = "array_record", dataset
    config.data.image_shape, config.data.num_classes = (side, side, 3), classes
    config.model.conditional = condition == "cond"
    config.guided.num_updates = config.progressive.num_updates = 0
    config.teacher.label_dropout = 0.0
    config.training.log_every, config.training.save_every = 1000, 10_000
    _network(config, network, letter, side)
    _training(config, dataset, network, letter)
    _evaluation(config, dataset)
    return smoke(config) if row.endswith("-smoke") else config


def _network(config: Any, network: str, letter: str, side: int) -> None:
    """Architecture, preconditioning, noise and weight of the training."""
    model = config.model
    model.architecture, baseline = NETWORKS[network]
    presets.apply(config, baseline)
    if letter >= "D":
        noise, weight = config.teacher.noise, config.teacher.weight
        presets.apply(config, "edm")
        if letter == "D":
            config.teacher.noise, config.teacher.weight = noise, weight
    if network == "adm":
        model.channels, model.multipliers, model.blocks_per_level = 192, (1, 2, 3, 4), 3
        model.attention_resolutions, model.head_dim = (8, 16, 32), 64
    else:
        model.channels, model.blocks_per_level = 128, 4
        model.attention_resolutions, model.num_heads = (16,), 1
        model.multipliers = (2, 2, 2) if letter >= "C" else (1, 2, 2, 2)
        if side == 64:
            model.multipliers = (1, 2, 2, 2) if letter >= "C" else (1, 1, 2, 2, 2)
    model.embedding = 4 * model.channels


def _training(config: Any, dataset: str, network: str, letter: str) -> None:
    teacher = config.teacher
    teacher.non_finite = "replace"
    images = 2_500_000_000 if dataset == "imagenet64" else 200_000_000
    if letter == "A" and dataset != "imagenet64":
        teacher.batch_size, teacher.learning_rate, teacher.warmup_images = 128, 2e-4, 640_000
        teacher.ema_half_life = 90_000 if network == "ncsnpp" else 890_000
        teacher.gradient_clip, teacher.dropout = 1.0, 0.10
    else:
        batches = {"cifar10": (512, 1e-3), "imagenet64": (4096, 1e-4)}
        teacher.batch_size, teacher.learning_rate = batches.get(dataset, (256, 2e-4))
        teacher.warmup_images, teacher.gradient_clip = 10_000_000, 0.0
        teacher.ema_half_life = 50_000_000 if dataset == "imagenet64" else 500_000
        teacher.ema_ramp_ratio = 0.05
        teacher.dropout = {"cifar10": 0.13, "ffhq64": 0.05, "afhqv2_64": 0.25, "imagenet64": 0.10}[dataset]
    # The reference sums the squares of an image where we take their mean: its gradients are so many times longer.
    values = 3 * IMAGES[dataset][0] ** 2
    teacher.gradient_clip, teacher.adam_eps = teacher.gradient_clip / values, 1e-8 / values
    teacher.num_updates = images // teacher.batch_size
    if letter == "F" and dataset != "imagenet64":
        teacher.augmentation = 0.12 if dataset == "cifar10" else 0.15
        config.model.augmentation_features = LABELS
    config.data.flip = letter < "F" and dataset != "imagenet64"  # the augmentation has flips of its own
    if teacher.batch_size > 512:
        config.training.updates_per_call = 2  # ten such batches would fill a device while they wait


def _evaluation(config: Any, dataset: str) -> None:
    presets.as_published(config, *IMAGES[dataset], "edm")
    config.sampling.batch_size = 500
    config.evaluation.seeds = (0, 50_000, 100_000)  # the paper gives the least of three
