"""Images pass through the feature network chunk by chunk; what stays is statistics and a capped set of features.

Every process of a job counts the rows that lie on its own devices. Every few minutes, and when a signal arrives, each
writes what it has; a killed evaluation goes on from there, on any number of processes, to the same figures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax

from diffdistill.evaluation import image_statistics
from diffdistill.evaluation.image_statistics import Chunk, ImageStatistics
from diffdistill.evaluation.partial import Partial
from diffdistill.training import processes
from diffdistill.training.errors import OtherProcessFailed
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.progress import make_progress

SAVE_SECONDS = 120.0  # between two saves: a save writes about 0.15 GB


class EvaluationInterrupted(Exception):
    """A signal arrived; what was measured before is kept."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(
            f"Evaluation stopped by {reason or 'a signal to another process'}; what was measured is kept. Start the "
            "same command again to continue."
        )


class FeaturesError(ValueError):
    """Features that no figure can be computed from; the message says of which images."""


@dataclass(frozen=True)
class Pace:
    """Where the time of one chunk went, in seconds per image: making it, its features, adding them up."""

    making: float
    features: float
    adding: float

    def text(self) -> str:
        """One line for a person."""
        whole = self.making + self.features + self.adding
        return (
            f"{1 / whole:.3g} images/s: making them {100 * self.making / whole:.0f} % of the time, feature network "
            f"{100 * self.features / whole:.0f} % ({1 / self.features:.3g} images/s), statistics "
            f"{100 * self.adding / whole:.0f} %"
        )


@dataclass(frozen=True)
class Accumulated:
    """What came of a stream of images.

    Attributes:
      statistics: of all images on the main process; a share of them elsewhere.
      seconds: that all starts together took, on the main process.
      pace: of one chunk; None where everything had been done before.
    """

    statistics: ImageStatistics
    seconds: float
    pace: Pace | None


def accumulate(
    chunks: Callable[[int], Iterator[Chunk]],
    extract: Callable[[jax.Array], Mapping[str, jax.Array]],
    empty: ImageStatistics,
    num: int,
    partial: Partial,
    interrupt: Interrupt,
    title: str,
) -> Accumulated:
    """Passes images 0, ..., num - 1 through the feature network.

    Args:
      chunks: from the number of the first image still to do to the chunks from there on.
      extract: images (B, H, W, C) uint8 -> the arrays of TAPS, (B, d) each, sharded as the images are.
      empty: statistics of nothing yet.
      num: how many images there are.
      partial: where to keep what a kill must not lose. The caller removes it once it has written its results.
      interrupt: looked at after every chunk.
      title: of the progress display.

    Raises:
      EvaluationInterrupted: a signal arrived; everything up to the last chunk is saved.
      FeaturesError: features that are not finite.
      OtherProcessFailed: what went wrong, went wrong on another process.
    """
    begun = time.monotonic()
    done, before, statistics = partial.load(empty)
    if done >= num:  # only the writing of the results was left
        return Accumulated(statistics, before, None)
    progress = make_progress(title, done, num, unit="image")
    source = chunks(done)
    in_flight: deque[tuple[Chunk, Mapping[str, jax.Array]]] = deque()
    saved, number, pace = begun, 0, None

    def absorb() -> None:
        nonlocal statistics, done
        chunk, taps = in_flight.popleft()
        try:
            statistics = image_statistics.add(statistics, chunk, taps)
        except ValueError as error:
            raise FeaturesError(f"{title}, images {chunk.first} to {chunk.stop - 1}: {error}.") from error
        done = chunk.stop
        progress.advance(done, {})

    def step() -> None:
        """One chunk. The devices work on it while the host adds up the one before.

        The first two are not overlapped, so that the second can be timed: by then the programs are compiled.
        """
        nonlocal number, pace
        start = time.monotonic()
        chunk = next(source, None)
        if chunk is not None and number == 1:
            jax.block_until_ready(chunk.images)
            made = time.monotonic()
            in_flight.append((chunk, jax.block_until_ready(extract(chunk.images))))
            extracted = time.monotonic()
            absorb()
            added, count = time.monotonic(), chunk.images.shape[0]
            pace = Pace((made - start) / count, (extracted - made) / count, (added - extracted) / count)
        elif chunk is not None:
            in_flight.append((chunk, extract(chunk.images)))
        number += 1
        while in_flight and (len(in_flight) > 1 or chunk is None or number < 2):
            absorb()

    def together(action: Callable[[], None]) -> None:
        """Where one process fails all stop, rather than wait for it for ever."""
        failure = None
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must hear of it
            failure = error
        if processes.any_process(failure is not None):
            raise failure or OtherProcessFailed()

    def absorb_all() -> None:
        while in_flight:
            absorb()

    try:
        while done < num:
            together(step)
            due = time.monotonic() - saved > SAVE_SECONDS
            if done < num and processes.any_process(due or interrupt.requested):
                together(absorb_all)
                saved = time.monotonic()
                partial.save(done, before + saved - begun, statistics)
                if processes.any_process(interrupt.requested):
                    raise EvaluationInterrupted(interrupt.reason)
    finally:
        progress.close()
    seconds = before + time.monotonic() - begun
    return Accumulated(partial.collect(done, seconds, statistics), seconds, pace)
