"""Where numbers go: metrics.jsonl always, TensorBoard events where tensorboardX is installed."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from diffdistill.training import processes
from diffdistill.training.errors import MetricsError
from diffdistill.training.json_files import parse_object

FLUSH_SECONDS = 20.0


class MetricWriter:
    """Writes the metrics of one stage: one JSON object a line, {"stage", "step", name: number or list of numbers}.

    directory: the run's directory; all stages share `metrics.jsonl`, TensorBoard events go to `tensorboard/<stage>`.
    step: updates the stage has done already (0 = fresh). Lines of the stage beyond it, and a line torn by a kill, are
    dropped on opening, so that a resumed stage leaves no line twice.
    A value that is not finite (the loss of an empty bin) is written as null. Only the main process writes.
    Raises MetricsError where the file cannot be written (a full disk, a directory that is none).
    """

    def __init__(self, directory: str | os.PathLike[str], stage: str, step: int = 0, *, tensorboard: bool = True):
        self._stage = stage
        self._path = Path(directory) / "metrics.jsonl"
        self._file: TextIO | None = None
        self._events: _Events | None = None
        if not processes.is_main():
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, stage, step)
            self._file = self._path.open("a", encoding="utf-8")
            if tensorboard:
                self._events = _events(self._path.parent / "tensorboard" / stage, step)
        except OSError as error:
            raise self._failed(error) from error

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """step: updates done. scalars: numbers or small 1-d arrays."""
        if self._file is None:
            return
        values = {name: _plain(value) for name, value in scalars.items()}
        try:
            self._file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
            self._file.flush()  # to the kernel: a kill loses nothing
        except OSError as error:
            raise self._failed(error) from error
        numbers = [pair for name, value in values.items() for pair in _numbered(name, value)]
        self._on_events(lambda events: events.write(step, numbers))

    def flush(self) -> None:
        """Hand everything to the operating system (lines are there already)."""
        self._on_events(_Events.flush)

    def close(self) -> None:
        """Flush and close; the writer must not be used again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._on_events(_Events.close)
        self._events = None

    def _on_events(self, action: Callable[[_Events], None]) -> None:
        if self._events is None:
            return
        try:
            action(self._events)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> MetricsError:
        """The message; and no second attempt with what could not be written."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
            self._events = None
        return MetricsError(
            f"Cannot write {self._path} or its TensorBoard events: {error.strerror}. Free some space or choose a "
            "workdir that this user may write; then start the same command again, which continues from the newest "
            "checkpoint."
        )


class Window:
    """Means of metrics over windows of `size` updates, ending at multiples of `size` and at the stage's last update.

    A value that is NaN (an empty bin) does not count. After a resume the first window holds the updates since then.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"log_every={size}: expected 1 or more.")
        self._size = size
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(
        self, first: int, metrics: Mapping[str, np.ndarray], last: int
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """metrics: name -> (count, ...) rows of updates first+1 .. first+count. Yields (update, means) per window."""
        count = len(next(iter(metrics.values())))
        for row in range(count):
            for name, rows in metrics.items():
                value = np.asarray(rows[row], np.float64)
                valid = ~np.isnan(value)
                self._sums[name] = self._sums.get(name, 0.0) + np.where(valid, value, 0.0)
                self._counts[name] = self._counts.get(name, 0.0) + valid
            update = first + row + 1
            if update % self._size == 0 or update == last:
                yield update, {n: _mean(self._sums[n], self._counts[n]) for n in self._sums}
                self._sums, self._counts = {}, {}


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _plain(value: Any) -> Any:
    """JSON: 6 significant digits, null for what is not finite."""
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array]
    number = array.item()
    if isinstance(number, float):
        return float(f"{number:.6g}") if math.isfinite(number) else None
    return number


def _numbered(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbered(f"{name}/{index}", item)
    elif value is not None:
        yield name, value


def _drop_lines_after(path: Path, stage: str, step: int) -> None:
    """Rewrite `path` without the lines of `stage` beyond `step` and without torn lines. Atomic."""
    if not path.is_file():
        return

    def keep(line: str) -> bool:
        try:
            entry = parse_object(line)
            return entry["stage"] != stage or entry["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and keep(line)]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


class _Events:
    """TensorBoard's event file of a stage, written by whoever calls it, and on disk after FLUSH_SECONDS at the latest:
    tensorboardX's own writer has a thread, whose errors nobody hears."""

    def __init__(self, directory: Path, step: int) -> None:
        """step: updates the stage has done already; TensorBoard hides earlier events beyond it."""
        from tensorboardX.event_file_writer import EventsWriter

        event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary: Any = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._flushed = event_pb2.Event, time.monotonic()
        self._writer = EventsWriter(str(directory / "events"))
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, scalars: Sequence[tuple[str, float]]) -> None:
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in scalars]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _events(directory: Path, step: int) -> _Events | None:
    """None where tensorboardX is missing."""
    try:
        return _Events(directory, step)
    except ImportError:
        return None
