"""Small images in the features of a classifier of the same data (evaluation.features): distances that are not FID.

Every model is sampled with the same seeds, so that image k of a student and image k of the teacher start from the
same noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffdistill.config import Config
from diffdistill.data.contract import DataError, Source
from diffdistill.data.pipeline import gather
from diffdistill.evaluation import features, metrics, moments
from diffdistill.evaluation.moments import Moments
from diffdistill.generator import Generator
from diffdistill.judges.contract import Figures, Measurement
from diffdistill.samplers import STOCHASTIC
from diffdistill.training import processes
from diffdistill.training.interrupt import Interrupt
from diffdistill.workdir import Workdir

METRICS = ("frechet_to_data", "frechet_to_teacher", "paired_rmse_to_teacher", "class_accuracy")
DATA_LIMIT = 10_000  # images of the data that are enough for its statistics; a larger set is thinned out evenly


class DomainJudge:
    """Keeps the reference samples of each w and seed; holds all samples of a measurement in memory."""

    needs_reference = True

    def __init__(self, config: Config, network: features.FeatureNetwork, data: Moments) -> None:
        self._config, self.network, self.data = config, network, data
        self._reference: dict[tuple[float, int], tuple[np.ndarray, Moments]] = {}

    def protocol(self, item: Measurement, generator: Generator) -> str:
        """The recipe of the feature network and the sampler's settings."""
        return f"domain features {features.RECIPE}, {generator.settings_text(item.sampler)}"

    def metrics(self, item: Measurement, generator: Generator) -> Sequence[str]:
        """Those of METRICS that make sense: no distance of the reference to itself, pairs of deterministic samplers."""
        names = {"frechet_to_data"}
        if generator.denoiser.num_classes:
            names.add("class_accuracy")
        if not item.is_reference:
            names.add("frechet_to_teacher")
            if item.sampler not in STOCHASTIC:
                names.add("paired_rmse_to_teacher")
        return [name for name in METRICS if name in names]

    def measure(
        self, item: Measurement, generator: Generator, wanted: Sequence[str], digest: str, interrupt: Interrupt
    ) -> Figures:
        """See Judge; short enough not to look at signals."""
        del digest, interrupt
        start = time.monotonic()
        samples = generator.sample(
            self._config.evaluation.num_samples,
            seed=item.seed,
            w=item.w,
            num_steps=item.num_steps,
            sampler=item.sampler,
        )
        seconds = time.monotonic() - start
        sampled, predicted = self.network.measure(samples.images)
        own = moments.moments_of(sampled)
        if item.is_reference:
            self._reference[item.w, item.seed] = samples.images, own

        def teacher() -> tuple[np.ndarray, Moments]:
            return self._reference[item.w, item.seed]

        def distance(other: Moments) -> float:
            return metrics.frechet_distance(own.mean(), own.covariance(), other.mean(), other.covariance())

        compute: dict[str, Callable[[], float]] = {
            "frechet_to_data": lambda: distance(self.data),
            "frechet_to_teacher": lambda: distance(teacher()[1]),
            "paired_rmse_to_teacher": lambda: metrics.paired_rmse(samples.images, teacher()[0]),
            "class_accuracy": lambda: metrics.class_accuracy(predicted, samples.labels),
        }
        values = {name: compute[name]() for name in wanted} if processes.is_main() else {}
        return Figures(values, samples, seconds)


def make(folder: Workdir, source: Source, say: Callable[[str], Any]) -> DomainJudge:
    """Trains the feature network of the run's data, or finds it trained before.

    Raises:
      DataError: the data has too few images or classes.
    """
    chosen = np.linspace(0, len(source) - 1, min(len(source), DATA_LIMIT)).astype(np.int64)
    data = gather(source, chosen)
    cache = folder.path / "evaluation" / "cache"
    try:
        network = processes.on_main(
            lambda: features.train_or_load(
                data["image"], data["label"], source.num_classes, source.fingerprint(), cache
            )
        )
    except ValueError as error:
        raise DataError(f"evaluation of {source.name}: {error}. Set config.evaluation.num_samples=0.") from error
    accuracy = network.record.get("hold_out_accuracy")
    if isinstance(accuracy, float):
        say(f"evaluation: features of a classifier with {100 * accuracy:.1f} % held-out accuracy")
    return DomainJudge(folder.config, network, moments.moments_of(network.features(data["image"])))
