"""A shared pool of threads for reading and decoding, which spend their time outside the interpreter lock."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

_BLOCK = 64  # calls per task of the pool: a future costs about as much as decoding one small image


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    # A few threads more than cores hide the latency of network disks.
    return ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1) + 2), thread_name_prefix="diffdistill-data")


def for_each(function: Callable[[int], None], count: int, describe: str | None = None) -> None:
    """Calls function(0) .. function(count - 1) from several threads and waits for all.

    Args:
      function: called once per number, in no particular order.
      count: how many calls.
      describe: the label of a progress bar, shown on a terminal when the work takes longer than two seconds.

    Raises:
      whatever `function` raises, for the smallest block of numbers that fails; blocks not begun are dropped.
    """
    block = max(1, min(_BLOCK, count // (2 * (os.cpu_count() or 1))))

    def run(first: int) -> int:
        last = min(first + block, count)
        for number in range(first, last):
            function(number)
        return last - first

    finished = _threads().map(run, range(0, count, block))
    if describe is None:
        for _ in finished:
            pass
        return
    from tqdm import tqdm

    with tqdm(total=count, desc=describe, unit="image", delay=2, disable=None) as bar:
        for calls in finished:
            bar.update(calls)
