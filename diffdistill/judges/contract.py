"""What every judge of samples is: it says which figures it gives for a measurement, and gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffdistill.chain import Stage
from diffdistill.generator import Generator, Samples
from diffdistill.training.interrupt import Interrupt

SHOWN = 200  # images of every measurement that are kept for pictures


@dataclass(frozen=True)
class Measurement:
    """One thing to measure: a stage sampled in so many steps, with this sampler and guidance weight.

    Attributes:
      seed: number of the first image.
      is_reference: whether other measurements at the same w and seed are compared with this one.
    """

    stage: Stage
    num_steps: int
    sampler: str
    w: float
    seed: int
    is_reference: bool = False

    def text(self) -> str:
        """For progress displays."""
        return f"{self.stage.name}, {self.sampler} {self.num_steps} steps, w {self.w:g}"


@dataclass(frozen=True)
class Figures:
    """The outcome of one measurement.

    Attributes:
      values: figure by metric; empty on all but the main process.
      spreads: standard deviation over parts of the samples, of the metrics that have one.
      shown: the first images, for pictures.
      seconds: for making and measuring the samples, since the last start.
      facts: whatever else every record of these figures says.
      written: to be called once the figures are on disk.
    """

    values: Mapping[str, float]
    shown: Samples
    seconds: float
    spreads: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    written: Callable[[], None] = lambda: None


class Judge(Protocol):
    """Measures samples. `needs_reference`: whether the reference of the same w and seed has to be measured before."""

    needs_reference: bool

    def protocol(self, item: Measurement, generator: Generator) -> str:
        """Everything but the samples that a figure depends on, as text; part of what identifies a result."""
        ...

    def metrics(self, item: Measurement, generator: Generator) -> Sequence[str]:
        """The names of the figures that this measurement gives."""
        ...

    def measure(
        self, item: Measurement, generator: Generator, wanted: Sequence[str], digest: str, interrupt: Interrupt
    ) -> Figures:
        """Samples the model and measures `wanted`, some of `metrics`; `digest` identifies its parameters.

        Raises:
          EvaluationInterrupted: a signal arrived.
        """
        ...
