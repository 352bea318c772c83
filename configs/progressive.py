"""Progressive distillation as published (Salimans & Ho 2022): the teacher, then rounds of halving down to one step.

    python main.py --config=configs/progressive.py:cifar10 --workdir=runs/pd_cifar10 --config.data.path=PATH
    python main.py --config=configs/progressive.py:imagenet64 --workdir=runs/pd_imagenet64 --config.data.path=PATH
    python main.py --config=configs/progressive.py:lsun128 --workdir=runs/pd_lsun128 --config.data.path=PATH

Add --mode=plan to see sizes, memory and FLOPs first; append "-smoke" to the row for a few tiny updates on the embedded
digits. PATH holds what `--mode=prepare` wrote; `--config.data.source=tfds --config.data.path=cifar10` reads a TFDS data
set instead. Lengths of the teachers (800k, 550k, 400k updates) are recalled, not published.
"""

from typing import Any

from diffdistill.config import default_config, smoke

# Height, width, channels and number of classes; 0: any.
IMAGES = {"cifar10": ((32, 32, 3), 10), "imagenet64": ((64, 64, 3), 1000), "lsun128": ((128, 128, 3), 0)}
ROWS = tuple(IMAGES)


def get_config(row: str = "cifar10") -> Any:
    """The settings of one row: cifar10, imagenet64 or lsun128, each also with "-smoke"."""
    name = row.removesuffix("-smoke")
    if name not in ROWS:
        raise ValueError(
            f"configs/progressive.py has no row {row!r}; rows: {', '.join(ROWS)}, each also with '-smoke'."
        )
    config = default_config()
    config.name = f"progressive-{row}"
    config.data.source = "array_record"
    config.data.flip = True
    config.data.image_shape, config.data.num_classes = IMAGES[name]
    config.guided.num_updates = 0
    config.training.log_every = 1000
    config.training.save_every = 10_000
    config.data.dataset = name
    config.evaluation.features = "inception"
    config.sampling.quantisation = "adm"
    config.sampling.batch_size = 500
    config.evaluation.num_steps = (1, 2, 4, 8, 10, 16, 20, 50, 100, 1024)

    model, teacher, distil = config.model, config.teacher, config.progressive
    teacher.weight = distil.weight = "snr_trunc"
    teacher.warmup_updates = 1000
    teacher.ema_decay = 0.9999
    teacher.label_dropout = 0.0
    distil.anneal = "linear"
    distil.num_updates = 50_000
    distil.final_num_updates = 100_000

    if name == "cifar10":
        model.conditional = False
        model.prediction = "x"
        model.channels, model.multipliers, model.embedding = 256, (1, 1, 1), 1024
        model.attention_resolutions, model.num_heads = (8, 16), 1
        teacher.num_updates, teacher.batch_size, teacher.learning_rate = 800_000, 128, 2e-4
        teacher.dropout, teacher.weight_decay = 0.2, 0.001
        distil.batch_size, distil.learning_rate, distil.start_steps = 128, 5e-5, 8192
    else:
        model.prediction = "both"
        model.head_dim, model.attention_resolutions = 64, (8, 16, 32)
        teacher.batch_size = distil.batch_size = 2048
        teacher.learning_rate, distil.learning_rate = 3e-4, 1e-4
        teacher.dropout = 0.1
        config.training.updates_per_call = 2  # ten batches of 2048 would fill a device while they wait
        distil.start_steps = 1024
    if name == "imagenet64":
        model.channels, model.multipliers, model.embedding = 192, (1, 2, 3, 4), 768
        teacher.num_updates = 550_000
    if name == "lsun128":
        model.conditional = False
        model.channels, model.multipliers, model.embedding = 64, (1, 2, 4, 6, 8), 768
        teacher.num_updates = 400_000
    model.blocks_per_level = 3
    return smoke(config) if row.endswith("-smoke") else config
