"""The targets of DisBack's generator: checkpoints of the recorded path, one after another, and the teacher at last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffdistill import chain
from diffdistill.chain import Stage
from diffdistill.config import DisbackConfig
from diffdistill.evaluation.files import write_atomically
from diffdistill.methods import walk
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.training.errors import CheckpointError
from diffdistill.training.json_files import read_json
from diffdistill.training.relay import Relay, timed
from diffdistill.workdir import Workdir

Read = Callable[[str, int], Any]
"""(name of a stage, updates of a checkpoint or 0 for the newest) -> its parameters on all devices."""

FILE = "path.json"
_DRAWS = 8  # batches over which the loss of a checkpoint is averaged


def relay(folder: Workdir, stage: Stage, mesh: Mesh, read: Read, say: Callable[[str], Any]) -> tuple[Relay, int]:
    """The targets of a stage that trains a generator, in their turn, and how many there are."""
    settings = stage.settings
    assert isinstance(settings, DisbackConfig)
    order: Sequence[int] = (0,)
    if stage.path:
        losses = path_losses(folder, stage, mesh, read)
        order = walk.targets(walk.apart(losses, settings.path_share), settings.path)
        say(_described(losses, order, settings.interval))

    def target(number: int) -> Any:
        checkpoint = order[number]
        return {"teacher": read(stage.path, checkpoint * settings.interval) if checkpoint else read(stage.teacher, 0)}

    if settings.walk == "adaptive":
        changes = range(0, stage.num_updates, settings.walk_window)
        return Relay(changes, len(order), lambda update, state: int(state.walk.position), target), len(order)
    return timed([position * settings.leg for position in range(len(order))], target), len(order)


def path_losses(folder: Workdir, stage: Stage, mesh: Mesh, read: Read) -> list[float]:
    """The loss of every checkpoint of a path, the teacher's first, on the same samples of the initial generator.

    Where the path leads to that generator they fall. They are measured once, and kept beside the checkpoints.
    """
    settings = stage.settings
    assert isinstance(settings, DisbackConfig)
    file = folder.stage(stage.path) / FILE
    kept = processes.on_main(lambda: _read(file, settings.path + 1) if file.exists() else None)
    if kept is not None:
        return kept
    found = processes.from_main(np.array(_measure(folder, stage, settings, mesh, read))).tolist()
    if processes.is_main():
        updates = [number * settings.interval for number in range(settings.path + 1)]
        text = json.dumps({"update": updates, "loss": found, "blake2b": _digest(found)})
        write_atomically(file, lambda stream: stream.write(text.encode()))
    return found


def _read(file: Path, count: int) -> list[float]:
    try:
        record = read_json(file)
        found = np.array(record["loss"], np.float64)
        if record.get("blake2b", _digest(found.tolist())) != _digest(found.tolist()):
            raise ValueError("it is not as it was written: the checksums differ")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Delete it, and it is measured again.") from error
    if found.shape != (count,):
        raise CheckpointError(f"{file} holds {found.size} losses, expected {count}. Delete it; it is measured again.")
    return found.tolist()


def _digest(losses: list[float]) -> str:
    return hashlib.blake2b(json.dumps(losses).encode(), digest_size=16).hexdigest()


def _measure(folder: Workdir, stage: Stage, settings: DisbackConfig, mesh: Mesh, read: Read) -> list[float]:
    loss = chain.path_loss(folder.config, stage, folder.facts)
    everywhere = meshes.replicated(mesh)

    def mean(params: Any, generator: Any, labels: jax.Array, key: jax.Array) -> jax.Array:
        return loss(params, {"generator": generator}, {"label": labels}, key, {})[0]

    rows = meshes.batch_sharding(mesh)
    compiled = jax.jit(mean, in_shardings=(everywhere, everywhere, rows, everywhere), out_shardings=everywhere)
    generator = read(stage.generator, 0)
    labels = np.arange(settings.batch_size, dtype=np.int32) % max(folder.facts.num_classes, 1)
    draws = [jax.random.fold_in(jax.random.key(folder.config.seed), draw) for draw in range(_DRAWS)]
    found = []
    for number in range(settings.path + 1):
        params = read(stage.path, number * settings.interval) if number else read(stage.teacher, 0)
        values = [compiled(params, generator, meshes.shard_rows(mesh, labels), key) for key in draws]
        found.append(float(np.mean([float(value) for value in values])))
    return found


def _described(losses: Sequence[float], order: Sequence[int], interval: int) -> str:
    shown = ", ".join(f"{loss:.3g}" for loss in losses)
    targets = ", ".join(f"update {number * interval}" if number else "the teacher" for number in order)
    return f"path: losses on samples of the first generator {shown}; targets: {targets}"
