"""Reads pickles of arrays (CIFAR-10, downsampled ImageNet, weights of JAX ports), executing nothing from them.

A pickle may name any function of any module. Here six names of NumPy and one of the codecs are known, each replaced by
an inert stand-in of our own; every other name is refused. NumPy itself never sees the pickled state, so a forged dtype
cannot make it touch wrong memory.
"""

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from diffdistill.data import unpickling
from diffdistill.data.contract import DataError

_KINDS = ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8")


class _Dtype:
    def __init__(self, kind: Any, *_: Any):
        kind = kind.decode() if isinstance(kind, bytes) else kind
        if not isinstance(kind, str) or kind not in _KINDS:
            raise DataError(f"the pickle holds an array of type {unpickling.shown(kind)}; plain numbers were expected")
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.order = ">" if order == ">" else "<"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.kind)


class _Array:
    def __init__(self) -> None:
        self.value: NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _frombuffer(content, dtype, shape, "F" if fortran else "C").value


class _Ndarray:
    """Named by pickles as the type to reconstruct; never made."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
        raise DataError("the pickle holds an array that is not plain numbers")
    array.value = np.frombuffer(content, dtype.numpy()).reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(dtype: Any, content: Any) -> Any:
    return _frombuffer(content, dtype, (), "C").value.item()


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise DataError(f"the pickle holds bytes in the encoding {unpickling.shown(encoding)}; latin1 was expected")
    return text.encode("latin1")


_KNOWN = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Ndarray,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Unpickler(unpickling.Unpickler):
    known = _KNOWN
    stateful = (_Dtype, _Array)


def load(file: BinaryIO, title: str) -> dict[str, Any]:
    """Returns the dict in a pickle: str keys; arrays, numbers, bytes, and lists and dicts of them as values.

    Args:
      file: an open pickle of Python 2 or 3.
      title: how messages call it.

    Raises:
      DataError: damaged, no dict, or naming anything but arrays of numbers.
    """
    try:
        content = _Unpickler(file, encoding="bytes").load()
        found = _plain(content, {})
    except unpickling.Refused as error:
        raise DataError(f"{title} is refused: the pickle {error}") from error
    except DataError as error:
        raise DataError(f"{title} is refused: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{title} is damaged or truncated ({unpickling.about(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{title} holds a {type(found).__name__}, expected a dict of images and labels")
    return found


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """The same containers with NumPy's arrays in place of our stand-ins, and text as keys.

    done: what was made of each container so far; a small file may hold one of them a million times.
    """
    if isinstance(value, _Array):
        return value.value
    if not isinstance(value, list | tuple | dict):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {
                key.decode("latin1") if isinstance(key, bytes) else str(key): _plain(v, done)
                for key, v in value.items()
            }
        else:
            done[id(value)] = type(value)(_plain(v, done) for v in value)
    return done[id(value)]
