"""Which distance of images --mode=analyse measures: LPIPS from a file, features of a small classifier, or pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffdistill import analyse, runner
from diffdistill.config import Config
from diffdistill.data.contract import DataError, Source
from diffdistill.data.pipeline import gather
from diffdistill.evaluation import features, lpips

_ENOUGH = 10_000  # images for the classifier; a larger set is thinned out evenly


def choose(
    config: Config, place: Path, lpips_file: str, say: Callable[[str], Any] = print
) -> tuple[Source | None, analyse.Distance, str]:
    """(the images of a config, None where it names none yet; a distance of them; what it is called).

    Args:
      place: folder that keeps the small classifier.
      lpips_file: weights of LPIPS; empty: features of a classifier of the same images where they have classes.

    Raises:
      DataError, ConfigError: the images cannot be read.
      WeightsError: the file is not there or no LPIPS.
    """
    measure = lpips.load(lpips_file) if lpips_file else None
    if config.data.source != "digits" and not config.data.path:
        say("config.data.path is empty: weights alone.")
        return None, analyse.root_mean_square, ""
    source = runner.open_images(config)
    if measure is not None:
        smallest = np.zeros((1, *source.image_shape), np.float32)
        try:
            measure(smallest, smallest)
        except ValueError as error:
            raise DataError(f"analysis of {source.name}: {error}.") from error
        return source, measure, "LPIPS"
    if source.num_classes < 2:
        return source, analyse.root_mean_square, "RMS difference of pixels"
    data = gather(source, np.linspace(0, len(source) - 1, min(len(source), _ENOUGH)).astype(np.int64))
    cache = place / "cache"
    try:
        network = features.train_or_load(data["image"], data["label"], source.num_classes, source.fingerprint(), cache)
    except ValueError as error:
        raise DataError(f"analysis of {source.name}: {error}.") from error
    return source, analyse.feature_distance(network.features), "RMS difference of features"
