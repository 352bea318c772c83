"""The folder of a run: what it was started with, and where its stages lie."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffdistill import config as configs
from diffdistill import fields, mirror
from diffdistill.chain import DataFacts
from diffdistill.config import Config
from diffdistill.data import remote
from diffdistill.evaluation import program
from diffdistill.evaluation.files import write_atomically
from diffdistill.training import processes
from diffdistill.training.json_files import read_json

# These parts say how a run is watched and measured, not what is trained: they may change between two starts.
_FREE = ("evaluation", "sampling", "training", "name")
# The stages of each part that may follow a teacher.
_LATER = {
    "guided": ("guided",),
    "progressive": ("round_*",),
    "stochastic": ("stochastic_*",),
    "encoder": ("encoder_*",),
    "disback": ("degradation", "one_step"),
}
_MOST_CLASSES, _LONGEST_SIDE = 10**7, 2**16
_LOCK = ".lock"
_held: set[Path] = set()  # the folders that this process trains in


class WorkdirError(RuntimeError):
    """A workdir that cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's folder with what its config.json records.

    has_data: whether it is bound to certain images; an imported model is not, until it is distilled.
    """

    path: Path
    config: Config
    facts: DataFacts
    has_data: bool = True

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.path / name

    def measured_as(self, config: Config) -> Workdir:
        """The same run, sampled and evaluated as another config says; one without images takes those too."""
        changed = dataclasses.replace(self.config, evaluation=config.evaluation, sampling=config.sampling)
        if not self.has_data:
            changed = dataclasses.replace(changed, data=config.data)
        return dataclasses.replace(self, config=changed)

    def starts(self) -> list[dict[str, Any]]:
        """What config.json says of each start: versions, git_revision, command_line and time, where it says them."""
        return _load(self.path / "config.json").get("starts", [])


def create(path: str | os.PathLike[str], config: Config, facts: DataFacts, fingerprint: str | None) -> Workdir:
    """Opens the folder of a run for training: makes it, or checks that it belongs to the same config and data.

    The settings of stages that have not begun may differ from those of the start before. Of several processes all
    call it, and the main one alone looks at the folder.

    Args:
      path: the folder.
      config, facts: of this run.
      fingerprint: of the data; None: of none yet, for a run whose first stage was not trained here.

    Raises:
      WorkdirError: the folder cannot be written, holds a run of another config or of other data, or another program
        trains in it.
    """
    if remote.is_remote(path):
        raise WorkdirError(
            f"The workdir {path} is an address, but a run works in a folder: use the one of "
            "diffdistill.store.kept(address), as main.py does."
        )
    folder = Path(os.path.abspath(path))
    record = {
        "config": configs.to_dict(config),
        "data": {**json.loads(json.dumps(dataclasses.asdict(facts))), "fingerprint": fingerprint},
    }
    processes.on_main(lambda: _begin_alone(folder, record, imported=fingerprint is None))
    return Workdir(folder, config, facts)


def _begin_alone(folder: Path, record: dict[str, Any], *, imported: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            _begin(folder, record, imported=imported)
    except OSError as error:
        raise WorkdirError(
            f"The workdir {folder} cannot be written: {error.strerror or error}. "
            "Make room or choose another with --workdir=FOLDER."
        ) from error


def _begin(folder: Path, record: dict[str, Any], *, imported: bool) -> None:
    file = folder / "config.json"
    starts: list[dict[str, Any]] = []
    trained = has_checkpoints(folder)
    if trained and file.exists():
        _check_same(file, record)
        before = _load(file)
        starts, imported = before.get("starts", []), before.get("imported", False)
    elif trained:
        raise WorkdirError(
            f"{folder} holds checkpoints but no config.json that says of what. Choose another --workdir, or restore "
            "the file."
        )
    about = {**program.about(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    text = json.dumps({**record, "imported": imported, "starts": [*starts, about]}, indent=2) + "\n"
    write_atomically(file, lambda stream: stream.write(text.encode()))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other programs from training in a folder: each would replace what the other saves.

    Within it this process may ask again. On a file system without locks nothing is kept from anything.

    Raises:
      WorkdirError: another program is in it.
      OSError: the folder cannot be written.
    """
    if folder in _held:
        yield
        return
    with (folder / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read(200).strip()
                raise WorkdirError(
                    f"Another program trains in {folder}{f' ({holder})' * bool(holder)}. Wait until it ends, or choose "
                    "another --workdir; processes that are to train one run together are all started with "
                    "--distributed."
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


def read(path: str | os.PathLike[str]) -> Workdir:
    """Opens the folder of a run for reading, of an address a copy (data.remote).

    Of several processes all call it, and the main one alone looks at the folder.

    Raises:
      DataError: nothing is at an address, or it cannot be read.
      WorkdirError: there is no run, or its config.json is damaged.
    """
    folder, record = processes.on_main(lambda: _located(path))
    return _opened(folder, record)


def read_alone(path: str | os.PathLike[str]) -> Workdir:
    """The same as `read` by one process, which finds the folder itself, before it joins any others.

    Of a run at an address the record alone is fetched.
    """
    if remote.is_remote(path):
        file = remote.local(f"{str(path).rstrip('/')}/config.json")
        return _opened(file.parent, _of_a_run(file))
    return _opened(*_located(path))


def _located(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    if not remote.is_remote(path):
        folder = Path(os.path.abspath(path))
        return folder, _of_a_run(folder / "config.json")
    folder = remote.local(str(path), mirror.with_mark)  # without checkpoints that are being copied there
    return folder, _of_a_run(folder / "config.json")


def _opened(folder: Path, record: dict[str, Any]) -> Workdir:
    try:
        data = record["data"]
        facts = _facts(data["image_shape"], data["num_classes"], data["class_names"], data.get("latents", False))
        return Workdir(folder, configs.resolve(record["config"]), facts, data["fingerprint"] is not None)
    except (KeyError, configs.ConfigError) as error:
        file = folder / "config.json"
        raise WorkdirError(f"{file} was not written by this version of diffdistill: {error}") from error


def _facts(image_shape: Any, num_classes: Any, class_names: Any, latents: Any) -> DataFacts:
    """What a record says of the data; ConfigError where it cannot be so."""

    def is_whole(value: Any, low: int, high: int) -> bool:
        return isinstance(value, int) and low <= value <= high

    sides = image_shape if isinstance(image_shape, list) else []
    for name, value, fits, expected in (
        (
            "image_shape",
            image_shape,
            len(sides) == 3 and all(is_whole(side, 1, _LONGEST_SIDE) for side in sides),
            f"[height, width, channels], each from 1 to {_LONGEST_SIDE}",
        ),
        ("num_classes", num_classes, is_whole(num_classes, 0, _MOST_CLASSES), f"from 0 to {_MOST_CLASSES}"),
        (
            "class_names",
            class_names,
            isinstance(class_names, list) and all(isinstance(name, str) for name in class_names),
            "a list of names",
        ),
        ("latents", latents, isinstance(latents, bool), "true or false"),
    ):
        if not fits:
            raise configs.ConfigError(f"data.{name} is {fields.shown(value)}, but must be {expected}")
    return DataFacts(tuple(sides), num_classes, tuple(class_names), latents)


def _of_a_run(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise WorkdirError(
            f"{file.parent} holds no run: there is no config.json in it. Give the --workdir of a training run."
        )
    return _load(file)


def has_checkpoints(folder: Path, stage: str = "*") -> bool:
    """Whether there are any, damaged or not, of the stages that match a pattern."""
    return any(path.name.isdigit() for path in folder.glob(f"{stage}/*"))


def _load(file: Path) -> dict[str, Any]:
    """What a config.json records; where it has "config", "data", "imported" and "starts" they are of the right type."""
    try:
        record = read_json(file)
        starts = record.get("starts", [])
        types: dict[str, Any] = {"config": dict, "data": dict, "imported": bool, "starts": list}
        for name, kind in types.items():
            if not isinstance(record.get(name, kind()), kind):
                raise ValueError(f"its {name!r} is {fields.shown(record[name])}")
        if not all(map(_is_a_start, starts)):
            raise ValueError(f"its 'starts' are {fields.shown(starts)}")
    except OSError as error:
        raise WorkdirError(
            f"{file} cannot be read: {error.strerror or error}. If the disk or the network fails, put it right and "
            "start the same command again; otherwise restore the file, or choose another --workdir."
        ) from error
    except ValueError as error:
        raise WorkdirError(f"{file} cannot be read: {error}. Restore it, or choose another --workdir.") from error
    return record


def _is_a_start(start: Any) -> bool:
    if not isinstance(start, dict):
        return False
    line = start.get("command_line", [])
    texts = [start.get("time", ""), start.get("git_revision", ""), *(line if isinstance(line, list) else [None])]
    return isinstance(start.get("versions", {}), dict) and all(isinstance(text, str) for text in texts)


def _check_same(file: Path, record: dict[str, Any]) -> None:
    before = _load(file)

    def trained(config: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name not in (*_FREE, *later)}

    later = _not_begun(file.parent)
    unbound = before.get("imported", False) and len(later) == len(_LATER)  # nothing was learnt here yet
    if unbound:
        later.append("process")  # an imported network knows noise levels, not times
    there = before.get("config", {})
    with contextlib.suppress(configs.ConfigError):
        there = configs.to_dict(configs.resolve(there))  # a field that is younger than the run had its default
    data = {"latents": False, **before.get("data", {})}  # of a run that is older than latents
    if unbound:  # only the shape of the images is given
        here = {**record["data"], **{name: data.get(name) for name in ("fingerprint", "class_names")}}
        model = there.get("model")
        if not (isinstance(model, dict) and model.get("conditional")):
            here["num_classes"] = data.get("num_classes")
        record = {**record, "config": {**record["config"], "data": there.get("data")}, "data": here}
    changes = fields.differences(trained(there), trained(record["config"]))
    if not changes and data != record["data"]:
        changes = ["the images themselves are others than those that the run was started with"]
    if changes:
        shown = "\n  ".join(changes[:12] + (["..."] if len(changes) > 12 else []))
        raise WorkdirError(
            f"{file.parent} holds a run of another config (there -> here):\n  {shown}\n"
            "Give the same config to continue that run, or another --workdir to start a new one."
        )


def _not_begun(folder: Path) -> list[str]:
    """The groups of the config whose stages have no checkpoint."""
    return [
        name for name, patterns in _LATER.items() if not any(has_checkpoints(folder, pattern) for pattern in patterns)
    ]
