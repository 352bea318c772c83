"""FID, sFID, KID, inception score, precision and recall of samples, streamed through the Inception network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffdistill.config import EvaluationConfig
from diffdistill.data.contract import DataError, Source
from diffdistill.evaluation import image_statistics, measuring, stream
from diffdistill.evaluation.image_statistics import Chunk
from diffdistill.evaluation.measuring import Network
from diffdistill.evaluation.partial import Partial
from diffdistill.evaluation.reference import Reference
from diffdistill.generator import Generator
from diffdistill.judges.contract import SHOWN, Figures, Measurement
from diffdistill.training import processes
from diffdistill.training.interrupt import Interrupt
from diffdistill.workdir import Workdir


class InceptionJudge:
    """Compares samples with reference statistics; holds statistics and a capped set of features, never the samples."""

    needs_reference = False

    def __init__(self, folder: Workdir, network: Network, reference: Reference, say: Callable[[str], Any]) -> None:
        self._folder, self._network, self._reference, self._say = folder, network, reference, say

    def protocol(self, item: Measurement, generator: Generator) -> str:
        """Protocol, weights, reference and the sampler's settings."""
        kept = self._folder.config.evaluation.reservoir
        settings = generator.settings_text(item.sampler)
        return f"{self._network.text()}, reference {self._reference.digest()}, {kept} kept, {settings}"

    def metrics(self, item: Measurement, generator: Generator) -> Sequence[str]:
        """What the reference allows."""
        del item, generator
        return measuring.metrics_against(self._reference, self._folder.config.evaluation.num_samples)

    def measure(
        self, item: Measurement, generator: Generator, wanted: Sequence[str], digest: str, interrupt: Interrupt
    ) -> Figures:
        """See Judge; saves every few minutes, and goes on from there."""
        evaluation = self._folder.config.evaluation
        settings = {"seed": item.seed, "w": item.w, "num_steps": item.num_steps, "sampler": item.sampler}
        shown = generator.sample(min(SHOWN, evaluation.num_samples), **settings)
        if not wanted:
            return Figures({}, shown, 0.0)

        def chunks(first: int) -> Iterator[Chunk]:
            return generator.stream(evaluation.num_samples, first=first, **settings)

        identity = json.dumps([item.text(), item.seed, digest, evaluation.num_samples, evaluation.reservoir])
        partial = Partial(self._folder.path / "evaluation" / ".partial", f"{identity} {self.protocol(item, generator)}")
        found = stream.accumulate(
            chunks,
            self._network.extract,
            image_statistics.empty(evaluation.num_samples, evaluation.reservoir),
            evaluation.num_samples,
            partial,
            interrupt,
            f"evaluation: {item.text()}",
        )
        facts = {**self._network.facts(), **self._reference.facts(), "quantisation": generator.quantisation}
        if not processes.is_main():
            return Figures({}, shown, found.seconds, facts=facts)
        values, spreads = measuring.figures(found.statistics, self._reference, wanted)
        if found.pace is not None:
            self._say(f"{item.text()}: {found.pace.text()}")
        return Figures(values, shown, found.seconds, spreads, facts, partial.remove)


def make(
    folder: Workdir, source: Source | None, weights: str, interrupt: Interrupt, say: Callable[[str], Any]
) -> InceptionJudge:
    """Loads the network, and reads or computes the reference statistics.

    Raises:
      WeightsError, StatisticsError, EvaluationInterrupted: see evaluation.measuring.
    """
    evaluation = folder.config.evaluation
    network = load_network(evaluation, weights)
    if evaluation.reference:
        reference = network.read_reference(evaluation.reference, evaluation.reference_protocol)
        cache = folder.path / "evaluation" / "cache"
        reference = network.with_features(reference, evaluation.reference, evaluation.reservoir, cache, interrupt)
    elif source is None:
        raise DataError("the reference statistics are to be of the run's own images, but there are none")
    else:
        reference = network.reference_of(
            source, evaluation.reference_images, evaluation.reservoir, folder.path / "evaluation" / "cache", interrupt
        )
    say(f"evaluation: {network.text()}, against {reference.text()}")
    measuring.say_left_out(reference, evaluation.num_samples, say)
    return InceptionJudge(folder, network, reference, say)


def load_network(evaluation: EvaluationConfig, weights: str) -> Network:
    """The Inception network of a config. Raises WeightsError."""
    return measuring.load(weights, evaluation.protocol, evaluation.inception_sha256)
