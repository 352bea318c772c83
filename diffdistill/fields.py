"""Nested frozen dataclasses from plain values, with errors that name the field: the machinery below config.py."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

_SHOWN = 200  # letters of a value in a message


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which field, what it holds and what is possible."""


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "config") -> list[str]:
    """Lines "field: value of one -> value of other" for every leaf in which two nested configs differ."""
    lines = []
    for name in sorted({*one, *other}):
        a, b, where = one.get(name), other.get(name), f"{prefix}.{name}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, where)
        elif a != b:
            lines.append(f"{where}: {a!r} -> {b!r}")
    return lines


def shown(value: Any) -> str:
    """A value as a message shows it: in part where it is long."""
    try:
        text = repr(value)
    except ValueError:  # of Python, for thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_of(where: str, value: str, known: list[str]) -> None:
    """Refuses a value that is not among the known names: ConfigError with the nearest."""
    if value not in known:
        raise ConfigError(
            f"{where} is {shown(value)}, which is not known.{nearest(value, known)} Known: {', '.join(known)}."
        )


def nearest(name: str, known: list[str]) -> str:
    """A sentence that proposes the known name most like `name`; empty where none is alike."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def build(cls: Any, settings: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from nested mappings; ConfigError for unknown fields and wrong types."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where} is {shown(settings)}, but must be a group of fields: {', '.join(names(cls))}.")
    values = {}
    for name, value in settings.items():
        kind = kind_of(cls, str(name), where)
        inner = f"{where}.{name}"
        values[name] = (build if dataclasses.is_dataclass(kind) else leaf)(kind, value, inner)
    return cls(**values)


def kind_of(cls: Any, name: str, where: str) -> Any:
    """The type of a field; ConfigError with the nearest name where there is none."""
    hints = _hints(cls)
    if name not in hints:
        raise ConfigError(
            f"{where}.{name} is not a field.{nearest(name, names(cls))} "
            f"The fields of {where} are: {', '.join(names(cls))}."
        )
    return hints[name]


# Asked once for every field of every config, and slow.
_hints = functools.cache(get_type_hints)


def names(cls: Any) -> list[str]:
    """The names of a dataclass's fields."""
    return [item.name for item in dataclasses.fields(cls)]


_EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[int, ...]: "a list of whole numbers, such as (1, 2)",
    tuple[float, ...]: "a list of numbers, such as (1, 2)",
    tuple[str, ...]: "a list of names, such as ('a', 'b')",
}


def expected(kind: Any) -> str:
    """What a value of this type looks like, in words."""
    if dataclasses.is_dataclass(kind):
        return f"a group of fields: {', '.join(names(kind))}"
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else _EXPECTED[kind]


def leaf(kind: Any, value: Any, where: str) -> Any:
    """A single checked value: whole numbers pass as numbers, lists as tuples; ConfigError for any other type."""
    if get_origin(kind) is tuple and isinstance(value, tuple | list):
        return tuple(leaf(get_args(kind)[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if get_origin(kind) is Literal:
        fits = value in get_args(kind)
    elif kind in (int, float):
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    else:
        fits = kind in (bool, str) and isinstance(value, kind)
    if not fits:
        raise ConfigError(f"{where} is {shown(value)} ({type(value).__name__}), but must be {expected(kind)}.")
    if kind is not float:
        return value
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where} is {shown(value)}, which is too large for a number.") from None
