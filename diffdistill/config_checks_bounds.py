"""How large the numbers of a config may be, and which texts may name a file; a part of config_checks.py.

A config may come from anywhere. The bounds are far beyond any experiment; what exceeds them would fill the memory, or
never end, before anything could say why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffdistill.diffusion.schedules import MOST_TRAIN_STEPS
from diffdistill.fields import ConfigError, shown

if TYPE_CHECKING:
    from diffdistill.config import Config

_LARGEST_WHOLE = 2**31 - 1  # of whole numbers not named below: devices count updates and images in 32 bits
_LARGEST = 1e30  # of other numbers
_IMAGES = 10**15
# By the place in the config or, for what several parts have, by the name alone.
_MOST: dict[str, float] = {
    "seed": 2**63 - 1,
    "batch_size": 2**24,
    "learning_rate": 1e38,
    "path_learning_rate": 1e38,
    "fake_learning_rate": 1e38,
    "warmup_images": _IMAGES,
    "ema_half_life": _IMAGES,
    "ema_half_lives": _IMAGES,
    "average": _IMAGES,
    "start_steps": 2**20,
    "end_steps": 2**20,
    "data.image_size": 2**16,
    "data.channels": 2**16,
    "data.image_shape": 2**16,
    "data.num_classes": 10**7,
    "process.num_train_steps": MOST_TRAIN_STEPS,
    "model.channels": 2**14,
    "model.multipliers": 2**8,
    "model.embedding": 2**18,
    "model.blocks_per_level": 100,
    "model.num_heads": 2**14,
    "model.head_dim": 2**14,
    "model.num_groups": 2**14,
    "model.augmentation_features": 2**18,
    "model.noise_features": 2**18,
    "disback.path": 10**5,
    "sampling.rho": 1000.0,
    "sampling.s_tmax": math.inf,  # published samplers have no end there
    "evaluation.num_steps": 10**6,
    "evaluation.grid_columns": 1000,
    "evaluation.reservoir": 10**7,
}
_LEAST = {
    f"model.{name}": 1
    for name in ("channels", "multipliers", "embedding", "blocks_per_level", "num_heads", "num_groups")
}
_MOST_LEVELS = 16


def check(config: Config) -> None:
    """Raises ConfigError for a number beyond all reason, and for a text that would lead out of the folder of a run."""
    for place, value in _numbers(config, ""):
        name = place.partition("[")[0]
        most = _MOST.get(
            name, _MOST.get(name.rpartition(".")[2], _LARGEST_WHOLE if isinstance(value, int) else _LARGEST)
        )
        if name in _LEAST and value < _LEAST[name]:
            raise ConfigError(f"config.{place} is {shown(value)}, but must be at least {_LEAST[name]}.")
        if not abs(value) <= most:
            bound = f"at least -{most}" if value < 0 else f"at most {most}"
            raise ConfigError(f"config.{place} is {shown(value)}, but must be {bound}.")
    if len(config.model.multipliers) > _MOST_LEVELS:
        raise ConfigError(
            f"config.model.multipliers has {len(config.model.multipliers)} entries, but must have at most "
            f"{_MOST_LEVELS}: each level halves the image."
        )
    if not _may_name_a_file(config.name):
        raise ConfigError(
            f"config.name is {shown(config.name)}, but it names the folder of the run: it must not begin with a dot "
            "nor hold a slash, a backslash or a NUL. Choose folders with --workdir=FOLDER."
        )
    for text in config.evaluation.transfers:
        if not all(map(_may_name_a_file, text.split(" to "))):
            raise ConfigError(
                f"config.evaluation.transfers has {shown(text)}, but both classes name a file: they must not begin "
                "with a dot nor hold a slash, a backslash or a NUL. Give such a class by its number, as in '3 to 8'."
            )


def _numbers(group: Any, place: str) -> Iterator[tuple[str, float]]:
    """(place, value) of all numbers of a group of fields."""
    for field in dataclasses.fields(group):
        value, inner = getattr(group, field.name), f"{place}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{inner}.")
        elif isinstance(value, tuple):
            yield from ((f"{inner}[{i}]", each) for i, each in enumerate(value) if isinstance(each, int | float))
        elif isinstance(value, int | float):
            yield inner, value


def _may_name_a_file(text: str) -> bool:
    return not text.startswith(".") and not any(sign in text for sign in "/\\\0")
