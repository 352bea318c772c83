"""Reference statistics: our own files and those of EDM, EDM2, pytorch-fid, ADM and clean-fid.

| file      | what is in it                                                | protocol                    |
|-----------|--------------------------------------------------------------|-----------------------------|
| ours      | .npz: mu, sigma, mu_s, sigma_s, features, provenance (JSON)  | provenance                  |
| ADM       | .npz: mu, sigma, mu_s, sigma_s of a data set; arr_0: images  | tf                          |
| EDM2      | .pkl: num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}   | tf                          |
| clean-fid | .npz: mu, sigma; <dataset>_<mode>_<split>_<resolution>.npz   | the mode in its name        |
| the rest  | .npz: mu, sigma (EDM, pytorch-fid, TTUR)                     | must be stated by the user  |

Nothing in them is executed, and images beside the statistics, which may be gigabytes, are not read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdistill.data import pickles, unpickling
from diffdistill.data.contract import DataError, check_expansion
from diffdistill.diffusion import names
from diffdistill.evaluation import program, protocols
from diffdistill.evaluation.files import write_atomically

if TYPE_CHECKING:
    from diffdistill.evaluation.image_statistics import ImageStatistics

_MEMBERS = ("mu", "sigma", "mu_s", "sigma_s", "features", "provenance")
_IMAGES = {"arr_0", "images"}
_CLEAN_FID = re.compile(
    r".+_(clean|legacy_tensorflow|legacy_pytorch)(_clip_vit_b_32)?_[a-z0-9]+_(?:\d+|na)\.npz", re.IGNORECASE
)
_CLEAN_FID_PROTOCOLS = {"clean": "clean", "legacy_tensorflow": "tf", "legacy_pytorch": "pytorch-fid"}


class StatisticsError(ValueError):
    """Reference statistics that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are compared with.

    Attributes:
      mean, covariance: of the pooled features, (d,) and (d, d) float64; d = 2048 for Inception.
      spatial_mean, spatial_covariance: of the spatial features of sFID, (2023,) and (2023, 2023), where the file has
        them.
      features: (M, d) float32, a random subset for KID, precision and recall, where the file has it.
      provenance: protocol; kind: diffdistill, adm, edm2, clean-fid or unmarked (one of many tools that write mu and
        sigma alone); source, in words; and in our own files count, weights_sha256, fingerprint, image_shape, date,
        written_by. All of it fits into JSON.
    """

    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    features: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int | None:
        """How many images mean and covariance are of; None: the file does not say it."""
        return self.provenance.get("count")

    def digest(self) -> str:
        """12 hexadecimal digits that change with any of the arrays."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        content = hashlib.sha256()
        for array in (self.mean, self.covariance, self.spatial_mean, self.spatial_covariance, self.features):
            content.update(b"absent" if array is None else np.ascontiguousarray(array).data)
        return content.hexdigest()[:12]

    def text(self) -> str:
        """In words, for a person."""
        count = "an unknown number of" if self.count is None else self.count
        return f"{self.provenance.get('source', 'unknown')} ({count} images)"

    def facts(self) -> dict[str, Any]:
        """What a record of results says about the reference."""
        return {"reference": self.provenance.get("source", "unknown"), "reference_count": self.count}


def of_statistics(statistics: ImageStatistics, provenance: Mapping[str, Any]) -> Reference:
    """The reference that statistics of a set of images make; `provenance` says which images, protocol and weights.

    Raises ValueError for fewer than two images.
    """
    known = {
        "kind": "diffdistill",
        "count": int(statistics.pool.count),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "written_by": program.about(),
    }
    return Reference(
        statistics.pool.mean(),
        statistics.pool.covariance(),
        statistics.spatial.mean(),
        statistics.spatial.covariance(),
        statistics.features.features,
        {**provenance, **known},
    )


def write(path: str | os.PathLike[str], reference: Reference) -> Path:
    """Writes an .npz file that `read` reads, and that tools which look for mu and sigma read too; whole or not at all.

    Raises OSError as the file system gives it.
    """
    arrays: dict[str, Any] = {"mu": reference.mean, "sigma": reference.covariance}
    if reference.spatial_mean is not None:
        arrays |= {"mu_s": reference.spatial_mean, "sigma_s": reference.spatial_covariance}
    if reference.features is not None:
        arrays["features"] = np.asarray(reference.features, np.float32)
    arrays["provenance"] = np.array(json.dumps(dict(reference.provenance)))
    return write_atomically(path, lambda file: np.savez(file, **arrays))


def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds statistics, perhaps beside images: an .npz file with mu in it, or a pickle as EDM2's."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(1) == b"\x80":
            return True
    return "mu" in _members(path)


def holds_images(path: str | os.PathLike[str]) -> bool:
    """Whether an .npz file holds images, perhaps beside statistics, as ADM's reference batches do."""
    return not _IMAGES.isdisjoint(_members(Path(path)))


def _members(path: Path) -> set[str]:
    """The arrays of an .npz file; none for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, ArithmeticError, zipfile.BadZipFile):
        return set()


def read(
    path: str | os.PathLike[str], *, protocol: str, stated_protocol: str = "", weights_sha256: str = ""
) -> Reference:
    """Reads reference statistics and checks that they belong to a protocol and to a feature network.

    Args:
      path: a file of the table at the top of this file.
      protocol: that of the features it will be compared with, a name of protocols.PROTOCOLS.
      stated_protocol: what the file is of, where it does not say it itself (config.evaluation.reference_protocol).
      weights_sha256: of the network that the features come from; checked where the file names its own.

    Raises:
      StatisticsError: no such file, damaged, not statistics, or of another protocol or network.
      ValueError: a protocol that does not exist.
    """
    path = Path(path)
    for name in filter(None, (protocol, stated_protocol)):
        names.choose(protocols.PROTOCOLS, name, "protocol")
    arrays, provenance = _contents(path)
    provenance["protocol"] = _protocol(path, provenance, stated_protocol)
    if provenance["protocol"] != protocol:
        raise StatisticsError(
            f"{path} holds statistics of the protocol {provenance['protocol']}, but {protocol} was asked for, and "
            "figures across protocols mean nothing. Set config.evaluation.protocol, or give another reference."
        )
    theirs = provenance.get("weights_sha256")
    if theirs and weights_sha256 and theirs != weights_sha256:
        raise StatisticsError(
            f"{path} was computed with the feature network {str(theirs)[:12]}..., not with {weights_sha256[:12]}...: "
            "compute it again with --mode=statistics, or give the same weights."
        )
    count = provenance.get("count")
    if count is not None and (not isinstance(count, int) or count < 2):
        raise StatisticsError(
            f"{path} gives its number of images as {unpickling.shown(count)}; a covariance needs at least 2."
        )
    mean, covariance = _gaussian(path, arrays, "mu", "sigma")
    spatial = _gaussian(path, arrays, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} & arrays.keys() else (None, None)
    return Reference(
        mean, covariance, *spatial, _features(path, arrays, len(mean)), {"source": path.name, **provenance}
    )


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by the names of _MEMBERS, provenance as far as the file shows it)."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise StatisticsError(
            f"{path} cannot be read: {error.strerror}. Give a file of reference statistics."
        ) from error
    if start.startswith(b"\x80"):
        return _edm2(path)
    if not start.startswith(b"PK"):
        what = "a single array" if start == b"\x93NUM" else "no .npz file, or damaged at its beginning"
        raise StatisticsError(f"{path} is {what}; reference statistics are an .npz file with mu and sigma.")
    arrays = _npz(path)
    if "provenance" in arrays:
        try:
            return arrays, dict(json.loads(str(arrays["provenance"])))
        except Exception as error:  # among them RecursionError
            reason = unpickling.about(error)
            raise StatisticsError(f"{path}: its provenance is damaged ({reason}); compute it again.") from error
    if "mu_s" in arrays:
        return arrays, {"kind": "adm", "protocol": "tf"}  # ADM's evaluator runs TensorFlow's own graph
    if match := _CLEAN_FID.fullmatch(path.name):
        if match[2]:
            raise StatisticsError(f"{path} is of CLIP's features by its name; statistics of Inception's are needed.")
        return arrays, {"kind": "clean-fid", "protocol": _CLEAN_FID_PROTOCOLS[match[1].lower()]}
    return arrays, {"kind": "unmarked"}


def _npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.removesuffix(".npy") in _MEMBERS:
                    stored = min(entry.compress_size, path.stat().st_size)
                    check_expansion(f"{path}: {entry.filename}", stored, entry.file_size)
        with np.load(path, allow_pickle=False) as file:  # reads a member when it is asked for
            found = {name: file[name] for name in _MEMBERS if name in file.files}
            members = list(file.files)
    except DataError as error:
        raise StatisticsError(f"{error}.") from error
    except Exception as error:  # a damaged zip raises nearly anything
        reason = unpickling.about(error)
        raise StatisticsError(
            f"{path} is damaged, or holds more than plain numbers ({reason}); fetch or compute it again."
        ) from error
    if "mu" in found and "sigma" in found:
        return found
    if not _IMAGES.isdisjoint(members):
        raise StatisticsError(
            f"{path} holds images, not statistics of them. --mode=evaluate --images={path} measures them; "
            f"--mode=evaluate --images=... --reference={path} compares others with them."
        )
    raise StatisticsError(
        f"{path} holds no mu and sigma, but {', '.join(members[:6]) or 'nothing'}: it is not reference statistics. "
        "--mode=statistics makes them of a data set."
    )


def _edm2(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            content = pickles.load(file, str(path))
    except DataError as error:
        raise StatisticsError(f"{error}. Of pickles, the reference statistics of EDM2 are read.") from error
    arrays = content.get("fid")
    if not isinstance(arrays, dict) or not all(isinstance(arrays.get(name), np.ndarray) for name in ("mu", "sigma")):
        raise StatisticsError(f"{path} holds {sorted(content)[:6]}; in EDM2's files mu and sigma of 'fid' are needed.")
    return arrays, {"kind": "edm2", "protocol": "tf", "count": content.get("num_images")}


def _protocol(path: Path, provenance: Mapping[str, Any], stated: str) -> str:
    """The protocol of a file, by itself or by the user."""
    found = provenance.get("protocol")
    if not found and not stated:
        raise StatisticsError(
            f"{path} does not say by which protocol its images were resized. State it with "
            "--config.evaluation.reference_protocol: tf for files of EDM and TTUR, pytorch-fid for those of "
            "pytorch-fid, clean for those of clean-fid in its own mode."
        )
    if found and stated and found != stated:
        how = "its name says" if provenance.get("kind") == "clean-fid" else "it says itself"
        raise StatisticsError(
            f"{path} is of the protocol {found}, {how}, but config.evaluation.reference_protocol states {stated}. "
            "Leave that empty, or give another reference."
        )
    return found or stated


def _gaussian(path: Path, arrays: Mapping[str, Any], mean: str, covariance: str) -> tuple[np.ndarray, np.ndarray]:
    m, c = (np.asarray(arrays.get(name, ())) for name in (mean, covariance))
    if m.ndim != 1 or not len(m) or c.shape != m.shape * 2:
        raise StatisticsError(
            f"{path}: {mean} has shape {m.shape} and {covariance} {c.shape}; expected (d,) and (d, d)."
        )
    if m.dtype.kind != "f" or c.dtype.kind != "f":
        raise StatisticsError(f"{path}: {mean} and {covariance} are {m.dtype} and {c.dtype}; expected floating point.")
    m, c = m.astype(np.float64), c.astype(np.float64)
    if not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise StatisticsError(f"{path}: {mean} or {covariance} holds a NaN or an infinity; compute it again.")
    rounding = 1e-6 * np.abs(c).max()
    if np.abs(c - c.T).max() > rounding or np.diag(c).min() < -rounding:
        raise StatisticsError(
            f"{path}: {covariance} is no covariance: it is not symmetric, or a variance is negative. Compute it again."
        )
    return m, c


def _features(path: Path, arrays: Mapping[str, Any], dimension: int) -> np.ndarray | None:
    if "features" not in arrays:
        return None
    features = np.asarray(arrays["features"])
    if features.ndim != 2 or features.shape[1] != dimension or not len(features) or features.dtype.kind != "f":
        raise StatisticsError(
            f"{path}: features are {features.dtype} {features.shape}; expected floating point (M, {dimension})."
        )
    if not np.isfinite(features).all():
        raise StatisticsError(f"{path}: features hold a NaN or an infinity; compute it again.")
    return features.astype(np.float32)
