"""Distillation of guided models as published (Meng et al. 2023): teacher, one w-conditioned student, rounds of halving.

    python main.py --config=configs/guided.py:cifar10 --workdir=runs/guided_cifar10 --config.data.path=PATH
    python main.py --config=configs/guided.py:imagenet64 --workdir=runs/guided_imagenet64 --config.data.path=PATH

Append "-stochastic" to the row for a second chain, of students of the stochastic sampler; "-single-<w>" for the
baseline of one student a weight, such as imagenet64-single-0.3; "-separate" for the baseline of a conditional and an
unconditional model, distilled without w in one network and combined by two evaluations a step; "-encoder" for distilled
encoders beside the decoders, for style transfer.

Add --mode=plan to see sizes, memory and FLOPs first; append "-smoke" to the row for a few tiny updates on the embedded
digits. PATH holds what `--mode=prepare` wrote. Guidance weights are w of (1 + w) conditional - w unconditional. The
lengths of the teachers and of the last rounds are recalled, not published.
"""

from typing import Any

from diffdistill.config import default_config, smoke

# Height, width, channels and number of classes.
IMAGES = {"cifar10": ((32, 32, 3), 10), "imagenet64": ((64, 64, 3), 1000)}
GUIDANCE = (0.0, 0.3, 1.0, 2.0, 4.0)
VARIANTS = ("stochastic", "encoder", "separate", *(f"single-{w:g}" for w in GUIDANCE))
ROWS = (*IMAGES, *(f"{name}-{variant}" for name in IMAGES for variant in VARIANTS))


def get_config(row: str = "cifar10") -> Any:
    """The settings of one row of ROWS, each also with "-smoke"."""
    whole = row.removesuffix("-smoke")
    name, _, variant = whole.partition("-")
    if whole not in ROWS:
        raise ValueError(f"configs/guided.py has no row {row!r}; rows: {', '.join(ROWS)}, each also with '-smoke'.")
    config = default_config()
    config.name = f"guided-{row}"
    config.data.source = "array_record"
    config.data.flip = True
    config.data.image_shape, config.data.num_classes = IMAGES[name]
    config.training.log_every = 1000
    config.training.save_every = 10_000
    config.data.dataset = name
    config.evaluation.features = "inception"
    config.sampling.quantisation = "adm"
    config.sampling.batch_size = 500
    config.evaluation.num_steps = (1, 2, 4, 8, 16, 32, 64, 1024)
    config.evaluation.guidance = GUIDANCE

    model, teacher, guided, halving = config.model, config.teacher, config.guided, config.progressive
    model.prediction = "v"
    model.blocks_per_level = 3
    teacher.weight = guided.weight = "snr"
    halving.weight = "snr_trunc"
    teacher.label_dropout = 0.1
    teacher.warmup_updates = 1000
    teacher.ema_decay = guided.ema_decay = 0.9999
    guided.w_min, guided.w_max = 0.0, 4.0
    halving.anneal, halving.learning_rate = "linear", 1e-4
    halving.start_steps, halving.num_updates, halving.final_num_updates = 1024, 50_000, 100_000

    if name == "cifar10":
        model.channels, model.multipliers, model.embedding = 256, (1, 1, 1), 1024
        model.attention_resolutions, model.num_heads = (8, 16), 1
        teacher.num_updates, teacher.batch_size, teacher.learning_rate = 800_000, 128, 2e-4
        teacher.dropout, teacher.weight_decay = 0.2, 0.001
        guided.num_updates, guided.batch_size, guided.learning_rate = 520_000, 128, 1e-4
        halving.batch_size = 128
    else:
        model.channels, model.multipliers, model.embedding = 192, (1, 2, 3, 4), 768
        model.head_dim, model.attention_resolutions = 64, (8, 16, 32)
        teacher.num_updates, teacher.batch_size, teacher.learning_rate = 550_000, 2048, 3e-4
        teacher.dropout = 0.1
        config.training.updates_per_call = 2  # ten batches of 2048 would fill a device while they wait
        guided.num_updates, guided.batch_size, guided.learning_rate = 520_000, 2048, 3e-4
        halving.batch_size = 256
    if variant == "stochastic":
        config.stochastic.update(halving)
    elif variant == "encoder":
        config.encoder.update({**halving, "weight": config.encoder.weight})
    elif variant == "separate":
        guided.num_updates, halving.label_dropout = 0, 0.5
    elif variant:
        w = float(variant.removeprefix("single-"))
        guided.w_min = guided.w_max = w
        config.evaluation.guidance = (w,)
    return smoke(config) if row.endswith("-smoke") else config
