"""What an accumulation of statistics that may be killed keeps on the disk, a share for each process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from diffdistill.evaluation import image_statistics
from diffdistill.evaluation.arrays import read_npz
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.image_statistics import ImageStatistics
from diffdistill.evaluation.results import ResultsError
from diffdistill.training import processes
from diffdistill.training.json_files import read_json

_NUMBER = re.compile(r"[0-9]{1,18}")


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
        np.savez(share, **image_statistics.to_arrays(statistics))
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
                part = image_statistics.from_arrays(read_npz(file, most=image_statistics.most_bytes(like)))
                image_statistics.check_alike(part, like)
                merged = part if merged is None else image_statistics.merge(merged, part)
            except (ValueError, KeyError) as error:
                raise self._damaged(file, error) from error
        assert merged is not None
        return merged

    def _damaged(self, file: Path, error: Exception) -> ResultsError:
        return ResultsError(
            f"{file}, where an evaluation that was stopped kept what it had, cannot be read ({error}). Delete "
            f"{self.path}; the same command then starts this measurement anew."
        )
