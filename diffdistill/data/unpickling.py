"""The unpickler under every reader of pickles here: it knows a few names and makes nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

NAMES_LIMIT = 200  # characters of a name that messages repeat


class Refused(ValueError):
    """A pickle asks for something that has no place in a file of numbers; the message says for what."""


class Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Unpickles by a table of names.

    It is the unpickler in Python, not that in C: the latter sets aside memory for whatever index a file names, so that
    a dozen bytes could fill a machine. Only instances of `stateful` are given a state; otherwise a file could change
    our own functions and classes, which outlive it.
    """

    known: Mapping[tuple[str, str], Any] = {}
    stateful: tuple[type, ...] = ()

    def __init__(self, file: BinaryIO, encoding: str = "utf-8") -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise Refused(f"names {f'{module}.{name}'[:NAMES_LIMIT]}, which has no place among numbers")
        return self.known[module, name]

    def load_build(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        if len(stack) < 2 or not isinstance(stack[-2], self.stateful):
            raise Refused("gives a state to something that has none")
        super().load_build()  # type: ignore[misc]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[attr-defined]
