"""Where data lies: a path on this machine, or the copy of what an address names."""

from pathlib import Path

from diffdistill.data import remote
from diffdistill.data.contract import DataError


def existing(path: str | Path) -> Path:
    """Returns the path if something is there; of an address such as gs://bucket/folder that of its copy (remote.py).

    Raises DataError that names the nearest parent that exists.
    """
    if remote.is_remote(path):
        return remote.local(str(path))
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:  # ~name/folder of someone unknown
        raise DataError(f"{path} begins with the home of a user who is not known here; give the whole path") from error
    try:
        if path.exists():
            return path
    except OSError as error:
        raise DataError(f"{path} cannot be looked at: {error.strerror}. Check its permissions") from error
    if path.is_symlink():
        raise DataError(f"{path} is a link to {path.readlink()}, which does not exist")
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    kind = "folder" if parent.is_dir() else "file"
    raise DataError(f"{path} does not exist; the nearest parent that does is the {kind} {parent}. Check the path")
