"""The results file: one JSON object a line, appended whole, so that a killed evaluation continues where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffdistill.evaluation import program
from diffdistill.fields import shown
from diffdistill.training.json_files import parse_object

Record = dict[str, Any]
Key = tuple[Any, ...]

_TEXT, _COUNT, _NUMBER = "text", "a whole number from 0 to 2^63", "a finite number"
_WEIGHT, _RANGE, _NUMBERS = "a finite number or null", "two finite numbers", "numbers by name"
# `w` is None for networks without guidance; `num_samples` counts images, `network_evaluations` those per image.
_KINDS = {
    "stage": _TEXT,
    "num_steps": _COUNT,
    "network_evaluations": _COUNT,
    "sampler": _TEXT,
    "w": _WEIGHT,
    "metric": _TEXT,
    "value": _NUMBER,
    "num_samples": _COUNT,
    "seed": _COUNT,
    "hardware": _TEXT,
    "wall_time": _NUMBER,
    "date": _TEXT,
    "params_hash": _TEXT,
}
REQUIRED = tuple(_KINDS)
# Fields that not every record has, but that tables rely on where they are.
_OPTIONAL = {
    "protocol": _TEXT,
    "weights_sha256": _TEXT,
    "update": _COUNT,
    "average": _COUNT,
    "guidance_range": _RANGE,
    "weight_settings": _NUMBERS,
}
# What makes two measurements the same one. Retrained parameters have another hash and are measured again.
IDENTITY = ("stage", "num_steps", "sampler", "w", "metric", "num_samples", "seed", "params_hash", "protocol")


class ResultsError(ValueError):
    """A results file that cannot be read, or a result that cannot be written; the message says which line and why."""


def record(
    *,
    stage: str,
    num_steps: int,
    network_evaluations: int,
    sampler: str,
    w: float | None,
    metric: str,
    value: float,
    num_samples: int,
    seed: int,
    hardware: str,
    wall_time: float,
    params_hash: str,
    **more: Any,
) -> Record:
    """One measurement by this program, dated now (UTC). `wall_time` in seconds; further facts by keyword."""
    return {
        "stage": stage,
        "num_steps": int(num_steps),
        "network_evaluations": int(network_evaluations),
        "sampler": sampler,
        "w": None if w is None else float(w),
        "metric": metric,
        "value": float(value),
        "num_samples": int(num_samples),
        "seed": int(seed),
        "hardware": hardware,
        "wall_time": float(wall_time),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "params_hash": params_hash,
        **program.about(),
        **more,
    }


def append(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records in one write and flushes them to disk; a torn line left by a killed process is removed first.

    Raises ResultsError when a record lacks a required field or one is of another kind, such as a value that is not a
    finite number.
    """
    lines = [_line(entry) for entry in records]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "a+b") as file:
            _drop_torn_line(file)
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a full disk does not say which file did not fit
        raise


def read(path: str | os.PathLike[str]) -> list[Record]:
    """All records in order; none when the file does not exist. A torn last line is left out.

    Raises ResultsError naming file and line where any other line is not a record: it is no JSON object, lacks a
    required field or has one of another kind.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn, or empty
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_object(line)
        except ValueError as error:
            raise ResultsError(f"{path}, line {number}: not a JSON object ({error}); correct or delete it") from error
        try:
            _check(entry)
        except ResultsError as error:
            raise ResultsError(f"{path}, line {number}: {error}; correct or delete it") from error
        records.append(entry)
    return records


def read_all(paths: Iterable[str | os.PathLike[str]]) -> list[Record]:
    """The records of several files, and of every results.jsonl in a folder or below it.

    Raises ResultsError where a path does not exist or a file cannot be read.
    """
    records = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(path.rglob("results.jsonl"))
        elif path.exists():
            files = [path]
        else:
            raise ResultsError(f"{path} does not exist; give results.jsonl files, or folders that hold them")
        for file in files:
            records += read(file)
    return records


def key(entry: Mapping[str, Any]) -> Key:
    """What identifies a measurement: the fields of `IDENTITY`, w as a float so that 1 and 1.0 are one."""
    return tuple(
        float(entry[name]) if name == "w" and entry.get(name) is not None else entry.get(name) for name in IDENTITY
    )


def finished(records: Iterable[Mapping[str, Any]]) -> set[Key]:
    """The keys of everything measured so far: `key(candidate) in finished(read(path))` says what to skip."""
    return {key(entry) for entry in records}


def _line(entry: Mapping[str, Any]) -> str:
    _check(entry)
    return json.dumps(dict(entry), allow_nan=False) + "\n"


def _check(entry: Mapping[str, Any]) -> None:
    missing = [name for name in REQUIRED if name not in entry]
    if missing:
        raise ResultsError(f"a result lacks {', '.join(missing)}; every line needs {', '.join(REQUIRED)}")
    for name, kind in _KINDS.items():
        _check_kind(entry, name, kind)
    for name, kind in _OPTIONAL.items():
        if entry.get(name) is not None:
            _check_kind(entry, name, kind)


def _check_kind(entry: Mapping[str, Any], name: str, kind: str) -> None:
    value = entry[name]
    if kind == _TEXT:
        fits = isinstance(value, str)
    elif kind == _COUNT:
        fits = isinstance(value, int) and 0 <= value < 2**63
    elif kind == _RANGE:
        fits = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_finite, value))
    elif kind == _NUMBERS:
        fits = isinstance(value, dict) and all(map(_is_finite, value.values()))
    else:
        fits = _is_finite(value) or (kind == _WEIGHT and value is None)
    if not fits:
        raise ResultsError(f"{entry['stage']}, {entry['metric']}: expected {kind} as {name}; given {shown(value)}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number that calculations can begin with."""
    return isinstance(value, int | float) and abs(value) <= 1e300


def _drop_torn_line(file: Any) -> None:
    """Cuts what follows the last newline: the rest of a write that a kill interrupted."""
    end = file.seek(0, os.SEEK_END)
    start = end
    tail = b""
    while start > 0 and b"\n" not in tail:
        step = min(4096, start)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    keep = start + tail.rfind(b"\n") + 1
    if keep < end:
        file.truncate(keep)
    file.seek(0, os.SEEK_END)
