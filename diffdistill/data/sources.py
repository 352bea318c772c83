"""The front door of the data room: one function that opens any kind of source by name."""

import difflib
from collections.abc import Callable
from pathlib import Path

from diffdistill.data.contract import DataError, Source
from diffdistill.data.digits import digits


def _digits(path: str | None, split: str, image_size: int | None, channels: int | None) -> Source:
    del split  # one set, used whole
    if path is not None:
        raise DataError(f"the digits are part of the package, but path {path!r} was given; leave the path out")
    return digits()


SOURCES: dict[str, Callable[[str | None, str, int | None, int | None], Source]] = {
    "digits": _digits,
}


def open_source(
    *,
    source: str = "digits",
    path: str | Path | None = None,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
) -> Source:
    """Returns the source of that kind."""
    if source not in SOURCES:
        nearest = difflib.get_close_matches(source, SOURCES, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise DataError(f"unknown data source {source!r}, expected one of {', '.join(SOURCES)}{hint}")
    return SOURCES[source](None if path is None else str(path), split, image_size, channels)
