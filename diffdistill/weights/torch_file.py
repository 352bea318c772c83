"""Reads files written by torch.save without torch, and without executing what they name.

Both formats are pickles that describe tensors as (storage, offset, shape, strides) beside raw bytes: a zip file since
torch 1.6, one stream of pickles and bytes before. A pickle may name any function of any module; here the few names
that rebuild tensors are known, each replaced by an inert stand-in of our own, and every other name is refused.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from diffdistill.data import unpickling
from diffdistill.weights import WeightsError

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before the zip file, a number that a pickle holds
_VIEWS = 8  # tensors of the size of their storage that may share it: each becomes an array of its own
_DTYPES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


@dataclass(frozen=True)
class _StorageType:
    """Stands for torch.FloatStorage and its relatives."""

    dtype: np.dtype[Any]


@dataclass
class _Storage:
    """Stands for a block of numbers; `values` (N,) comes from the file, before or after the tensors that show it."""

    dtype: np.dtype[Any]
    size: int
    values: NDArray[Any] | None = None
    shown: int = 0  # numbers in all tensors that show it


@dataclass(frozen=True)
class Tensor:
    """Stands for a tensor: a view of a storage, looked at once everything is read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> NDArray[Any]:
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        values = self.storage.values
        lowest = min(*self.shape, *self.strides, self.offset, 0)
        if values is None or lowest < 0 or math.prod(self.shape) > len(values):
            raise WeightsError(f"a tensor of shape {self.shape} is larger than its storage")
        if 0 not in self.shape and last >= len(values):
            raise WeightsError(f"a tensor of shape {self.shape} reaches beyond its storage")
        self.storage.shown += math.prod(self.shape)
        if self.storage.shown > _VIEWS * max(len(values), 1):
            raise WeightsError(f"more than {_VIEWS} tensors show all of the same block of numbers")
        if 0 in self.shape:
            return np.zeros(self.shape, values.dtype)
        itemsize = values.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, [stride * itemsize for stride in self.strides], writeable=False
        )
        return np.array(view)


class Pairs(OrderedDict[Any, Any]):
    """Stands for OrderedDict: of a list of pairs, or empty and filled later; never the copy of a dict."""

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__()
        for key, value in pairs:
            unpickling.check_keys([key])
            self[key] = value


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    whole = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(type(n) is int for n in whole) or len(shape) != len(strides):
        raise WeightsError("a tensor is not described by a storage and whole numbers")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Pairs,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Unpickler(unpickling.Unpickler):
    """Knows the names in KNOWN and `find_storage`, nothing else."""

    known = KNOWN
    stateful = (OrderedDict,)  # the dicts of torch's modules have attributes

    def __init__(
        self,
        file: BinaryIO,
        find_storage: Callable[[str, np.dtype[Any], int], _Storage],
        operations: int = unpickling.OPERATIONS,
    ) -> None:
        super().__init__(file, operations=operations)
        self._find_storage = find_storage

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            # A sixth entry, in files before the zip format, says that the storage is a part of another one.
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(size), *part) if part in ([], [None]):
                return self._find_storage(key, dtype, size)
        raise WeightsError("it refers to something that is not a block of numbers")


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """Returns what torch.save wrote to `path`: a dict, nested or not, whose tensors are numpy arrays.

    float16 and bfloat16 keep their types (bfloat16 as that of ml_dtypes). Objects other than tensors, numbers, text and
    containers are refused.

    Raises:
      WeightsError: no such file, damaged or truncated, of another kind, or naming anything but tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = _read_zip(file) if zipfile.is_zipfile(path) else read_stream(file)
            found = _arrays(content, {})
    except unpickling.Refused as error:
        raise WeightsError(f"{path} is refused: it {error}.") from error
    except WeightsError as error:
        raise WeightsError(f"{path} is refused: {error}.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = unpickling.about(error)
        raise WeightsError(f"{path} is damaged, truncated or not from torch.save ({reason}).") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds a {type(found).__name__}; a dict of tensors was expected.")
    return found


def is_torch(path: str | Path) -> bool:
    """Whether a file is of torch.save, by its content: a zip file, or a pickle that begins with torch's number."""
    with open(path, "rb") as file:
        start = file.read(32)
    return start.startswith(b"PK") or _MAGIC.to_bytes(10, "little") in start


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names, entries = archive.namelist(), archive.infolist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError("the zip file holds no data.pkl, so torch.save did not write it")
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        # Entries may also lie over each other, or claim any size.
        if packed or sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
            raise WeightsError(
                "its entries are compressed or lie over each other, which torch.save never does; write it again with "
                "torch.save"
            )
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise WeightsError("its numbers are big-endian; save it again on a little-endian machine")
        storages: dict[str, _Storage] = {}

        def find(key: str, dtype: np.dtype[Any], size: int) -> _Storage:
            if key not in storages:
                entry = archive.getinfo(f"{root}data/{key}")
                if entry.file_size != size * dtype.itemsize:
                    raise WeightsError(f"storage {key} has {entry.file_size} bytes, not {size * dtype.itemsize}")
                content = archive.read(entry)  # the zip file checks every member's CRC
                storages[key] = _Storage(dtype, size, np.frombuffer(content, dtype))
            return storages[key]

        with archive.open(pickles[0]) as stream:
            return _Unpickler(stream, find).load()  # type: ignore[arg-type]


def read_stream(file: BinaryIO, operations: int = unpickling.OPERATIONS) -> Any:
    """The object in an open file of the format before the zip file, with Tensor in place of tensors.

    operations: that each of its pickles may have.
    """
    storages: dict[str, _Storage] = {}

    def find(key: str, dtype: np.dtype[Any], size: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, size))

    def load() -> Any:
        return _Unpickler(file, find, operations).load()

    if load() != _MAGIC:
        raise WeightsError("it does not begin as files of torch.save do")
    load()  # version of the protocol
    if not load().get("little_endian", False):
        raise WeightsError("its numbers are big-endian; save it again on a little-endian machine")
    content = load()
    for key in load():
        if not isinstance(key, str) or key not in storages:
            raise WeightsError("it names a block of numbers that no tensor shows")
        storage = storages[key]
        (size,) = struct.unpack("<q", file.read(8))
        data = file.read(size * storage.dtype.itemsize)
        if size != storage.size or len(data) != size * storage.dtype.itemsize:
            raise WeightsError(f"storage {key} is truncated")
        storage.values = np.frombuffer(data, storage.dtype)
    return content


def _arrays(content: Any, done: dict[int, Any]) -> Any:
    """The same containers with arrays in place of tensors.

    done: what was made of each so far; a small file may hold one of them a million times.
    """
    if id(content) in done:
        return done[id(content)]
    if isinstance(content, Tensor):
        done[id(content)] = content.array()
        return done[id(content)]
    if isinstance(content, Mapping):
        done[id(content)] = {key: _arrays(value, done) for key, value in content.items()}
        return done[id(content)]
    if isinstance(content, list | tuple):
        done[id(content)] = [_arrays(value, done) for value in content]
        return done[id(content)]
    if content is None or isinstance(content, bool | int | float | str | bytes):
        return content
    raise WeightsError(f"it holds a {type(content).__name__}, which is neither a tensor nor a plain value")
