"""What is said where a checkpoint cannot be written or read."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

KEPT = "Checkpoints that were complete before are intact; start the same command again to continue from the newest."


def damaged(checkpoint: Path, why: str, newer: Sequence[int] = ()) -> str:
    """newer: the checkpoints of the stage after one that is needed itself."""
    return f"The checkpoint {checkpoint} is damaged: {why}. {_away(newer)}"


def unreadable(checkpoint: Path, error: Exception, newer: Sequence[int] = ()) -> str:
    """What cannot be read need not be damaged."""
    return (
        f"The checkpoint {checkpoint} cannot be read: {_first_line(error)}. If the disk or the network fails, put it "
        f"right and start the same command again. {_away(newer)}"
    )


def absent(directory: Path, update: int, there: Sequence[int]) -> str:
    """A checkpoint that is needed itself is not among those of its stage."""
    newer = [step for step in there if step > update]
    advice = f" Move those after it ({_numbers(newer)}) away to train it again from the one before." if newer else ""
    return (
        f"There is no complete checkpoint of update {update} in {directory}; there are {_numbers(there) or 'none'}."
        f"{advice}"
    )


def _away(newer: Sequence[int]) -> str:
    if newer:
        return (
            f"Move that directory and the later ones of its stage ({_numbers(newer)}) away to train them again from "
            "the checkpoint before it, if there is one."
        )
    return "Move that directory away to continue from the checkpoint before it, if there is one."


def _numbers(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def explain(error: BaseException, doing: str, directory: Path) -> str:
    """One message for a person out of an error of the file system, however deep Orbax wrapped it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    numbers = {e.errno for e in chain if isinstance(e, OSError)}
    text = " ".join(str(e) for e in chain)
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or any(
        os.strerror(n) in text for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    ):
        return f"Cannot {doing} a checkpoint in {directory}: the disk is full. Free some space. {KEPT}"
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}:
        return (
            f"Cannot {doing} a checkpoint in {directory}: {_first_line(error)}. "
            "Choose a workdir that is a directory and that this user may write."
        )
    return f"Cannot {doing} a checkpoint in {directory}: {type(error).__name__}: {_first_line(error)}. {KEPT}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
