"""Tables of names: one lookup, so that every unknown name ends in the same kind of message."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`; an unknown name is a ValueError that lists the known ones and the nearest.

    `what` is the noun of the message, for example "loss weight".
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), list(table), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}; known: {', '.join(table)}.{hint}")


def settings_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the keyword-only arguments of `function`, in order."""
    parameters = inspect.signature(function).parameters.items()
    return tuple(name for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def check_settings(function: Callable[..., Any], settings: Mapping[str, Any], what: str) -> None:
    """Refuses settings that `function` does not take as keyword-only arguments: a ValueError naming those it takes."""
    known = dict.fromkeys(settings_of(function))
    for name in settings:
        if not known:
            raise ValueError(f"{what} takes no settings, got {name!r}; leave it out")
        choose(known, name, f"setting of {what}")
