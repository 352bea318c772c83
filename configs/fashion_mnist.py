"""The digits' recipe on Fashion-MNIST at 16x16: real pictures of clothes, for any GPU or a patient CPU.

    python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist --config.data.path=FOLDER

FOLDER holds the gzipped IDX files (train-images-idx3-ubyte.gz, ...), such as /usr/share/datasets/fashion-mnist of the
Debian package dataset-fashion-mnist; any other set of the MNIST family has the same format. Append ":smoke" for a few
tiny updates on the embedded digits.
"""

from typing import Any

from diffdistill.config import default_config, smoke


def get_config(variant: str = "") -> Any:
    """The settings; variant "smoke" for a few tiny updates."""
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/fashion_mnist.py has no variant {variant!r}; there is 'smoke'.")
    config = default_config()
    config.name = "fashion_mnist-smoke" if variant else "fashion_mnist"
    config.data.source, config.data.image_size, config.data.flip = "idx", 16, True

    model, teacher, guided, halving = config.model, config.teacher, config.guided, config.progressive
    model.channels, model.multipliers, model.embedding, model.num_groups = 64, (1, 2, 2), 256, 16
    model.blocks_per_level, model.attention_resolutions, model.head_dim = 2, (4, 8), 64

    teacher.num_updates, teacher.learning_rate, teacher.warmup_updates = 20_000, 1e-3, 200
    teacher.ema_decay, teacher.ema_ramp = 0.999, True
    guided.num_updates, guided.learning_rate = 8_000, 1e-3
    guided.ema_decay, guided.ema_ramp = 0.99, True
    halving.num_updates, halving.final_num_updates, halving.learning_rate = 2_000, 4_000, 5e-4
    halving.start_steps, halving.end_steps = 64, 1
    for stage in (teacher, guided, halving):
        stage.batch_size, stage.anneal, stage.weight = 128, "linear", "snr_trunc"
        stage.stratified_times = True

    config.training.save_every = 2_000
    config.evaluation.num_samples, config.evaluation.num_steps = 5_000, (1, 2, 4, 8, 16)
    return smoke(config) if variant else config
