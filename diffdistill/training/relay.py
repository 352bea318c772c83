"""What a step reads and never changes, where it changes along a stage: one tree after another, read ahead of time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Relay:
    """Trees that take turns, each from a given update on; which one is a function of the update alone.

    starts: the update from which each tree counts, increasing, the first of them 0.
    read: number of a tree -> the tree, on the devices. While one tree is in use the next is read in a background
    thread; on several processes it is read when its turn comes, by all of them together.
    Close when done.
    """

    def __init__(self, starts: Sequence[int], read: Callable[[int], Any]) -> None:
        if list(starts) != sorted(set(starts)) or not starts or starts[0] != 0:
            raise ValueError(f"starts={list(starts)}: expected increasing numbers of updates that begin with 0.")
        self.starts = tuple(starts)
        self._read = read
        self._number = -1
        self._tree: Any = None
        self._next: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1) if jax.process_count() == 1 else None

    def number(self, update: int) -> int:
        """The number of the tree that counts after `update` finished updates."""
        return max(number for number, start in enumerate(self.starts) if start <= update)

    def at(self, update: int) -> Any:
        """The tree that counts after `update` finished updates. Raises what reading it raises."""
        number = self.number(update)
        if number != self._number:
            ready, self._next = self._next, None
            # Only the tree that follows was read ahead.
            follows = ready is not None and number == self._number + 1
            self._tree = None  # two trees at once are enough
            self._tree = ready.result() if ready is not None and follows else self._read(number)
            self._number = number
            if self._thread is not None and number + 1 < len(self.starts):
                self._next = self._thread.submit(self._read, number + 1)
        return self._tree

    def close(self) -> None:
        """Wait for the thread and let go of the trees."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._tree = self._next = None
