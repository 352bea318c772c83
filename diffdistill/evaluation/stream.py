"""Images pass through the feature network chunk by chunk; what stays is statistics and a capped set of features.

Every process of a job counts the rows that lie on its own devices. Every few minutes, and when a signal arrives, each
writes what it has; a killed evaluation goes on from there, on any number of processes, to the same figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffdistill.evaluation import moments, scores
from diffdistill.evaluation.arrays import read_npz
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.moments import Moments, Reservoir
from diffdistill.evaluation.results import ResultsError
from diffdistill.evaluation.scores import ScoreSums
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.training.errors import OtherProcessFailed
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.json_files import read_json
from diffdistill.training.progress import make_progress

SAVE_SECONDS = 120.0  # between two saves: a save writes about 0.15 GB
POOL, SPATIAL, LOGITS = "2048", "sfid", "logits_unbiased"
TAPS = (POOL, SPATIAL, LOGITS)
_NUMBER = re.compile(r"[0-9]{1,18}")


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
class Chunk:
    """Images number first, ..., stop - 1 of a set: the first rows of `images` (B, H, W, C) uint8; the rest is padding.

    `images` is sharded over all devices of all processes.
    """

    images: jax.Array
    first: int
    stop: int


@dataclass(frozen=True)
class ImageStatistics:
    """What is kept of a set of images.

    Attributes:
      pool: moments of the 2048 pooled features, for FID.
      spatial: moments of the 2023 spatial features, for sFID.
      scores: sums of class probabilities, for the inception score.
      features: a capped random subset of the pooled features, for KID, precision and recall.
    """

    pool: Moments
    spatial: Moments
    scores: ScoreSums
    features: Reservoir


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
class Partial:
    """Where an accumulation that may be killed keeps what it has; `identity`: everything that the result depends on."""

    folder: Path
    identity: str

    @property
    def path(self) -> Path:
        return self.folder / hashlib.sha256(self.identity.encode()).hexdigest()[:16]

    def load(self, empty: ImageStatistics) -> tuple[int, float, ImageStatistics]:
        """(images done, seconds that took, what to start from): all on the main process, nothing on the others.

        Raises ResultsError where what was kept is damaged.
        """
        done = processes.on_main(self._done)
        if not done or not processes.is_main():
            return done, 0.0, empty
        return done, self._about(done)[1], self._merged(done, empty)

    def _done(self) -> int:
        names = (path.parent.name for path in self.path.glob("*/complete"))
        return max((int(name) for name in names if _NUMBER.fullmatch(name)), default=0)

    def save(self, done: int, seconds: float, statistics: ImageStatistics) -> None:
        """Writes all processes' shares of the first `done` images. All of them call it together."""
        share = io.BytesIO()
        np.savez(share, **to_arrays(statistics))
        failures: list[OSError] = []

        def keep(process: int, share: bytes) -> None:
            try:
                write_atomically(folder / f"process_{process:04d}.npz", lambda file: file.write(share))
            except OSError as error:
                failures.append(error)

        folder = self.path / str(done)
        processes.gather(share.getvalue(), keep)
        processes.on_main(lambda: self._complete(folder, done, seconds, failures))

    def _complete(self, folder: Path, done: int, seconds: float, failures: list[OSError]) -> None:
        for failure in failures:
            raise failure
        about = json.dumps({"processes": jax.process_count(), "seconds": seconds})
        write_atomically(folder / "complete", lambda file: file.write(about.encode()))
        for other in self.path.iterdir():
            if _NUMBER.fullmatch(other.name) and int(other.name) < done:
                shutil.rmtree(other)

    def collect(self, done: int, seconds: float, statistics: ImageStatistics) -> ImageStatistics:
        """The statistics of all processes together, on the main one; the others get their own share back."""
        if jax.process_count() == 1:
            return statistics
        self.save(done, seconds, statistics)
        return self._merged(done, statistics) if processes.is_main() else statistics

    def remove(self) -> None:
        """Deletes the saved state, once the figures themselves are written."""
        if processes.is_main():
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # others have something there, or nothing was ever saved
                self.folder.rmdir()

    def _about(self, done: int) -> tuple[int, float]:
        """(how many processes wrote the first `done` images, seconds that they took)."""
        file = self.path / str(done) / "complete"
        try:
            about = read_json(file)
            count, seconds = int(about["processes"]), float(about["seconds"])
            if count < 1:
                raise ValueError(f"of {count} processes")
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise self._damaged(file, error) from error
        return count, seconds

    def _merged(self, done: int, like: ImageStatistics) -> ImageStatistics:
        folder = self.path / str(done)
        merged = None
        for index in range(self._about(done)[0]):
            file = folder / f"process_{index:04d}.npz"
            try:
                part = from_arrays(read_npz(file, most=_most_bytes(like)))
                _check_alike(part, like)
                merged = part if merged is None else merge(merged, part)
            except (ValueError, KeyError) as error:
                raise self._damaged(file, error) from error
        assert merged is not None
        return merged

    def _damaged(self, file: Path, error: Exception) -> ResultsError:
        return ResultsError(
            f"{file}, where an evaluation that was stopped kept what it had, cannot be read ({error}). Delete "
            f"{self.path}; the same command then starts this measurement anew."
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
            statistics = add(statistics, chunk, taps)
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


def empty(num: int, capacity: int) -> ImageStatistics:
    """Statistics of nothing yet, for a set of `num` images of which at most `capacity` keep their features."""
    return ImageStatistics(
        moments.empty_moments(2048),
        moments.empty_moments(2023),
        scores.empty_scores(num, 1008),
        moments.empty_reservoir(2048, capacity),
    )


def add(statistics: ImageStatistics, chunk: Chunk, taps: Mapping[str, jax.Array]) -> ImageStatistics:
    """The statistics after those rows of a chunk's taps that lie on this process went by; padding is left out.

    Raises ValueError for features that are not finite.
    """
    rows: dict[str, np.ndarray] = {}
    numbers = np.zeros(0, np.int64)
    for tap in TAPS:
        numbers, values = meshes.local_rows(taps[tap])
        numbers = numbers + chunk.first
        rows[tap] = values[numbers < chunk.stop]
    numbers = numbers[numbers < chunk.stop]
    return ImageStatistics(
        moments.add_features(statistics.pool, rows[POOL]),
        moments.add_features(statistics.spatial, rows[SPATIAL]),
        scores.add_logits(statistics.scores, rows[LOGITS], numbers),
        moments.keep(statistics.features, rows[POOL], numbers),
    )


def merge(first: ImageStatistics, second: ImageStatistics) -> ImageStatistics:
    """The statistics of two disjoint parts of one set of images together."""
    return ImageStatistics(
        moments.merge(first.pool, second.pool),
        moments.merge(first.spatial, second.spatial),
        scores.merge_scores(first.scores, second.scores),
        moments.keep(first.features, second.features.features, second.features.numbers),
    )


_PARTS = {"pool": Moments, "spatial": Moments, "scores": ScoreSums, "features": Reservoir}


def to_arrays(statistics: ImageStatistics) -> dict[str, Any]:
    """What numpy.savez needs to keep statistics."""
    return {
        f"{part}_{field.name}": getattr(getattr(statistics, part), field.name)
        for part, kind in _PARTS.items()
        for field in dataclasses.fields(kind)
    }


def from_arrays(arrays: Mapping[str, Any]) -> ImageStatistics:
    """The inverse of `to_arrays`."""

    def value(name: str) -> Any:
        array = arrays[name]
        return array if array.ndim else array.item()

    parts: dict[str, Any] = {
        part: kind(**{field.name: value(f"{part}_{field.name}") for field in dataclasses.fields(kind)})
        for part, kind in _PARTS.items()
    }
    return ImageStatistics(**parts)


def _most_bytes(like: ImageStatistics) -> int:
    """A bound for the file of statistics of that kind, however many features it keeps."""
    kept = like.features
    rows = kept.capacity * (8 + kept.features.itemsize * kept.features.shape[1])
    return sum(np.asarray(array).nbytes for array in to_arrays(like).values()) + rows + (1 << 16)


def _check_alike(found: ImageStatistics, like: ImageStatistics) -> None:
    """Raises ValueError where statistics are not of the same features."""
    expected = to_arrays(like)
    for name, value in to_arrays(found).items():
        one, other = np.asarray(value), np.asarray(expected[name])
        rows = int(name.startswith("features_") and one.ndim > 0)  # their number is free
        if one.dtype.kind != other.dtype.kind or one.ndim != other.ndim or one.shape[rows:] != other.shape[rows:]:
            raise ValueError(f"its {name} is {one.dtype}{list(one.shape)}, expected {other.dtype}{list(other.shape)}")
    if len(found.features.numbers) != len(found.features.features):
        raise ValueError("its features have not as many numbers")
