"""P2 as published (Choi et al. 2022): baseline and perception-prioritised teachers on six sets of images at 256 pixels.

    python main.py --config=configs/p2.py:ffhq-linear-0.5 --workdir=runs/p2 --config.data.path=PATH

The row is <data set>-<linear|cosine>-<gamma>; gamma 0 is the baseline. PATH holds what `--mode=prepare` wrote at 256
pixels; add --mode=plan to see sizes, memory and FLOPs; append "-smoke" for a few tiny updates on the embedded digits.
--config.teacher.parts=2 takes each batch of 8 in two halves where a device cannot hold it. FID is measured by the
protocol "clean" against all images of the set, with 50,000 samples of 250 steps; KID is there for the small sets.

The same comparison on small images, with the network and the training of configs/digits.py, minutes on CPU cores:
digits-<schedule>-<gamma> (8x8, embedded) and fashion-<schedule>-<gamma> (Fashion-MNIST at 16x16, with
--config.data.path=FOLDER of the IDX files). results/p2_table.py runs all of them. digits-chain-<gamma> trains a
discrete teacher of v with the P2 weight and halves it down to one step.

How long each published model was trained is not known here: 2,400,000 updates of 8 images are a choice.
"""

from typing import Any

from configs import digits
from diffdistill import presets
from diffdistill.config import default_config, smoke

DATASETS = {  # names of rows and, at 256 pixels, of the tables of published figures
    "ffhq": "ffhq256",
    "celebahq": "celebahq256",
    "cub": "cub256",
    "afhq-dog": "afhq_dog256",
    "flowers": "flowers256",
    "metfaces": "metfaces256",
}
SMALL = ("digits", "fashion")
SCHEDULES, GAMMAS = ("linear", "cosine"), ("0", "0.5", "1")
ROWS = (
    *(f"{name}-{schedule}-{gamma}" for name in (*DATASETS, *SMALL) for schedule in SCHEDULES for gamma in GAMMAS),
    *(f"digits-chain-{gamma}" for gamma in GAMMAS),
)


def get_config(row: str = "ffhq-linear-0.5") -> Any:
    """The settings of one row of ROWS, each also with "-smoke"."""
    whole = row.removesuffix("-smoke")
    if whole not in ROWS:
        raise ValueError(
            f"configs/p2.py has no row {row!r}; a row is <{'|'.join((*DATASETS, *SMALL))}>-<linear|cosine>-<0|0.5|1>, "
            "such as ffhq-linear-0.5, or digits-chain-<0|0.5|1>, each also with '-smoke'."
        )
    name, schedule, gamma = whole.rsplit("-", 2)
    config = digits.get_config() if name in SMALL else default_config()
    config.name = f"p2-{row}"
    if schedule == "chain":
        config.process.schedule = "discrete_cosine"
    else:
        presets.discrete(config, schedule)
        config.guided.num_updates = config.progressive.num_updates = 0
        config.evaluation.guidance = (0.0,)
        if name in SMALL:
            _small(config, name)
        else:
            _published(config, name)
    config.teacher.weight, config.teacher.weight_k, config.teacher.weight_gamma = "p2", 1.0, float(gamma)
    return smoke(config) if row.endswith("-smoke") else config


def _small(config: Any, name: str) -> None:
    """Without classes, as the paper trains."""
    if name == "fashion":
        config.data.source, config.data.image_size, config.data.flip = "idx", 16, True
    config.model.conditional, config.teacher.label_dropout = False, 0.0
    config.sampling.quantisation = "edm"
    config.evaluation.num_steps = (10, 25, 100, 250)
    config.evaluation.samplers = ("respaced", "respaced_ddim")


def _published(config: Any, name: str) -> None:
    """The light ADM: one residual block per level, attention at 16x16 and in the middle."""
    data, model, teacher = config.data, config.model, config.teacher
    data.source, data.dataset, data.flip = "array_record", DATASETS[name], True
    data.image_shape, data.num_classes = (256, 256, 3), 0
    model.conditional, model.architecture = False, "edm_adm"
    model.channels, model.multipliers, model.embedding = 128, (1, 1, 2, 2, 4, 4), 512
    model.blocks_per_level, model.attention_resolutions, model.head_dim = 1, (16,), 64

    teacher.num_updates, teacher.batch_size, teacher.learning_rate = 2_400_000, 8, 2e-5
    teacher.warmup_updates, teacher.gradient_clip, teacher.weight_decay = 0, 0.0, 0.0
    teacher.ema_decay, teacher.label_dropout, teacher.dropout = 0.9999, 0.0, 0.0

    config.training.log_every, config.training.save_every = 1000, 10_000
    config.sampling.batch_size = 32
    config.evaluation.features, config.evaluation.protocol = "inception", "clean"
