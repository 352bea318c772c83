"""The processes of a run: joining them, deciding alike, and handing on what only one of them has.

The main process keeps the run: it alone reads and writes the workdir, and tells the others what they need of it.
"""

import collections
import contextlib
import hashlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from diffdistill.training.errors import OtherProcessFailed, ProcessesDisagree, ProcessLost

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life from a process of the job, JAX ends the others."""

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_PIECE = 2**26  # bytes sent at once
_told: collections.Counter[str] = collections.Counter()


def initialize(
    distributed: bool,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of a job. Call before anything touches a device; does nothing unless `distributed`.

    coordinator: "host:port" of process 0; None lets JAX read the cluster environment (SLURM, MPI, Cloud TPU, ...).
    Raises ValueError where the other processes cannot be found: never falls back to a lonely run.
    """
    if not distributed:
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        # They meet for the first time here, which must happen within half a minute on CPUs; later they may wait.
        any_process(False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "A run on several processes was asked for, but the others could not be joined "
            f"(coordinator={coordinator!r}, num_processes={num_processes}, process_id={process_id}): {error}. "
            "Outside a known cluster give all three (coordinator as host:port of process 0), start every process "
            "with its own process_id, and touch no device before; for one process leave the flag away."
        ) from error


def is_main() -> bool:
    """True on the one process that writes logs, metrics and pictures."""
    return jax.process_index() == 0


def assert_same(value: str, what: str, advice: str = "start all of them with the same command and files.") -> None:
    """Refuses to go on where processes hold different text: ProcessesDisagree naming `what`. No-op on a single one."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
    with shared():
        gathered = np.asarray(multihost_utils.process_allgather(digest))
    differing = [str(process) for process, row in enumerate(gathered) if (row != gathered[0]).any()]
    if differing:
        raise ProcessesDisagree(
            f"The processes of this run disagree on {what} (not as in process 0: {', '.join(differing)}): {advice}"
        )


def from_main(values: np.ndarray) -> np.ndarray:
    """The main process's `values` on every process, bit for bit: one decides, all act alike.

    Elsewhere only shape and dtype count, which must be those of the main process.
    """
    if jax.process_count() == 1:
        return values
    values = np.asarray(values)
    found = _bytes_from(0, values.tobytes() if is_main() else b"", values.nbytes)
    return np.frombuffer(found, values.dtype).reshape(values.shape)


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on the main process, which alone calls it, on every process.

    So only the main process needs the files that are looked at. What comes back is pickled on its way. All processes
    must call it together; an error is raised by the main process, and OtherProcessFailed by the others.
    """
    if jax.process_count() == 1:
        return function()
    if not is_main():
        sent = _sent_by(0, b"")
        if not sent:
            raise OtherProcessFailed
        return pickle.loads(sent)
    try:
        result = function()
        sent = pickle.dumps(result)
    except Exception:
        _sent_by(0, b"")
        raise
    _sent_by(0, sent)
    return result


def gather(content: bytes, take: Callable[[int, bytes], object]) -> None:
    """Calls take(number of the process, its content) for each of them, in order, on the main process alone.

    All processes must call it together. `take` must not fail.
    """
    for process in range(jax.process_count()):
        sent = _sent_by(process, content) if jax.process_count() > 1 else content
        if is_main():
            take(process, sent)


def tell(what: str, text: str = "") -> None:
    """Lets the other processes go on that wait for it in `told`, without taking part in anything themselves."""
    if jax.process_count() > 1:
        _service().key_value_set(_key(what), f"{text}.")


def told(what: str) -> str:
    """What the main process has said with `tell`, however long that takes; empty where it has gone without."""
    key = _key(what)
    while True:
        try:
            return _service().blocking_key_value_get(key, 5_000)[:-1]
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return ""


def _key(what: str) -> str:
    """Another one each time that something is told."""
    _told[what] += 1
    return f"diffdistill/{what}/{_told[what]}"


def _service() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _sent_by(process: int, content: bytes) -> bytes:
    """The content of one process, of whatever length, on every process."""
    length = np.frombuffer(_bytes_from(process, np.int64(len(content)).tobytes(), 8), np.int64)
    return _bytes_from(process, content, int(length[0]))


def _bytes_from(process: int, content: bytes, length: int) -> bytes:
    """Exactly `length` bytes of one process on every process, in pieces of few sizes: each size is compiled once."""
    from jax.experimental import multihost_utils

    found = bytearray()
    for start in range(0, length, _PIECE):
        count = min(length - start, _PIECE)
        piece = np.zeros(max(1024, 1 << (count - 1).bit_length()), np.uint8)
        is_source = jax.process_index() == process
        if is_source:
            piece[:count] = np.frombuffer(content, np.uint8, count, start)
        with shared():
            found += np.asarray(multihost_utils.broadcast_one_to_all(piece, is_source=is_source))[:count].tobytes()
    return bytes(found)


def any_process(flag: bool) -> bool:
    """True on every process where `flag` is true on any. All processes must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    with shared():
        return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Translates the failure of something that several processes do together."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or _OUT_OF_MEMORY in str(error):
            raise
        raise ProcessLost(explained(error)) from error


def explained(error: Exception) -> str:
    """What to say of an error of JAX that is expected to happen; empty for any other.

    That is a device whose memory does not suffice, and what fails where several processes compute together.
    """
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return ""
    first = str(error).splitlines()[0][:200]
    if _OUT_OF_MEMORY in str(error):
        return (
            f"The memory of a device does not suffice ({first}). Checkpoints that were complete before are intact. "
            "--mode=plan shows what each stage needs; take batches in parts (--config.teacher.parts=4), recompute in "
            "the backward pass (--config.model.remat), or sample fewer images at once "
            "(--config.sampling.batch_size=100)."
        )
    if jax.process_count() == 1:
        return ""
    return (
        f"A computation that {jax.process_count()} processes share has failed: another of them has probably ended; "
        f"see its own message ({first}). Checkpoints that were complete before are intact; start the same command on "
        "all hosts again to continue."
    )
