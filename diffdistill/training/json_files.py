"""JSON from files that others may have written: an object of moderate depth, or a ValueError that says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_DEEPEST = 100  # levels: what is deeper could not even be shown in a message


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file holds anything else, such as a list, a damaged object or bytes that are no UTF-8.
      OSError: it cannot be read.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device, which need not end
        raise ValueError("it is no file")
    return parse_object(path.read_bytes())


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is; ValueError for any other text."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is not a JSON object, but of type {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inside(each)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _inside(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value
