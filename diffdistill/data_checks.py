"""Whether the images that were opened are those that a config is made for."""

from __future__ import annotations

from diffdistill.chain import DataFacts
from diffdistill.config import Config, ConfigError
from diffdistill.diffusion import conditioning


def check_data(config: Config, facts: DataFacts) -> None:
    """Refuses images that are not those of the config, and a network that does not fit them: ConfigError."""
    expected = config.data.image_shape or facts.image_shape, config.data.num_classes or facts.num_classes
    if expected != (facts.image_shape, facts.num_classes):
        raise ConfigError(
            f"The data has images {facts.image_shape} in {facts.num_classes} classes, but {config.name} is made for "
            f"{expected[0]} in {expected[1]} (config.data.image_shape and num_classes; 0 classes: any number). "
            "Give the right path, convert with config.data.image_size and channels, or change what is expected."
        )
    _check_latents(config, facts)
    _check_tasks(config, facts)
    height, width, _ = facts.image_shape
    factor = 2 ** (len(config.model.multipliers) - 1)
    if height % factor or width % factor:
        raise ConfigError(
            f"config.model.multipliers {config.model.multipliers} halve the image {len(config.model.multipliers) - 1} "
            f"times, but the images are {height} x {width}: both must be multiples of {factor}. "
            "Use fewer multipliers or set config.data.image_size."
        )
    if config.model.conditional and facts.num_classes < 1:
        raise ConfigError("config.model.conditional is True, but the data has no classes. Set it to False.")


def _check_latents(config: Config, facts: DataFacts) -> None:
    data, sampling = config.data, config.sampling
    if not facts.latents:
        if data.latent_shift or data.latent_scale != 1.0:
            raise ConfigError(
                "config.data.latent_shift and latent_scale are for latents, but the data are images, which always "
                "become [-1, 1]. Leave them out."
            )
        return
    wrong = {
        "config.data.flip=False": data.flip,  # the latents of a mirrored image are not the mirrored latents
        "config.teacher.augmentation=0": config.teacher.augmentation,
        "config.sampling.clip=False": sampling.clip,
        "config.sampling.quantisation=none": sampling.quantisation != "none",
        "config.evaluation.num_samples=0": config.evaluation.num_samples,
        "config.evaluation.transfers=()": config.evaluation.transfers,
    }
    needed = [setting for setting, is_wrong in wrong.items() if is_wrong]
    if needed:
        raise ConfigError(
            f"The data are latents, not images: set {', '.join(f'--{setting}' for setting in needed)}. To measure a "
            "model of latents, decode what --mode=sample writes and give the images to --mode=evaluate --images."
        )


def _check_tasks(config: Config, facts: DataFacts) -> None:
    height, width, channels = facts.image_shape
    task = config.model.image_condition
    if task == "super_resolution" and (height % conditioning.FACTOR or width % conditioning.FACTOR):
        raise ConfigError(
            f"config.model.image_condition='super_resolution' shrinks images {conditioning.FACTOR} times, but they are "
            f"{height} x {width}: set config.data.image_size to a multiple of it."
        )
    if task == "colourisation" and channels == 1:
        raise ConfigError("config.model.image_condition='colourisation', but the images are grey already.")
    known = {*facts.class_names, *map(str, range(facts.num_classes))}
    for text in config.evaluation.transfers:
        missing = [name for name in text.split(" to ", 1) if name not in known]
        if missing:
            raise ConfigError(
                f"config.evaluation.transfers has {text!r}, but the data has no class {missing[0]!r}; it has "
                f"{', '.join((facts.class_names or tuple(sorted(known)))[:20])}."
            )
