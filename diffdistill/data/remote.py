"""Data in an object store or on a web server (gs://, s3://, az://, https://, ...), brought to this machine once.

fsspec finds the files; gs:// needs the package gcsfs, s3:// s3fs, az:// adlfs, with their usual credentials. The copy
lies below ~/.cache/diffdistill/data (or $XDG_CACHE_HOME), and all processes that see that folder share it. A file whose
size and tag in the store have not changed is not fetched again; one that was cut short is.
"""

import errno
import fcntl
import hashlib
import json
import os
import posixpath
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffdistill import places
from diffdistill.data.contract import DataError
from diffdistill.data.parallel import for_each

ATTEMPTS = 3  # at files that change while they are fetched
_LISTING, _LOCK = ".listing.json", ".lock"
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
_TAGS = ("etag", "ETag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "created")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something that is not on this machine's disks: gs://bucket/folder."""
    return "://" in str(path)


def local(url: str, choose: Callable[[Iterable[str]], Iterable[str]] | None = None) -> Path:
    """The copy on this machine of a file, or of a folder with all that lies below it.

    Where files change while they are fetched, they are listed and fetched again.

    Args:
      url: an address that fsspec knows.
      choose: the names of all files in a folder -> those to fetch.

    Raises:
      DataError: a kind of address that is not known or lacks its package, nothing there, no access, a full disk.
    """
    for attempt in range(ATTEMPTS):
        files, root, found = connect(url)
        if not found:
            raise DataError(f"{url} does not exist, or is empty; check the address")
        if choose is not None:
            found = {name: found[name] for name in choose(found)}
        name = posixpath.basename(root.rstrip("/")) or "data"
        target = places.cache() / "data" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
        try:
            _fetch(files, root, found, target, url)
            return target
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or attempt == ATTEMPTS - 1:
                advice = "make room" if full else "check the network and the credentials"
                raise DataError(f"{url} cannot be copied to {target} ({error}); {advice}, and start again") from error
    raise AssertionError  # the last attempt returns or raises


def connect(url: str) -> tuple[Any, str, dict[str, list[Any]]]:
    """(the file system of an address, the path in it, size and tags of all files below that by their name there).

    The name is empty where the address is that of a file; nothing is listed where nothing is there. Raises DataError.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        files, root = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if scheme == "file" else {}))
        files.invalidate_cache()
        return files, root, _listing(files, root)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        advice = f"install it with: pip install {package}" if package else "install what that names"
        raise DataError(f"{url} cannot be opened ({error}); {advice}") from error
    except Exception as error:  # every store has its own errors
        if scheme in fsspec.available_protocols():
            advice = "check the address, the network and the credentials"
        else:
            advice = "give a path, or an address that fsspec knows"
        raise DataError(f"{url} cannot be opened ({error}); {advice}") from error


def exists(url: str) -> bool:
    """Whether something is at an address. Raises DataError where that cannot be said."""
    return bool(connect(url)[2])


def get(files: Any, address: str, size: int | None, file: Path) -> None:
    """Fetches one file of so many bytes, whole or not at all. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        files.get_file(address, str(part))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"{address} has {part.stat().st_size} bytes, not {size} as listed")
        os.replace(part, file)
    except Exception as error:  # every store has its own errors, not all of which name the file
        if isinstance(error, OSError) and (error.filename or address in str(error)):
            raise
        named = OSError(f"{address}: {error}")
        named.errno = getattr(error, "errno", None)
        raise named from error
    finally:
        part.unlink(missing_ok=True)


def _listing(files: Any, root: str) -> dict[str, list[Any]]:
    """Size and tags by path below `root`; "" is `root` itself, a file."""
    if not files.exists(root):
        return {}
    if files.isfile(root):
        return {"": _facts(files.info(root))}
    found = {}
    below = posixpath.join(root, "")
    for path, info in files.find(root, detail=True).items():
        if path.endswith("/"):  # of no bytes: so the consoles of S3 and of Google's store mark a folder
            continue
        name = path.removeprefix(below)  # as it is: in a store a//b is another file than a/b
        if not path.startswith(below) or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"it lists {path}, which cannot be a file in a folder")
        found[name] = _facts(info)
    return found


def _facts(info: Mapping[str, Any]) -> list[Any]:
    return [info.get("size"), *(str(info[tag]) for tag in _TAGS if tag in info)]


def _fetch(files: Any, root: str, found: dict[str, list[Any]], target: Path, url: str) -> None:
    """Fetches what is not there as it is listed, and removes what is no longer listed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of this host wait, and then find everything there
        _fetch_alone(files, root, found, target, url)


def _fetch_alone(files: Any, root: str, found: dict[str, list[Any]], target: Path, url: str) -> None:
    listing = target.parent / _LISTING
    try:
        before = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    for name in before.keys() - found.keys():
        (target / name).unlink(missing_ok=True)
    changed = [name for name, facts in found.items() if before.get(name) != facts or not (target / name).exists()]
    kept = {name: facts for name, facts in before.items() if name in found and name not in changed}
    listing.write_text(json.dumps(kept), encoding="utf-8")

    done: set[str] = set()

    def get_number(number: int) -> None:
        name = changed[number]
        get(files, posixpath.join(root, name) if name else root, found[name][0], target / name)
        done.add(name)

    try:
        for_each(get_number, len(changed), f"fetching {url}")
    finally:  # what a broken fetch has brought stays
        there = {name: facts for name, facts in found.items() if name in kept or name in done}
        listing.write_text(json.dumps(there), encoding="utf-8")
