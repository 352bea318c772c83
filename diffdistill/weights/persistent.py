"""Reads pickles of networks whose classes travel as source code (NVIDIA's torch_utils.persistence), running none of it.

Such a file says "rebuild an object of class X, whose module has this source, from this state"; unpickled in the normal
way it runs that source. Here the object becomes a record of its class name and state, the few names that rebuild
tensors are known (weights.torch_file), and any other name is refused before anything it could do.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from diffdistill.data import unpickling
from diffdistill.weights import WeightsError, torch_file

_STEPS = 64  # of each pickle within a block of numbers, which describes a single storage


class Record:
    """Stands for an object: the name of its class and its attributes, both as the file says."""

    # Of the class, for objects that a file makes and leaves without a state.
    class_name: str = ""
    state: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, class_name: str, state: Mapping[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, Mapping):
            raise WeightsError("it gives an object a state that is no dict")
        self.class_name, self.state = type(self).__name__, state

    def attribute(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """An attribute of the given type; WeightsError where it is absent or of another one."""
        value = self.state.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise WeightsError(
                f"its {self.class_name} has {name}={unpickling.shown(value)}, which was not expected there"
            )
        return value

    def entries(self, name: str) -> Mapping[str, Any]:
        """The dict that an attribute is; empty where it is absent or something else."""
        value = self.state.get(name)
        return value if isinstance(value, Mapping) else {}

    def child(self, name: str) -> Record:
        """The submodule of that name; WeightsError where there is none."""
        found = self.entries("_modules").get(name)
        if not isinstance(found, Record):
            raise WeightsError(f"its {self.class_name} has no submodule {name!r}")
        return found

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All parameters and buffers below this module by their names in torch, such as "enc.32x32_conv.weight".

        Raises WeightsError where a module stands in two places: a small file could name millions of them so.
        """
        return self._tensors("", set())

    def _tensors(self, prefix: str, seen: set[int]) -> dict[str, NDArray[Any]]:
        if id(self) in seen:
            raise WeightsError(f"its module {prefix.rstrip('.')} stands in another place too")
        seen.add(id(self))
        found: dict[str, NDArray[Any]] = {}
        for kind in ("_parameters", "_buffers"):
            for name, value in self.entries(kind).items():
                if isinstance(value, torch_file.Tensor):
                    found[prefix + name] = value.array()
                elif value is not None:
                    raise WeightsError(f"its {prefix}{name} is no tensor")
        for name, module in self.entries("_modules").items():
            if isinstance(module, Record):
                found |= module._tensors(f"{prefix}{name}.", seen)
        return found


class _Number(Record):
    """Stands for a number of NumPy or its type; what it is does not matter here."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(meta: Any) -> Record:
    if not isinstance(meta, Mapping) or not isinstance(meta.get("state"), Mapping):
        raise WeightsError("it describes an object by something that is not its class and state")
    name = meta.get("class_name")
    return Record(name[: unpickling.NAMES_LIMIT] if isinstance(name, str) else "", meta["state"])


def _load_from_bytes(content: Any) -> Any:
    if not isinstance(content, bytes | bytearray):
        raise WeightsError("a block of numbers is not given as bytes")
    return torch_file.read_stream(io.BytesIO(content), _STEPS)


_KNOWN: dict[tuple[str, str], Any] = {
    **{name: stand_in for name, stand_in in torch_file.KNOWN.items() if name[0] in ("collections", "torch._utils")},
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _reconstruct,
    ("dnnlib.util", "EasyDict"): torch_file.Pairs,
    ("numpy", "dtype"): _Number,
    ("numpy.core.multiarray", "scalar"): _Number,
    ("numpy._core.multiarray", "scalar"): _Number,
    **{
        ("torch.nn.modules.container", name): type(name, (Record,), {})
        for name in ("ModuleDict", "ModuleList", "Sequential")
    },
}


class _Unpickler(unpickling.Unpickler):
    known = _KNOWN
    stateful = (Record, OrderedDict)


def read(path: Path) -> dict[str, Any]:
    """The dict in a pickle, with a Record in place of each object.

    Raises:
      WeightsError: no such file, damaged, no dict, or naming anything but modules and tensors.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
    except unpickling.Refused as error:
        raise WeightsError(f"{path} is refused: it {error}.") from error
    except WeightsError as error:
        raise WeightsError(f"{path} is refused: {error}.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise WeightsError(f"{path} is damaged or truncated ({unpickling.about(error)}).") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}; a dict with the entry 'ema' was expected.")
    return content
