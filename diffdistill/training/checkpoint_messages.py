"""What is said where a checkpoint cannot be written or read."""

import errno
import os
from pathlib import Path

KEPT = "Checkpoints that were complete before are intact; start the same command again to continue from the newest."


def damaged(checkpoint: Path, why: str) -> str:
    return f"The checkpoint {checkpoint} is damaged: {why}. {_AWAY}"


def unreadable(checkpoint: Path, error: Exception) -> str:
    """What cannot be read need not be damaged."""
    return (
        f"The checkpoint {checkpoint} cannot be read: {_first_line(error)}. If the disk or the network fails, put it "
        f"right and start the same command again. {_AWAY}"
    )


_AWAY = "Move that directory away to continue from the checkpoint before it, if there is one."


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
