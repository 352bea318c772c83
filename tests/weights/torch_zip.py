"""Writes a state dict as torch.save does since 1.6, without torch."""

import io
import pathlib
import pickle
import zipfile

import numpy as np


class _Pickler(pickle._Pickler):
    """Names torch's functions without importing them."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Name):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, item):
        return item.pid if isinstance(item, _Storage) else None


class _Name:
    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self):
        """Callable, as pickle demands of what rebuilds an object."""


class _Storage:
    def __init__(self, key: str, size: int):
        self.pid = ("storage", _Name("torch", "FloatStorage"), key, "cpu", size)


class _Tensor:
    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array

    def __reduce__(self):
        strides = tuple(stride // self.array.itemsize for stride in self.array.strides)
        storage = _Storage(self.key, self.array.size)
        return _Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, self.array.shape, strides, False, {})


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    stream = io.BytesIO()
    _Pickler(stream, 2).dump({name: _Tensor(str(key), value) for key, (name, value) in enumerate(arrays.items())})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        for key, value in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", value.tobytes())
    return path
