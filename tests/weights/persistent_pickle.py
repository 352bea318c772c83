"""Writes pickles in the form of NVlabs/edm without torch: modules with their source, tensors as bytes within bytes."""

import io
import pickle
import struct
import sys
import types
from collections import OrderedDict

import numpy as np

SOURCE = "raise RuntimeError('the source inside a pickle was executed')"
MODULES = {
    "torch": ["FloatStorage"],
    "torch._utils": ["_rebuild_tensor_v2", "_rebuild_parameter"],
    "torch.storage": ["_load_from_bytes"],
    "torch.nn.modules.container": ["ModuleDict"],
    "torch_utils.persistence": ["_reconstruct_persistent_obj"],
}


class Call:
    """Pickled as a call of `function` with `arguments`, and whatever state it has."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class _Storage:
    def __init__(self, array):
        self.array = array


class _StoragePickler(pickle.Pickler):
    def persistent_id(self, item):
        if isinstance(item, _Storage):
            return ("storage", _name("torch", "FloatStorage"), "0", "cpu", item.array.size, None)
        return None


def _name(module: str, name: str):
    return getattr(sys.modules[module], name)


def storage_bytes(array: np.ndarray) -> bytes:
    """What torch.save wrote of a storage before it wrote zip files."""
    stream = io.BytesIO()
    for content in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, _Storage(array), ["0"]):
        _StoragePickler(stream, 2).dump(content)
    return stream.getvalue() + struct.pack("<q", array.size) + array.astype("<f4").tobytes()


def tensor(array: np.ndarray):
    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = Call(_name("torch.storage", "_load_from_bytes"), storage_bytes(array))
    rebuild = _name("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, 0, array.shape, strides, False, OrderedDict())


def persistent(class_name: str, **state):
    """An object of a class that carries its source."""
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}
    return Call(_name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def module(class_name: str, tensors: dict[str, np.ndarray], attributes: dict[str, dict], path: str = ""):
    """A torch module with everything below it; attributes: by the path of a module."""
    parameters, buffers, children = {}, {}, {}
    for name, array in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            children.setdefault(head, {})[rest] = array
        elif head in ("weight", "bias"):
            parameters[head] = Call(_name("torch._utils", "_rebuild_parameter"), tensor(array), False, OrderedDict())
        else:
            buffers[head] = tensor(array)
    modules = {
        name: module("Block", inner, attributes, f"{path}.{name}".strip(".")) for name, inner in children.items()
    }
    state = {"training": False, "_parameters": parameters, "_buffers": buffers, "_modules": modules}
    state |= attributes.get(path, {}) | {"scale": np.sqrt(0.5), "hooks": set()}
    if path in ("enc", "dec"):
        made = _name("torch.nn.modules.container", "ModuleDict").__new__(
            sys.modules["torch.nn.modules.container"].ModuleDict
        )
        made.__dict__.update(state)
        return made
    return persistent(class_name, **state)


def stand_ins(monkeypatch) -> None:
    """Modules of the names that the pickles hold, for as long as they are written."""
    # Parents first, as import demands.
    parents = {".".join(title.split(".")[:depth]): [] for title in MODULES for depth in range(1, title.count(".") + 1)}
    for title, names in {**parents, **MODULES}.items():
        stand_in = types.ModuleType(title)
        for name in names:
            known = type(name, (), {"__module__": title, "__qualname__": name})
            setattr(stand_in, name, known)
        monkeypatch.setitem(sys.modules, title, stand_in)
