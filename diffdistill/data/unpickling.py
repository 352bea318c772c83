"""The unpickler under every reader of pickles here: it knows a few names and makes nothing else."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

NAMES_LIMIT = 200  # characters of a name or a text that messages repeat
OPERATIONS = 1 << 21  # of one pickle: a single byte may make an object of 200
_REPEATED = 1 << 16  # how much functions may be given, beyond twice the size of the file
_SIZED = (str, bytes, bytearray, list, tuple, dict)
# Where operations find the keys of dicts and sets on the stack.
_KEYS: dict[int, Callable[[list[Any]], list[Any]]] = {
    pickle.SETITEM[0]: lambda stack: stack[-2:-1],
    pickle.SETITEMS[0]: lambda stack: stack[::2],
    pickle.DICT[0]: lambda stack: stack[::2],
    pickle.ADDITEMS[0]: lambda stack: stack,
    pickle.FROZENSET[0]: lambda stack: stack,
}


class Refused(ValueError):
    """A pickle asks for something that has no place in a file of numbers; the message says for what."""


def check_keys(keys: Iterable[Any]) -> None:
    """Refuses keys other than text and numbers: the hash of a deep tuple takes for ever."""
    for key in keys:
        # Of larger whole numbers, any number have the same hash.
        if not isinstance(key, str | bytes | int) or (isinstance(key, int) and abs(key) >= 1 << 60):
            raise Refused(f"has a key of type {type(key).__name__} that is neither text nor a number of 60 bits")


def shown(value: Any) -> str:
    """A value from a file in a message: itself where it is plain, else its type, as a nest may have no end."""
    if isinstance(value, str | bytes):
        return repr(value[:NAMES_LIMIT])
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    return f"a {type(value).__name__}"


def about(error: Exception) -> str:
    """An exception in a message: its type and how its text begins."""
    return f"{type(error).__name__}: {error}"[:NAMES_LIMIT]


def _checked(code: int, load: Callable[[Any], None]) -> Callable[[Any], None]:
    """An operation that is counted, and whose keys are checked."""
    keys = _KEYS.get(code)

    def checked(self: Any) -> None:
        self.count()
        if keys:
            check_keys(keys(self.stack))
        load(self)

    return checked


class Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Unpickles by a table of names.

    It is the unpickler in Python, not that in C: the latter sets aside memory for whatever index a file names, so that
    a dozen bytes could fill a machine. Only instances of `stateful` are given a state; otherwise a file could change
    our own functions and classes, which outlive it. Operations are counted, and so is what functions are given: a file
    may name one long text a million times.
    """

    known: Mapping[tuple[str, str], Any] = {}
    stateful: tuple[type, ...] = ()

    def __init__(self, file: BinaryIO, encoding: str = "utf-8", operations: int = OPERATIONS) -> None:
        super().__init__(file, encoding=encoding)
        self._tell, self._start = file.tell, file.tell()
        self._operations, self._left, self._given = operations, operations, 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise Refused(f"names {f'{module}.{name}'[:NAMES_LIMIT]}, which has no place among numbers")
        return self.known[module, name]

    def load_build(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        if len(stack) < 2 or not isinstance(stack[-2], self.stateful):
            raise Refused("gives a state to something that has none")
        super().load_build()  # type: ignore[misc]

    def load_reduce(self) -> None:
        self._check_arguments()
        super().load_reduce()  # type: ignore[misc]

    def load_newobj(self) -> None:
        self._check_arguments()
        super().load_newobj()  # type: ignore[misc]

    def load_bytearray8(self) -> None:
        # pickle's own fills as much memory as the file names before it reads.
        (size,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(size)))  # type: ignore[attr-defined]

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Refused(f"has more than {self._operations} steps, which no file of numbers needs")

    def refuse(self) -> None:
        raise Refused("makes an object in a way that files of numbers never do")

    def _check_arguments(self) -> None:
        arguments: Any = self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(arguments, tuple):
            raise Refused("calls something with arguments that are no tuple")
        self._given += len(arguments) + sum(len(value) for value in arguments if isinstance(value, _SIZED))
        if self._given > 2 * (self._tell() - self._start) + _REPEATED:
            raise Refused("repeats a part of itself so often that it would fill the memory")

    dispatch: dict[int, Any] = {  # type: ignore[assignment]
        code: _checked(code, load)
        for code, load in {
            **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
            pickle.BUILD[0]: load_build,
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.BYTEARRAY8[0]: load_bytearray8,
            **dict.fromkeys((pickle.OBJ[0], pickle.INST[0], pickle.NEWOBJ_EX[0]), refuse),
        }.items()
    }
