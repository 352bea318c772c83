"""What a step reads and never changes, where it changes along a stage: one tree after another, read ahead of time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Relay:
    """Trees that take turns. Which one counts is a function of the training state, so that a resumed run agrees.

    Close when done.
    """

    def __init__(
        self, changes: Sequence[int], count: int, number: Callable[[int, Any], int], read: Callable[[int], Any]
    ) -> None:
        """A relay of `count` trees.

        Args:
          changes: the updates at which the tree may change, increasing, the first of them 0: no device call reaches
            over one of them.
          number: (updates done, state) -> which tree counts, from 0; asked at those updates and where a run resumes.
          read: number of a tree -> the tree, on the devices. While one tree is in use the next is read in a background
            thread; on several processes it is read when its turn comes, by all of them together.
        """
        if list(changes) != sorted(set(changes)) or not changes or changes[0] != 0:
            raise ValueError(f"changes={list(changes)}: expected increasing numbers of updates that begin with 0.")
        self.changes = tuple(changes)
        self._count, self._which, self._read = count, number, read
        self._asked: int | None = None  # the last change before the update for which the number is known
        self._number = -1
        self._tree: Any = None
        self._next: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1) if jax.process_count() == 1 else None

    def at(self, update: int, state: Any) -> Any:
        """The tree that counts after `update` finished updates, which led to `state`. Raises what reading it raises."""
        change = max(change for change in self.changes if change <= update)
        if change != self._asked:
            self._take(self._which(update, state))
            self._asked = change
        return self._tree

    def _take(self, number: int) -> None:
        if number == self._number:
            return
        ready, self._next = self._next, None
        # Only the tree that follows was read ahead.
        follows = ready is not None and number == self._number + 1
        self._tree = None  # two trees at once are enough
        self._tree = ready.result() if ready is not None and follows else self._read(number)
        self._number = number
        if self._thread is not None and number + 1 < self._count:
            self._next = self._thread.submit(self._read, number + 1)

    def close(self) -> None:
        """Wait for the thread and let go of the trees."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._tree = self._next = None


def timed(starts: Sequence[int], read: Callable[[int], Any]) -> Relay:
    """A relay whose trees take turns at given updates: tree k counts from update starts[k] on."""

    def number(update: int, state: Any) -> int:
        del state
        return max(number for number, start in enumerate(starts) if start <= update)

    return Relay(starts, len(starts), number, read)
