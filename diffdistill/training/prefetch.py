"""Batches read, stacked and sent to the devices in the background, a few calls ahead of the training loop."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffdistill.training import mesh as meshes

Batch = Mapping[str, Any]
Call = tuple[int, int, Any]

AHEAD = 2
"""Stacks that wait on the devices for the loop."""


def cut(start: int, stop: int, size: int, save_every: int, changes: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Updates start..stop cut into calls (first, count): at most `size` long, none over a save point or a change."""
    while start < stop:
        end = min([start + size, stop, *(change for change in changes if change > start)])
        if save_every:
            end = min(end, (start // save_every + 1) * save_every)
        yield start, end - start
        start = end


class Calls:
    """Iterator over (first, count, batches (size, B, ...) on the devices), filled by one background thread.

    A short call is padded with copies of its last batch, which the device never looks at.
    An error while reading a batch is raised in the loop, at the call it belongs to. Close when done.
    """

    def __init__(
        self,
        batches: Callable[[int], Batch],
        mesh: Mesh,
        start: int,
        stop: int,
        size: int,
        save_every: int,
        changes: Sequence[int] = (),
    ) -> None:
        self._queue: queue.Queue[Call | Exception | None] = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(batches, mesh, cut(start, stop, size, save_every, changes), size), daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Call]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _fill(self, batches: Callable[[int], Batch], mesh: Mesh, calls: Iterator[tuple[int, int]], size: int) -> None:
        try:
            for first, count in calls:
                rows = []
                for index in range(first, first + count):
                    if self._closed.is_set():
                        return
                    rows.append(batches(index))
                rows += [rows[-1]] * (size - count)
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
                self._queue.put((first, count, meshes.shard_batch(mesh, stacked, axis=1)))
            self._queue.put(None)
        except Exception as error:  # noqa: BLE001, handed to the loop, which raises it
            self._queue.put(error)
