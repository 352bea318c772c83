"""Files that are published elsewhere: where, how large, and what they hash to."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from diffdistill import places
from diffdistill.evaluation.files import write_atomically
from diffdistill.weights import WeightsError

_BLOCK = 1 << 20
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Published:
    """A published file. `url` is empty where it has no address of its own, `size` 0 where it is not known."""

    name: str
    sha256: str
    size: int = 0
    url: str = ""


INCEPTION = Published(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    95_628_359,
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
# The same numbers as a pickled dict of arrays, as the JAX ports carry them.
INCEPTION_NESTED = Published(
    "inception_v3_weights_fid.pickle", "4e030efa5bccac3222d975f658d1884f9e00fab24f2812082884539220b90d77"
)


def is_inception(sha256: str | None) -> bool:
    """Whether figures are of the published network: by the hash in their record, None where none was used."""
    return sha256 in (None, INCEPTION.sha256, INCEPTION_NESTED.sha256)


def sha256(path: Path) -> str:
    """The hash of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(published: Published, destination: str | os.PathLike[str] = "") -> Path:
    """Downloads a published file, unless it is there, and verifies it; nothing unverified is ever left in its place.

    Args:
      published: what.
      destination: the file to write; empty: its name in `places.cache()`.

    Returns:
      Where the file lies.

    Raises:
      WeightsError: the address cannot be reached, what came is not the file, or another file is in its place.
    """
    path = Path(destination) if destination else places.cache() / published.name
    if path.exists():
        found = sha256(path)
        if found != published.sha256:
            raise WeightsError(
                f"{path} is there, but is not {published.name}: its sha256 is {found}, not {published.sha256}. "
                "Remove it, or give another path."
            )
        return path
    request = urllib.request.Request(published.url, headers={"User-Agent": "diffdistill"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return write_atomically(path, lambda file: _copy(response, file, published))
    except WeightsError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise WeightsError(
            f"{published.url} cannot be fetched ({reason}). Without a network here, fetch it on another machine "
            f"(sha256 {published.sha256}) and give its path with --inception_weights=PATH or put it at {path}."
        ) from error


def _copy(response: Any, file: BinaryIO, published: Published) -> None:
    """Copies with a progress bar and verifies what was copied before it gets its name."""
    from tqdm import tqdm

    content = hashlib.sha256()
    length = 0
    total = int(response.headers.get("Content-Length") or published.size) or None
    with tqdm(total=total, desc=published.name, unit="B", unit_scale=True, disable=None) as bar:
        while block := response.read(_BLOCK):
            file.write(block)
            content.update(block)
            length += len(block)
            if published.size and length > published.size:  # an endless answer must not fill the disk
                break
            bar.update(len(block))
    if content.hexdigest() != published.sha256:
        short = f" It ended after {length} of {published.size} bytes." if length < published.size else ""
        raise WeightsError(
            f"{published.url} gave a file with sha256 {content.hexdigest()}, not {published.sha256}.{short} "
            "Nothing was kept. Start the same command again; if it repeats, something between here and there changes "
            "the file."
        )
